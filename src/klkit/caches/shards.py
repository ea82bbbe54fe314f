"""Shards: some consecutive strings of a cache in a file, with everything that is kept of their laws.

A shard's strings are named by their index in the whole set, and where one shard ends and the next begins depends on
the strings' lengths alone, so that neither batches nor processes have a say in it. A file carries its digest in its
name: one that was cut short, or rots, is not read as numbers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from klkit.caches.recording import SAMPLED, Coverage
from klkit.files import file_digest
from klkit.sequences import Sequences

DAMAGED = ".damaged"
COVERAGE = "coverage"
ROWS = {
    "hidden": ("hidden",),
    "top-k": ("ids", "logp", "rest"),
    "sampled": ("unique",),
    "hybrid": ("ids", "logp", "rest", "draws", "logp_draws", "whole", "text", "entropy", "variance", "coin"),
}
"""Tensors with one row a decision, by kind."""
DRAWN = ("ids", "counts")
"""Tensors with one entry a different token that was drawn."""


class CacheError(ValueError):
    """A cache cannot be used as asked: it is missing, unfinished, damaged, or of other models or data."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some consecutive strings.

    Attributes:
        index: of the shard.
        first: index of its first string.
        count: strings.
    """

    index: int
    first: int
    count: int

    def find(self, folder: Path) -> Path | None:
        """Its file, whole or not; None where there is none."""
        return next(iter(sorted(folder.glob(f"{self.index:05d}-*.safetensors"))), None)


def parts_of(lengths: Sequence[int], decision_bytes: int, most_bytes: int) -> list[Part]:
    """Cut strings of these lengths into consecutive parts of at most so many bytes, one string at least.

    Example:
        >>> parts_of([3, 3, 5, 1], decision_bytes=10, most_bytes=60)
        [Part(index=0, first=0, count=2), Part(index=1, first=2, count=2)]
    """
    found: list[Part] = []
    first, held = 0, 0
    for i, length in enumerate(lengths):
        size = length * decision_bytes
        if i > first and held + size > most_bytes:
            found.append(Part(len(found), first, i - first))
            first, held = i, 0
        held += size
    return [*found, Part(len(found), first, len(lengths) - first)] if len(lengths) else found


def write_shard(
    folder: Path, part: Part, strings: Sequences, tensors: Mapping[str, Tensor], coverage: Coverage
) -> Path:
    """Write a shard, whole or not at all; return its file.

    Raises:
        CacheError: the disk refuses; the shards before this one are whole.
    """
    ids = torch.cat([strings.tokens[i, :stop] for i, stop in enumerate(strings.stop.tolist())])
    kept = {
        "tokens": ids.to(torch.int32),
        "start": strings.start,
        "stop": strings.stop,
        "prompt": strings.prompt,
        "cluster": strings.cluster,
        "finished": strings.finished,
        **tensors,
    }
    beside = folder / f"{part.index:05d}.{os.getpid()}.part"
    try:
        save_file(
            {name: value.contiguous() for name, value in kept.items()},
            beside,
            metadata={COVERAGE: json.dumps(asdict(coverage))},
        )
        path = folder / f"{part.index:05d}-{file_digest(beside)}.safetensors"
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        raise CacheError(
            f"expected to write into {folder}, got: {error}. Every shard before this one is kept whole; make room and "
            f"repeat the command to go on"
        ) from error
    finally:
        beside.unlink(missing_ok=True)
    return path


class Shard:
    """A shard that is read a string at a time.

    Args:
        path: its file.
        part: which strings it should hold.
        kind: what is kept of their laws.
        trusted: whether its digest was checked before.

    Raises:
        CacheError: it is not what was written.
    """

    def __init__(self, path: Path, part: Part, kind: str, *, trusted: bool = False):
        self._kind = kind
        try:
            if not trusted and not whole(path):
                raise ValueError("its content is not what was written")
            file: Any = safe_open(path, framework="pt")
            self._file = file
            self._start, self._stop = file.get_tensor("start"), file.get_tensor("stop")
            if len(self._start) != part.count:
                raise ValueError(f"{len(self._start)} strings instead of {part.count}")
            self._prompt, self._cluster = file.get_tensor("prompt"), file.get_tensor("cluster")
            self._finished = file.get_tensor("finished")
            self._unique = file.get_tensor("unique").long() if kind == SAMPLED else torch.zeros(1).long()
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise CacheError(
                f"expected a whole shard {path}, got: {error}; delete this file and repeat the command that built the "
                f"cache: only what is missing is asked of the model again"
            ) from error
        lengths = self._stop - self._start
        self._decisions = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).tolist()
        self._tokens = torch.cat([lengths.new_zeros(1), self._stop.cumsum(0)]).tolist()
        self._drawn = torch.cat([self._unique.new_zeros(1), self._unique.cumsum(0)]).tolist()

    @property
    def coverage(self) -> Coverage:
        """What its writer counted."""
        return Coverage(**json.loads(self._file.metadata()[COVERAGE]))

    def laws(self, i: int) -> dict[str, Tensor]:
        """What is kept of the laws of its string ``i``."""
        rows = slice(self._decisions[i], self._decisions[i + 1])
        found = {name: self._file.get_slice(name)[rows] for name in ROWS[self._kind]}
        if self._kind == SAMPLED:
            drawn = slice(self._drawn[rows.start], self._drawn[rows.stop])
            found |= {name: self._file.get_slice(name)[drawn] for name in DRAWN}
        return found

    def string(self, i: int) -> Sequences:
        """Its string ``i``, as the model read it."""
        tokens = self._file.get_slice("tokens")[self._tokens[i] : self._tokens[i + 1]]
        here = slice(i, i + 1)
        return Sequences(
            tokens.long()[None],
            self._start[here],
            self._stop[here],
            self._prompt[here],
            self._cluster[here],
            self._finished[here],
        )


def read_shard(folder: Path, index: int) -> dict[str, Tensor]:
    """All that shard ``index`` holds.

    Raises:
        CacheError: its file is missing, or not what was written.
    """
    path = Part(index, 0, 0).find(folder)
    try:
        if path is None:
            raise ValueError("it is not there")
        if not whole(path):
            raise ValueError("its content is not what was written")
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise CacheError(
            f"expected a whole shard {index:05d} in {folder}, got: {error}; delete its file and repeat the command "
            f"with --resume: only what is missing is asked of the model again"
        ) from error


def strings_of(tensors: Mapping[str, Tensor]) -> Sequences:
    """The strings of a shard that was read whole, as the model read them.

    Example:
        >>> flat = {"tokens": torch.tensor([5, 1, 5, 2, 0]), "stop": torch.tensor([2, 3])}
        >>> flat |= {"start": torch.ones(2).long(), "finished": torch.ones(2).bool()}
        >>> flat |= {"prompt": torch.arange(2), "cluster": torch.arange(2)}
        >>> strings_of(flat).tokens.tolist()
        [[5, 1, 0], [5, 2, 0]]
    """
    stop = tensors["stop"]
    inside = torch.arange(int(stop.max()) if len(stop) else 0) < stop[:, None]
    tokens = torch.zeros(inside.shape, dtype=torch.long).masked_scatter_(inside, tensors["tokens"].long())
    start, prompt, cluster, finished = (tensors[name] for name in ("start", "prompt", "cluster", "finished"))
    return Sequences(tokens, start, stop, prompt, cluster, finished)


def whole(path: Path) -> bool:
    """Whether a shard's file is what was written."""
    return file_digest(path) == path.stem.split("-", 1)[1]
