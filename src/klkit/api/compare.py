"""Many models compared with one, from settings to a ranking: ``p`` runs once, then each candidate once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from klkit.api.assemble import from_strings, from_text
from klkit.api.candidates import (
    Candidate,
    contexts_of,
    folder_of,
    require_readable,
    require_room,
    score_candidate,
)
from klkit.api.compare_settings import CompareSettings
from klkit.api.gather import Gathered
from klkit.api.material import (
    Material,
    Observer,
    Stage,
    fill,
    gather_material,
    on_disk,
    publish_material,
    recorded_material,
    room,
    start_folder,
    watch,
)
from klkit.api.prepare import Pair, environment, prepare
from klkit.api.rank import against_floor, rank_entries
from klkit.api.run import draw_strings, shown_texts
from klkit.api.settings import Settings
from klkit.api.strings import SHOWN_STRINGS, Plan, dtype_floor
from klkit.caches.recorded import RecordedModel
from klkit.models.base import LanguageModel
from klkit.ranking import Entry, Ranking
from klkit.report.html import write_report
from klkit.report.ranking import write_ranking
from klkit.report.record import RESULT, RunFolder
from klkit.results import Comparison
from klkit.sequences import Prompts
from klkit.train.processes import Processes


def compare_models(
    p: LanguageModel,
    candidates: Sequence[Candidate],
    settings: CompareSettings,
    *,
    prompts: Prompts | None = None,
    documents: Sequence[str] | None = None,
    wide: LanguageModel | None = None,
    sizes: Sequence[dict[str, Any]] | None = None,
    out: Path | None = None,
    resume: bool = False,
    processes: Processes | None = None,
    announce: Callable[[str], None] | None = None,
    observe: Observer | None = None,
) -> Ranking:
    """Score every candidate on one set of strings of ``p``, or on one text, and rank them.

    At any time ``p`` and one candidate are in memory, and one batch of what ``p`` says.

    Args:
        wide: ``p`` in fp32, for the floor ``dtype``.
        sizes: of each candidate's weights, for the tables.
        out: run folder; None keeps nothing on disk.
        resume: continue the run in ``out``, which may get further candidates that way.
        processes: that share the work.
        announce: told how much room the run takes, before it is taken.
        observe: called after every batch.

    Raises:
        ValueError: options, prompts or models that cannot be used.
        VocabularyMismatch: a candidate does not choose from the tokens of ``p``.
    """
    processes = processes or Processes()
    common = settings.common
    if isinstance(p, RecordedModel):
        alone: LanguageModel = p
        material = recorded_material(p, settings)
    else:
        alone = prepare(p, p, common, prompts).p
        material = gather_material(alone, settings, prompts, documents)
    folder = start_folder(out, settings, material.env, resume, processes)
    if not isinstance(p, RecordedModel):
        if out is not None:
            material = on_disk(material, out / "reference", processes)
            text = room(material, alone, out / "reference")
            if announce is not None and processes.first:
                announce(text)
        fill(material, processes, observe)
        if processes.first:
            publish_material(material, alone)
    if material.plan is not None:
        common = replace(common, samples=material.plan.samples, max_tokens=material.plan.max_tokens)
    entries = []
    for i, candidate in enumerate(candidates):
        own = replace(common, q=settings.pair(i).q)
        with candidate.open() as model:
            entry = one_candidate(
                p, model, candidate.name, own, material, prompts, wide, folder_of(out, candidate.name), resume,
                processes, observe, both=settings.both,
            )  # fmt: skip
        entries.append(replace(entry, size={} if sizes is None else sizes[i]))
    ranking = rank_entries(entries, settings, material.env, material.notes)
    if folder is not None and processes.first:
        folder.clear()
        write_ranking(folder.path, ranking.to_dict(), {e.name: folder_of(out, e.name) for e in entries})
    return ranking


def one_candidate(
    p: LanguageModel,
    model: LanguageModel,
    name: str,
    settings: Settings,
    material: Material,
    prompts: Prompts | None,
    wide: LanguageModel | None,
    where: Path | None,
    resume: bool,
    processes: Processes,
    observe: Observer | None,
    *,
    both: bool,
) -> Entry:
    """Everything about one candidate while it is open."""
    pair = prepare(p, model, settings, prompts)
    env = {**environment(settings, pair), "contexts": material.env["contexts"]}
    folder = None
    if where is not None:
        folder = processes.by_first(lambda: pair_folder(where, settings, env, resume))
    plan, windows, reference = material.plan, material.windows, material.reference
    notes = (*pair.notes, *material.notes)
    contexts_q = None
    if plan is not None:
        if material.contents is not None:
            contexts_q = contexts_of(pair.q, material.contents, plan.contexts_p)
        require_room(pair.q, contexts_q or plan.contexts_p, plan.max_tokens)
        whole = Gathered(plan.clusters)
    else:
        assert windows is not None
        require_readable(pair.q, windows.x)
        whole = Gathered(0, every=True)
    watch(
        observe,
        f"{name} reads them",
        reference.count,
        lambda done: score_candidate(
            pair,
            reference,
            whole,
            contexts_q,
            features=material.features,
            max_tokens=settings.max_tokens if plan is not None else settings.context,
            shown=SHOWN_STRINGS if plan is not None else 0,
            folder=folder,
            processes=processes,
            observe=done,
        ),
    )
    reverse = None
    if plan is not None:
        floor = None
        if wide is not None:
            floor = dtype_floor(prepare(wide, pair.q, settings, prompts).p, pair.p, whole.shown.statistics.x)
        result = from_strings(whole, pair.p, pair.q, settings, plan, notes, env, floor)
        per_token = next(e for e in result.estimates if e.estimand == "R")
        if both:
            reverse = other_direction(pair, plan, contexts_q, settings, env, notes, where, resume, observe, name)
    else:
        assert windows is not None
        result = from_text(whole, pair.p, pair.q, settings, windows, pair.notes, env)
        per_token = result.headline
    if folder is not None and processes.first:
        keep(folder, result, pair.p, whole)
    return Entry(name, result, per_token, {}, against_floor(whole), reverse)


def other_direction(
    pair: Pair,
    plan: Plan,
    contexts_q: list[torch.Tensor] | None,
    settings: Settings,
    env: dict[str, Any],
    notes: tuple[str, ...],
    where: Path | None,
    resume: bool,
    observe: Observer | None,
    name: str,
) -> Comparison:
    """``KL(q‖p)`` from strings of the candidate itself: other strings than those of ``p``, so no pairing across them."""
    backwards = replace(settings, divergence="reverse_kl")
    plan = replace(plan, contexts_q=contexts_q or plan.contexts_p).swapped()
    folder = None if where is None else pair_folder(where / "from_q", backwards, env, resume)
    began = time.monotonic()

    def seen(state: Any) -> None:
        if observe is not None:
            observe(Stage(f"{name} draws its own", state.strings, state.total, time.monotonic() - began))

    if folder is not None and (folder.path / RESULT).is_file():
        whole = Gathered(plan.clusters)
        for batch in folder.batches():
            whole.add(batch)
    else:
        whole = draw_strings(pair.swapped(), plan, backwards, folder, seen)
    result = from_strings(whole, pair.q, pair.p, backwards, plan, notes, env)
    if folder is not None:
        keep(folder, result, pair.q, whole)
    return result


def pair_folder(where: Path, settings: Settings, env: dict[str, Any], resume: bool) -> RunFolder:
    """The folder of a pair: a new one, or with ``resume`` the one that is there, finished or not.

    Raises:
        RunFolderError: it holds another run, or cannot be written.
    """
    if resume and (where / RESULT).is_file():
        folder = RunFolder.open(where)
        folder.check_same_run(settings.to_dict(), env)
        return folder
    return RunFolder.create(where, settings.to_dict(), env, resume=resume and where.exists())


def keep(folder: RunFolder, result: Comparison, model: LanguageModel, whole: Gathered) -> None:
    """Write the result of a pair, and its page."""
    if (folder.path / RESULT).is_file():
        folder.rewrite(result.to_dict())
    else:
        folder.finish(result.to_dict(), shown_texts(model, whole.shown))
    write_report(folder)
