"""Building a cache: the model is asked once for every string, a shard at a time, and a crash costs one shard.

manifest.json        what the cache is made of; complete once everything below is there
head.safetensors     the output head that vectors are read with (kind hidden)
shards/00000-….      some strings and what is kept of their laws
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from klkit.caches.cache import NEGLIGIBLE, TeacherCache
from klkit.caches.manifest import HEAD, MANIFEST, SHARDS, Manifest
from klkit.caches.recording import HIDDEN, Coverage, Recording, named, record, require_recordable
from klkit.caches.shards import DAMAGED, CacheError, Shard, parts_of, whole, write_shard
from klkit.caches.sizes import CacheSize, cache_size, require_room
from klkit.caches.source import Data, Teacher
from klkit.divergences.linear import Head
from klkit.files import file_digest, write_atomically
from klkit.models.base import LanguageModel, head_of
from klkit.sequences import Sequences

SHARD_BYTES = 64 << 20
PROBED = 8  # strings at whose first decision the mass of unnamed rows is measured

Observer = Callable[[int, int], None]
"""(decisions done, decisions in all)."""


@dataclass(frozen=True, slots=True)
class Built:
    """What building did.

    Attributes:
        cache: the cache, finished.
        fresh: shards that were written now; the others were there.
        damaged: files that were not what was written, set aside and made again.
    """

    cache: TeacherCache
    fresh: int
    damaged: tuple[Path, ...]


def size_of(teacher: LanguageModel, strings: Sequences, recording: Recording) -> CacheSize:
    """Bytes that the cache will take.

    Raises:
        ValueError: the model cannot be recorded so.
    """
    require_recordable(teacher, recording)
    head = head_of(teacher)
    return cache_size(
        recording,
        decisions=strings.decisions,
        examples=len(strings),
        tokens=int(strings.stop.sum()),
        width=teacher.width,
        vocabulary=teacher.vocabulary.size if head is None else head.tokens,
        dtype=teacher.dtype,
        bias=head is not None and head.bias is not None,
    )


def build(
    path: str | Path,
    teacher: LanguageModel,
    strings: Sequences,
    recording: Recording | None = None,
    *,
    max_tokens: int | None = None,
    batch: int = 16,
    most_bytes: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    observe: Observer | None = None,
) -> Built:
    """Write what ``teacher`` says at every decision of ``strings`` into the folder ``path``, or finish writing it.

    Args:
        strings: all of them, in the order that indices will count; as the teacher reads them.
        recording: what is kept; by default hidden states.
        max_tokens: longest string that was let through, for the record.
        batch: strings the teacher reads at a time.
        most_bytes: refuse to write more.
        shard_bytes: of a shard, about.
        observe: called after every batch.

    Raises:
        CacheError: the folder holds something else, or cannot be written.
        ValueError: there are no strings, one is longer than the teacher can read, the teacher cannot be recorded so or
            returns NaN, or there is no room.

    Example:
        >>> import tempfile
        >>> from klkit.models.automaton import coin
        >>> x = Sequences.pack([torch.tensor([1])] * 2, [torch.tensor([1, 0]), torch.tensor([0])])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = build(folder, coin(end=0.5), x, Recording("top-k", k=2)).cache
        ...     cache.rows([1]).logp.exp().tolist()
        [[0.5, 0.5]]
    """
    recording = recording or Recording()
    _require_readable(teacher, strings)
    room = size_of(teacher, strings, recording)
    folder = Path(path).expanduser()
    plan = _plan(teacher, strings, recording, max_tokens, room.decision, shard_bytes)
    resuming = _claim(folder, plan)
    present, damaged = _present(folder, plan) if resuming else (set(), ())
    if not present:
        require_room(room, folder, most_bytes)
    try:
        (folder / SHARDS).mkdir(parents=True, exist_ok=True)
        plan.write(folder)
        plan = replace(plan, head=write_head(folder, teacher, recording))
    except (OSError, SafetensorError) as error:
        raise CacheError(f"expected to write into {folder}, got: {error}; choose another --out") from error
    done = 0
    for part in plan.parts:
        rows = range(part.first, part.first + part.count)
        mine = strings.select(list(rows))
        if part.index not in present:
            parts = []
            for start in range(0, part.count, batch):
                some = list(range(start, min(start + batch, part.count)))
                parts.append(_ask(teacher, mine.select(some), part.first + start, plan))
                done += int(mine.lengths[some].sum())
                if observe is not None:
                    observe(done, strings.decisions)
            tensors = {name: torch.cat([kept[name] for kept, _ in parts]) for name in parts[0][0]}
            write_shard(folder / SHARDS, part, mine, tensors, reduce(add, (covered for _, covered in parts)))
        else:
            done += mine.decisions
    return Built(_finished(folder, plan), len(plan.parts) - len(present), damaged)


def _require_readable(teacher: LanguageModel, strings: Sequences) -> None:
    if not len(strings):
        raise ValueError("expected at least one example to build a cache of, got none; check the file of examples")
    longest = int(strings.stop.argmax())
    if teacher.window is not None and int(strings.stop[longest]) > teacher.window:
        raise ValueError(
            f"expected examples of at most {teacher.window} tokens, the window of {teacher.name}, got "
            f"{int(strings.stop[longest])} (example {longest + 1}); lower --max-tokens to {teacher.window} or less"
        )


def _plan(
    teacher: LanguageModel,
    strings: Sequences,
    recording: Recording,
    max_tokens: int | None,
    decision_bytes: int,
    shard_bytes: int,
) -> Manifest:
    return Manifest(
        teacher=Teacher.of(teacher),
        data=Data.of(strings, max_tokens),
        recording=recording,
        size=size_of_laws(teacher, recording, [strings.context(i) for i in range(min(PROBED, len(strings)))]),
        width=teacher.width,
        head=None,
        parts=tuple(parts_of(strings.lengths.tolist(), decision_bytes, shard_bytes)),
    )


def size_of_laws(teacher: LanguageModel, recording: Recording, contexts: Sequence[Tensor]) -> int:
    """Ids that laws are over: of parts of them, without padding rows of the table, where these carry no mass.

    Args:
        contexts: at whose first decision the mass is measured.
    """
    size, used = teacher.vocabulary.size, named(teacher)
    if recording.kind == HIDDEN or used == size:
        return size
    hidden = teacher.begin(contexts)[1]
    unused = teacher.readout(hidden)[:, used:].exp().sum(-1)
    return used if float(unused.max()) < NEGLIGIBLE else size


def _claim(folder: Path, plan: Manifest) -> bool:
    """Whether this very cache was begun in ``folder`` before.

    Raises:
        CacheError: the folder holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise CacheError(f"expected a folder for --out, got the file {folder}; choose another name")
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / MANIFEST).is_file():
        raise CacheError(
            f"expected an empty or new folder for --out, got {folder}, which holds other files; choose another folder"
        )
    before, now = (_comparable(manifest) for manifest in (Manifest.read(folder), plan))
    names = dict.fromkeys((*before, *now))
    differing = [
        f"{name}: {before.get(name)!r} then, {now.get(name)!r} now"
        for name in names
        if before.get(name) != now.get(name)
    ]
    if differing:
        raise CacheError(
            f"expected {folder} to hold the cache that this command builds, got another one: {'; '.join(differing)}; "
            f"choose another --out, or repeat the command that it was begun with"
        )
    return True


def _comparable(manifest: Manifest) -> dict[str, Any]:
    """What two caches must share to be one; a model may have been moved, and a limit that cuts nothing is none."""
    teacher, data = asdict(manifest.teacher), asdict(manifest.data)
    del teacher["name"], data["max_tokens"]
    facts = {f"teacher's {name}": value for name, value in teacher.items()}
    facts |= {f"data's {name}": value for name, value in data.items()} | manifest.recording.options()
    return {**facts, "size": manifest.size, "shards": [part.first for part in manifest.parts]}


def _present(folder: Path, plan: Manifest) -> tuple[set[int], tuple[Path, ...]]:
    """Shards that are there and whole; what is not whole is set aside."""
    present, damaged = set(), []
    for part in plan.parts:
        path = part.find(folder / SHARDS)
        if path is None:
            continue
        if whole(path):
            present.add(part.index)
        else:
            aside = path.with_name(path.name + DAMAGED)
            path.replace(aside)
            damaged.append(aside)
    return present, tuple(damaged)


def write_head(folder: Path, teacher: LanguageModel, recording: Recording) -> dict[str, Any] | None:
    """Write the output head that vectors are read with, and return what is known of it; None for what needs none."""
    head = head_of(teacher)
    if recording.kind != HIDDEN or head is None:
        return None
    own: Head = head.detach()
    tensors = {"weight": own.weight[: own.tokens], **({} if own.bias is None else {"bias": own.bias[: own.tokens]})}
    plain = {name: value.cpu().contiguous() for name, value in tensors.items()}
    write_atomically(folder / HEAD, lambda beside: save_file(plain, beside))
    return {"factor": own.factor, "cap": own.cap, "size": own.tokens, "digest": file_digest(folder / HEAD)}


def _ask(teacher: LanguageModel, strings: Sequences, first: int, plan: Manifest) -> tuple[dict[str, Tensor], Coverage]:
    """What is kept of the laws of a batch whose first string has the index ``first``."""
    hidden = teacher.encode(strings)
    wrong = ~torch.isfinite(hidden).all(-1).cpu() if hidden.dtype.is_floating_point else torch.zeros(0)
    if bool(wrong.any()):
        example = first + int(strings.row()[wrong.nonzero()[0, 0]])
        raise ValueError(
            f"expected finite hidden states from {teacher.name}, got NaN or infinite ones at {int(wrong.sum())} "
            f"decisions, the first in example {example + 1}; if it overflows in half precision load it with "
            f"dtype=float32. Nothing before this shard is lost: repeat the command to go on"
        )
    examples = torch.arange(first, first + len(strings))
    return record(teacher, hidden, plan.recording, strings, size=plan.size, examples=examples)


def _finished(folder: Path, plan: Manifest) -> TeacherCache:
    """Write the manifest of the whole cache."""
    files, total = [], Coverage()
    for part in plan.parts:
        path = part.find(folder / SHARDS)
        assert path is not None
        files.append(path.name)
        total += Shard(path, part, plan.recording.kind, trusted=True).coverage
    held = sum((folder / SHARDS / name).stat().st_size for name in files)
    held += (folder / HEAD).stat().st_size if plan.head is not None else 0
    manifest = replace(plan, files=tuple(files), coverage=total.summary(plan.recording.kind), bytes=held)
    manifest.write(folder)
    return TeacherCache.open(folder)
