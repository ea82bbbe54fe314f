"""What happens before a run draws anything: two models over one vocabulary, contexts, a plan, a record of it all."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klkit import __version__
from klkit.api.settings import CAP_STRINGS, DEFAULT_STRINGS, Settings
from klkit.api.strings import Plan
from klkit.models.align import align, context_note
from klkit.models.base import LanguageModel
from klkit.models.spec import ModelSpec, load_pair
from klkit.models.wrap import temperature
from klkit.sequences import Prompts
from klkit.stats.intervals import MINIMUM_CLUSTERS
from klkit.train.records import resolve

MEMORY = "memory:"  # stands for prompts that were given in Python, in the record of a run
VERSIONS = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "peft")


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


def resolved(settings: Settings) -> Settings:
    """The settings with every path absolute and every automatic choice made, so that they repeat the run anywhere."""
    for name, source in (("prompts", settings.prompts), ("text", settings.text)):
        if source is not None and source.startswith(MEMORY):
            raise ValueError(
                f"expected {name} in a file, got a run whose {name} were given in Python ({source}), which cannot be "
                f"repeated from its config; write them to a file, or repeat the Python call"
            )
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return replace(
        settings,
        p=_absolute(settings.p),
        q=_absolute(settings.q),
        prompts=None if settings.prompts is None else _absolute_file(settings.prompts),
        text=None if settings.text is None else _absolute_file(settings.text),
        device=device,
    )


def _absolute_file(source: str) -> str:
    return source if source.startswith("klkit:") else str(resolve(source).resolve())


def _absolute(spec: str) -> str:
    head, comma, options = spec.partition(",")
    folder = Path(head).expanduser()
    return f"{folder.resolve()}{comma}{options}" if folder.is_dir() else spec


def load_models(settings: Settings) -> tuple[LanguageModel, LanguageModel]:
    """Load both models, with the run's dtype and device where their specifications say nothing."""
    p, q = load_pair(with_defaults(settings, settings.p), with_defaults(settings, settings.q))
    return p, q


def with_defaults(settings: Settings, text: str) -> str:
    """A specification with the run's dtype and device where it says nothing itself."""
    if settings.device != "cpu" and "device=" not in text and "device_map=" not in text:
        text += f",device={settings.device}"
    if settings.dtype != "auto" and ModelSpec.parse(text).dtype is None:
        text += f",dtype={settings.dtype}"
    return text


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
    differing = context_note(contexts_p, contexts_q)
    notes = [] if differing is None else [differing]
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
    if settings.rtol is not None and 1 < len(contents) < MINIMUM_CLUSTERS:
        raise ValueError(
            f"expected one prompt or at least {MINIMUM_CLUSTERS} for --rtol, got {len(contents)}: so few prompts give "
            f"no interval to watch; leave --rtol out and choose --samples"
        )
    samples = settings.samples
    if samples is None:
        wanted = CAP_STRINGS if settings.rtol is not None else DEFAULT_STRINGS
        samples = max(1, -(-wanted // len(contents)))
    groups = None if prompts is None else prompts.groups
    return Plan(contexts_p, contexts_q, samples, max_tokens, settings.seed, groups), tuple(notes)


def document_ids(model: LanguageModel, text: str) -> Tensor:
    """Ids of a document of any length, as the model's tokenizer makes them for a text."""
    from klkit.models.tokenization import context_ids

    inner: Any = model
    while not hasattr(inner, "tokenizer") and hasattr(inner, "base"):
        inner = inner.base  # a transformation of a model
    if hasattr(inner, "tokenizer"):
        return context_ids(inner.tokenizer, text, inner.vocabulary)
    return model.context(text)


def versions() -> dict[str, str]:
    """Versions of klkit, of Python and of the libraries that numbers depend on."""
    found = {"klkit": __version__, "python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def environment(settings: Settings, pair: Pair) -> dict[str, Any]:
    """What the numbers depend on beside the settings: versions, precision, digests."""
    files = {}
    for option in ("prompts", "text"):
        source = getattr(settings, option)
        if source is not None and not source.startswith(MEMORY):
            files[option] = {"file": source, "sha256": hashlib.sha256(resolve(source).read_bytes()).hexdigest()}
    return {
        "versions": versions(),
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
                "weights": model_digest(model),
            }
            for role, model in (("p", pair.p), ("q", pair.q))
        },
        "files": files,
    }


def model_digest(model: LanguageModel) -> str:
    """What tells one set of weights from another: the digest of the model under any transformations, or its name."""
    inner: Any = model
    while hasattr(inner, "base"):
        inner = inner.base
    return str(getattr(inner, "digest", inner.name))


def contexts_digest(plan: Plan) -> str:
    """Digest of the token ids that both models read before they respond."""
    digest = hashlib.sha256()
    for contexts in (plan.contexts_p, plan.contexts_q):
        for context in contexts:
            digest.update(repr(context.tolist()).encode())
    return digest.hexdigest()[:16]
