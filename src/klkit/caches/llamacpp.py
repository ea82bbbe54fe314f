"""Files of base logits that ``llama-perplexity --kl-divergence-base`` writes, and how they are read.

    8 bytes       ``_logits_``
    3 int32       tokens a window ``n``, size of the vocabulary ``v``, windows ``w``
    w·n int32     ids of the text
    w·(n-1-n//2)  records of 2·ceil(v/2)+4 uint16: fp32 step, fp32 lowest log-probability, and a code for each id

All of it is little-endian. A window is scored in its second half: from the token after the one at ``n//2``. The
log-probability of an id is ``step·code + lowest``. A law is cut 16 nats below its likeliest token: whatever lies lower
has code 0, and no other trace. A model that begins texts with a token of its own reads that token instead of the first
one of every window, of which the file says nothing.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from klkit.caches.shards import CacheError
from klkit.models.base import LanguageModel, Vocabulary, VocabularyMismatch
from klkit.models.token_bytes import tokenizer_of
from klkit.sequences import Sequences

MAGIC = b"_logits_"
HEADER = struct.Struct("<8s3i")
DEPTH = np.float32(16.0)
"""Nats below the likeliest token at which a law is cut."""
CODES = np.float32(65535.0)
"""The code of the likeliest token."""
FLOOR_STEP = float(DEPTH / CODES) * (1 - 5e-4)
"""Steps from this one on belong to laws that were cut: 16 nats in single precision, at logits of any usual size."""


@dataclass(frozen=True, slots=True)
class StoredLaws:
    """Next-token laws as a file holds them.

    Attributes:
        logp: log-probabilities, not quite normalised, ``(m, v)``; nats, fp32.
        floored: tokens of which the file says only that they are no likelier than ``lowest``, ``(m, v)``.
        step: distance of two codes, ``(m,)``, nats: a stored value is off by half of it at most.
        lowest: the log-probability that code 0 stands for, ``(m,)``.
    """

    logp: Float[Tensor, "m v"]
    floored: Bool[Tensor, "m v"]
    step: Float[Tensor, " m"]
    lowest: Float[Tensor, " m"]

    def to(self, device: torch.device) -> StoredLaws:
        """The same on another device."""
        return StoredLaws(*(x.to(device) for x in (self.logp, self.floored, self.step, self.lowest)))


@dataclass(frozen=True, eq=False, slots=True)
class LlamaCppFile:
    """A file of base logits, of which only what is asked for is ever in memory.

    Attributes:
        path: the file.
        tokens: ids of the text, one row a window, as they were before any token of the model's own, ``(w, n)``.
        size: ids in the vocabulary.
        records: what is stored of every scored decision, window by window, ``(m, 2·ceil(size/2)+4)``.
    """

    path: Path
    tokens: Int[Tensor, "w n"]
    size: int
    records: NDArray[np.uint16]

    @classmethod
    def open(cls, path: str | Path) -> LlamaCppFile:
        """Look at a file's header and size, and map its records.

        Raises:
            CacheError: the file is missing, is something else, is cut short, is longer than its header says, or
                holds ids outside of its vocabulary.

        Example:
            >>> import tempfile
            >>> from klkit.caches.llamacpp_write import write_llamacpp
            >>> from klkit.models.automaton import coin
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     write_llamacpp(Path(folder) / "base", coin(end=0.5), torch.tensor([[1, 1, 0, 1]]))
            ...     file = LlamaCppFile.open(Path(folder) / "base")
            ...     file.size, file.scored, file.rows(slice(0, 1)).logp.exp().tolist()
            (2, 1, [[0.5, 0.5]])
        """
        path = Path(path)
        try:
            found = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(HEADER.size)
        except OSError as error:
            raise CacheError(
                f"expected a file of base logits at {path}, got: {error}; write one with llama-perplexity "
                f"-m MODEL.gguf -f TEXT --kl-divergence-base FILE"
            ) from error
        if head[: len(MAGIC)] != MAGIC:
            raise CacheError(
                f"expected {path} to begin with {MAGIC!r}, got {head[: len(MAGIC)]!r}; give the file that "
                f"llama-perplexity --kl-divergence-base wrote, not a model or a log"
            )
        if len(head) < HEADER.size:
            raise CacheError(
                f"expected a header of {HEADER.size} bytes in {path}, got a file of {found}; it was cut short: write "
                f"it again with llama-perplexity"
            )
        _, window, size, windows = HEADER.unpack(head)
        if window < 3 or size < 1 or windows < 1:
            raise CacheError(
                f"expected windows of at least 3 tokens, a vocabulary and a window in the header of {path}, got "
                f"n_ctx={window}, n_vocab={size}, n_chunk={windows}; the file is damaged: write it again"
            )
        begin, record = HEADER.size + 4 * windows * window, 2 * record_width(size)
        decisions = windows * scored_tokens(window)
        if found < begin:
            raise CacheError(
                f"expected {windows * window:,} ids of text in {path}, got room for {(found - HEADER.size) // 4:,} in "
                f"its {found:,} bytes; it was cut short: write it again"
            )
        if found < begin + decisions * record:
            raise CacheError(
                f"expected {decisions:,} scored positions ({windows:,} windows) in {path}, got "
                f"{(found - begin) // record:,} in its {found:,} of {begin + decisions * record:,} bytes; "
                f"llama-perplexity does not notice a full disk: make room, and write the file again"
            )
        if found > begin + decisions * record:
            raise CacheError(
                f"expected {begin + decisions * record:,} bytes in {path}, by its header (n_ctx={window}, n_vocab="
                f"{size}, n_chunk={windows}), got {found:,}; another version or program wrote it: write it again"
            )
        ids = np.fromfile(path, dtype="<i4", count=windows * window, offset=HEADER.size)
        if ids.min() < 0 or ids.max() >= size:
            raise CacheError(
                f"expected ids in 0..{size - 1} in {path}, got {ids.min()}..{ids.max()}; the file is damaged: write it "
                f"again"
            )
        records = np.memmap(path, dtype="<u2", mode="r", offset=begin, shape=(decisions, record_width(size)))
        return cls(path, torch.from_numpy(ids.astype(np.int64)).view(windows, window), size, records)

    @property
    def scored(self) -> int:
        """Decisions scored in each window."""
        return scored_tokens(self.tokens.shape[1])

    def strings(self, first: int | None = None) -> Sequences:
        """The windows: the scored tokens of each behind those that its model had read; see :func:`strings_of`."""
        return strings_of(self.tokens, first)

    def rows(self, rows: slice) -> StoredLaws:
        """The laws of some decisions, numbered as those of :meth:`strings`.

        Raises:
            CacheError: a record holds no law.
        """
        records: NDArray[np.uint16] = np.ascontiguousarray(self.records[rows])
        heads = records[:, :4].copy().view("<f4")
        step, lowest = heads[:, :1], heads[:, 1:]
        with np.errstate(invalid="ignore"):
            wrong = ~((step >= 0) & (step <= DEPTH / CODES * (1 + 1e-3)) & (lowest <= 0) & np.isfinite(lowest))[:, 0]
        if wrong.any():
            i = int(wrong.argmax())
            raise CacheError(
                f"expected a step between 0 and {float(DEPTH / CODES):.3g} nats and a finite lowest log-probability in "
                f"every record of {self.path}, got {step[i, 0]:.6g} and {lowest[i, 0]:.6g} at position "
                f"{range(len(self.records))[rows][i]}; the file is damaged: write it again"
            )
        codes = records[:, 4 : 4 + self.size]
        logp = codes.astype(np.float32)
        logp *= step
        logp += lowest
        floored = (codes == 0) & (step >= FLOOR_STEP)
        return StoredLaws(*map(torch.from_numpy, (logp, floored, step[:, 0].copy(), lowest[:, 0].copy())))

    def require_vocabulary(self, vocabulary: Vocabulary, name: str) -> None:
        """Refuse a model that cannot choose from the file's ids, as far as sizes and unnamed ids show it.

        The file holds no token strings: a tokenizer of the same size that means other tokens passes.

        Args:
            vocabulary: of the model.
            name: of the model.

        Raises:
            VocabularyMismatch: the model has fewer ids, or named ones beyond the file's, or the text holds ids that
                its tokenizer does not define.
        """
        added = [token for token in vocabulary.tokens[self.size :] if token is not None]
        if vocabulary.size < self.size or added:
            what = f", among them {added[0]!r} beyond those of the file" if added else ""
            raise VocabularyMismatch(
                f"expected a model over the {self.size} ids of {self.path.name}, got {name} with "
                f"{vocabulary.size}{what}; score the model that its GGUF was made from, or one of that tokenizer"
            )
        used = torch.unique(self.tokens).tolist()
        unknown = [i for i in used if vocabulary.tokens[i] is None]
        if unknown:
            raise VocabularyMismatch(
                f"expected text in tokens of {name}, got {len(unknown)} ids in {self.path.name} that its tokenizer "
                f"does not define, such as {unknown[0]}; score a model with the tokenizer of the model in the file"
            )


def scored_tokens(window: int) -> int:
    """How many tokens of a window are scored.

    Example:
        >>> scored_tokens(512), scored_tokens(5)
        (255, 2)
    """
    return window - 1 - window // 2


def record_width(size: int) -> int:
    """Numbers of 16 bits in the record of a law over ``size`` tokens: an even number of codes, and four."""
    return 2 * ((size + 1) // 2) + 4


def strings_of(windows: Int[Tensor, "w n"], first: int | None = None) -> Sequences:
    """Windows as strings: those tokens that are scored behind those that are only read; all of one text.

    Args:
        first: what the model reads in place of the first token of every window; see :func:`first_token`.

    Example:
        >>> x = strings_of(torch.tensor([[3, 4, 5, 6, 7]]), first=1)
        >>> x.context(0).tolist(), x.completion(0).tolist()
        ([1, 4, 5], [6, 7])
    """
    count, width = windows.shape
    tokens = windows.clone()
    if first is not None:
        tokens[:, 0] = first
    index = torch.arange(count)
    return Sequences(
        tokens=tokens,
        start=torch.full((count,), width - scored_tokens(width)),
        stop=torch.full((count,), width),
        prompt=torch.zeros_like(index),
        cluster=index,
        finished=torch.ones(count, dtype=torch.bool),
    )


def first_token(windows: Int[Tensor, "w n"], model: LanguageModel, first: int | str | None = "auto") -> int | None:
    """What is read in place of the first token of every window, of which a file says nothing; None for the text itself.

    llama.cpp puts the token that begins texts before the whole text and over the first token of every window, or
    does neither: so it did both if the text begins with the token that ``model``'s tokenizer begins texts with.

    Args:
        windows: the text, as the file holds it.
        first: ``"auto"`` for that rule, else the answer.

    Raises:
        ValueError: no such id, or another word.

    Example:
        >>> from klkit.models.automaton import coin
        >>> text, model = torch.tensor([[1, 1, 0, 1]]), coin(end=0.5)  # a model without a tokenizer
        >>> first_token(text, model), first_token(text, model, 1)
        (None, 1)
    """
    if first == "auto":
        begin = getattr(tokenizer_of(model), "bos_token_id", None)
        return begin if begin is not None and begin == int(windows[0, 0]) else None
    if isinstance(first, str) or (first is not None and not 0 <= first < model.vocabulary.size):
        raise ValueError(
            f"expected 'auto', None or an id in 0..{model.vocabulary.size - 1} for first, got {first!r}; leave it out"
        )
    return first
