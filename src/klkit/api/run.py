"""One run, from settings to a result: load, align, draw, score, check, assemble, write."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klkit import __version__
from klkit.api.assemble import from_strings, from_text, from_two_directions
from klkit.api.prompts import read_documents, read_prompts, resolve
from klkit.api.settings import CAP_STRINGS, DEFAULT_STRINGS, MINIMUM_STRINGS, Settings
from klkit.api.strings import Observer, Plan, batches_of, dtype_floor, run_strings
from klkit.api.text import cut
from klkit.estimators import summarise
from klkit.estimators.statistics import TokenStatistics, score
from klkit.estimators.variates import token_features
from klkit.models.align import align
from klkit.models.base import LanguageModel
from klkit.models.spec import ModelSpec, load, load_pair
from klkit.models.wrap import temperature
from klkit.report.html import write_report
from klkit.report.record import Batch, RunFolder
from klkit.results import Comparison
from klkit.sequences import Prompts

VERSIONS = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "peft")
TOKEN_FEATURES = 16


@dataclass(frozen=True, slots=True)
class Pair:
    """Two models over one vocabulary, ready to be compared.

    Attributes:
        p: the model that generates.
        q: the model compared with it.
        notes: what aligning their vocabularies changed.
    """

    p: LanguageModel
    q: LanguageModel
    notes: tuple[str, ...]

    def swapped(self) -> Pair:
        """The pair seen from ``q``: for the reverse divergence."""
        return replace(self, p=self.q, q=self.p)


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
    prompts = read_prompts(settings.prompts, settings.column) if settings.prompts is not None else None
    documents = (
        read_documents(settings.text, "text" if settings.column == "prompt" else settings.column)
        if settings.text
        else None
    )
    p, q = load_models(settings)
    return measure(p, q, settings, prompts=prompts, documents=documents, out=out, resume=resume, observe=observe)


def load_models(settings: Settings) -> tuple[LanguageModel, LanguageModel]:
    """Load both models, with the run's dtype and device where their specifications say nothing."""
    specs = [ModelSpec.parse(text) for text in (settings.p, settings.q)]
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    texts = []
    for text, spec in zip((settings.p, settings.q), specs, strict=True):
        if "device=" not in text and "device_map=" not in text and device != "cpu":
            text += f",device={device}"
        if spec.dtype is None and settings.dtype != "auto":
            text += f",dtype={settings.dtype}"
        texts.append(text)
    p, q = load_pair(*texts)
    return p, q


def measure(
    p: LanguageModel,
    q: LanguageModel,
    settings: Settings,
    *,
    prompts: Prompts | None = None,
    documents: Sequence[str] | None = None,
    out: Path | None = None,
    resume: bool = False,
    observe: Observer | None = None,
) -> Comparison:
    """Compare two loaded models as ``settings`` say, on ``prompts`` or on the fixed text ``documents``."""
    pair = prepare(p, q, settings, prompts)
    env = environment(settings, pair)
    folder = RunFolder.create(out, settings.to_dict(), env, resume=resume) if out is not None else None
    if documents is not None:
        whole, result = measure_text(pair, settings, documents, env)
    elif settings.divergence in ("js", "jeffreys"):
        whole, result = measure_both(pair, settings, prompts, env, folder, resume, observe)
    else:
        reverse = settings.divergence == "reverse_kl"
        whole, result = measure_strings(pair.swapped() if reverse else pair, settings, prompts, env, folder, observe)
    if folder is not None:
        folder.finish(whole, result.to_dict(), shown_texts(pair.p, whole))
        write_report(folder)
    return result


def prepare(p: LanguageModel, q: LanguageModel, settings: Settings, prompts: Prompts | None = None) -> Pair:
    """Align the vocabularies, and put the temperature on both models."""
    same = p is q
    # A transformed model has no notes of its own, so they are read off before anything is wrapped.
    loading = [f"{m.name}: {note}" for m in ((p,) if same else (p, q)) for note in getattr(m, "notes", ())]
    if same:
        notes: tuple[str, ...] = ("p and q are one and the same model: the divergence is 0 by definition",)
    else:
        p, q, notes = align(p, q, prompts, shared_only=settings.shared_only)
    notes = (*notes, *loading)
    if settings.temperature != 1.0:
        p = temperature(p, settings.temperature)
        q = p if same else temperature(q, settings.temperature)
        notes = (
            *notes,
            f"both models are taken at temperature {settings.temperature:g}: a divergence of the tempered laws",
        )
    return Pair(p, q, tuple(dict.fromkeys(notes)))


def make_plan(pair: Pair, settings: Settings, prompts: Prompts | None) -> tuple[Plan, tuple[str, ...]]:
    """Contexts for both models, and how many strings of what length.

    Raises:
        ValueError: a prompt leaves no room for a response in a model's window.
    """
    contents = prompts.contents if prompts is not None else (None,)
    contexts_p = [pair.p.context(content) for content in contents]
    contexts_q = contexts_p if pair.q is pair.p else [pair.q.context(content) for content in contents]
    notes: list[str] = []
    if any(not torch.equal(a, b) for a, b in zip(contexts_p, contexts_q, strict=True)):
        notes.append("each model reads the prompts through its own template; the response tokens are shared")
    max_tokens = settings.max_tokens
    for model, contexts in ((pair.p, contexts_p), (pair.q, contexts_q)):
        longest = max(range(len(contexts)), key=lambda i: len(contexts[i]))
        room = max_tokens if model.window is None else model.window - len(contexts[longest])
        if room < 1:
            raise ValueError(
                f"expected prompts shorter than the {model.window} tokens that {model.name} can read, got one of "
                f"{len(contexts[longest])} tokens (prompt {longest + 1}); shorten it or leave it out"
            )
        if room < max_tokens:
            notes.append(
                f"responses are limited to {room} tokens instead of {max_tokens}: {model.name} reads "
                f"{model.window} tokens in all"
            )
            max_tokens = room
    samples = settings.samples
    if samples is None:
        wanted = CAP_STRINGS if settings.rtol is not None else DEFAULT_STRINGS
        samples = max(1, -(-wanted // len(contents)))
    return Plan(contexts_p, contexts_q, samples, max_tokens, settings.seed), tuple(notes)


def measure_strings(
    pair: Pair,
    settings: Settings,
    prompts: Prompts | None,
    env: Mapping[str, Any],
    folder: RunFolder | None,
    observe: Observer | None,
) -> tuple[Batch, Comparison]:
    """Estimand S and R from strings of ``pair.p``."""
    plan, notes = make_plan(pair, settings, prompts)
    whole = draw_strings(pair, plan, settings, folder, observe)
    floor = dtype_floor_of(pair, whole, settings) if settings.floor == "dtype" else None
    return whole, from_strings(whole, pair.p, pair.q, settings, plan, (*pair.notes, *notes), env, floor)


def draw_strings(
    pair: Pair,
    plan: Plan,
    settings: Settings,
    folder: RunFolder | None,
    observe: Observer | None,
    *,
    mixture: bool = False,
) -> Batch:
    """The strings of one direction, drawn, scored and kept."""
    embedding = pair.p.embedding()
    return run_strings(
        pair.p,
        pair.q,
        plan,
        batch_size=settings.batch_size,
        features=None if embedding is None else token_features(embedding, TOKEN_FEATURES),
        mixture=mixture,
        floor=settings.floor == "batch",
        enough=stop_rule(settings),
        folder=folder,
        observe=observe,
    )


def stop_rule(settings: Settings) -> Callable[[TokenStatistics], bool] | None:
    """Whether the headline's interval is narrow enough, for ``--rtol``; None without it."""
    if settings.rtol is None:
        return None
    rtol = settings.rtol

    def enough(statistics: TokenStatistics) -> bool:
        estimate = summarise(settings.method, statistics)
        interval = estimate.interval()
        width = (interval.upper - interval.lower) / 2
        return estimate.n >= MINIMUM_STRINGS and width <= rtol * abs(estimate.value)

    return enough


def measure_both(
    pair: Pair,
    settings: Settings,
    prompts: Prompts | None,
    env: Mapping[str, Any],
    folder: RunFolder | None,
    resume: bool,
    observe: Observer | None,
) -> tuple[Batch, Comparison]:
    """Jensen-Shannon or Jeffreys: half from strings of ``p``, half from strings of ``q``."""
    plan, notes = make_plan(pair, settings, prompts)
    mixture = settings.divergence == "js"
    other = pair.swapped()
    swapped = replace(plan, contexts_p=plan.contexts_q, contexts_q=plan.contexts_p)
    below = None
    if folder is not None:
        below = RunFolder.create(folder.path / "from_q", settings.to_dict(), env, resume=resume)
    forward = draw_strings(pair, plan, replace(settings, rtol=None), folder, observe, mixture=mixture)
    backward = draw_strings(other, swapped, replace(settings, rtol=None), below, observe, mixture=mixture)
    result = from_two_directions(forward, backward, pair.p, pair.q, settings, plan, (*pair.notes, *notes), env)
    if below is not None:
        below.finish(backward, result.to_dict(), shown_texts(pair.p, backward))
    return forward, result


def measure_text(
    pair: Pair, settings: Settings, documents: Sequence[str], env: Mapping[str, Any]
) -> tuple[Batch, Comparison]:
    """Estimand F: both models read the documents; nothing is sampled."""
    limits = [model.window for model in (pair.p, pair.q) if model.window is not None]
    windows = cut(documents, lambda text: document_ids(pair.p, text), min([settings.context, *limits]))
    size = settings.batch_size if isinstance(settings.batch_size, int) else 16
    parts = []
    for rows in batches_of(len(windows.x), size):
        parts.append(score(pair.p, pair.q, windows.x.select(rows), batch_size=size))
    return from_text(TokenStatistics.cat(parts), pair.p, pair.q, settings, windows, pair.notes, env)


def document_ids(model: LanguageModel, text: str) -> Tensor:
    """Ids of a document of any length, as the model's tokenizer makes them for a text."""
    from klkit.models.tokenization import context_ids

    inner: Any = model
    while not hasattr(inner, "tokenizer") and hasattr(inner, "base"):
        inner = inner.base  # a transformation of a model
    if hasattr(inner, "tokenizer"):
        return context_ids(inner.tokenizer, text, inner.vocabulary)
    return model.context(text)


def dtype_floor_of(pair: Pair, whole: Batch, settings: Settings) -> Tensor:
    """``KL(p in fp32 ‖ p as run)`` on the first strings: what the run's precision costs."""
    wide = load(settings.q if settings.divergence == "reverse_kl" else settings.p, dtype="float32")
    return dtype_floor(wide, pair.p, whole.statistics.x)


def shown_texts(model: LanguageModel, whole: Batch) -> dict[int, str]:
    """Readable text of every token that a page about ``whole`` can show."""
    x, details = whole.statistics.x.select(whole.details.string), whole.details
    inside = torch.arange(x.tokens.shape[1]) < x.stop[:, None]
    ids = torch.cat([x.tokens[inside], details.tokens_p.reshape(-1), details.tokens_q.reshape(-1)]).tolist()
    ids = sorted(set(ids))
    return dict(zip(ids, model.pieces(ids), strict=True))


def environment(settings: Settings, pair: Pair) -> dict[str, Any]:
    """What the numbers depend on beside the settings: versions, precision, digests."""
    versions = {"klkit": __version__, "python": platform.python_version()}
    for name in VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    files = {}
    for option in ("prompts", "text"):
        source = getattr(settings, option)
        if source is not None:
            files[option] = {"file": source, "sha256": hashlib.sha256(resolve(source).read_bytes()).hexdigest()}
    return {
        "versions": versions,
        "machine": platform.machine(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "models": {
            role: {
                "name": model.name,
                "dtype": str(model.dtype).removeprefix("torch."),
                "vocabulary": model.vocabulary.fingerprint,
                "vocabulary_size": model.vocabulary.size,
                "ends": list(model.vocabulary.ends),
            }
            for role, model in (("p", pair.p), ("q", pair.q))
        },
        "files": files,
    }
