"""What is kept of ``p`` while candidates come and go: its strings, and the vectors that its laws are read from.

``p`` runs once. A batch of its strings is a few ids and one trunk vector a token, from which any number of candidates
is scored, each with one pass of its own. With a run folder the batches lie on disk, so that memory holds one of them,
and a run that was interrupted goes on where it stopped; without one they are in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from klkit.api.batches import batch_floor
from klkit.api.plan import Plan
from klkit.caches.manifest import SHARDS
from klkit.caches.recording import HIDDEN, Coverage, Recording, record
from klkit.caches.shards import ROWS, Part, read_shard, strings_of, write_shard
from klkit.files import write_text
from klkit.models.base import LanguageModel
from klkit.report.record import RunFolderError, disk_errors
from klkit.sampling.ancestral import sample
from klkit.sequences import Sequences

FLOOR_STRINGS = 64  # strings on which the numerical floor is measured, for a paired comparison with it
PLAN = "plan.json"


@dataclass(frozen=True, slots=True)
class ReferenceBatch:
    """Some strings of ``p``.

    Attributes:
        start: number of the first one in the run.
        x: the strings, as ``p`` reads them.
        kept: what the laws of ``p`` at every decision are read from: trunk vectors ``hidden``, ``(m, d)``, or the parts
            of a hybrid law (:mod:`klkit.caches.recording`).
        floor: ``KL(p‖p)`` between two passes of ``p``, of those among the run's first strings, nats, ``(k,)``.
        coverage: how much of the laws was kept, as long as the batch is fresh.
    """

    start: int
    x: Sequences
    kept: Mapping[str, Tensor]
    floor: Float[Tensor, " k"]
    coverage: Coverage = field(default_factory=Coverage)

    def halves(self) -> tuple[ReferenceBatch, ReferenceBatch]:
        """The first strings and the others, where all of them do not fit in memory at once."""
        n, k = len(self.x), len(self.x) // 2
        cut = int(self.x.lengths[:k].sum())
        first = {name: value[:cut] for name, value in self.kept.items()}
        rest = {name: value[cut:] for name, value in self.kept.items()}
        return (
            ReferenceBatch(self.start, self.x.select(range(k)), first, self.floor[:k]),
            ReferenceBatch(self.start + k, self.x.select(range(k, n)), rest, self.floor[k:]),
        )

    @staticmethod
    def cat(parts: Sequence[ReferenceBatch]) -> ReferenceBatch:
        """Successive strings together."""
        kept = {name: torch.cat([part.kept[name] for part in parts]) for name in parts[0].kept}
        floor = torch.cat([part.floor for part in parts])
        coverage = sum((part.coverage for part in parts), Coverage())
        return ReferenceBatch(parts[0].start, Sequences.cat([part.x for part in parts]), kept, floor, coverage)


@dataclass(frozen=True, slots=True)
class MemoryStore:
    """Batches in memory."""

    batches: dict[int, ReferenceBatch] = field(default_factory=dict)

    def has(self, index: int) -> bool:
        """Whether the batch is there."""
        return index in self.batches

    def put(self, index: int, batch: ReferenceBatch) -> None:
        """Keep a batch."""
        self.batches[index] = batch

    def get(self, index: int) -> ReferenceBatch:
        """The batch."""
        return self.batches[index]


@dataclass(frozen=True, slots=True)
class FolderStore:
    """Batches on disk, as the shards of a cache: whole or not there at all, with a digest in each name.

    Attributes:
        path: the folder of the cache.
        kind: what is kept of a law.
        size: strings a batch.
    """

    path: Path
    kind: str
    size: int

    @classmethod
    def open(cls, path: Path, facts: Mapping[str, Any]) -> FolderStore:
        """A folder for the strings of the run that ``facts`` describe, new or begun before.

        Raises:
            RunFolderError: it holds those of another run, or cannot be written.
        """
        plan = path / PLAN
        with disk_errors(path):
            (path / SHARDS).mkdir(parents=True, exist_ok=True)
            if not plan.is_file():
                write_text(plan, json.dumps(dict(facts), indent=1))
            before, now = (json.loads(text) for text in (plan.read_text(encoding="utf-8"), json.dumps(dict(facts))))
        # The folder's own batches go on, whatever size is asked for now: no string depends on it.
        other = [key for key in dict.fromkeys((*before, *now)) if key != "batch" and before.get(key) != now.get(key)]
        if other:
            changes = "; ".join(f"{key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in other)
            raise RunFolderError(
                f"expected {path} to hold strings of this run, got others ({changes}); restore what changed, or choose "
                f"another folder"
            )
        return cls(path, facts["recording"]["kind"], int(before["batch"]))

    def has(self, index: int) -> bool:
        """Whether the batch is there."""
        return Part(index, 0, 0).find(self.path / SHARDS) is not None

    def put(self, index: int, batch: ReferenceBatch) -> None:
        """Keep a batch.

        Raises:
            CacheError: the disk refuses.
        """
        part = Part(index, batch.start, len(batch.x))
        tensors = {**{name: value.cpu() for name, value in batch.kept.items()}, "floor": batch.floor}
        write_shard(self.path / SHARDS, part, batch.x, tensors, batch.coverage)

    def get(self, index: int) -> ReferenceBatch:
        """The batch; its first string is not stored with it, but counts the strings of the batches before it.

        Raises:
            CacheError: its file is missing or not what was written.
        """
        tensors = read_shard(self.path / SHARDS, index)
        kept = {name: tensors[name] for name in ROWS[self.kind]}
        return ReferenceBatch(index * self.size, strings_of(tensors), kept, tensors["floor"])


@dataclass(frozen=True, slots=True)
class Reference:
    """All strings of a run, in batches.

    Attributes:
        count: strings in all.
        size: strings a batch.
        draw: draws or reads the batch that begins with a string, of so many strings, with kernels of a name.
        store: where batches are kept.
        backend: kernels that whole laws are reduced with, the same for all batches and candidates of a call.
    """

    count: int
    size: int
    draw: Callable[[int, int, str], ReferenceBatch]
    store: MemoryStore | FolderStore
    backend: str = "eager"

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def make(self, index: int) -> ReferenceBatch:
        """Draw or read batch ``index`` anew; by halves where it does not fit in memory."""
        start = index * self.size
        return self._part(start, min(self.size, self.count - start))

    def _part(self, start: int, size: int) -> ReferenceBatch:
        try:
            return self.draw(start, size, self.backend)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        k = size // 2
        return ReferenceBatch.cat([self._part(start, k), self._part(start + k, size - k)])

    def __iter__(self) -> Iterator[ReferenceBatch]:
        return (self.store.get(index) for index in range(len(self)))


def sampled_batch(
    p: LanguageModel,
    plan: Plan,
    start: int,
    size: int,
    recording: Recording,
    laws: int,
    *,
    floor: bool,
    backend: str,
) -> ReferenceBatch:
    """Strings of ``p``, drawn as ``klkit estimate`` draws them: the same ones, whatever the batches.

    In half precision the trunk vectors are those of a teacher-forced pass, in the batch shapes in which candidates are
    scored; otherwise those of the sampling pass, which are the same up to rounding and cost nothing.
    """
    draw = plan.draw(sample, p, start, start + size)
    x = draw.sequences
    checked = torch.arange(max(0, min(len(x), FLOOR_STRINGS - start)) if floor else 0)
    again = p.dtype not in (torch.float32, torch.float64)
    kept, coverage = kept_of(p, p.encode(x) if again else draw.hidden, recording, x, start, laws)
    return ReferenceBatch(start, x, kept, batch_floor(p, draw.hidden, x, checked, backend), coverage)


def kept_of(
    p: LanguageModel, hidden: Float[Tensor, "m d"], recording: Recording, x: Sequences, start: int, laws: int
) -> tuple[Mapping[str, Tensor], Coverage]:
    """What is kept of ``p``'s laws, parts of them over ``laws`` ids; draws depend on the strings' numbers alone."""
    if recording.kind == HIDDEN:
        return {"hidden": hidden}, Coverage(decisions=len(hidden))
    examples = torch.arange(start, start + len(x))
    return record(p, hidden, recording, x, size=laws, examples=examples)


def given_batch(
    p: LanguageModel, x: Sequences, start: int, size: int, recording: Recording, laws: int
) -> ReferenceBatch:
    """Windows of a fixed text, read by ``p``."""
    rows = x.select(torch.arange(start, start + size))
    kept, coverage = kept_of(p, p.encode(rows), recording, rows, start, laws)
    return ReferenceBatch(start, rows, kept, torch.zeros(0, dtype=torch.float64), coverage)
