"""Models by name: ``org/name@revision,dtype=bfloat16,peft=FOLDER`` in one string.

A spec names a checkpoint folder, a model of the Hugging Face Hub, or a packaged checkpoint
(``klkit:NAME``), and the few settings that change its numbers. Loading never runs code from a
checkpoint, reads no pickles and asks the network for nothing that lies in a folder, unless told to.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klkit.models.places import ADAPTER_FILE as ADAPTER_FILE
from klkit.models.places import base_of_adapter, resolved
from klkit.models.places import locate as locate
from klkit.models.places import packaged_names as packaged_names

if TYPE_CHECKING:
    from klkit.models.hf import HuggingFaceModel
    from klkit.models.wrap import Transformed

DTYPES = ("float32", "float64", "bfloat16", "float16", "auto")
QUANTIZATIONS = ("8bit", "4bit")
ROUNDINGS = ("int4", "int8", "bfloat16", "float16", "float8_e4m3fn")
READOUT = ("temperature", "top_k", "top_p")  # options that change the read-out alone, in the order they are applied


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
        round: ``int4``, ``int8``, ``bfloat16``, ``float16`` or ``float8_e4m3fn``: the weights of the linear layers
            rounded to that format and stored back in the model's own; ``int4/32`` has a scale for every 32 inputs
            instead of one an output (:mod:`klkit.models.rounding`).
        temperature: softmax temperature of the read-out.
        top_k: tokens that stay possible at every decision, after the temperature.
        top_p: mass of the tokens that stay possible at every decision, after ``top_k``.
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
    round: str | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
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
        path, revision, options = _parts(text)
        merged = {**({"revision": revision} if revision else {}), **options, **overrides}
        for key in merged:
            _refuse_unknown(key)
        if not path:
            raise ValueError(f"expected a model's folder or name before the first comma, got {text!r}; name a model")
        for key in ("trust_remote_code", "safetensors"):
            if key in merged:
                merged[key] = _boolean(key, merged[key])
        for key in READOUT:
            if merged.get(key) is not None:
                merged[key] = _number(key, merged[key])
        if not isinstance(merged.get("ends", ""), str):
            merged["ends"] = "+".join(str(i) for i in merged["ends"])
        if "peft" not in merged and (base := base_of_adapter(path)) is not None:
            path, merged["peft"] = base, path
        spec = cls(path=path, **merged)
        _one_of("dtype", spec.dtype, DTYPES)
        _one_of("quantization", spec.quantization, QUANTIZATIONS)
        if spec.round is not None:
            spec.rounding()
            if spec.quantization is not None:
                raise ValueError(
                    f"expected either round or quantization, got round={spec.round} and quantization="
                    f"{spec.quantization}; a quantised layer has no weights left to round: leave one of them out"
                )
        if spec.ends is not None and not all(part.isdecimal() for part in spec.ends.split("+")):
            raise ValueError(f"expected end token ids joined by +, such as ends=2+32000, got {spec.ends!r}")
        return spec

    def canonical(self) -> str:
        """One string for all spellings of the same spec: folders resolved, options sorted, defaults left out.

        Example:
            >>> ModelSpec.parse("org/name,device=cpu,dtype=auto,attn=sdpa").canonical()
            'org/name,attn=sdpa,dtype=auto'
        """
        parts = [resolved(self.path) + (f"@{self.revision}" if self.revision else "")]
        for field in sorted(fields(self), key=lambda f: f.name):
            value = getattr(self, field.name)
            if field.name not in ("path", "revision") and value != field.default:
                value = resolved(value) if field.name in ("peft", "tokenizer") else value
                parts.append(f"{field.name}={str(value).lower() if isinstance(value, bool) else value}")
        return ",".join(parts)

    def network(self) -> ModelSpec:
        """What decides the base network alone: no adapter, no map of the read-out, and any tokenizer and end tokens."""
        return replace(self.untransformed(), peft=None, tokenizer=None, ends=None)

    def untransformed(self) -> ModelSpec:
        """The same model with its read-out as it is."""
        return replace(self, temperature=None, top_k=None, top_p=None)

    def rounding(self) -> tuple[str, int | None]:
        """The format that weights are rounded to, and how many inputs share a scale (None: all of an output's).

        Raises:
            ValueError: there is no such format, or no such group.

        Example:
            >>> ModelSpec.parse("org/name,round=int4/32").rounding()
            ('int4', 32)
        """
        kind, slash, group = (self.round or "").partition("/")
        _one_of("round", kind, ROUNDINGS)
        if slash and (not kind.startswith("int") or not group.isdecimal() or int(group) < 1):
            raise ValueError(
                f"expected a group such as int4/32 after a whole-number format, got round={self.round!r}; other "
                f"formats have one scale an output or none: write round={kind}"
            )
        return kind, int(group) if slash else None

    def end_ids(self) -> tuple[int, ...] | None:
        """The ids of ``ends``, or None."""
        return None if self.ends is None else tuple(int(part) for part in self.ends.split("+"))


def load(spec: str, *, name: str | None = None, **overrides: Any) -> HuggingFaceModel | Transformed:
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
    from klkit.models.family import load_one

    return load_one(ModelSpec.parse(spec, **overrides), name or spec)


def load_network(spec: str, *, name: str | None = None, **overrides: Any) -> HuggingFaceModel:
    """Load a model whose network is wanted as well: to train it, or to take it apart.

    Raises:
        ValueError: the spec maps the read-out, of which a network knows nothing; or as :func:`load`.
        OSError, ImportError: as :func:`load`.

    Example:
        >>> load_network("klkit:docs,temperature=0.9")
        Traceback (most recent call last):
            ...
        ValueError: expected a model without a map of its read-out, got temperature=0.9 in 'klkit:docs,temperature...
    """
    from klkit.models.family import load_untransformed

    parsed = ModelSpec.parse(spec, **overrides)
    given = [f"{key}={getattr(parsed, key):g}" for key in READOUT if getattr(parsed, key) is not None]
    if given:
        raise ValueError(
            f"expected a model without a map of its read-out, got {', '.join(given)} in {spec!r}; "
            f"here the network itself is used, so leave {'it' if len(given) == 1 else 'them'} out"
        )
    return load_untransformed(parsed, name or spec)


def load_pair(
    spec_p: str, spec_q: str, **overrides: Any
) -> tuple[HuggingFaceModel | Transformed, HuggingFaceModel | Transformed]:
    """Load ``(p, q)``; adapters of one base share a single copy of its weights, a spec with itself one model.

    The adapter is switched before each forward pass, so both models run the same kernels on the same
    weights and differ in nothing else. Where loading an adapter changed the base (trained biases, some
    initialisations), that is noticed and two copies are loaded instead. Models that differ in their read-out only
    (``temperature``, ``top_k``, ``top_p``) are one network.

    Raises:
        ValueError, OSError, ImportError: as :func:`load`.
    """
    from klkit.models.family import Family

    family = Family(ModelSpec.parse(spec_p, **overrides), spec_p)
    return family.p, family.candidate(ModelSpec.parse(spec_q, **overrides), spec_q).model


def candidate_spec(p: str, text: str) -> str:
    """The spec of a candidate: a spec of its own, or ``p``'s with the options that ``text`` begins with.

    Options replace those of ``p`` and are added to the others.

    Raises:
        ValueError: ``text`` begins with an option that there is not, or holds what is no option.

    Example:
        >>> candidate_spec("org/name,dtype=bfloat16", "temperature=0.9,dtype=float32")
        'org/name,dtype=float32,temperature=0.9'
        >>> candidate_spec("org/name,dtype=bfloat16", "org/other")
        'org/other'
    """
    first = text.strip().split(",")[0]
    # A folder or a Hub id may hold an equals sign too, but hardly as the rest of a single word.
    if not re.fullmatch(r"\s*\w+\s*=.*", first) or Path(first).is_dir():
        return text
    options = _options(text.strip().split(","), text)
    for key in options:
        _refuse_unknown(key)
    head, *rest = p.strip().split(",")
    base = base_of_adapter(head.strip())
    if base is not None and "peft" in options:
        head = base  # an adapter's folder stands for its base model, on which the other adapter goes
    merged = {**_options(rest, p), **options}
    return ",".join([head, *(f"{key}={value}" for key, value in merged.items())])


def spec_with(text: str, defaults: Mapping[str, Any]) -> ModelSpec:
    """The spec of ``text``, with ``defaults`` for options of which it says nothing.

    Raises:
        ValueError: as :meth:`ModelSpec.parse`.

    Example:
        >>> spec_with("org/name,dtype=float16", {"dtype": "float32", "attn": "eager"}).canonical()
        'org/name,attn=eager,dtype=float16'
    """
    said = set(_parts(text)[2])
    said |= {"device"} if "device_map" in said else set()
    return ModelSpec.parse(text, **{key: value for key, value in defaults.items() if key not in said})


def _parts(text: str) -> tuple[str, str | None, dict[str, str]]:
    """Path, revision and options of a spec."""
    head, *rest = text.strip().split(",")
    path, revision = head.strip(), None
    if "@" in path and not Path(path).expanduser().is_dir():
        path, _, revision = path.rpartition("@")
    return path, revision, _options(rest, text)


def _options(items: Sequence[str], text: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for item in items:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not value or key in options:
            raise ValueError(
                f"expected options of the form NAME=VALUE, each once, after the model's name, got {item!r} in "
                f"{text!r}; known options: {', '.join(_option_names())}"
            )
        options[key] = value
    return options


def _refuse_unknown(key: str) -> None:
    if key not in _option_names():
        close = difflib.get_close_matches(key, _option_names(), n=1)
        raise ValueError(
            f"expected one of the options {', '.join(_option_names())}, got {key!r}; "
            + (f"did you mean {close[0]}?" if close else "see klkit.models.spec.ModelSpec")
        )


def _number(key: str, value: object) -> float | int:
    """The value of an option of the read-out, in its range."""
    what = {
        "temperature": "a positive finite number",
        "top_k": "a whole number of at least 1",
        "top_p": "a number above 0 and at most 1",
    }[key]
    number: float | int
    try:
        number = int(str(value)) if key == "top_k" else float(str(value))
    except ValueError:
        number = 0
    if not 0 < number < math.inf or (key == "top_p" and number > 1):
        raise ValueError(
            f"expected {key} to be {what}, got {value!r}; write {key}={40 if key == 'top_k' else 0.9}, say, or leave "
            f"it out" + ("; for greedy decoding write top_k=1" if key == "temperature" else "")
        )
    return number


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
