"""Kernels compiled with numba, called on tensors: single and half precision on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from klkit.divergences.backends import kernels
from klkit.divergences.sums import COLUMNS


def row_sums(a: Float[Tensor, "m v"], b: Float[Tensor, "m v"]) -> Float[Tensor, "m _"]:
    """The table of :class:`klkit.divergences.sums.RowSums`, in double precision."""
    table = torch.empty(len(a), COLUMNS, dtype=torch.float64)
    kernels.row_sums(_array(a), _array(b), kernels.ONE, table.numpy())
    return table


def second_sweep(
    a: Float[Tensor, "m v"], b: Float[Tensor, "m v"], norms: Float[Tensor, "m 4"], *, overwrite: bool = False
) -> Float[Tensor, "m 3"]:
    """Jensen-Shannon divergence, ``KL(p‖½p + ½q)`` and total variation of rows whose norms are known."""
    table = torch.empty(len(a), 3, dtype=torch.float64)
    kernels.second_sweep(_array(a), _array(b), norms.numpy(), kernels.ONE, overwrite, table.numpy())
    return table


def gradients(
    a: Float[Tensor, "m v"],
    b: Float[Tensor, "m v"],
    tokens: Int[Tensor, " m"],
    norms: Float[Tensor, "m 4"],
    slopes: Float[Tensor, "m 12"],
    out_a: Float[Tensor, "m v"] | None,
    out_b: Float[Tensor, "m v"] | None,
) -> None:
    """Write the gradients that :class:`klkit.divergences.sums.Slopes` spells out."""
    if out_a is None and out_b is None:
        return
    a_, b_ = _array(a), _array(b)
    into_a, into_b = (fallback if out is None else _array(out) for out, fallback in ((out_a, a_), (out_b, b_)))
    want = (out_a is not None, out_b is not None)
    kernels.gradients(a_, b_, tokens.numpy(), norms.numpy(), slopes.numpy(), kernels.ONE, *want, into_a, into_b)


def _array(x: Tensor) -> NDArray[Any]:
    """The memory of a tensor on the CPU, half formats as whole numbers of their size."""
    kinds = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
    return x.detach().view(kinds[x.dtype]).numpy() if x.dtype in kinds else x.detach().numpy()
