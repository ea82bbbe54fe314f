"""Many models compared with one: ``p`` is asked once, then each candidate once, and all of them are ranked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klkit.api.assemble import from_strings, from_text
from klkit.api.batches import SHOWN_STRINGS, floor_of
from klkit.api.candidates import (
    Candidate,
    candidates_of,
    contexts_of,
    folder_of,
    require_room,
    score_candidate,
)
from klkit.api.compare_settings import CompareSettings
from klkit.api.gather import Gathered, TokenTables
from klkit.api.material import (
    Material,
    Observer,
    Stage,
    fill,
    gather_material,
    on_disk,
    place,
    publish_material,
    recorded_material,
    room,
    watch,
    with_backend,
)
from klkit.api.plan import Plan
from klkit.api.prepare import Pair, described, prepare, require_alike, require_wide
from klkit.api.rank import against_floor, rank_entries
from klkit.api.reference import FLOOR_STRINGS
from klkit.api.run import Share, draw_strings, finish
from klkit.api.settings import Settings
from klkit.api.strings import ALONE, stored
from klkit.caches.recorded import RecordedModel
from klkit.models.align import context_note
from klkit.models.base import LanguageModel, Vocabulary
from klkit.models.noise import with_rounding_noise
from klkit.models.wrap import temperature
from klkit.ranking import Entry, Ranking
from klkit.report.html import write_report
from klkit.report.ranking import write_ranking
from klkit.report.record import FROM_Q, RESULT, RunFolder
from klkit.results import Comparison
from klkit.sequences import Prompts
from klkit.train.processes import Processes


@dataclass(frozen=True, slots=True)
class Contest:
    """What stays the same from candidate to candidate.

    Attributes:
        p: the reference, as it was loaded.
        settings: options that all pairs share, with the numbers of strings and tokens that came of them.
        both: whether the other direction is measured too.
        material: what all candidates are scored on.
        prompts: as they were given.
        floor: of ``p``, of its first strings, where it is not that of batch shapes.
        out: run folder, or None.
        resume: whether folders of candidates may be there.
        processes: that share the work.
        observe: called after every batch, in the first process.
        tables: of the vocabularies that ``p`` was read over, one where no candidate has more ids.
    """

    p: LanguageModel
    settings: Settings
    both: bool
    material: Material
    prompts: Prompts | None
    floor: Tensor | None
    out: Path | None
    resume: bool
    processes: Processes
    observe: Observer | None
    tables: dict[Vocabulary, TokenTables] = field(default_factory=dict)


def compare_models(
    p: LanguageModel,
    candidates: Sequence[Candidate],
    settings: CompareSettings,
    *,
    prompts: Prompts | None = None,
    documents: Sequence[str] | None = None,
    wide: Callable[[], LanguageModel] | None = None,
    out: Path | None = None,
    resume: bool = False,
    processes: Processes = ALONE,
    announce: Callable[[str], None] | None = None,
    observe: Observer | None = None,
) -> Ranking:
    """Score every candidate on one set of strings of ``p``, or on one text, and rank them.

    At any time ``p`` and one candidate are in memory, and with a folder one batch of what ``p`` says.

    Args:
        wide: loads ``p`` in fp32, for the floor ``dtype``; it is let go of before any candidate is opened.
        out: run folder; None keeps nothing on disk.
        resume: continue the run in ``out``, which may get further candidates that way.
        processes: that share the work.
        announce: told how much room the run takes, before it is taken.
        observe: called after every batch.

    Raises:
        ValueError: options, prompts or models that cannot be used.
        VocabularyMismatch: a candidate does not choose from the tokens of ``p``.
    """
    observe = observe if processes.first else None
    common = settings.common
    require_wide(common, wide)
    require_all(candidates, out, resume)

    def ready() -> tuple[LanguageModel, Material]:
        if isinstance(p, RecordedModel):
            return p, recorded_material(p, settings)
        alone = prepare(p, p, common, prompts).p
        return alone, gather_material(alone, settings, prompts, documents)

    alone, material = processes.everywhere(ready)
    for candidate in candidates:
        require_room(candidate.name, candidate.window, material.plan, material.windows)
    require_alike(material.env, processes)
    material = with_backend(material, alone, len(candidates), processes)
    folder = None
    if out is not None:
        folder = processes.by_first(lambda: RunFolder.create(out, settings.to_dict(), material.env, resume=resume))
    if not isinstance(p, RecordedModel):
        with ExitStack() as building:
            where = processes.by_first(lambda: place(material, alone, settings, out, building))
            if where is not None:
                material = on_disk(material, where, processes)
                text = processes.by_first(lambda: room(material, alone, where))
                if announce is not None and processes.first and text:
                    announce(text)
            fill(material, processes, observe)
            processes.by_first(lambda: publish_material(material, alone))
    else:
        common = replace(common, temperature=float(material.facts["temperature"]))  # at which it was recorded
    if material.plan is not None:
        common = replace(common, samples=material.plan.samples, max_tokens=material.plan.max_tokens)
    floor = processes.by_first(lambda: other_floor(alone, material, common, wide))
    contest = Contest(p, common, settings.both, material, prompts, floor, out, resume, processes, observe)
    entries = [one_candidate(contest, candidate, settings.pair(i).q) for i, candidate in enumerate(candidates)]
    ranking = rank_entries(entries, settings, material.env, material.notes)
    if folder is not None:
        processes.by_first(lambda: write(folder, ranking))
    return ranking


def write(folder: RunFolder, ranking: Ranking) -> None:
    """Leave the ranking in the run folder."""
    folder.clear()
    write_ranking(folder.path, ranking.to_dict(), {e.name: folder_of(folder.path, e.name) for e in ranking.entries})


def one_candidate(contest: Contest, candidate: Candidate, spec: str) -> Entry:
    """Everything about one candidate, while it is open."""
    settings, material, processes = replace(contest.settings, q=spec), contest.material, contest.processes
    where = None if contest.out is None else folder_of(contest.out, candidate.name)
    with ExitStack() as stack:
        model = processes.everywhere(lambda: stack.enter_context(candidate.open()))

        def ready() -> tuple[Pair, dict[str, Any], list[Tensor] | None]:
            pair = pair_of(contest, model, settings)
            env = {**material.env, "models": described(p=pair.p, q=pair.q)}
            contexts_q = None
            if material.plan is not None and material.contents is not None:
                contexts_q = contexts_of(pair.q, material.contents, material.plan.contexts_p)
                if contexts_q is not None:
                    differing = context_note(material.plan.contexts_p, contexts_q)
                    pair = replace(pair, notes=(*pair.notes, *filter(None, [differing])))
            require_room(candidate.name, pair.q.window, material.plan, material.windows, contexts_q)
            return pair, env, contexts_q

        pair, env, contexts_q = processes.everywhere(ready)
        require_alike(env, processes)
        folder = None
        if where is not None:
            folder = processes.by_first(lambda: pair_folder(where, settings, env, contest.resume))
        whole = gathered(contest, pair.p)
        watch(
            contest.observe,
            f"{candidate.name} reads",
            material.reference.count,
            lambda done: score_candidate(
                pair,
                material.reference,
                whole,
                contexts_q,
                features=material.features,
                js=settings.token_js,
                shown=0 if material.plan is None else SHOWN_STRINGS,
                laws_size=int(material.facts["size"]),
                folder=folder,
                processes=processes,
                observe=done,
            ),
        )
        entry = processes.by_first(lambda: assembled(contest, candidate, model, pair, settings, env, whole, folder))
        if contest.both and material.plan is not None:
            plan = replace(material.plan, contexts_q=contexts_q or material.plan.contexts_p)
            reverse = other_direction(contest, candidate.name, pair, plan, settings, env, where)
            entry = replace(entry, reverse=reverse)
    return entry


def gathered(contest: Contest, p: LanguageModel) -> Gathered:
    """Where the batches of a candidate are summed up; most candidates have the tokens of ``p`` and no others."""
    if p.vocabulary not in contest.tables:
        contest.tables[p.vocabulary] = TokenTables.of(p)
    tables, plan = contest.tables[p.vocabulary], contest.material.plan
    return Gathered.of_text(tables) if plan is None else Gathered.of_plan(plan, tables)


def assembled(
    contest: Contest,
    candidate: Candidate,
    model: LanguageModel,
    pair: Pair,
    settings: Settings,
    env: dict[str, Any],
    whole: Gathered,
    folder: RunFolder | None,
) -> Entry:
    """The result of a candidate, written into its folder if it has one."""
    material = contest.material
    notes = (*pair.notes, *material.notes)
    noise = whole.floor
    if material.plan is None:
        assert material.windows is not None
        result = from_text(whole, pair.p, pair.q, settings, material.windows, pair.notes, env)
        per_token = result.headline
    else:
        noise = noise if contest.floor is None else contest.floor
        result = from_strings(whole, pair.p, pair.q, settings, material.plan, notes, env, contest.floor)
        per_token = next(e for e in result.estimates if e.estimand == "R")
    if folder is not None:
        keep(folder, result, pair.p, whole)
    return Entry(candidate.name, result, per_token, candidate.size(model), against_floor(whole.strings, noise))


def require_all(candidates: Sequence[Candidate], out: Path | None, resume: bool) -> None:
    """Refuse to continue a run without candidates that it has: they would be gone from its table.

    Raises:
        ValueError: some are missing.
    """
    names = {candidate.name for candidate in candidates}
    before = candidates_of(out) if resume and out is not None else []
    missing = [name for name in before if name not in names]
    if missing:
        raise ValueError(
            f"expected all candidates of the run in {out} to continue it, got none of {', '.join(missing)}; name them "
            f"again, with any further ones"
        )


def pair_of(contest: Contest, model: LanguageModel, settings: Settings) -> Pair:
    """``p`` and a candidate over one vocabulary; what was recorded of ``p`` is at the run's temperature already."""
    if isinstance(contest.p, RecordedModel) and settings.temperature != 1.0:
        pair = prepare(contest.p, temperature(model, settings.temperature), replace(settings, temperature=1.0))
        note = f"both models are taken at temperature {settings.temperature:g}, at which p was recorded"
        return replace(pair, notes=(*pair.notes, note))
    return prepare(contest.p, model, settings, contest.prompts)


def other_floor(
    p: LanguageModel, material: Material, settings: Settings, wide: Callable[[], LanguageModel] | None
) -> Tensor | None:
    """The floor of the first strings with noise after every layer, or against fp32; None for that of batch shapes."""
    if material.plan is None:
        return None
    if settings.floor == "noise":
        other: LanguageModel = with_rounding_noise(p, seed=settings.seed)
    elif settings.floor == "dtype" and wide is not None:
        loaded = wide()
        other = prepare(loaded, loaded, settings).p
    else:
        return None
    x = material.reference.store.get(0).x
    return floor_of(other, p, x.select(torch.arange(min(len(x), FLOOR_STRINGS))))


def other_direction(
    contest: Contest,
    name: str,
    pair: Pair,
    plan: Plan,
    settings: Settings,
    env: dict[str, Any],
    where: Path | None,
) -> Comparison:
    """``KL(q‖p)`` from strings of the candidate itself: other strings for each, so nothing is paired."""
    backwards, processes = replace(settings, divergence="reverse_kl"), contest.processes
    began = time.monotonic()

    def seen(state: Any) -> None:
        if contest.observe is not None:
            contest.observe(Stage(f"{name} draws its own", state.strings, state.total, time.monotonic() - began))

    folder = None
    if where is not None:
        folder = processes.by_first(lambda: pair_folder(where / FROM_Q, backwards, env, contest.resume))
    plan = plan.swapped()
    if folder is not None and processes.by_first(lambda: (folder.path / RESULT).is_file()):
        whole = Gathered.of_plan(plan, TokenTables.of(pair.q))
        for batch in stored(folder, pair.q, processes):
            whole.add(batch)
    else:
        whole = draw_strings(pair.swapped(), plan, backwards, folder, Share(processes, seen, None))

    def result() -> Comparison:
        found = from_strings(whole, pair.q, pair.p, backwards, plan, pair.notes, env)
        if folder is not None:
            keep(folder, found, pair.q, whole)
        return found

    return processes.by_first(result)


def pair_folder(where: Path, settings: Settings, env: dict[str, Any], resume: bool) -> RunFolder:
    """The folder of a pair: a new one, or with ``resume`` the one that is there, finished or not.

    Raises:
        RunFolderError: it holds another run, or cannot be written.
    """
    if resume and (where / RESULT).is_file():
        folder = RunFolder.open(where)
        folder.check_same_run(settings.to_dict(), env)
        return folder
    return RunFolder.create(where, settings.to_dict(), env, resume=resume)


def keep(folder: RunFolder, result: Comparison, model: LanguageModel, whole: Gathered) -> None:
    """Write the result of a pair, and its page."""
    if (folder.path / RESULT).is_file():
        folder.rewrite(result.to_dict())
        write_report(folder)
    else:
        finish(folder, result, whole, model)
