"""How much room a cache takes, before anything is written."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from klkit.caches.recording import HIDDEN, HYBRID, TOP_K, Recording

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SPARE = 64 << 20  # what is left on a disk that a cache just fits on
STRING_BYTES = 32  # of a string's entries beside its ids


@dataclass(frozen=True, slots=True)
class CacheSize:
    """Bytes of a cache.

    Attributes:
        decision: of one decision; at most, where draws may coincide.
        laws: of all decisions.
        head: of the output head, once.
        strings: of the token ids.
        logits: what all logits would take in half precision.
    """

    decision: int
    laws: int
    head: int
    strings: int
    logits: int

    @property
    def total(self) -> int:
        """All of the cache."""
        return self.laws + self.head + self.strings

    @property
    def saving(self) -> float:
        """How many times smaller than logits in half precision."""
        return self.logits / max(self.total, 1)


def cache_size(
    recording: Recording,
    *,
    decisions: int,
    examples: int,
    tokens: int,
    width: int,
    vocabulary: int,
    dtype: torch.dtype,
    bias: bool = False,
) -> CacheSize:
    """Bytes that laws recorded so will take; of draws, at most.

    Args:
        decisions: response tokens.
        examples: strings.
        tokens: prompt and response tokens.
        width: values of a hidden state.
        vocabulary: rows of the output head.
        dtype: of hidden states and head.
        bias: whether the head has one.

    Example:
        >>> size = cache_size(
        ...     Recording(), decisions=10**6, examples=2000, tokens=2 * 10**6, width=2048, vocabulary=128_000,
        ...     dtype=torch.bfloat16,
        ... )
        >>> size.decision, size.head, round(size.saving, 1)
        (4096, 524288000, 55.3)
    """
    head = 0
    if recording.kind == HIDDEN:
        decision = width * dtype.itemsize
        head = vocabulary * (width + bias) * dtype.itemsize
    elif recording.kind == TOP_K:
        decision = 8 * recording.k + 4
    elif recording.kind == HYBRID:
        decision = 8 * (recording.k + recording.draws) + 25  # masses of tail, text and end, two moments, and a flag
    else:
        decision = 6 * min(recording.draws, vocabulary) + 2
    return CacheSize(
        decision=decision,
        laws=decision * decisions,
        head=head,
        strings=4 * tokens + STRING_BYTES * examples,
        logits=2 * vocabulary * decisions,
    )


def require_room(size: CacheSize, path: Path, most: int | None) -> None:
    """Refuse a cache that is larger than asked for, or than the disk has room for.

    Raises:
        ValueError: it is.
    """
    ways = "record fewer examples, or a smaller kind (top-k, sampled, hybrid), or fewer tokens of each law"
    if most is not None and size.total > most:
        raise ValueError(f"expected a cache of at most {readable(most)}, got one of {readable(size.total)}; {ways}")
    folder = next(place for place in (path, *path.absolute().parents) if place.exists())
    free = shutil.disk_usage(folder).free
    if size.total + SPARE > free:
        raise ValueError(
            f"expected room for {readable(size.total)} at {path}, got a disk with {readable(free)} left; make room, or "
            f"{ways}"
        )


def readable(size: int | float) -> str:
    """Bytes as people say them.

    Example:
        >>> readable(999), readable(8_200_000_000), readable(1e15)
        ('999 B', '8.2 GB', '1,000 TB')
    """
    for unit in ("B", "KB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB" if size < 999.5 else f"{size:,.0f} TB"


def parse_size(text: str) -> int:
    """Bytes from ``20GB``, ``512MiB`` or a plain number.

    Raises:
        ValueError: it is none.

    Example:
        >>> parse_size("1.5 GB"), parse_size("2MiB"), parse_size("10")
        (1500000000, 2097152, 10)
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    unit = (match[2] or "B").upper() if match else ""
    if match is None or unit not in UNITS:
        raise ValueError(f"expected a size such as 20GB or 512MiB, got {text!r}; write a number and a unit")
    return int(float(match[1]) * UNITS[unit])
