"""Rounded weights: a linear layer's weights moved to the nearest values of a coarser format, and kept as they were.

The error of a quantisation without its saving: the model runs in its own precision, so that what it
loses is the rounding of the weights and nothing else. Formats of whole numbers have the symmetric
grid ``scale · {−m, …, m}`` with ``m = 2^(bits−1) − 1`` and ``scale = max|w| / m`` over an output's
weights, or over each group of consecutive inputs. ``float8_e4m3fn`` has such a scale too, with the
format's largest value as ``m``; ``bfloat16`` and ``float16`` have none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

SCALED = {"float8_e4m3fn": torch.float8_e4m3fn}
PLAIN = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def rounded(weight: Tensor, bits: int, *, dim: int) -> Tensor:
    """The nearest weights on a symmetric grid of ``2^bits − 1`` values, one scale a slice along ``dim``.

    Example:
        >>> rounded(torch.tensor([[1.0, 0.4, -0.6]]), 2, dim=0).tolist()
        [[1.0, 0.0, -1.0]]
    """
    rest = tuple(d for d in range(weight.dim()) if d != dim)
    scale = weight.abs().amax(rest, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.where(scale > 0, (weight / scale).round() * scale, 0.0)


def rounded_rows(weight: Float[Tensor, "o i"], kind: str, group: int | None = None) -> Float[Tensor, "o i"]:
    """Weights rounded to the format ``kind``, with a scale for each row, or for each ``group`` columns of one.

    The arithmetic is in single precision at least; a last group may be shorter.

    Raises:
        ValueError: a weight is larger than the format can hold.

    Example:
        >>> rounded_rows(torch.tensor([[7.0, 0.4, 0.7, 0.06]]), "int4", 2)
        tensor([[7.0000, 0.0000, 0.7000, 0.1000]])
    """
    wide = weight if weight.dtype == torch.float64 else weight.float()
    if kind in PLAIN:
        found = wide.to(PLAIN[kind]).to(wide.dtype)
        if not bool(torch.isfinite(found).all()):
            raise ValueError(
                f"expected weights of at most {torch.finfo(PLAIN[kind]).max:g}, the largest {kind}, got one of "
                f"{float(wide.abs().max()):g}; round to bfloat16, which has the range of single precision"
            )
    elif kind in SCALED:
        scale = wide.abs().amax(1, keepdim=True) / torch.finfo(SCALED[kind]).max
        found = torch.where(scale > 0, (wide / scale).to(SCALED[kind]).to(wide.dtype) * scale, 0.0)
    else:
        bits = int(kind.removeprefix("int"))
        parts = [wide] if group is None else torch.split(wide, group, dim=1)
        found = torch.cat([rounded(part, bits, dim=0) for part in parts], dim=1)
    return found.to(weight.dtype)


def linear_layers(network: Any) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers of a network by name: all but its output head, and but those of adapters on it."""
    head = network.get_output_embeddings()
    head = getattr(head, "base_layer", head)
    adapted = [name for name, module in network.named_modules() if hasattr(module, "base_layer")]
    for name, module in network.named_modules():
        if any(name == a or (name.startswith(f"{a}.") and not name.startswith(f"{a}.base_layer")) for a in adapted):
            continue
        # Kernels of quantised layers are linear layers by inheritance, so it is the interface that tells.
        linear = isinstance(module, (nn.Linear, Conv1D)) or hasattr(module, "in_features")
        if linear and module is not head and hasattr(module, "weight"):
            yield name, module


def round_weights(network: Any, kind: str, group: int | None = None) -> str:
    """Round the weights of every linear layer but the output head, in place; return a note on what was rounded.

    Embeddings, the head, norms and biases stay as they are, as in most quantised checkpoints, and so do weights that
    no linear layer holds, such as stacked experts: the note tells which share of the parameters was rounded.

    Raises:
        ValueError: there are no linear layers, or their weights are quantised already.

    Example:
        >>> from klkit import load
        >>> round_weights(load("klkit:docs").model, "int4")
        'rounded weights: 16 linear layers to int4, 78% of the parameters; the others stay float32'
    """
    count = layers = 0
    for name, module in linear_layers(network):
        weight: Any = module.weight
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2 or weight.is_meta:
            raise ValueError(
                f"expected linear layers with plain weights to round, got {type(module).__name__} {name}, whose "
                f"weights are quantised or elsewhere; name a checkpoint in full precision"
            )
        with torch.no_grad():
            # GPT-2's layers keep outputs in columns.
            rows = weight.T if isinstance(module, Conv1D) else weight
            new = rounded_rows(rows, kind, group)
            weight.copy_(new.T if isinstance(module, Conv1D) else new)
        count, layers = count + weight.numel(), layers + 1
    if not layers:
        raise ValueError(
            f"expected a network with linear layers to round, got {type(network).__name__} without any; leave round out"
        )
    total = sum(parameter.numel() for parameter in network.parameters())
    what = kind if group is None else f"{kind} in groups of {group}"
    return (
        f"rounded weights: {layers} linear layers to {what}, {math.floor(100 * count / total)}% of the parameters; "
        f"the others stay {str(network.dtype).removeprefix('torch.')}"
    )
