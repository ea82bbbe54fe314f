"""``klkit compare`` from settings: whatever can be checked is checked first, then models are loaded one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from klkit.api.candidates import Candidate, candidates_of
from klkit.api.compare import compare_models
from klkit.api.compare_settings import CompareSettings
from klkit.api.material import Observer
from klkit.api.prepare import absolute, resolved, with_defaults
from klkit.api.prompts import documents_of, prompts_of
from klkit.api.settings import Settings
from klkit.api.strings import ALONE
from klkit.caches.recorded import RecordedModel
from klkit.caches.recording import HIDDEN
from klkit.models.align import differing
from klkit.models.base import LanguageModel, VocabularyMismatch
from klkit.models.checkpoints import quiet, read_tokenizer, read_window
from klkit.models.family import Family, load_one
from klkit.models.sizes import weight_size
from klkit.models.spec import ModelSpec, load, locate
from klkit.models.tokenization import token_strings
from klkit.ranking import Ranking
from klkit.sequences import Prompts
from klkit.train.processes import Processes

CACHE = "cache:"
DRAWING = (
    "prompts", "group_column", "text", "context", "samples", "max_tokens", "temperature", "seed", "floor", "batch_size",
)  # fmt: skip
"""Options of drawing strings and asking p: those of a recorded reference were drawn, and it is not there."""


def run_compare(
    settings: CompareSettings,
    *,
    prompts: Prompts | None = None,
    out: Path | None = None,
    resume: bool = False,
    processes: Processes = ALONE,
    announce: Callable[[str], None] | None = None,
    observe: Observer | None = None,
) -> Ranking:
    """Carry out ``settings``: the whole of what ``klkit compare`` does.

    Args:
        prompts: instead of those of a file.
        out: run folder; None keeps nothing.
        resume: continue the run in ``out``; candidates that it does not have yet join it.
        processes: that share the work; each calls this function.
        announce: told how much room the run takes.
        observe: called after every batch, in the first process.

    Raises:
        ValueError: options, files or models that cannot be used, each with what to do instead.
        OSError: a file or checkpoint that is not there.
    """
    settings = processes.everywhere(lambda: settings_resolved(settings, given=prompts is not None))
    if resume and out is not None:
        settings = processes.by_first(lambda: with_those_of(settings, out))
    common = settings.common

    def loaded() -> dict[str, Any]:
        given = prompts if prompts is not None else prompts_of(common)
        documents = documents_of(common)
        specs = [spec_of(common, settings.pair(i).q, processes) for i in range(len(settings.candidates))]

        def waiting(opened: Callable[[ModelSpec, str], AbstractContextManager[LanguageModel]]) -> list[Candidate]:
            return [
                Candidate(name, partial(opened, spec, name), partial(size_of, spec=spec), read_window(spec))
                for spec, name in zip(specs, settings.candidates, strict=True)
            ]

        if common.p.startswith(CACHE):
            require_nothing_drawn(settings)
            p: LanguageModel = RecordedModel.open(common.p.removeprefix(CACHE))
            return {"p": p, "candidates": waiting(lambda spec, name: nullcontext(load_one(spec, name)))}
        mine = spec_of(common, common.p, processes)
        require_one_tokenizer(mine, specs, settings)
        family = Family(mine, common.p)
        candidates = waiting(family.candidate)
        named = with_defaults(common, common.p, processes)
        wide = (lambda: load(named, dtype="float32")) if common.floor == "dtype" else None
        found = {"prompts": given, "documents": documents, "wide": wide}
        return {"p": family.p, "candidates": candidates, **found}

    found = processes.everywhere(loaded)
    p, candidates = found.pop("p"), found.pop("candidates")
    return compare_models(
        p, candidates, settings, **found, out=out, resume=resume, processes=processes, announce=announce,
        observe=observe,
    )  # fmt: skip


def settings_resolved(settings: CompareSettings, *, given: bool) -> CompareSettings:
    """The settings with paths absolute and automatic choices made, so that they repeat the run anywhere."""
    recorded = settings.common.p.startswith(CACHE)
    common = resolved(replace(settings.common, prompts=None) if given else settings.common)
    if recorded:
        common = replace(common, p=CACHE + str(Path(common.p.removeprefix(CACHE)).expanduser().resolve()))
    candidates = tuple(absolute(name) for name in settings.candidates)
    common = replace(common, q=candidates[0], prompts=settings.common.prompts if given else common.prompts)
    return replace(settings, common=common, candidates=candidates)


def with_those_of(settings: CompareSettings, out: Path) -> CompareSettings:
    """The settings with the candidates that the run in ``out`` has: new ones join them."""
    candidates = tuple(dict.fromkeys((*candidates_of(out), *settings.candidates)))
    return replace(settings, common=replace(settings.common, q=candidates[0]), candidates=candidates)


def spec_of(settings: Settings, text: str, processes: Processes) -> ModelSpec:
    """A specification, read, with the run's precision and device where it says nothing."""
    if text.startswith(CACHE):
        raise ValueError(
            f"expected a model for every candidate, got {text!r}: what a model said about its own strings says nothing "
            f"about those of p; a cache can stand for p alone"
        )
    return ModelSpec.parse(with_defaults(settings, text, processes))


def size_of(model: LanguageModel, spec: ModelSpec) -> dict[str, Any]:
    """What its weights take, as tables have it."""
    size = weight_size(model, spec)
    return {} if size is None else asdict(size)


def require_nothing_drawn(settings: CompareSettings) -> None:
    """Refuse options that a recorded reference has settled.

    Raises:
        ValueError: one was given.
    """
    default = {f.name: f.default for f in fields(Settings)}
    given = [name for name in DRAWING if getattr(settings.common, name) != default[name]]
    given += [name for name in ("both", "cache", "cache_limit") if getattr(settings, name)]
    given += ["keep"] if settings.keep != HIDDEN else []
    if given:
        raise ValueError(
            f"expected only options that have an effect, got {', '.join(given)}, but the strings of "
            f"{settings.common.p} are drawn, and its model is not there to be asked again; leave them out, or name the "
            f"model itself"
        )


def require_one_tokenizer(p: ModelSpec, candidates: Sequence[ModelSpec], settings: CompareSettings) -> None:
    """Refuse candidates whose tokens are others than those of ``p``, before anything is loaded or drawn.

    Raises:
        VocabularyMismatch: an id stands for different strings.
        FileNotFoundError: a folder is not there.
    """
    with quiet():
        ours, seen = words_of(p), {p.path}
        for spec, name in zip(candidates, settings.candidates, strict=True):
            locate(spec.path)
            if spec.path in seen and spec.tokenizer is None:
                continue
            seen.add(spec.path)
            if wrong := differing(ours, words_of(spec)):
                i, a, b = wrong[0]
                raise VocabularyMismatch(
                    f"expected candidates over the tokens of p, got {name} with other strings for {len(wrong)} ids: id "
                    f"{i} is {a!r} in {settings.common.p} and {b!r} there; a divergence between token choices needs "
                    f"one tokenizer. Leave it out, or compare texts: klkit estimate with --bytes"
                )


def words_of(spec: ModelSpec) -> tuple[str | None, ...]:
    """The string of each token id that a tokenizer defines."""
    tokenizer = read_tokenizer(spec)
    return token_strings(tokenizer, max(tokenizer.get_vocab().values(), default=-1) + 1)
