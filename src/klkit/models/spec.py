"""Models by name: ``org/name@revision,dtype=bfloat16,peft=FOLDER`` in one string.

A spec names a checkpoint folder, a model of the Hugging Face Hub, or a packaged checkpoint
(``klkit:NAME``), and the few settings that change its numbers. Loading never runs code from a
checkpoint, reads no pickles and asks the network for nothing that lies in a folder, unless told to.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from klkit.models.hf import HuggingFaceModel

DTYPES = ("float32", "float64", "bfloat16", "float16", "auto")
QUANTIZATIONS = ("8bit", "4bit")
PACKAGED = "klkit:"
ADAPTER_FILE = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What is loaded, and how: the parsed form of a spec string.

    Attributes:
        path: a folder, the id of a model on the Hub, or ``klkit:NAME``.
        revision: branch, tag or commit on the Hub.
        dtype: precision of weights and arithmetic; ``auto`` is the checkpoint's own.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        peft: folder or id of an adapter on top of the model.
        attn: attention implementation, as transformers names it.
        tokenizer: folder or id of the tokenizer, where it is not the model's.
        device_map: placement over several devices (needs accelerate), instead of ``device``.
        quantization: ``8bit`` or ``4bit`` while loading (needs bitsandbytes).
        ends: ids that end a response, joined by ``+``, where the model's own settings are wrong.
        trust_remote_code: run the model code that comes with the checkpoint.
        safetensors: read safetensors only; pickled weights can run code.
    """

    path: str
    revision: str | None = None
    dtype: str | None = None
    device: str = "cpu"
    peft: str | None = None
    attn: str | None = None
    tokenizer: str | None = None
    device_map: str | None = None
    quantization: str | None = None
    ends: str | None = None
    trust_remote_code: bool = False
    safetensors: bool = True

    @classmethod
    def parse(cls, text: str, **overrides: Any) -> ModelSpec:
        """Read a spec string; ``overrides`` win over what it says.

        A folder that holds an adapter only stands for the adapter on the base model that it names.

        Raises:
            ValueError: an option is unknown, repeated, or has a value it cannot have.

        Example:
            >>> ModelSpec.parse("org/name@main,dtype=bfloat16").revision
            'main'
        """
        head, *rest = text.strip().split(",")
        options: dict[str, Any] = {}
        for item in rest:
            key, equals, value = (part.strip() for part in item.partition("="))
            if not equals or not value or key in options:
                raise ValueError(
                    f"expected options of the form NAME=VALUE, each once, after the model's name, got {item!r} in "
                    f"{text!r}; known options: {', '.join(_option_names())}"
                )
            options[key] = value
        path, revision = head.strip(), None
        if "@" in path and not Path(path).expanduser().is_dir():
            path, _, revision = path.rpartition("@")
        merged = {**({"revision": revision} if revision else {}), **options, **overrides}
        for key in merged:
            if key not in _option_names():
                close = difflib.get_close_matches(key, _option_names(), n=1)
                raise ValueError(
                    f"expected one of the options {', '.join(_option_names())}, got {key!r}; "
                    + (f"did you mean {close[0]}?" if close else "see klkit.models.spec.ModelSpec")
                )
        if not path:
            raise ValueError(f"expected a model's folder or name before the first comma, got {text!r}; name a model")
        for key in ("trust_remote_code", "safetensors"):
            if key in merged:
                merged[key] = _boolean(key, merged[key])
        if not isinstance(merged.get("ends", ""), str):
            merged["ends"] = "+".join(str(i) for i in merged["ends"])
        if "peft" not in merged and (base := _base_of_adapter(path)) is not None:
            path, merged["peft"] = base, path
        spec = cls(path=path, **merged)
        _one_of("dtype", spec.dtype, DTYPES)
        _one_of("quantization", spec.quantization, QUANTIZATIONS)
        if spec.ends is not None and not all(part.isdecimal() for part in spec.ends.split("+")):
            raise ValueError(f"expected end token ids joined by +, such as ends=2+32000, got {spec.ends!r}")
        return spec

    def canonical(self) -> str:
        """One string for all spellings of the same spec: folders resolved, options sorted, defaults left out.

        Example:
            >>> ModelSpec.parse("org/name,device=cpu,dtype=auto,attn=sdpa").canonical()
            'org/name,attn=sdpa,dtype=auto'
        """
        parts = [_resolved(self.path) + (f"@{self.revision}" if self.revision else "")]
        for field in sorted(fields(self), key=lambda f: f.name):
            value = getattr(self, field.name)
            if field.name not in ("path", "revision") and value != field.default:
                value = _resolved(value) if field.name in ("peft", "tokenizer") else value
                parts.append(f"{field.name}={str(value).lower() if isinstance(value, bool) else value}")
        return ",".join(parts)

    def base(self) -> ModelSpec:
        """The same model without its adapter."""
        return replace(self, peft=None)

    def end_ids(self) -> tuple[int, ...] | None:
        """The ids of ``ends``, or None."""
        return None if self.ends is None else tuple(int(part) for part in self.ends.split("+"))


def load(spec: str, *, name: str | None = None, **overrides: Any) -> HuggingFaceModel:
    """Load the model that ``spec`` names.

    Args:
        spec: folder, Hub id or ``klkit:NAME``, then options: ``org/name@revision,dtype=bfloat16``.
        name: what reports call it; by default the spec as it was written.
        overrides: options as keywords, such as ``dtype="float64"`` or ``ends=[0, 2]``.

    Raises:
        ValueError: the spec cannot be read, or the checkpoint is incomplete.
        OSError: there is no such folder, or the Hub and its cache cannot provide the model.
        ImportError: the spec needs a library that is not installed.

    Example:
        >>> load("./no-such-folder")
        Traceback (most recent call last):
            ...
        FileNotFoundError: expected a folder with a checkpoint in Hugging Face format, got './no-such-folder', ...
    """
    from klkit.models.checkpoints import load_one

    return load_one(ModelSpec.parse(spec, **overrides), name or spec)


def load_pair(spec_p: str, spec_q: str, **overrides: Any) -> tuple[HuggingFaceModel, HuggingFaceModel]:
    """Load ``(p, q)``; adapters of one base share a single copy of its weights, a spec with itself one model.

    The adapter is switched before each forward pass, so both models run the same kernels on the same
    weights and differ in nothing else. Where loading an adapter changed the base (trained biases, some
    initialisations), that is noticed and two copies are loaded instead.

    Raises:
        ValueError, OSError, ImportError: as :func:`load`.
    """
    from klkit.models.checkpoints import load_one, load_shared

    one, two = ModelSpec.parse(spec_p, **overrides), ModelSpec.parse(spec_q, **overrides)
    if one.canonical() == two.canonical():
        model = load_one(one, spec_p)
        return model, model
    if one.base().canonical() == two.base().canonical():
        pair = load_shared(one, two, (spec_p, spec_q))
        if pair is not None:
            return pair
    return load_one(one, spec_p), load_one(two, spec_q)


def packaged_names() -> list[str]:
    """Names of the checkpoints that come with klkit, for specs ``klkit:NAME``."""
    root = resources.files("klkit").joinpath("zoo", "weights")
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []


def locate(path: str) -> str:
    """A folder on this machine or an id on the Hub for what a spec names.

    Raises:
        ValueError: a packaged name is unknown.
        FileNotFoundError: ``path`` reads like a folder and there is none.
    """
    if path.startswith(PACKAGED):
        name = path.removeprefix(PACKAGED)
        if name not in packaged_names():
            raise ValueError(
                f"expected one of the packaged models {', '.join(PACKAGED + n for n in packaged_names()) or '(none)'}, "
                f"got {path!r}; choose one of these, or name a folder or a model of the Hub"
            )
        return str(resources.files("klkit").joinpath("zoo", "weights", name))
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path:
        raise FileNotFoundError(
            f"expected a folder with a checkpoint in Hugging Face format, got {path!r}, which is "
            f"{'a file' if folder.exists() else 'not there'}; check the path, seen from {Path.cwd().name or '/'}"
        )
    return path


def _base_of_adapter(path: str) -> str | None:
    """The base model that an adapter's folder names; None if ``path`` is no such folder."""
    name = path.removeprefix(PACKAGED)
    folder = Path(locate(path) if path.startswith(PACKAGED) and name in packaged_names() else path).expanduser()
    if (folder / "config.json").is_file() or not (folder / ADAPTER_FILE).is_file():
        return None
    base: str | None = json.loads((folder / ADAPTER_FILE).read_text()).get("base_model_name_or_path")
    return base or None


def _resolved(path: str) -> str:
    folder = Path(path).expanduser()
    return str(folder.resolve()) if folder.is_dir() else path


def _option_names() -> Sequence[str]:
    return [field.name for field in fields(ModelSpec) if field.name != "path"]


def _one_of(key: str, value: str | None, known: Sequence[str]) -> None:
    if value is not None and value not in known:
        raise ValueError(f"expected {key} to be one of {', '.join(known)}, got {value!r}; choose one of these")


def _boolean(key: str, value: object) -> bool:
    text = str(value).lower()
    if text not in ("true", "false", "1", "0", "yes", "no"):
        raise ValueError(f"expected {key} to be true or false, got {value!r}; write {key}=true or {key}=false")
    return text in ("true", "1", "yes")
