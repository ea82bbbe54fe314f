"""Kernels compiled with numba, called on tensors: single and half precision on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numba
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from klkit.divergences.adaptive import HeadRule
from klkit.divergences.backends import heads, kernels
from klkit.divergences.sums import COLUMNS

PIECE = 16 << 20
"""Bytes of a wider tensor's rows that are copied to lie together, at a time."""


def row_sums(a: Float[Tensor, "m v"], b: Float[Tensor, "m v"]) -> Float[Tensor, "m _"]:
    """The table of :class:`klkit.divergences.sums.RowSums`, in double precision."""
    table = torch.empty(len(a), COLUMNS, dtype=torch.float64)
    for rows in _pieces(a, b):
        kernels.row_sums(_array(a[rows]), _array(b[rows]), kernels.ONE, table[rows].numpy())
    return table


def second_sweep(
    a: Float[Tensor, "m v"],
    b: Float[Tensor, "m v"],
    norms: Float[Tensor, "m 4"],
    *,
    mixture: bool = True,
    overwrite: bool = False,
) -> Float[Tensor, "m 3"]:
    """Jensen-Shannon divergence, ``KL(p‖½p + ½q)`` and total variation of rows whose norms are known."""
    table = torch.empty(len(a), 3, dtype=torch.float64)
    for rows in _pieces(a, b):
        x = a[rows].contiguous()
        kernels.second_sweep(
            _array(x), _array(b[rows]), norms[rows].numpy(), kernels.ONE, mixture, overwrite, table[rows].numpy()
        )
        if overwrite and not a.is_contiguous():
            a[rows] = x
    return table


def sums_and_gaps(
    a: Float[Tensor, "m v"], b: Float[Tensor, "m v"], rule: HeadRule
) -> tuple[Float[Tensor, "m _"], Float[Tensor, "m 2"]]:
    """The table of sums, and ``Σ |p − q|`` over the head of each row and over all of it."""
    table, gaps = torch.empty(len(a), COLUMNS, dtype=torch.float64), torch.empty(len(a), 2, dtype=torch.float64)
    for rows in _pieces(a, b):
        into = table[rows].numpy(), gaps[rows].numpy()
        heads.sums_and_gaps(_array(a[rows]), _array(b[rows]), kernels.ONE, rule.mass, rule.rule == "cover", *into)
    return table, gaps


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
    for rows in _pieces(a, b):
        x, y = _array(a[rows]), _array(b[rows])
        into_x, into_y = (logits if out is None else _array(out[rows]) for out, logits in ((out_a, x), (out_b, y)))
        in_place = any(
            out is not None and out.data_ptr() == logits.data_ptr() for out, logits in ((out_a, a), (out_b, b))
        )
        of_rows = tokens[rows].numpy(), norms[rows].numpy(), slopes[rows].numpy()
        wanted = out_a is not None, out_b is not None
        kernels.gradients(x, y, *of_rows, kernels.ONE, *wanted, in_place, into_x, into_y)


def _pieces(a: Tensor, b: Tensor) -> Iterator[slice]:
    """All rows at once where they lie together in memory, else a few at a time, to be copied."""
    # As many threads as torch may use: two pools that both take every core wait for each other.
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    together = a.is_contiguous() and b.is_contiguous()
    count = max(1, len(a)) if together else max(1, PIECE // (a.shape[1] * a.element_size()))
    for start in range(0, len(a), count):
        yield slice(start, start + count)


def _array(x: Tensor) -> NDArray[Any]:
    """The memory of a tensor on the CPU, or of a copy that lies together; half formats as integers."""
    kinds = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
    x = x.detach().contiguous()
    return x.view(kinds[x.dtype]).numpy() if x.dtype in kinds else x.numpy()
