"""The verbs for Python: what the command line does, on models or on their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

from klkit.api.approximate import approximate as approximate_models
from klkit.api.approximate import approximate_run, require_plain
from klkit.api.approximation import Approximation
from klkit.api.candidates import Candidate
from klkit.api.compare import compare_models
from klkit.api.compare_run import run_compare
from klkit.api.compare_settings import CompareSettings
from klkit.api.drawn import Sampler
from klkit.api.material import Stage
from klkit.api.prepare import MEMORY, load_models, resolved
from klkit.api.prompts import prompts_of
from klkit.api.run import measure, run
from klkit.api.settings import Settings
from klkit.api.strings import ALONE, Observer
from klkit.models.base import LanguageModel
from klkit.ranking import Ranking
from klkit.results import Comparison
from klkit.sequences import Content, Prompts
from klkit.train.processes import Processes


@overload
def estimate(
    p: LanguageModel | str,
    q: LanguageModel | str,
    prompts: Prompts | Sequence[Content] | str | None = None,
    *,
    approximate: Literal[False] = False,
    out: str | Path | None = None,
    resume: bool = False,
    observe: Observer | None = None,
    draw: Sampler | None = None,
    processes: Processes = ALONE,
    **options: Any,
) -> Comparison: ...


@overload
def estimate(
    p: LanguageModel | str,
    q: LanguageModel | str,
    prompts: Prompts | Sequence[Content] | str | None = None,
    *,
    approximate: Literal[True],
    processes: Processes = ALONE,
    **options: Any,
) -> Approximation: ...


def estimate(
    p: LanguageModel | str,
    q: LanguageModel | str,
    prompts: Prompts | Sequence[Content] | str | None = None,
    *,
    approximate: bool = False,
    out: str | Path | None = None,
    resume: bool = False,
    observe: Observer | None = None,
    draw: Sampler | None = None,
    processes: Processes = ALONE,
    **options: Any,
) -> Comparison | Approximation:
    """Estimate ``KL(p‖q) = E_{y∼p} Σ_n Σ_a p(a|y_<n) (log p(a|y_<n) − log q(a|y_<n))``, in nats per response.

    Args:
        p: the model that generates: a specification such as ``"org/name,dtype=bfloat16"``, or a model.
        q: the model compared with it.
        prompts: a file, a list of texts or conversations, or None for one empty prompt.
        approximate: for models with different tokenizers: the canonical-tokenisation number in the divergence's
            stead, see :mod:`klkit.api.approximation`; nothing is written.
        out: run folder to write, with a report; None keeps nothing on disk.
        resume: continue the run in ``out``.
        observe: called after every batch with the state of the run.
        draw: draws the strings in klkit's stead, together with ``sampler="vllm"``: what
            :func:`klkit.integrations.engine.sampler` makes, or any function of that kind.
        processes: that share the work, each of which calls this function: see
            :func:`klkit.train.processes.open_processes`.
        options: any option of :class:`klkit.api.settings.Settings`: ``samples``, ``max_tokens``,
            ``temperature``, ``divergence``, ``method``, ``seed``, ``rtol``, ``batch_size``, …

    Raises:
        ValueError: an option, a prompt or a pair of models that cannot be used.
        VocabularyMismatch: the models do not choose from the same tokens; the message says what can be compared.

    Source: A. Amini, T. Vieira and R. Cotterell (2025), Better Estimation of the KL Divergence Between Language
    Models, arXiv 2504.10637; the variates and intervals go beyond it, see docs/papers.md.

    Example:
        >>> from klkit.models.automaton import coin
        >>> result = estimate(coin(end=0.5), coin(end=0.25), samples=100, max_tokens=60)
        >>> result.headline.method, result.audit["passed"]
        ('rb_cv', True)
    """
    folder = None if out is None else Path(out)
    if isinstance(prompts, str):
        options, prompts = {**options, "prompts": prompts}, None
    settings = Settings.from_mapping({"p": _name(p), "q": _name(q), "approximate": approximate, **options})
    if approximate:
        require_plain(out=out, resume=resume or None, observe=observe, draw=draw)
    named = isinstance(p, str) and isinstance(q, str)
    if not named and (isinstance(p, str) or isinstance(q, str)):
        raise TypeError(
            f"expected two specifications or two models, got {type(p).__name__} and {type(q).__name__}; "
            f"load both with klkit.load"
        )
    if named and prompts is None and approximate:
        return approximate_run(settings, processes)
    if named and prompts is None:
        return run(settings, out=folder, resume=resume, observe=observe, sampler=draw, processes=processes)
    if isinstance(p, str) or isinstance(q, str):
        settings = processes.everywhere(lambda: resolved(settings))
        p, q = processes.everywhere(lambda: load_models(settings, processes))
    if settings.prompts is not None:
        prompts = processes.everywhere(lambda: prompts_of(settings))
    elif prompts is not None:
        prompts = prompts if isinstance(prompts, Prompts) else Prompts(tuple(prompts))
        settings = replace(settings, prompts=f"{MEMORY}{len(prompts)} prompts")
    if approximate:
        return approximate_models(p, q, settings, prompts, processes)
    return measure(
        p,
        q,
        settings,
        prompts=prompts,
        out=folder,
        resume=resume,
        observe=observe,
        sampler=draw,
        processes=processes,
    )


def compare(
    p: LanguageModel | str,
    candidates: Sequence[LanguageModel | str],
    prompts: Prompts | Sequence[Content] | str | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    observe: Callable[[Stage], None] | None = None,
    processes: Processes = ALONE,
    **options: Any,
) -> Ranking:
    """Rank many models by ``KL(p‖q)``, all on the same strings of ``p``, which runs once; ties are called ties.

    Args:
        p: the reference: a specification, a model, or ``"cache:FOLDER"`` for what one said in an earlier comparison.
        candidates: specifications, among them what is done to ``p`` (``"temperature=0.9"``, ``"round=int4"``,
            ``"peft=./adapter"``); or models. One of these is in memory at a time.
        prompts: a file, a list of texts or conversations, or None for one empty prompt.
        out: run folder to write, with a page for the ranking and one for every candidate; None keeps nothing.
        resume: continue the run in ``out``; further candidates may join it.
        observe: called after every batch with the state of the run.
        processes: that share the work, each of which calls this function.
        options: of :class:`klkit.api.settings.Settings` (``samples``, ``max_tokens``, ``text``, …), and ``both``: also
            ``KL(q‖p)``, from strings of every candidate.

    Raises:
        ValueError: options, prompts or models that cannot be used.
        VocabularyMismatch: a candidate does not choose from the tokens of ``p``.

    Example:
        >>> from klkit.models.automaton import coin
        >>> ranking = compare(coin(end=0.5), [coin(end=0.1), coin(end=0.4)], samples=100, max_tokens=60)
        >>> [ranking.entries[i].name for i in ranking.ranked]
        ['coin(0.4)', 'coin(0.1)']
    """
    folder = None if out is None else Path(out)
    if isinstance(prompts, str):
        options, prompts = {**options, "prompts": prompts}, None
    names = [_name(q) for q in candidates]
    settings = CompareSettings.from_mapping({"p": _name(p), "candidates": names, **options})
    given = None if prompts is None else prompts if isinstance(prompts, Prompts) else Prompts(tuple(prompts))
    if given is not None:
        settings = replace(settings, common=replace(settings.common, prompts=f"{MEMORY}{len(given)} prompts"))
    loaded = [model for model in (p, *candidates) if not isinstance(model, str)]
    if not loaded:
        return run_compare(settings, prompts=given, out=folder, resume=resume, processes=processes, observe=observe)
    if len(loaded) <= len(candidates):
        raise TypeError(
            "expected specifications alone or models alone, got some of both; load all of them with klkit.load"
        )
    given = prompts_of(settings.common) if given is None else given
    first, *rest = loaded
    waiting = [Candidate(q.name, lambda q=q: nullcontext(q)) for q in rest]  # type: ignore[misc]
    return compare_models(
        first, waiting, settings, prompts=given, out=folder, resume=resume, processes=processes, observe=observe
    )


def _name(model: LanguageModel | str) -> str:
    return model if isinstance(model, str) else model.name
