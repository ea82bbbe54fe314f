"""What all candidates of a comparison are scored on: strings of ``p``, or one text, and what ``p`` says there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float

from klkit.api.compare_settings import CompareSettings
from klkit.api.plan import Plan
from klkit.api.prepare import Pair, contexts_digest, document_ids, environment, make_plan
from klkit.api.reference import (
    PLAN,
    FolderStore,
    MemoryStore,
    Reference,
    ReferenceBatch,
    given_batch,
    sampled_batch,
)
from klkit.api.rounds import in_rounds
from klkit.api.run import TOKEN_FEATURES, shortest
from klkit.api.strings import resolve_batch_size
from klkit.api.text import Windows, cut
from klkit.caches.build import PROBED, size_of_laws
from klkit.caches.manifest import MANIFEST
from klkit.caches.recorded import RecordedModel, publish
from klkit.caches.recording import HIDDEN, Recording
from klkit.caches.shards import CacheError, Part
from klkit.caches.sizes import CacheSize, cache_size, parse_size, readable, require_room
from klkit.caches.source import Data, Teacher, ids_digest
from klkit.caches.store import CacheStore, key_of
from klkit.divergences import backends
from klkit.estimators.variates import token_features
from klkit.models.base import LanguageModel, head_of
from klkit.sequences import Prompts, Sequences
from klkit.train.processes import Processes

TEXT_BATCH = 16
FILES = 8192  # bytes of headers, of the manifest and of the plan
CACHE_LIMIT = "20GB"  # what the folder of --cache may hold, unless told otherwise


@dataclass(frozen=True, slots=True)
class Stage:
    """Where a comparison stands, for whoever watches it.

    Attributes:
        name: what is being done, such as ``"p draws its strings"``.
        done: strings of it, and ``total``.
        seconds: since this stage began.
    """

    name: str
    done: int
    total: int
    seconds: float


Observer = Callable[[Stage], None]


@dataclass(frozen=True, slots=True)
class Material:
    """What all candidates are scored on.

    Attributes:
        reference: the strings, and what ``p`` says at each decision.
        plan: which strings were drawn; None for a fixed text.
        windows: what was cut from a fixed text; None where strings were drawn.
        contents: the prompts; None where only what ``p`` read is known, so that every candidate reads the same.
        notes: what a reader must know of them.
        env: what the numbers depend on, on the side of ``p``.
        facts: what tells these strings from others, for the folder that they are kept in.
        features: of the tokens, for control variates.
    """

    reference: Reference
    plan: Plan | None
    windows: Windows | None
    contents: Sequence[Any] | None
    notes: tuple[str, ...]
    env: dict[str, Any]
    facts: dict[str, Any]
    features: Float[torch.Tensor, "v f"] | None


def gather_material(
    p: LanguageModel,
    settings: CompareSettings,
    prompts: Prompts | None,
    documents: Sequence[str] | None,
) -> Material:
    """What to draw or to read; nothing is drawn yet, and what will be is kept in memory.

    Args:
        p: the reference, at the temperature of the run.

    Raises:
        ValueError: prompts that leave no room for a response.
    """
    common = settings.common
    env = environment(common, p=p)
    recording = settings.recording(p.vocabulary.size)
    contents: Sequence[Any] = prompts.contents if prompts is not None else (None,)
    plan: Plan | None = None
    windows: Windows | None = None
    if documents is not None:
        windows = cut(documents, lambda text: document_ids(p, text), shortest(common.context, p.window))
        given, notes = windows.x, windows.notes
        parts = [given.tokens[i, : int(stop)] for i, stop in enumerate(given.stop)]
        env["contexts"] = ids_digest([*parts, given.start, given.cluster])  # and where scoring begins
        laws = size_of_laws(p, recording, [given.context(i) for i in range(min(len(given), PROBED))])
        count, most = len(given), int(given.lengths.max())
        size = common.batch_size if isinstance(common.batch_size, int) else TEXT_BATCH
        make = lambda start, some, _backend: given_batch(p, given, start, some, recording, laws)  # noqa: E731
    else:
        plan, notes = make_plan(Pair(p, p, ()), common, prompts)
        env["contexts"] = contexts_digest(plan)
        laws = size_of_laws(p, recording, plan.contexts_p[:PROBED])
        count, most, drawn = plan.total, plan.max_tokens, plan
        size = resolve_batch_size(p, plan, common.batch_size)

        def make(start: int, some: int, backend: str) -> ReferenceBatch:
            return sampled_batch(p, drawn, start, some, recording, laws, floor=common.floor != "none", backend=backend)

    facts = {
        "kind": "sampled" if plan is not None else "text",
        "model": {name: value for name, value in env["models"]["p"].items() if name != "name"},
        "contexts": env["contexts"],
        "recording": recording.options(),
        "size": laws,
        "strings": count,
        "batch": size,
        "samples": None if plan is None else plan.samples,
        "max_tokens": most,
        "seed": common.seed,
        "temperature": common.temperature,
        "floor": common.floor != "none",
        "notes": list(notes),
        "contents": None if plan is None else portable(contents),
        "groups": None if plan is None or plan.groups is None else list(plan.groups),
    }
    table = p.embedding() if plan is not None else None
    features = None if table is None else token_features(table, TOKEN_FEATURES)
    reference = Reference(count, size, make, MemoryStore())
    return Material(reference, plan, windows, contents, tuple(notes), env, facts, features)


def portable(contents: Sequence[Any]) -> list[Any] | None:
    """Prompts as JSON has them; None where one cannot be kept so."""
    found = [{"ids": content.tolist()} if isinstance(content, torch.Tensor) else content for content in contents]
    try:
        json.dumps(found)
    except TypeError:
        return None
    return found


def restored(contents: list[Any] | None) -> list[Any] | None:
    """Prompts from their form in JSON."""
    if contents is None:
        return None
    return [torch.tensor(c["ids"], dtype=torch.long) if isinstance(c, dict) else c for c in contents]


def on_disk(material: Material, path: Path, processes: Processes) -> Material:
    """The same, kept in the folder ``path``: new, or begun before.

    Raises:
        RunFolderError: the folder holds other strings, or cannot be written.
    """
    store = processes.by_first(lambda: FolderStore.open(path, material.facts))
    return replace(material, reference=replace(material.reference, store=store, size=store.size))


def recorded_material(p: RecordedModel, settings: CompareSettings) -> Material:
    """The strings of a model that was recorded: what it said is all there is, so options of drawing have no say.

    Raises:
        CacheError: the folder was not written by a comparison.
    """
    path = p.cache.path
    try:
        facts = json.loads((path / PLAN).read_text(encoding="utf-8"))
        kind, size, count = facts["kind"], int(facts["batch"]), int(facts["strings"])
        notes = (*facts["notes"], f"p was not asked again: its laws are those recorded in {path.name}")
    except (OSError, ValueError, KeyError) as error:
        raise CacheError(
            f"expected a reference that klkit compare recorded in {path}, got: {error}; make it anew"
        ) from error

    def make(start: int, some: int, _backend: str) -> Any:
        raise CacheError(
            f"expected all {count} strings in {path}, got none from {start} on; make it anew from the model"
        )

    env = environment(settings.common, p=p) | {"contexts": facts["contexts"]}
    store = FolderStore(path, p.cache.kind, size)
    reference = Reference(count, size, make, store)
    plan, windows = None, None
    if kind == "sampled":
        contexts: dict[int, torch.Tensor] = {}
        for batch in reference:
            for i, prompt in enumerate(batch.x.prompt.tolist()):
                contexts.setdefault(prompt, batch.x.context(i))
        ordered = [contexts[i] for i in sorted(contexts)]
        plan = Plan(
            ordered, ordered, int(facts["samples"]), int(facts["max_tokens"]), int(facts["seed"]), facts["groups"]
        )
    else:
        windows = Windows(Sequences.cat([batch.x for batch in reference]), tuple(facts["notes"]))
    return Material(reference, plan, windows, restored(facts["contents"]), notes, env, facts, p.features)


def with_backend(material: Material, p: LanguageModel, candidates: int, processes: Processes) -> Material:
    """The same, with kernels for the whole comparison: half of the responses' room is an average guess.

    One choice for all processes: what has been compiled before may differ between machines. Parts of laws have no use
    for kernels.
    """
    reference = material.reference
    if material.facts["recording"]["kind"] != HIDDEN:
        return material
    room = candidates * reference.count * int(material.facts["max_tokens"]) * p.vocabulary.size // 2
    backend = processes.by_first(lambda: backends.choose(room, dtype=p.dtype))
    return replace(material, reference=replace(reference, backend=backend))


def fill(material: Material, processes: Processes, observe: Observer | None) -> None:
    """Make all batches that are not there, each in one of the processes; afterwards each finds all of them.

    On disk they are shared; in memory each process is given those of the others.
    """
    reference = material.reference
    name = "p reads the text" if material.plan is None else "p draws its strings"
    missing = processes.by_first(lambda: [i for i in range(len(reference)) if not reference.store.has(i)])
    shared = isinstance(reference.store, FolderStore)

    def make(index: int) -> ReferenceBatch | None:
        batch = reference.make(index)
        if not shared:
            return batch
        reference.store.put(index, batch)
        return None

    def work(done: Callable[[int], None]) -> None:
        for index, batch in zip(missing, in_rounds(missing, make, processes), strict=True):
            if batch is not None:
                reference.store.put(index, batch)
            processes.by_first(lambda index=index: done(min(reference.count, (index + 1) * reference.size)))  # type: ignore[misc]

    watch(observe, name, reference.count, work)


def publish_material(material: Material, p: LanguageModel) -> None:
    """Turn the batches on disk into a cache that other comparisons can start from, without ``p``.

    A model whose output head is no plain linear layer has none to keep: its folder serves this run only.
    """
    store, reference = material.reference.store, material.reference
    if not isinstance(store, FolderStore) or (store.path / MANIFEST).is_file():
        return
    parts, drawn = [], []
    for i, batch in enumerate(reference):  # one at a time: what is kept of the laws is large
        parts.append(Part(i, batch.start, len(batch.x)))
        drawn.append(batch.x)
    strings = Sequences.cat(drawn)
    limit = None if material.plan is None else material.plan.max_tokens
    recording = Recording(**material.facts["recording"])
    size = int(material.facts["size"])
    publish(store.path, p, strings, parts, recording, size=size, max_tokens=limit, features=material.features)


def size_on_disk(material: Material, p: LanguageModel) -> CacheSize:
    """What is kept of ``p``'s laws, at most: strings that end early take less."""
    plan, windows, reference = material.plan, material.windows, material.reference
    decisions = read = 0
    if plan is not None:
        decisions, read = reference.count * plan.max_tokens, reference.count * max(map(len, plan.contexts_p))
    elif windows is not None:
        decisions, read = windows.x.decisions, int(windows.x.start.sum())
    head = head_of(p)
    size = cache_size(
        Recording(**material.facts["recording"]),
        decisions=decisions,
        examples=reference.count,
        tokens=decisions + read,
        width=p.width,
        vocabulary=p.vocabulary.size,
        dtype=p.dtype,
        bias=head is not None and head.bias is not None,
    )
    words = sum(4 * len(token or "") + 16 for token in p.vocabulary.tokens)  # twice, in JSON
    features = 0 if material.features is None else material.features.numel() * 4
    return replace(size, head=size.head if head is not None else 0, strings=size.strings + words + features + FILES)


def place(
    material: Material, p: LanguageModel, settings: CompareSettings, out: Path | None, building: ExitStack
) -> Path | None:
    """The folder for what ``p`` says: in the store of ``--cache``, else below the run's folder, else none.

    In the store it is found again by what it is made of: the model, the prompts and how strings are drawn.

    Args:
        building: holds the cache against other processes until it is closed.

    Raises:
        ValueError: the store or the disk has no room for it.
    """
    size = size_on_disk(material, p)
    if settings.cache is None:
        if out is not None:
            require_room(size, out, None)
        return None if out is None else out / "reference"
    store = CacheStore(settings.cache, parse_size(settings.cache_limit or CACHE_LIMIT))
    data = Data(material.reference.count, 0, "", material.facts["contexts"], None)
    if head_of(p) is None and settings.keep == HIDDEN:
        raise ValueError(
            f"expected a model whose output head can be kept for --cache, got {p.name}, whose laws are no linear map "
            f"of what is kept; say --keep hybrid, or leave --cache out"
        )
    sampling = {name: value for name, value in material.facts.items() if name not in ("notes", "batch")}
    key = key_of(Teacher.of(p), data, Recording(**material.facts["recording"]), sampling)
    building.enter_context(store.alone(key))
    if store.find(key) is None:
        require_room(size, store.folder, None)
        return store.claim(key, size.total)
    return store.folder / key


def room(material: Material, p: LanguageModel, where: Path) -> str:
    """What the laws of ``p`` will take at most on disk, in words; empty where all of it is there."""
    if all(material.reference.store.has(i) for i in range(len(material.reference))):
        return ""
    size = size_on_disk(material, p)
    return (
        f"What p says will take {'at most ' if material.plan is not None else ''}{readable(size.total)} in {where} "
        f"({size.decision:,} bytes a token); all its logits in half precision would take {readable(size.logits)}."
    )


def watch(observe: Observer | None, name: str, total: int, work: Callable[[Callable[[int], None]], None]) -> None:
    """Run ``work``, which is given a function to report the strings done, as one stage."""
    began = time.monotonic()

    def done(strings: int) -> None:
        if observe is not None:
            observe(Stage(name, strings, total, time.monotonic() - began))

    work(done)
