"""What happens before a run draws anything: two models over one vocabulary, contexts, a plan, a record of it all."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klkit import __version__
from klkit.api.bytewise import over_bytes, symbol_of
from klkit.api.plan import Plan
from klkit.api.settings import CAP_STRINGS, DEFAULT_BEAM, DEFAULT_STRINGS, Settings
from klkit.api.strings import ALONE
from klkit.models.align import align, context_note
from klkit.models.base import LanguageModel, Named
from klkit.models.spec import ModelSpec, candidate_spec, load_pair
from klkit.models.wrap import innermost, model_digest, temperature
from klkit.sequences import Prompts
from klkit.stats.intervals import MINIMUM_CLUSTERS
from klkit.train.processes import Processes
from klkit.train.records import resolve

MEMORY = "memory:"  # stands for prompts that were given in Python, in the record of a run
VERSIONS = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "peft", "accelerate", "vllm")


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
    return replace(
        settings,
        p=absolute(settings.p),
        q=absolute(candidate_spec(settings.p, settings.q)),
        prompts=None if settings.prompts is None else _absolute_file(settings.prompts),
        text=None if settings.text is None else _absolute_file(settings.text),
        device=device_of(settings),
        beam=DEFAULT_BEAM if settings.bytes and settings.beam is None else settings.beam,
    )


def device_of(settings: Settings) -> str:
    """Where the models run, with the automatic choice made."""
    if settings.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return settings.device


def _absolute_file(source: str) -> str:
    return source if source.startswith("klkit:") else str(resolve(source).resolve())


def absolute(spec: str) -> str:
    """A specification with its folder absolute, if it names one."""
    head, comma, options = spec.partition(",")
    folder = Path(head).expanduser()
    return f"{folder.resolve()}{comma}{options}" if folder.is_dir() else spec


def load_models(settings: Settings, processes: Processes = ALONE) -> tuple[LanguageModel, LanguageModel]:
    """Load both models, with the run's dtype and the process's device where their specifications say nothing.

    Raises:
        ValueError: one of several processes would put a model on the devices of the others.
    """
    p, q = load_pair(with_defaults(settings, settings.p, processes), with_defaults(settings, settings.q, processes))
    return p, q


def with_defaults(settings: Settings, text: str, processes: Processes = ALONE) -> str:
    """A specification with the run's dtype and the process's device where it says nothing itself."""
    spec = ModelSpec.parse(text)
    if processes.count > 1 and spec.device_map is not None:
        raise ValueError(
            f"expected models that fit one device under {processes.count} processes, got {text!r}, which each of them "
            f"would spread over the devices of all; run one process (leave the launcher out), or leave device_map out"
        )
    device = processes.device if processes.count > 1 else settings.device
    if device != "cpu" and "device=" not in text and "device_map=" not in text:
        text += f",device={device}"
    if settings.dtype != "auto" and spec.dtype is None:
        text += f",dtype={settings.dtype}"
    return text


def prepare(p: LanguageModel, q: LanguageModel, settings: Settings, prompts: Prompts | None = None) -> Pair:
    """Align the vocabularies, by way of bytes if that is asked for, and put the temperature on both models."""
    same = p is q
    if settings.bytes:
        p = over_bytes(p, settings)
        q = p if same else over_bytes(q, settings)
    # A transformed model has no notes of its own, but what it transforms may have some.
    loading = [f"{m.name}: {note}" for m in ((p,) if same else (p, q)) for note in getattr(innermost(m), "notes", ())]
    if same:
        notes: tuple[str, ...] = ("p and q are one and the same model: the divergence is 0 by definition",)
    else:
        p, q, notes = align(p, q, prompts, shared_only=settings.shared_only)
    notes = (*notes, *loading)
    if settings.bytes:
        notes = (
            *notes,
            f"a divergence of laws of texts: decisions are bytes, of which max_tokens={settings.max_tokens}",
        )
    if settings.temperature != 1.0:
        if not settings.bytes:  # else it is on the choices of tokens already
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
        symbol = f"{symbol_of(model)}s"
        room = max_tokens if model.window is None else model.window - len(contexts[longest])
        if room < 1:
            raise ValueError(
                f"expected prompts shorter than the {model.window} {symbol} that {model.name} can read, got one of "
                f"{len(contexts[longest])} {symbol} (prompt {longest + 1}); shorten it or leave it out"
            )
        if room < max_tokens:
            notes.append(
                f"responses are limited to {room} {symbol} instead of {max_tokens}: {model.name} reads "
                f"{model.window} {symbol} in all"
            )
            max_tokens = room
    if settings.watched and 1 < len(contents) < MINIMUM_CLUSTERS:
        raise ValueError(
            f"expected one prompt or at least {MINIMUM_CLUSTERS} for --rtol or --until-halfwidth, got {len(contents)}: "
            f"so few prompts give no interval to watch; leave it out and choose --samples"
        )
    samples = settings.samples
    if samples is None:
        wanted = CAP_STRINGS if settings.watched else DEFAULT_STRINGS
        samples = max(1, -(-wanted // len(contents)))
    groups = None if prompts is None else prompts.groups
    return Plan(contexts_p, contexts_q, samples, max_tokens, settings.seed, groups), tuple(notes)


def document_ids(model: LanguageModel, text: str) -> Tensor:
    """Ids of a document of any length, as the model's tokenizer makes them for a text."""
    from klkit.models.tokenization import context_ids

    inner: Any = innermost(model)
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


def environment(settings: Settings, **models: LanguageModel) -> dict[str, Any]:
    """What the numbers depend on beside the settings: versions, files, and precision and digests of models by role."""
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
        "models": described(**models),
        "files": files,
    }


def described(**models: LanguageModel) -> dict[str, Any]:
    """What numbers depend on of each model."""
    return {
        role: {
            "name": model.name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "vocabulary": model.vocabulary.fingerprint,
            "vocabulary_size": model.vocabulary.size,
            "ends": list(model.vocabulary.ends),
            "weights": model_digest(model),
        }
        for role, model in models.items()
    }


def require_wide(settings: Settings, wide: object) -> None:
    """Refuse the floor ``dtype`` of models that were given loaded.

    Args:
        wide: the sampled model in fp32, or what loads it; None if nothing does.

    Raises:
        ValueError: it is wanted, and there is none.
    """
    if settings.floor == "dtype" and wide is None:
        raise ValueError(
            "expected models by name for the floor 'dtype', got loaded ones: klkit cannot load their fp32 form; give "
            "specifications, or leave floor out"
        )


def alike(p: Named, q: Named) -> str:
    """What weights and adapters say of why two models might give the same numbers; empty where they say nothing.

    Example:
        >>> from klkit.models.automaton import coin
        >>> alike(coin(end=0.5), coin(end=0.5)).split(",")[0]
        'Both sides have the same weights'
    """
    one, two = innermost(p), innermost(q)
    idle = [role for role, model in (("p", one), ("q", two)) if getattr(model, "inert", False)]
    if idle:
        return (
            f"The adapter of {' and that of '.join(idle)} changes nothing: its B matrices are all zero, as LoRA "
            f"initialises them; was it saved before it was trained?"
        )
    if not (hasattr(one, "digest") and hasattr(two, "digest")):
        return ""
    if one is two or model_digest(p) == model_digest(q):
        what = "one model under two names" if p.name != q.name else "a model and itself"
        return (
            f"Both sides have the same weights, value for value (digest {model_digest(p)}): this compares {what}; "
            f"look at the paths and options of both."
        )
    return (
        f"The weights of the two sides are different ones (digests {model_digest(p)} and {model_digest(q)}), but what "
        f"differs takes no part in these predictions: look for a weight that is not used, or an adapter or patch that "
        f"is not active."
    )


def contexts_digest(plan: Plan) -> str:
    """Digest of the token ids that both models read before they respond."""
    digest = hashlib.sha256()
    for contexts in (plan.contexts_p, plan.contexts_q):
        for context in contexts:
            digest.update(repr(context.tolist()).encode())
    return digest.hexdigest()[:16]


def require_alike(env: Mapping[str, Any], processes: Processes) -> None:
    """Refuse processes that do not hold the same models and prompts: on several machines files may differ.

    Raises:
        ValueError: what differs, in every process.
    """
    mine = {key: env.get(key) for key in ("models", "contexts", "files")}
    all_of_them = processes.gather(mine)
    differing = [key for key in mine if any(other[key] != all_of_them[0][key] for other in all_of_them)]
    if differing:
        raise ValueError(
            f"expected the same models and prompts in all {processes.count} processes, got other "
            f"{' and '.join(differing)} in some of them; give every machine the same files and revisions"
        )
