"""A vLLM engine for a model by its specification: what ``klkit estimate --sampler vllm`` draws strings with.

The engine is opened when the first strings are wanted, beside the two models that score them, so it may take a share
of the device's memory only. Nothing of vLLM or torch is imported before that.

Written against the interface of ``LLM`` and ``LoRARequest`` in vLLM's sources and tested with a stand-in for the
engine; it has not been run with vLLM itself.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from klkit.models.spec import ADAPTER_FILE, ModelSpec, locate

if TYPE_CHECKING:
    from klkit.models.base import LanguageModel
    from klkit.sequences import Sequences

ENGINE = "vllm"
MEMORY = 0.4
"""Share of the device's memory that the engine takes, unless told otherwise: both models need room beside it."""
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that the engine prepares for; an adapter's is rounded up to one of them."""


def sampler(spec: str, chosen: str = ENGINE) -> Callable[..., Sequences]:
    """What draws strings from a vLLM engine that serves the model ``spec``, each with the engine's log-probabilities.

    Args:
        spec: of the model that generates, as the run names it.
        chosen: ``vllm``, and options of ``vllm.LLM`` behind commas: ``vllm,tensor_parallel_size=8``.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: options that cannot be read, several processes, or a model that the engine would serve otherwise
            than klkit loads it.

    Example:
        >>> sampler("org/model,quantization=4bit")
        Traceback (most recent call last):
            ...
        ValueError: expected a model that vLLM can serve as klkit loads it, got quantization=4bit in ...
    """
    model, options = ModelSpec.parse(spec), engine_options(chosen)
    if model.quantization is not None:
        raise ValueError(
            f"expected a model that vLLM can serve as klkit loads it, got quantization={model.quantization} in "
            f"{spec!r}, which is done while loading; name a checkpoint that is quantised already, or leave --sampler "
            f"out"
        )
    adapter = _adapter(model)
    if sys.modules.get(ENGINE) is None and importlib.util.find_spec(ENGINE) is None:
        raise ImportError(
            "expected vLLM for --sampler vllm, got an environment without it; pip install vllm, or leave --sampler out "
            "to draw with klkit itself"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"expected one process for --sampler vllm, got {os.environ['WORLD_SIZE']}: the engine starts processes of "
            f"its own; leave the launcher out, and spread the engine with --sampler vllm,tensor_parallel_size=N"
        )
    opened: list[Any] = []

    def draw(p: LanguageModel, contexts: Sequence[Any], **names: Any) -> Sequences:
        from klkit.integrations.vllm import sample

        if not opened:
            opened.append(import_module(ENGINE).LLM(**served(model, p) | options))
        request = {}
        if adapter is not None:
            lora = import_module("vllm.lora.request").LoRARequest("adapter", 1, str(adapter[0]))
            request = {"lora_request": lora}
        return sample(opened[0], p, contexts, weighted=True, **names, **request)

    return draw


def engine_options(chosen: str) -> dict[str, Any]:
    """The engine's options in ``vllm,NAME=VALUE,…``.

    Raises:
        ValueError: one is not of that form.

    Example:
        >>> engine_options("vllm,tensor_parallel_size=8,enforce_eager=true")
        {'tensor_parallel_size': 8, 'enforce_eager': True}
    """
    found = {}
    for item in chosen.split(",")[1:]:
        name, equals, value = (part.strip() for part in item.partition("="))
        if not name.isidentifier() or not equals or not value or name in found:
            raise ValueError(
                f"expected options of vllm.LLM as NAME=VALUE, each once, after 'vllm,', got {item!r} in {chosen!r}; "
                f"write for instance vllm,gpu_memory_utilization=0.5"
            )
        found[name] = yaml.safe_load(value)
    return found


def served(spec: ModelSpec, p: LanguageModel) -> dict[str, Any]:
    """Options under which ``vllm.LLM`` serves the weights of ``spec`` in the precision in which ``p`` scores.

    Example:
        >>> from klkit.models.automaton import coin
        >>> served(ModelSpec.parse("org/name@main"), coin(end=0.5))["revision"]
        'main'
    """
    precision = str(p.dtype).removeprefix("torch.")
    options: dict[str, Any] = {
        "model": locate(spec.path),
        "dtype": "float32" if precision == "float64" else precision,
        "gpu_memory_utilization": MEMORY,
        "trust_remote_code": spec.trust_remote_code,
    }
    if spec.revision is not None:
        options["revision"] = spec.revision
    if spec.tokenizer is not None:
        options["tokenizer"] = locate(spec.tokenizer)
    adapter = _adapter(spec)
    if adapter is not None:
        options |= {"enable_lora": True, "max_lora_rank": adapter[1]}
    return options


def _adapter(spec: ModelSpec) -> tuple[Path, int] | None:
    """The folder of the model's adapter, and the rank to prepare for."""
    if spec.peft is None:
        return None
    folder = Path(locate(spec.peft))
    config = json.loads((folder / ADAPTER_FILE).read_text()) if (folder / ADAPTER_FILE).is_file() else {}
    rank = next((size for size in LORA_RANKS if size >= int(config.get("r") or 0)), None)
    if config.get("peft_type") != "LORA" or rank is None:
        raise ValueError(
            f"expected a folder with a LoRA adapter of rank at most {LORA_RANKS[-1]} for --sampler vllm, got "
            f"peft={spec.peft}; name such a folder, or merge the adapter into its model"
        )
    return folder, rank
