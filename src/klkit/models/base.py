"""What klkit needs of a language model: a vocabulary, a trunk, and a read-out.

A model is split where its memory is smallest. The *trunk* (``encode``, ``begin``, ``advance``) turns
contexts into one narrow vector a decision: a hidden state, or the state of an automaton. The
*read-out* turns such vectors into log-probabilities over the whole vocabulary, a few rows at a time.
Keeping the narrow vectors is how p is run once and read twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from klkit.divergences.linear import Head
from klkit.numerics import rows_per_chunk, wide_dtype
from klkit.sequences import Content, Sequences


class VocabularyMismatch(ValueError):
    """Two models do not choose from the same tokens, so a token-level divergence is undefined."""


class NotTractable(TypeError):
    """An exact answer was asked of a model for which none is computable."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens a model chooses from, by id, and which of them end a response.

    Attributes:
        tokens: the string of each token; ids that no tokenizer defines hold ``None``.
        ends: ids that end a response.
    """

    tokens: tuple[str | None, ...]
    ends: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of ids, unused ones included."""
        return len(self.tokens)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the token strings in id order: equal exactly when ids mean the same tokens."""
        digest = hashlib.sha256()
        for token in self.tokens:
            digest.update(b"\xff" if token is None else token.encode("utf-8", "surrogatepass"))
            digest.update(b"\x00\xff")
        return digest.hexdigest()[:16]


@runtime_checkable
class Named(Protocol):
    """What a result needs of a model once all is computed: what to call it, and how it spells its tokens."""

    @property
    def name(self) -> str:
        """What reports call the model."""
        ...

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Each token as text that a person can read."""
        ...


@runtime_checkable
class LanguageModel(Protocol):
    """The contract of every model, neural or exact; ``klkit.models.laws`` checks it on any adapter.

    The first five members are plain attributes or properties; nothing here assigns to them.
    """

    @property
    def name(self) -> str:
        """What reports call the model."""
        ...

    @property
    def vocabulary(self) -> Vocabulary:
        """What it chooses from."""
        ...

    @property
    def window(self) -> int | None:
        """Longest context plus completion it can read, or None."""
        ...

    @property
    def width(self) -> int:
        """Values a decision's trunk vector holds."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Precision of its logits: below fp32 nothing is reproducible across batch shapes."""
        ...

    def context(self, prompt: Content | None) -> Int[Tensor, " c"]:
        """Token ids the model reads before it responds to ``prompt``; None is the empty prompt."""
        ...

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Each token as text that a person can read."""
        ...

    def encode(self, x: Sequences) -> Float[Tensor, "m d"]:
        """Trunk vectors of every decision of a batch of given strings (teacher forcing)."""
        ...

    def readout(self, h: Float[Tensor, "m d"]) -> Float[Tensor, "m v"]:
        """Normalised log-probabilities (nats, at least fp32) that trunk vectors stand for."""
        ...

    def begin(self, contexts: Sequence[Int[Tensor, " _c"]]) -> tuple[Any, Float[Tensor, "b d"]]:
        """Read contexts of any lengths; return a state and the trunk vector of the first decision."""
        ...

    def advance(self, state: Any, tokens: Int[Tensor, " b"]) -> tuple[Any, Float[Tensor, "b d"]]:
        """Append one token to every row; the old state must not be used again."""
        ...

    def select(self, state: Any, rows: Int[Tensor, " k"]) -> Any:
        """The state of the given rows only: how finished strings leave the batch."""
        ...

    def embedding(self) -> Float[Tensor, "v e"] | None:
        """One vector a token, from which control variates take next-token features; or None."""
        ...


@runtime_checkable
class HasHead(Protocol):
    """What a model may offer beyond the contract: its read-out as a linear map, for those who want raw logits.

    Logits are read into a buffer that is used again, and gradients go through the map without the
    logits of a whole batch ever existing. ``log_softmax(head.logits(h))`` must be ``readout(h)``.
    """

    def head(self) -> Head | None:
        """The map from trunk vectors to logits, or None where the read-out is no such map."""
        ...


def head_of(model: LanguageModel) -> Head | None:
    """The output head of ``model``, or None where it has none to hand over.

    Example:
        >>> from klkit.models.automaton import coin
        >>> head_of(coin(end=0.5)) is None
        True
    """
    return model.head() if isinstance(model, HasHead) else None


CHUNKS_A_READOUT = 16
"""Chunks whose rows are read out together: a head's weights are streamed once a product, however few the rows."""


def read_rows(
    model: LanguageModel, hidden: Float[Tensor, "m d"], *, rows: int | None = None
) -> Iterator[Float[Tensor, "_c v"]]:
    """Log-probabilities of trunk vectors in chunks of ``rows``: by default as many as stay in a core's cache.

    Shapes: chunks ``(c, v)`` whose ``c`` sum to ``m``; nats.
    """
    size = rows or rows_per_chunk(model.vocabulary.size)
    for block in torch.split(hidden, CHUNKS_A_READOUT * size):
        yield from torch.split(model.readout(block), size)


def read_logits(
    model: LanguageModel, hidden: Float[Tensor, "m d"], *, rows: int | None = None
) -> Iterator[Float[Tensor, "_c v"]]:
    """Logits of trunk vectors in chunks of ``rows``, normalised or not, all in one buffer.

    Every chunk overwrites the one before: be done with it, or copy it, before asking for the next; it may be
    written to. A model without a head gives the log-probabilities of its read-out, in tensors of their own.

    Shapes: chunks ``(c, v)`` whose ``c`` sum to ``m``; at least fp32; ``-inf`` at excluded tokens.

    Args:
        rows: rows a chunk; by default as many as stay in a core's cache.
    """
    head, size = head_of(model), model.vocabulary.size
    rows = rows or rows_per_chunk(size)
    if head is None:
        yield from read_rows(model, hidden, rows=rows)
        return
    # Several chunks a product, but no more room than that of the default.
    together = rows * max(1, CHUNKS_A_READOUT * rows_per_chunk(size) // rows)
    dtype = wide_dtype(hidden, head.weight)
    buffer = torch.empty(min(together, len(hidden)), size, dtype=dtype, device=head.weight.device)
    for block in torch.split(hidden, together):
        yield from torch.split(head.logits(block, out=buffer[: len(block)]), rows)


def log_probs(model: LanguageModel, x: Sequences, *, rows: int | None = None) -> Iterator[Float[Tensor, "c v"]]:
    """Log-probabilities at every decision of the strings ``x``, in chunks of ``rows`` decisions.

    ``x`` is one batch: the trunk runs on it whole, the read-out on a cache-sized chunk at a time.

    Shapes: chunks ``(c, v)`` whose ``c`` sum to ``x.decisions``; nats.
    """
    yield from read_rows(model, model.encode(x), rows=rows)
