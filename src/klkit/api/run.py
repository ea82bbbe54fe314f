"""One run, from settings to a result: load, align, draw, score, check, assemble, write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from klkit.api.assemble import from_strings, from_text, from_two_directions
from klkit.api.gather import Gathered
from klkit.api.prepare import (
    Pair,
    contexts_digest,
    document_ids,
    environment,
    load_models,
    make_plan,
    prepare,
    resolved,
    with_defaults,
)
from klkit.api.prompts import read_documents, read_prompts
from klkit.api.settings import Settings
from klkit.api.strings import (
    Observer,
    Plan,
    batches_of,
    describe,
    dtype_floor,
    mend_samples,
    no_details,
    run_strings,
)
from klkit.api.text import Windows, cut
from klkit.estimators import summarise
from klkit.estimators.statistics import score
from klkit.estimators.tally import Tally
from klkit.estimators.variates import token_features
from klkit.models.base import LanguageModel
from klkit.models.spec import load
from klkit.models.token_classes import token_classes
from klkit.report.html import write_report
from klkit.report.record import RunFolder
from klkit.report.shards import Batch, Shown
from klkit.results import Comparison
from klkit.sequences import Prompts

TOKEN_FEATURES = 16


def run(
    settings: Settings, *, out: Path | None = None, resume: bool = False, observe: Observer | None = None
) -> Comparison:
    """Carry out ``settings``: the whole of what ``klkit estimate`` does.

    Args:
        out: run folder; None keeps nothing.
        resume: continue the run in ``out``.
        observe: called after every batch.

    Raises:
        ValueError: options, files or models that cannot be used, each with what to do instead.
        OSError: a file or checkpoint that is not there.
    """
    if resume and out is not None and (out / "result.json").is_file():
        raise ValueError(
            f"expected an unfinished run in {out} for --resume, got a finished one; read it with: klkit report {out}"
        )
    settings = resolved(settings)
    prompts = None
    if settings.prompts is not None:
        prompts = read_prompts(settings.prompts, settings.column, settings.group_column)
    documents = (
        read_documents(settings.text, "text" if settings.column == "prompt" else settings.column)
        if settings.text
        else None
    )
    p, q = load_models(settings)
    # Loaded before anything is drawn: what cannot be measured should not be found out at the end.
    wide = None
    if settings.floor == "dtype":
        sampled = settings.q if settings.divergence == "reverse_kl" else settings.p
        wide = load(with_defaults(settings, sampled), dtype="float32")
    return measure(
        p, q, settings, prompts=prompts, wide=wide, documents=documents, out=out, resume=resume, observe=observe
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
) -> Comparison:
    """Compare two loaded models as ``settings`` say, on ``prompts`` or on the fixed text ``documents``.

    Args:
        wide: the sampled model in fp32, for the floor ``dtype``.

    Raises:
        ValueError: as :func:`run`.
    """
    if settings.floor == "dtype" and wide is None:
        raise ValueError(
            "expected models by name for the floor 'dtype', got loaded ones: klkit cannot load their fp32 form; "
            "give specifications, or leave floor out"
        )
    pair = prepare(p, q, settings, prompts)
    env = environment(settings, pair)
    if documents is not None:
        windows = cut(
            documents, lambda text: document_ids(pair.p, text), shortest(settings.context, pair.p.window, pair.q.window)
        )
        folder = start(out, settings, env, resume)
        whole, result = measure_text(pair, settings, windows, env, folder)
    else:
        plan, notes = make_plan(pair, settings, prompts)
        pair = replace(pair, notes=(*pair.notes, *notes))
        env["contexts"] = contexts_digest(plan)
        settings = replace(settings, samples=plan.samples, max_tokens=plan.max_tokens)
        folder = start(out, settings, env, resume)
        if settings.divergence in ("js", "jeffreys"):
            whole, result = measure_both(pair, plan, settings, env, folder, resume, observe)
        else:
            reverse = settings.divergence == "reverse_kl"
            if reverse:
                pair, plan = pair.swapped(), plan.swapped()
            if wide is not None:
                wide = prepare(wide, pair.q, settings, prompts).p
            whole, result = measure_strings(pair, plan, settings, env, wide, folder, observe)
    if folder is not None:
        folder.finish(result.to_dict(), shown_texts(pair.p, whole.shown))
        write_report(folder)
    return result


def start(out: Path | None, settings: Settings, env: Mapping[str, Any], resume: bool) -> RunFolder | None:
    """The run folder, if one is wanted."""
    return None if out is None else RunFolder.create(out, settings.to_dict(), env, resume=resume)


def shortest(*limits: int | None) -> int:
    """The smallest of the limits that exist."""
    return min(limit for limit in limits if limit is not None)


def measure_strings(
    pair: Pair,
    plan: Plan,
    settings: Settings,
    env: Mapping[str, Any],
    wide: LanguageModel | None,
    folder: RunFolder | None,
    observe: Observer | None,
) -> tuple[Gathered, Comparison]:
    """Estimand S and R from strings of ``pair.p``."""
    whole = draw_strings(pair, plan, settings, folder, observe)
    if settings.rtol is not None and not narrow_enough(whole.tally, settings):
        cut_short = (
            f"the interval is still wider than rtol={settings.rtol:g} allows: {plan.total} strings were the limit"
        )
        pair = replace(pair, notes=(*pair.notes, cut_short))
    floor = None if wide is None else dtype_floor(wide, pair.p, whole.shown.statistics.x)
    return whole, from_strings(whole, pair.p, pair.q, settings, plan, pair.notes, env, floor)


def draw_strings(
    pair: Pair,
    plan: Plan,
    settings: Settings,
    folder: RunFolder | None,
    observe: Observer | None,
    *,
    mixture: bool = False,
) -> Gathered:
    """The strings of one direction, drawn, scored and summed up."""
    found = Gathered(plan.clusters, classes=token_classes(pair.p), groups=plan.groups)
    draw_batches(
        pair,
        plan,
        settings,
        found.add,
        mixture=mixture,
        enough=None if settings.rtol is None else lambda: narrow_enough(found.tally, settings),
        folder=folder,
        observe=observe,
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
) -> None:
    """Draw and score the strings of one direction as ``settings`` say, and hand over every batch."""
    embedding = pair.p.embedding()
    run_strings(
        pair.p,
        pair.q,
        plan,
        keep=keep,
        batch_size=settings.batch_size,
        features=None if embedding is None else token_features(embedding, TOKEN_FEATURES),
        mixture=mixture,
        js=settings.token_js,
        floor=settings.floor != "none",
        enough=enough,
        folder=folder,
        observe=observe,
    )


def narrow_enough(tally: Tally, settings: Settings) -> bool:
    """Whether the headline's interval is as narrow as ``--rtol`` asks."""
    if settings.rtol is None or bool((tally.strings().infinite > 0).any()):
        return True  # infinite, whatever else is drawn
    estimate = summarise(settings.method, tally)
    interval = estimate.interval()
    return (interval.upper - interval.lower) / 2 <= settings.rtol * abs(estimate.value)


def measure_both(
    pair: Pair,
    plan: Plan,
    settings: Settings,
    env: Mapping[str, Any],
    folder: RunFolder | None,
    resume: bool,
    observe: Observer | None,
) -> tuple[Gathered, Comparison]:
    """Jensen-Shannon or Jeffreys: half from strings of ``p``, half from strings of ``q``."""
    mixture = settings.divergence == "js"
    below = None
    if folder is not None:
        below = RunFolder.create(folder.path / "from_q", settings.to_dict(), env, resume=resume)
    forward = draw_strings(pair, plan, settings, folder, observe, mixture=mixture)
    backward = draw_strings(pair.swapped(), plan.swapped(), settings, below, observe, mixture=mixture)
    result = from_two_directions(forward, backward, pair.p, pair.q, settings, plan, pair.notes, env)
    if below is not None:
        below.finish(result.to_dict(), shown_texts(pair.p, backward.shown))
    return forward, result


def measure_text(
    pair: Pair, settings: Settings, windows: Windows, env: Mapping[str, Any], folder: RunFolder | None
) -> tuple[Gathered, Comparison]:
    """Estimand F: both models read the windows; nothing is sampled."""
    size = settings.batch_size if isinstance(settings.batch_size, int) else 16
    found = Gathered(0, every=True, classes=token_classes(pair.p), first=False)
    stored = 0
    if folder is not None:
        for batch in folder.batches():
            found.add(batch)
            stored += 1
        mend_samples(folder, pair.p, len(found))
    for number, rows in enumerate(batches_of(len(windows.x), size, start=len(found)), start=stored):
        scored = score(pair.p, pair.q, windows.x.select(rows), batch_size=size, js=settings.token_js)
        batch = Batch(scored, no_details(), torch.zeros(0))
        if folder is not None:
            folder.append(number, batch, describe(pair.p, batch.statistics))
        found.add(batch)
    return found, from_text(found, pair.p, pair.q, settings, windows, pair.notes, env)


def shown_texts(model: LanguageModel, shown: Shown) -> dict[int, str]:
    """Readable text of every token that a page about a run can show."""
    x, details = shown.statistics.x, shown.details
    inside = torch.arange(x.tokens.shape[1]) < x.stop[:, None]
    ids = torch.cat([x.tokens[inside], details.tokens_p.reshape(-1), details.tokens_q.reshape(-1)]).tolist()
    ids = sorted(set(ids))
    return dict(zip(ids, model.pieces(ids), strict=True))
