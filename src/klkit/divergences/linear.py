"""An output head: the linear map, with its scale and its cap, from hidden states to logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from klkit.numerics import linear, rows_per_chunk, widen

TILE_BYTES = 4 << 20
"""Bytes of a weight that are worked on at a time: they stay in cache."""


@dataclass(frozen=True, eq=False, slots=True)
class Head:
    """``z = cap · tanh(factor · (W h + b) / cap)``: what turns a hidden state into logits.

    The tokens are the first ``size`` rows of the weight; any later id is excluded, ``-inf``.

    Attributes:
        weight: ``W``, ``(v, d)``, in any precision; a parameter stays the parameter, so that it can be trained.
        bias: ``b``, ``(v,)``.
        factor: logit scale of the architecture, over the temperature.
        cap: where the architecture bends logits towards a bound, that bound; over the temperature too.
        size: rows that are tokens; None for all of them.

    Raises:
        ValueError: weight and bias do not fit, or ``factor``, ``cap`` or ``size`` is out of range.

    Example:
        >>> head = Head(torch.eye(3, 2), factor=2.0)
        >>> head.logits(torch.tensor([[1.0, -1.0]])).tolist()
        [[2.0, -2.0, 0.0]]
        >>> head.cooled(2.0).logits(torch.tensor([[1.0, -1.0]])).tolist()
        [[1.0, -1.0, 0.0]]
    """

    weight: Float[Tensor, "v d"]
    bias: Float[Tensor, " v"] | None = None
    factor: float = 1.0
    cap: float | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        rows = len(self.weight)
        if self.bias is not None and self.bias.shape != (rows,):
            raise ValueError(
                f"expected a bias of {rows} values, one for each row of the weight, got {tuple(self.bias.shape)}; "
                f"pass the two of one layer"
            )
        if not math.isfinite(self.factor) or (self.cap is not None and not 0 < self.cap < math.inf):
            raise ValueError(
                f"expected a finite factor and a positive finite cap or None, got {self.factor} and {self.cap}; "
                f"take them from the model's configuration"
            )
        if self.size is not None and not 0 < self.size <= rows:
            raise ValueError(f"expected a size in 1..{rows}, the rows of the weight, got {self.size}")

    @property
    def tokens(self) -> int:
        """Number of ids it gives a logit."""
        return len(self.weight) if self.size is None else self.size

    def cooled(self, temperature: float) -> Head:
        """The head whose logits are these, over ``temperature``."""
        cap = None if self.cap is None else self.cap / temperature
        return replace(self, factor=self.factor / temperature, cap=cap)

    def cut(self, size: int) -> Head:
        """The head of the first ``size`` ids only."""
        return replace(self, size=min(size, self.tokens))

    @torch.no_grad()
    def logits(self, hidden: Float[Tensor, "m d"], out: Float[Tensor, "m w"] | None = None) -> Float[Tensor, "m w"]:
        """Logits in single precision or above, without gradients.

        Logits that are rounded to half precision are off by up to 25 % of a gradient where ``p`` is near ``q``, so
        half-precision weights are widened, a tile at a time, or multiplied with a wide accumulator where the device
        has that.

        Args:
            out: where to write them, ``(m, w)`` with ``w`` the number of tokens or more; ids beyond get ``-inf``.

        Raises:
            ValueError: ``out`` has fewer columns than there are tokens.
        """
        dtype = torch.promote_types(widen(hidden).dtype, widen(self.weight).dtype)
        if out is None:
            out = torch.empty(len(hidden), self.tokens, dtype=dtype, device=self.weight.device)
        if out.shape[1] < self.tokens:
            raise ValueError(f"expected room for {self.tokens} logits a row, got {out.shape[1]} columns; widen `out`")
        z = out[:, : self.tokens]
        weight, bias = self.weight[: self.tokens], None if self.bias is None else self.bias[: self.tokens]
        # Autocast would round the logits.
        with torch.autocast(hidden.device.type, enabled=False):
            if hidden.dtype == weight.dtype != dtype and hidden.device.type == "cuda":
                torch.mm(hidden, weight.t(), out_dtype=dtype, out=z)
                if bias is not None:
                    z += bias
                if self.factor != 1.0:
                    z *= self.factor
            else:
                self._product(hidden.to(dtype), weight, bias, z)
            if self.cap is not None:
                z.div_(self.cap).tanh_().mul_(self.cap)
            out[:, self.tokens :].fill_(-torch.inf)
        return out

    def _product(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor) -> None:
        """``z = factor · (hidden Wᵀ + b)``, a tile at a time."""
        for tile, wide in tiles(weight, z.dtype):
            part = linear(hidden, wide, None if bias is None else bias[tile].to(z.dtype), out=z[:, tile])
            if self.factor != 1.0:
                part *= self.factor


def tiles(weight: Float[Tensor, "v d"], dtype: torch.dtype) -> Iterator[tuple[slice, Float[Tensor, "_t d"]]]:
    """The rows of ``weight`` in precision ``dtype``, as many at a time as stay in cache; on accelerators, all of them.

    Reading half the bytes and widening them in one small buffer takes no longer than reading wide weights, and the
    product of a tile is small too, wherever it must be written twice.
    """
    if weight.device.type != "cpu" and weight.dtype == dtype:
        yield slice(0, len(weight)), weight
        return
    rows = rows_per_chunk(weight.shape[1], bytes_per_value=dtype.itemsize, budget=TILE_BYTES)
    buffer = weight.new_empty(0 if weight.dtype == dtype else min(rows, len(weight)), weight.shape[1], dtype=dtype)
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows]
        yield slice(start, start + len(part)), part if part.dtype == dtype else buffer[: len(part)].copy_(part)
