"""How large a model is: bytes on disk, parameters, and bits for each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from klkit.models.base import LanguageModel
from klkit.models.digest import place_of, plain_tensors
from klkit.models.hf import HuggingFaceModel
from klkit.models.rounding import linear_layers
from klkit.models.spec import ModelSpec, locate
from klkit.models.wrap import innermost

SCALE_BITS = 16  # of the scales in a rounded layer, as most formats store them


@dataclass(frozen=True, slots=True)
class WeightSize:
    """What a model's weights take.

    Attributes:
        file_bytes: size of the files that its weights are read from; None where there are none.
        parameters: how many weights it has, before any packing.
        bits_per_weight: for each of them.
        nominal: where the bits are not those of files or memory but what a format would take, a few words on it;
            empty elsewhere.
    """

    file_bytes: int | None
    parameters: int
    bits_per_weight: float
    nominal: str = ""


def weight_size(model: LanguageModel, spec: ModelSpec | None = None) -> WeightSize | None:
    """What the weights of ``model`` take; None of a model that has none, such as an automaton.

    Counted are:

    - in ``file_bytes``, the weight files that loading ``spec`` reads, in the folder or in the Hub's cache: one file or
      the shards of its index, safetensors before pickles, and an adapter's file in addition to its base's. No
      tokenizer, no configuration, no second copy in another format.
    - in ``parameters``, every weight once, tied ones and those under two names too, and of adapters this model's
      only. A layer that keeps its weights packed counts as inputs times outputs.
    - in ``bits_per_weight``, ``8 · file_bytes / parameters``. For a model that was quantised while loading, or whose
      files are not here: the bits in memory of weights and of what their quantisation keeps beside them (scales,
      code books), over ``parameters``. For ``round=…``, whose weights are rounded but kept in full: the bits that the
      format would take, with 16 for each scale, for the rounded layers, and the bits in memory of the others;
      ``nominal`` then says so.

    Args:
        model: a loaded model, transformed or not.
        spec: what it was loaded from.

    Example:
        >>> from klkit import load
        >>> spec = "klkit:docs,round=int4"
        >>> size = weight_size(load(spec), ModelSpec.parse(spec))
        >>> size.parameters, round(size.bits_per_weight, 2), size.nominal
        (564288, 10.15, '16 layers at 4 bits a weight and 16 a scale, the others as they are')
    """
    inner = innermost(model)
    if not isinstance(inner, HuggingFaceModel):
        return None
    network: Any = inner.model
    held = {place_of(leaf): leaf for name, value in inner.weights().items() for _, leaf in plain_tensors(name, value)}
    packed = dict(_packed(network))
    plain = {place_of(p.detach()): p.numel() for p in network.parameters() if id(p) not in packed}
    parameters = sum(count for place, count in plain.items() if place in held) + sum(packed.values())
    files = None if spec is None else weight_files(spec)
    file_bytes = None if files is None else sum(file.stat().st_size for file in files)
    in_memory = sum(leaf.numel() * leaf.element_size() for leaf in held.values())
    if spec is not None and spec.round is not None:
        bits, words = _nominal(network, spec, 8 * in_memory)
        return WeightSize(file_bytes, parameters, bits / parameters, words)
    quantized = spec is not None and spec.quantization is not None
    total = in_memory if file_bytes is None or quantized else file_bytes
    return WeightSize(file_bytes, parameters, 8 * total / parameters)


def weight_files(spec: ModelSpec) -> list[Path] | None:
    """The weight files that loading ``spec`` reads, the adapter's last; None where some are not on this machine."""
    found = _files(spec.path, spec.revision, "model.safetensors", "pytorch_model.bin", pickles=not spec.safetensors)
    if found is None or spec.peft is None:
        return found
    adapter = _files(spec.peft, None, "adapter_model.safetensors", "adapter_model.bin", pickles=True)
    return None if adapter is None else found + adapter


def _files(path: str, revision: str | None, safe: str, pickled: str, *, pickles: bool) -> list[Path] | None:
    source = locate(path)

    def find(name: str) -> Path | None:
        if Path(source).is_dir():
            return file if (file := Path(source) / name).is_file() else None
        cached = huggingface_hub.try_to_load_from_cache(source, name, revision=revision)
        return Path(cached) if isinstance(cached, str) else None

    for name in (safe, pickled) if pickles else (safe,):
        if (whole := find(name)) is not None:
            return [whole]
        if (index := find(f"{name}.index.json")) is not None:
            shards = [find(shard) for shard in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
            return None if None in shards else [shard for shard in shards if shard is not None]
    return None


def _packed(network: Any) -> Iterator[tuple[int, int]]:
    """Identity of packed weights, and how many weights are in each."""
    for module in network.modules():
        weight = getattr(module, "weight", None)
        inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if not isinstance(inputs, int) or not isinstance(outputs, int) or hasattr(module, "base_layer"):
            continue
        if not isinstance(weight, Tensor) or weight.numel() != inputs * outputs:
            yield id(module if weight is None else weight), inputs * outputs


def _nominal(network: nn.Module, spec: ModelSpec, bits_in_memory: int) -> tuple[int, str]:
    """Bits that a rounded model would take in its format, and words for them."""
    kind, group = spec.rounding()
    bits = {"int4": 4, "int8": 8, "float8_e4m3fn": 8}.get(kind, 16)
    total, layers = bits_in_memory, 0
    for _, module in linear_layers(network):
        weight: Any = module.weight
        outputs, inputs = weight.T.shape if isinstance(module, Conv1D) else weight.shape
        scales = 0 if bits == 16 else outputs * (1 if group is None else -(-inputs // group))
        total += (bits - 8 * weight.element_size()) * weight.numel() + SCALE_BITS * scales
        layers += 1
    beside = "" if bits == 16 else f" and {SCALE_BITS} a scale"
    return total, f"{layers} layers at {bits} bits a weight{beside}, the others as they are"
