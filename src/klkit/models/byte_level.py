"""A model of tokens as a model of bytes: two models with different tokenizers over one vocabulary of 257 symbols.

Each model gives a text the sum of the probabilities of all its tokenisations. The law of the next byte given the
bytes so far is a ratio of such sums, so a byte-level model is a language model like any other, and every estimator
measures the divergence between the laws of texts with it, in nats per response and per byte.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from klkit.models.base import LanguageModel, Vocabulary
from klkit.models.byte_contexts import Contexts, Tokens
from klkit.models.byte_trie import Array
from klkit.models.hypotheses import (
    END,
    SYMBOLS,
    Fresh,
    Hypothesis,
    Law,
    Ledger,
    Reading,
    after,
    at_boundary,
    heaviest,
)
from klkit.models.text_laws import TextLaws
from klkit.models.wrap import innermost, model_digest
from klkit.sequences import Content, Sequences

BYTES = Vocabulary((*(f"<0x{byte:02X}>" for byte in range(END)), "<end>"), (END,))
"""The vocabulary of every byte-level model."""
MOST = 20_000  # hypotheses of one text that exact sums may come to

Row = tuple[Tokens, Reading]
"""The token context of a prompt, and the hypotheses about the bytes behind it."""


@dataclass(frozen=True, eq=False)
class ByteLevel:
    """A model over 256 bytes and an end symbol: the law of the texts that a token-level model writes.

    ``P(b | bytes) = Σ P(tokens) / P(bytes)`` over all token strings that spell these bytes and then ``b``. A trunk
    vector is the row of log-probabilities itself. The state of strings that are drawn is their hypotheses about the
    tokens (:mod:`klkit.models.hypotheses`).

    A context is an end symbol, and for a prompt its bytes and another end symbol: what follows the last one belongs
    to the response. The prompt is read as the token-level model reads it, by its tokenizer and its template; only
    the response is summed over its tokenisations. The text of a conversation is that of the filled-in template, and
    which tokens it stood for is remembered by the object that was asked for its context.

    With a beam, a choice between two hypotheses of nearly the same mass may fall otherwise in another batch shape;
    what that changes is of the size of the mass that is dropped.

    Attributes:
        tokenwise: the token-level model.
        beam: hypotheses kept at each byte; None keeps all, which is exact.
        least: share of the mass below which a hypothesis is dropped.
        ledger: what it has cost, and what was left out, so far.
    """

    tokenwise: LanguageModel
    beam: int | None
    least: float
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def name(self) -> str:
        """The token-level model's name, marked."""
        return f"{self.tokenwise.name}|bytes"

    @property
    def vocabulary(self) -> Vocabulary:
        """256 bytes and the end symbol."""
        return BYTES

    @property
    def window(self) -> int | None:
        """The token-level model's, since every byte may be a token of its own."""
        return self.tokenwise.window

    @property
    def width(self) -> int:
        """257: a trunk vector is a row of log-probabilities."""
        return SYMBOLS

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the token-level model, whose rounding the sums inherit; rows are at least in fp32."""
        return self.tokenwise.dtype

    @property
    def digest(self) -> str:
        """The digest or name of the token-level model, and what was done to it; not which tokenisations are kept."""
        return model_digest(self.tokenwise)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the numbers should know: those of the token-level model, and what was left out."""
        kept = "all tokenisations of a text are summed"
        if self.beam is not None or self.least:
            limits = [f"the {self.beam} heaviest hypotheses"] if self.beam is not None else []
            limits += [f"those above {self.least:g} of the mass"] if self.least else []
            kept = f"approximate: of the tokenisations of a text {' and '.join(limits)} are kept at every byte"
        size, silent = self.tokenwise.vocabulary.size, len(self._laws.silent)
        return (
            *getattr(innermost(self.tokenwise), "notes", ()),
            kept,
            f"{silent} of {size} tokens stand for no text (special or unused): left out of every choice of a token",
        )

    def context(self, prompt: Content | None) -> Int[Tensor, " c"]:
        """The end symbol, and the prompt's bytes between two of them; ids are taken to be bytes.

        Raises:
            ValueError: ids that are no bytes, or a prompt whose text another prompt with other tokens has.
        """
        return self._contexts.ids(prompt)

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Each byte as text; those that are no character by themselves are escaped."""
        return ["<end>" if symbol == END else bytes([symbol]).decode(errors="backslashreplace") for symbol in tokens]

    def encode(self, x: Sequences) -> Float[Tensor, "m 257"]:
        """Log-probabilities at every decision of given strings, byte by byte, all strings together."""
        rows = self._begin([x.context(i) for i in range(len(x))])
        completions = [x.completion(i).tolist() for i in range(len(x))]
        found: list[list[Array]] = [[] for _ in completions]
        live, step = [i for i, completion in enumerate(completions) if completion], 0
        rows = [rows[i] for i in live]
        while live:
            for i, (_, reading) in zip(live, rows, strict=True):
                found[i].append(reading.row())
            step += 1
            stay = [place for place, i in enumerate(live) if len(completions[i]) > step]
            live = [live[place] for place in stay]
            rows = self._advance([rows[place] for place in stay], [completions[i][step - 1] for i in live])
        return self._trunk([row for several in found for row in several])

    def readout(self, h: Float[Tensor, "m 257"]) -> Float[Tensor, "m 257"]:
        """The rows, which are normalised; a copy, since readers of log-probabilities may write to theirs."""
        return h.clone()

    def begin(self, contexts: Sequence[Int[Tensor, " _c"]]) -> tuple[list[Row], Float[Tensor, "b 257"]]:
        """Read contexts of any lengths.

        Raises:
            ValueError: a context that does not begin with the end symbol, or is too long for the token-level model.
        """
        rows = self._begin(contexts)
        return rows, self._trunk([reading.row() for _, reading in rows])

    def advance(self, state: list[Row], tokens: Int[Tensor, " b"]) -> tuple[list[Row], Float[Tensor, "b 257"]]:
        """Append one byte to every row.

        Raises:
            ValueError: the end symbol, behind which there is no next byte; more than ``MOST`` hypotheses without a
                beam; or a text too long for the token-level model.
        """
        rows = self._advance(state, tokens.tolist())
        return rows, self._trunk([reading.row() for _, reading in rows])

    def select(self, state: list[Row], rows: Int[Tensor, " k"]) -> list[Row]:
        """The state of the given rows."""
        return [state[i] for i in rows.tolist()]

    def embedding(self) -> Float[Tensor, "257 257"]:
        """One indicator a symbol."""
        return torch.eye(SYMBOLS, dtype=self._wide)

    # Readings

    def _begin(self, contexts: Sequence[Tensor]) -> list[Row]:
        began = time.perf_counter()
        split = [self._contexts.split(context.tolist()) for context in contexts]
        prompts = [self._contexts.tokens(prompt) for prompt, _ in split]
        laws = self._after(prompts)
        rows = [(p, Reading((at_boundary(self._laws.trie, Fresh((), 0.0), laws[p]),))) for p in prompts]
        self.ledger.add([reading for _, reading in rows], time.perf_counter() - began)
        for step in range(max((len(response) for _, response in split), default=0)):
            longer = [i for i, (_, response) in enumerate(split) if len(response) > step]
            fed = self._advance([rows[i] for i in longer], [split[i][1][step] for i in longer])
            for i, row in zip(longer, fed, strict=True):
                rows[i] = row
        return rows

    def _advance(self, rows: Sequence[Row], symbols: Sequence[int]) -> list[Row]:
        began = time.perf_counter()
        if any(not 0 <= symbol < END for symbol in symbols):
            raise ValueError(
                f"expected bytes from 0 to 255 in unfinished responses, got {[s for s in symbols if s >= END][:1]}; "
                f"a response that has ended (symbol {END}) has no next decision"
            )
        kept: list[tuple[Tokens, list[Hypothesis | Fresh], float]] = []
        for (prompt, reading), symbol in zip(rows, symbols, strict=True):
            inside, fresh = after(self._laws.trie, reading, symbol)
            several: list[Hypothesis | Fresh] = [*inside, *fresh]
            boundary = [False] * len(inside) + [True] * len(fresh)
            masses = np.array([h.mass for h in several])
            chosen, dropped = heaviest(masses, boundary, beam=self.beam, least=self.least)
            if self.beam is None and len(chosen) > MOST:
                raise ValueError(
                    f"expected texts with at most {MOST} tokenisations for exact sums, got one with more, whose number "
                    f"grows exponentially with its length; pass a beam, such as beam=8, or use shorter responses"
                )
            kept.append((prompt, [several[i] for i in chosen], dropped))
        laws = self._after([p + h.tokens for p, several, _ in kept for h in several if isinstance(h, Fresh)])
        found = []
        for prompt, chosen_ones, dropped in kept:
            whole = tuple(
                at_boundary(self._laws.trie, h, laws[prompt + h.tokens]) if isinstance(h, Fresh) else h
                for h in chosen_ones
            )
            found.append((prompt, Reading(whole, dropped)))
        self.ledger.add([reading for _, reading in found], time.perf_counter() - began)
        return found

    def _after(self, contexts: Sequence[Tokens]) -> dict[Tokens, Law]:
        laws = self._laws.after(contexts)
        self.ledger.laws += len(laws)
        return laws

    @cached_property
    def _contexts(self) -> Contexts:
        return Contexts(self.tokenwise)

    @cached_property
    def _laws(self) -> TextLaws:
        return TextLaws(self.tokenwise)

    @property
    def _wide(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def _trunk(self, rows: Sequence[Array]) -> Float[Tensor, "m 257"]:
        block = np.stack(rows) if len(rows) else np.zeros((0, SYMBOLS))
        return torch.from_numpy(block).to(self._wide)


def byte_level(model: LanguageModel, *, beam: int | None = None, least: float = 0.0) -> ByteLevel:
    """``P(b | bytes) = Σ_tokens P(tokens) 1[they spell bytes, then b] / Σ_tokens P(tokens) 1[they spell bytes]``.

    The token-level model with its tokenisations summed out, over 256 bytes and an end symbol: the same vocabulary
    for every tokenizer. Without a beam the sums are exact, and their number of terms grows exponentially with the
    response; with one, the heaviest terms are kept, and ``ledger`` says what was dropped. The law is conditional, at
    every choice of a token, on tokens that stand for text or end it.

    Args:
        beam: hypotheses to keep at each byte, and the heaviest one that is at the end of a token; None for all.
        least: share of the mass below which a hypothesis is dropped as well.

    Raises:
        ValueError: a beam below 1, or a share outside [0, 1).
        VocabularyMismatch: a model whose tokens do not stand for bytes, see
            :func:`klkit.models.token_bytes.token_bytes`.

    Source: T. Vieira, B. LeBrun, M. Giulianelli, J. L. Gastaldi, B. DuSell, J. Terilla, T. J. O'Donnell and
    R. Cotterell (2024), From Language Models over Tokens to Language Models over Characters, arXiv 2412.03719.

    Example:
        >>> import torch
        >>> from klkit.models.automaton import automaton
        >>> table = torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64)
        >>> p = byte_level(automaton(table, torch.zeros(1, 2, dtype=torch.long), symbols=["a", "ab"]))
        >>> state, row = p.begin([p.context(None)])
        >>> [round(float(row[0, i].exp()), 4) for i in (97, 98, 256)]
        [0.5, 0.0, 0.5]
        >>> state, row = p.advance(state, torch.tensor([97]))  # half of the time the b is still to come
        >>> [round(float(row[0, i].exp()), 4) for i in (97, 98, 256)]
        [0.25, 0.5, 0.25]
    """
    if (beam is not None and beam < 1) or not 0 <= least < 1:
        raise ValueError(f"expected a beam of at least 1 and a share in [0, 1), got {beam} and {least}; leave them out")
    found = ByteLevel(model, beam, least)
    _ = found._laws  # what cannot be spelt in bytes is refused now
    return found
