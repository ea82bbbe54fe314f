"""Texts as a model's own tokenizer writes them, and what a model makes of texts that are written so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from klkit.models.base import LanguageModel, VocabularyMismatch, read_rows
from klkit.models.token_bytes import token_bytes, tokenizer_of
from klkit.sequences import Sequences

Canonical = Callable[[str], list[int] | None]
"""From a text to the ids of its canonical tokenisation; None where there is none that spells it."""


def canonical(model: LanguageModel) -> Canonical:
    """A function from a text to the tokens that the model's tokenizer writes it in, special tokens left out.

    Texts are what stands behind a context, not what begins a document: where a tokenizer puts a space before every
    text (SentencePiece), that space has to be the text's own. None is returned for a text that the tokenizer changes,
    by its normalisation say: no tokens of its making spell it. The text of a special token is ordinary text.

    Raises:
        VocabularyMismatch: a model without a tokenizer, or whose tokens do not stand for bytes, see
            :func:`klkit.models.token_bytes.token_bytes`.

    Source: the words are those of R. L. Geh, H. Zhang, K. Ahmed, B. Wang and G. Van den Broeck (2024), Where is the
    signal in tokenization space?, arXiv 2408.08541.
    """
    tokenizer = tokenizer_of(model)
    if tokenizer is None:
        raise VocabularyMismatch(
            f"expected a model with a tokenizer, got {model.name} without: nothing says in which tokens it would write "
            f"a text; compare models that have one"
        )
    spelt, size = token_bytes(model), model.vocabulary.size

    def ids_of(text: str) -> list[int]:
        made = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        found: list[int] = made["input_ids"]
        return found

    newline = ids_of("\n")

    def candidates(text: str) -> Iterator[list[int]]:
        yield ids_of(text)
        if text.startswith(" "):
            yield ids_of(text[1:])  # the space that the tokenizer puts there is this one
        yield behind(newline, ids_of("\n" + text))  # where a line has ended, nothing is put before what follows

    def write(text: str) -> list[int] | None:
        wanted = text.encode()
        for ids in candidates(text):
            if all(i < size for i in ids) and b"".join(spelt[i] or b"" for i in ids) == wanted:
                return ids
        return None

    return write


def behind(start: Sequence[int], ids: Sequence[int]) -> list[int]:
    """What follows ``start`` in ``ids``; nothing if they begin otherwise.

    Example:
        >>> behind([1], [1, 5, 6]), behind([1], [5, 6])
        ([5, 6], [])
    """
    return list(ids[len(start) :]) if list(ids[: len(start)]) == list(start) else []


@torch.no_grad()
def log_texts(model: LanguageModel, x: Sequences) -> Float[Tensor, " n"]:
    """``log p(y) = Σ_n log p(y_n | y_<n)`` of given strings, where every end token stands for all of them, ``(n,)``.

    In nats and double precision; the strings are one batch.

    Example:
        >>> from klkit.models.automaton import coin
        >>> p = coin(end=0.5)
        >>> x = Sequences.pack([p.context(None)], [torch.tensor([0, 0, 1])])
        >>> log_texts(p, x).exp().round(decimals=6).tolist()
        [0.125]
    """
    return read_texts(model, model.encode(x), x)


@torch.no_grad()
def read_texts(model: LanguageModel, hidden: Float[Tensor, "m d"], x: Sequences) -> Float[Tensor, " n"]:
    """The same from trunk vectors that are there already, ``(m, d)`` to ``(n,)``."""
    targets, ends = x.targets(), torch.tensor(model.vocabulary.ends)
    found, place = [], 0
    for rows in read_rows(model, hidden):
        here = targets[place : place + len(rows)]
        logp = rows.gather(1, here[:, None].to(rows.device))[:, 0].double().cpu()
        over = torch.isin(here, ends)
        if bool(over.any()):
            block = rows[over.to(rows.device)][:, ends.to(rows.device)]
            logp[over] = block.double().logsumexp(1).cpu()
        found.append(logp)
        place += len(rows)
    total = torch.zeros(len(x), dtype=torch.float64)
    return total.index_add_(0, x.row(), torch.cat(found)) if found else total
