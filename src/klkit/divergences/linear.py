"""An output head: the linear map, with its scale and its cap, from hidden states to logits, and the way back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from klkit.numerics import linear, rows_per_chunk, wide_dtype

TILE_BYTES, ACCELERATOR_BYTES = 16 << 20, 256 << 20
"""Bytes of a weight that are worked on at a time: on a CPU they stay in its shared cache.

Much less would make more and shorter products, between which threads wait for each other where cores are busy.
"""


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

    def detach(self) -> Head:
        """The head without gradients: for the model that is not trained."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, weight=self.weight.detach(), bias=bias)

    def cut(self, size: int) -> Head:
        """The head of the first ``size`` ids only."""
        return replace(self, size=min(size, self.tokens))

    def rows(self, rows: slice) -> Head:
        """The head of some consecutive ids: of those among ``rows`` that it has."""
        rows = slice(rows.start, min(rows.stop, self.tokens))
        bias = None if self.bias is None else self.bias[rows]
        return replace(self, weight=self.weight[rows], bias=bias, size=None)

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
        dtype = wide_dtype(hidden, self.weight)
        if out is None:
            out = torch.empty(len(hidden), self.tokens, dtype=dtype, device=self.weight.device)
        if out.shape[1] < self.tokens:
            raise ValueError(f"expected room for {self.tokens} logits a row, got {out.shape[1]} columns; widen `out`")
        # Autocast would round the logits.
        with torch.autocast(hidden.device.type, enabled=False):
            for tile, weight in self.tiles(hidden):
                self.read(hidden, tile, weight, out[:, tile])
        out[:, self.tokens :].fill_(-torch.inf)
        return out

    def tiles(self, hidden: Float[Tensor, "m d"]) -> Iterator[tuple[slice, Float[Tensor, "_t d"]]]:
        """The weight's token rows, some at a time, as they are multiplied with ``hidden``.

        On a CPU as many as stay in its cache: to read half the bytes and widen them in one small buffer takes no
        longer than to read wide weights, and no product is large, wherever it must be copied or added.
        """
        weight = self.weight.detach()[: self.tokens]
        dtype = wide_dtype(hidden, weight)
        if weight.device.type == "cuda" and weight.dtype == hidden.dtype == torch.bfloat16:
            dtype = torch.bfloat16  # has products with a wide accumulator there
        budget = TILE_BYTES if weight.device.type == "cpu" else ACCELERATOR_BYTES
        rows = rows_per_chunk(weight.shape[1], bytes_per_value=dtype.itemsize, budget=budget)
        buffer = weight.new_empty(0 if weight.dtype == dtype else min(rows, len(weight)), weight.shape[1], dtype=dtype)
        for start in range(0, len(weight), rows):
            part = weight[start : start + rows]
            yield slice(start, start + len(part)), part if part.dtype == dtype else buffer[: len(part)].copy_(part)

    def read(self, hidden: Tensor, tile: slice, weight: Tensor, out: Tensor) -> Tensor:
        """Logits of one of the :meth:`tiles`, into ``out``."""
        times(hidden, weight, out=out)
        if self.bias is not None:
            out += self.bias[tile]
        if self.factor != 1.0:
            out *= self.factor
        return out if self.cap is None else out.div_(self.cap).tanh_().mul_(self.cap)


def times(
    x: Float[Tensor, "m d"], weight: Float[Tensor, "t d"], *, out: Float[Tensor, "m t"] | None = None
) -> Float[Tensor, "m t"]:
    """``x Wᵀ`` in at least single precision, also from half-precision operands."""
    if weight.dtype == torch.bfloat16:
        product: Tensor = torch.mm(x.to(weight.dtype), weight.t(), out_dtype=torch.float32)
        return product if out is None else out.copy_(product)
    return linear(x.to(weight.dtype), weight, out=out)


class Gathered:
    """A gradient that sums up tile by tile; tiles come in order the first time, and then in any."""

    def __init__(self, like: Tensor, dtype: torch.dtype):
        self._total = torch.empty_like(like, dtype=dtype)
        self._written = 0

    def add(self, tile: slice, part: Tensor) -> None:
        """Add ``part`` to the rows of a tile."""
        # What is written first need not be set to zero before: for large weights that takes as long as to add.
        seen = min(max(self._written - tile.start, 0), len(part))
        self._total[tile.start : tile.start + seen] += part[:seen]
        self._total[tile.start + seen : tile.stop] = part[seen:]
        self._written = max(self._written, tile.stop)

    def result(self, dtype: torch.dtype) -> Tensor:
        """The sum; 0 where nothing was added."""
        self._total[self._written :] = 0.0
        return self._total.to(dtype)


class Side:
    """One model's part in a loss: what enters its head, and gradients that gather there from the logits'.

    Args:
        hidden: what enters the head, ``(m, d)``.
        head: the head.
        needs: whether hidden states, weight and bias need a gradient.
        twin: the other model's part: of a parameter that both have, it holds the gradient.

    Attributes:
        dtype: precision of its logits and of what is summed.
    """

    def __init__(self, hidden: Tensor, head: Head, needs: Sequence[bool], twin: Side | None = None):
        self.hidden, self.head = hidden.detach(), head
        self.dtype = wide_dtype(hidden, head.weight)
        self._hidden = torch.zeros_like(self.hidden, dtype=self.dtype) if needs[0] else None
        self._weight = Gathered(head.weight, self.dtype) if needs[1] else None
        self._bias = Gathered(head.bias, self.dtype) if head.bias is not None and needs[2] else None
        self._lent = [False, False]
        if twin is not None and twin.head.weight is head.weight:
            self._weight, self._lent[0] = twin._weight, True
        if twin is not None and twin.head.bias is head.bias:
            self._bias, self._lent[1] = twin._bias, True

    @property
    def trained(self) -> bool:
        """Whether the head's weight needs a gradient."""
        return self._weight is not None

    @property
    def wanted(self) -> bool:
        """Whether anything needs a gradient."""
        return self._hidden is not None or self._weight is not None or self._bias is not None

    def gather(self, rows: slice, tile: slice, weight: Tensor, slope: Float[Tensor, "c t"]) -> None:
        """Take in the gradient of some rows in the logits of one of the head's tiles, scale and cap undone."""
        if self._hidden is not None:
            self._hidden[rows] += times(slope, weight.t())
        if self._weight is not None:
            self._weight.add(tile, times(slope.t(), self.hidden[rows].to(weight.dtype).t()))
        if self._bias is not None:
            self._bias.add(tile, slope.sum(0))

    def uncap(self, slope: Tensor, logits: Tensor) -> None:
        """Turn a gradient in capped logits into one in what the cap was put on; ``logits`` are overwritten."""
        if self.head.cap is not None:
            slope.addcmul_(slope, logits.div_(self.head.cap).square_(), value=-1)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden states, weight and bias, in their precision; None where none is needed or it is lent."""
        weight, bias = (None if lent else x for lent, x in zip(self._lent, (self._weight, self._bias), strict=True))
        return (
            None if self._hidden is None else self._hidden.to(self.hidden.dtype),
            None if weight is None else weight.result(self.head.weight.dtype),
            None if bias is None or self.head.bias is None else bias.result(self.head.bias.dtype),
        )
