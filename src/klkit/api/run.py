"""One run, from settings to a result: load, align, draw, score, check, assemble, write.

Several processes share the batches (:mod:`klkit.api.rounds`); each loads both models, and the first alone reads and
writes the run folder and puts the result together, which all of them return.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from klkit.api.assemble import from_strings, from_text, from_two_directions
from klkit.api.batches import FLOOR_STRINGS, batches_of, describe, floor_of, no_details
from klkit.api.bytewise import cost_notes
from klkit.api.drawn import Sampler
from klkit.api.gather import Gathered, TokenTables
from klkit.api.plan import Plan
from klkit.api.precision import narrow_enough, too_wide
from klkit.api.prepare import (
    Pair,
    contexts_digest,
    document_ids,
    environment,
    load_models,
    make_plan,
    prepare,
    require_alike,
    require_wide,
    resolved,
    with_defaults,
)
from klkit.api.prompts import documents_of, prompts_of
from klkit.api.rounds import in_rounds
from klkit.api.settings import KLKIT, Settings
from klkit.api.strings import ALONE, Observer, run_strings, stored
from klkit.api.text import Windows, cut
from klkit.api.tokenizers import prepare_or_explain
from klkit.estimators.statistics import score
from klkit.estimators.variates import token_features
from klkit.models.base import LanguageModel
from klkit.models.noise import with_rounding_noise
from klkit.models.spec import load
from klkit.report.html import write_report
from klkit.report.record import FROM_Q, RESULT, RunFolder
from klkit.report.shards import Batch, Shown
from klkit.results import Comparison
from klkit.sequences import Prompts
from klkit.train.processes import Processes

TOKEN_FEATURES = 16


def run(
    settings: Settings,
    *,
    out: Path | None = None,
    resume: bool = False,
    observe: Observer | None = None,
    sampler: Sampler | None = None,
    processes: Processes = ALONE,
) -> Comparison:
    """Carry out ``settings``: the whole of what ``klkit estimate`` does.

    Args:
        out: run folder; None keeps nothing.
        resume: continue the run in ``out``.
        observe: called after every batch, in the first process.
        sampler: draws the strings, where ``settings.sampler`` is not klkit.
        processes: that share the work (:func:`klkit.train.processes.open_processes`); each calls this function.

    Raises:
        ValueError: options, files or models that cannot be used, each with what to do instead.
        OSError: a file or checkpoint that is not there.
    """

    def loaded() -> dict[str, Any]:
        if processes.first and resume and out is not None and (out / RESULT).is_file():
            raise ValueError(
                f"expected an unfinished run in {out} for --resume, got a finished one; read it with: klkit report "
                f"{out}"
            )
        prompts, documents = prompts_of(settings), documents_of(settings)
        p, q = load_models(settings, processes)
        # Loaded before anything is drawn: what cannot be measured should not be found out at the end.
        wide = None
        if settings.floor == "dtype":
            sampled = settings.q if settings.divergence == "reverse_kl" else settings.p
            wide = load(with_defaults(settings, sampled, processes), dtype="float32")
        return {"p": p, "q": q, "prompts": prompts, "wide": wide, "documents": documents}

    settings = processes.everywhere(lambda: resolved(settings))
    found = processes.everywhere(loaded)
    p, q = found.pop("p"), found.pop("q")
    return measure(
        p, q, settings, **found, out=out, resume=resume, observe=observe, sampler=sampler, processes=processes
    )


def measure(
    p: LanguageModel,
    q: LanguageModel,
    settings: Settings,
    *,
    prompts: Prompts | None = None,
    documents: Sequence[str] | None = None,
    wide: LanguageModel | None = None,
    out: Path | None = None,
    resume: bool = False,
    observe: Observer | None = None,
    sampler: Sampler | None = None,
    processes: Processes = ALONE,
) -> Comparison:
    """Compare two loaded models as ``settings`` say, on ``prompts`` or on the fixed text ``documents``.

    Args:
        wide: the sampled model in fp32, for the floor ``dtype``.
        sampler: as for :func:`run`.
        processes: that share the work; each brings the same two models.

    Raises:
        ValueError: as :func:`run`.
    """
    require_wide(settings, wide)
    if (settings.sampler == KLKIT) != (sampler is None):
        raise ValueError(
            f"expected a sampler exactly where the settings name another one than {KLKIT}, got the setting "
            f"{settings.sampler!r} {'without' if sampler is None else 'and'} a sampler; on the command line --sampler "
            f"vllm opens one, in Python give both (klkit.integrations.engine.sampler)"
        )
    share = Share(processes, observe if processes.first else None, sampler)
    if documents is not None:
        result = measure_text(p, q, settings, documents, out, resume, share)
    else:
        result = measure_prompts(p, q, settings, prompts, wide, out, resume, share)
    return result


@dataclass(frozen=True, slots=True)
class Share:
    """How a run is carried out: what changes nothing in its result.

    Attributes:
        processes: that share the work.
        observe: called after every batch, in the first process.
        sampler: draws the strings, if klkit does not.
    """

    processes: Processes
    observe: Observer | None
    sampler: Sampler | None


def measure_prompts(
    p: LanguageModel,
    q: LanguageModel,
    settings: Settings,
    prompts: Prompts | None,
    wide: LanguageModel | None,
    out: Path | None,
    resume: bool,
    share: Share,
) -> Comparison:
    """Estimand S and R, and what is put together from both directions."""

    def ready() -> tuple[Pair, Plan, dict[str, Any], LanguageModel | None]:
        pair = prepare_or_explain(p, q, settings, prompts)
        plan, notes = make_plan(pair, settings, prompts)
        pair = replace(pair, notes=(*pair.notes, *notes))
        env = environment(settings, p=pair.p, q=pair.q) | {"contexts": contexts_digest(plan)}
        if settings.divergence == "reverse_kl":
            pair, plan = pair.swapped(), plan.swapped()
        other: LanguageModel | None = None
        if settings.floor == "noise":
            other = with_rounding_noise(pair.p, seed=settings.seed)
        elif wide is not None:
            other = prepare(wide, pair.q, settings, prompts).p
        return pair, plan, env, other

    pair, plan, env, other = share.processes.everywhere(ready)
    require_alike(env, share.processes)
    settings = replace(settings, samples=plan.samples, max_tokens=plan.max_tokens)
    folder = start(out, settings, env, resume, share.processes)
    if settings.divergence in ("js", "jeffreys"):
        return measure_both(pair, plan, settings, env, folder, resume, share)
    return measure_strings(pair, plan, settings, env, other, folder, share)


def start(
    out: Path | None, settings: Settings, env: Mapping[str, Any], resume: bool, processes: Processes
) -> RunFolder | None:
    """The run folder, if one is wanted: made by the first process, and for it alone."""
    if out is None:
        return None
    return processes.by_first(lambda: RunFolder.create(out, settings.to_dict(), env, resume=resume))


def shortest(*limits: int | None) -> int:
    """The smallest of the limits that exist."""
    return min(limit for limit in limits if limit is not None)


def measure_strings(
    pair: Pair,
    plan: Plan,
    settings: Settings,
    env: Mapping[str, Any],
    other: LanguageModel | None,
    folder: RunFolder | None,
    share: Share,
) -> Comparison:
    """Estimand S and R from strings of ``pair.p``; ``other`` is what the floor is measured with, if not ``batch``."""
    whole = draw_strings(pair, plan, settings, folder, share)

    def result() -> Comparison:
        notes = (*pair.notes, *cost_notes(pair.p, pair.q))
        if settings.watched and not narrow_enough(whole.tally, settings):
            notes = (*notes, too_wide(settings, plan.total))
        shown = whole.shown.statistics.x
        few = shown.select(torch.arange(min(len(shown), FLOOR_STRINGS)))
        floor = None if other is None else floor_of(other, pair.p, few)
        found = from_strings(whole, pair.p, pair.q, settings, plan, notes, env, floor)
        finish(folder, found, whole, pair.p)
        return found

    return share.processes.by_first(result)


def finish(folder: RunFolder | None, result: Comparison, whole: Gathered, model: LanguageModel) -> None:
    """Write the result and its page into the run folder, if there is one."""
    if folder is not None:
        folder.finish(result.to_dict(), shown_texts(model, whole.shown))
        write_report(folder)


def draw_strings(
    pair: Pair, plan: Plan, settings: Settings, folder: RunFolder | None, share: Share, *, mixture: bool = False
) -> Gathered:
    """The strings of one direction, drawn, scored and summed up."""
    found = Gathered.of_plan(plan, TokenTables.of(pair.p))
    draw_batches(
        pair,
        plan,
        settings,
        found.add,
        mixture=mixture,
        enough=None if not settings.watched else lambda: narrow_enough(found.tally, settings),
        folder=folder,
        observe=share.observe,
        sampler=share.sampler,
        processes=share.processes,
    )
    return found


def draw_batches(
    pair: Pair,
    plan: Plan,
    settings: Settings,
    keep: Callable[[Batch], None],
    *,
    mixture: bool = False,
    enough: Callable[[], bool] | None = None,
    folder: RunFolder | None = None,
    observe: Observer | None = None,
    sampler: Sampler | None = None,
    processes: Processes = ALONE,
) -> None:
    """Draw and score the strings of one direction as ``settings`` say, and hand over every batch."""

    def features() -> Float[Tensor, "v f"] | None:
        embedding = pair.p.embedding()
        return None if embedding is None else token_features(embedding, TOKEN_FEATURES)

    run_strings(
        pair.p,
        pair.q,
        plan,
        keep=keep,
        batch_size=settings.batch_size,
        features=processes.everywhere(features),
        mixture=mixture,
        js=settings.token_js,
        floor=settings.floor != "none",
        enough=enough,
        folder=folder,
        observe=observe,
        sampler=sampler,
        processes=processes,
    )


def measure_both(
    pair: Pair,
    plan: Plan,
    settings: Settings,
    env: Mapping[str, Any],
    folder: RunFolder | None,
    resume: bool,
    share: Share,
) -> Comparison:
    """Jensen-Shannon or Jeffreys: half from strings of ``p``, half from strings of ``q``."""
    mixture = settings.divergence == "js"
    below = start(None if folder is None else folder.path / FROM_Q, settings, env, resume, share.processes)
    forward = draw_strings(pair, plan, settings, folder, share, mixture=mixture)
    backward = draw_strings(pair.swapped(), plan.swapped(), settings, below, share, mixture=mixture)

    def result() -> Comparison:
        notes = (*pair.notes, *cost_notes(pair.p, pair.q))
        found = from_two_directions(forward, backward, pair.p, pair.q, settings, plan, notes, env)
        if below is not None:
            below.finish(found.to_dict(), shown_texts(pair.p, backward.shown))
        finish(folder, found, forward, pair.p)
        return found

    return share.processes.by_first(result)


def measure_text(
    p: LanguageModel,
    q: LanguageModel,
    settings: Settings,
    documents: Sequence[str],
    out: Path | None,
    resume: bool,
    share: Share,
) -> Comparison:
    """Estimand F: both models read the windows of a fixed text; nothing is sampled."""

    def ready() -> tuple[Pair, dict[str, Any], Windows]:
        pair = prepare_or_explain(p, q, settings, documents=documents)
        context = shortest(settings.context, pair.p.window, pair.q.window)
        windows = cut(documents, lambda text: document_ids(pair.p, text), context)
        return pair, environment(settings, p=pair.p, q=pair.q), windows

    processes = share.processes
    pair, env, windows = processes.everywhere(ready)
    require_alike(env, processes)
    folder = start(out, settings, env, resume, processes)
    size = settings.batch_size if isinstance(settings.batch_size, int) else 16
    found = Gathered.of_text(TokenTables.of(pair.p))
    number = 0

    def work(rows: Tensor) -> Batch:
        scored = score(pair.p, pair.q, windows.x.select(rows), batch_size=size, js=settings.token_js)
        return Batch(scored, no_details(), torch.zeros(0))

    def store(batch: Batch) -> None:
        if folder is not None:
            folder.append(number, batch, describe(pair.p, batch.statistics))

    for batch in () if folder is None else stored(folder, pair.p, processes):
        found.add(batch)
        number += 1
    for batch in in_rounds(batches_of(len(windows.x), size, start=len(found)), work, processes):
        processes.by_first(lambda batch=batch: store(batch))  # type: ignore[misc]
        found.add(batch)
        number += 1

    def result() -> Comparison:
        made = from_text(found, pair.p, pair.q, settings, windows, pair.notes, env)
        finish(folder, made, found, pair.p)
        return made

    return processes.by_first(result)


def shown_texts(model: LanguageModel, shown: Shown) -> dict[int, str]:
    """Readable text of every token that a page about a run can show."""
    x, details = shown.statistics.x, shown.details
    inside = torch.arange(x.tokens.shape[1]) < x.stop[:, None]
    ids = torch.cat([x.tokens[inside], details.tokens_p.reshape(-1), details.tokens_q.reshape(-1)]).tolist()
    ids = sorted(set(ids))
    return dict(zip(ids, model.pieces(ids), strict=True))
