"""Row sums in plain PyTorch: always there, on any device, in any precision.

Rows go through in chunks that stay in a core's cache, in buffers that every chunk uses again; nothing
of the logits' size is allocated.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import vecdot

from klkit.divergences.sums import COLUMNS, FARTHEST
from klkit.numerics import FLOOR, LN2, excess_series, rows_per_chunk, split, widen

BLOCK = 1024
"""Entries that are summed in the working precision; blocks are added up in double."""

CHUNK_BYTES = 512 << 10
"""Bytes a buffer of a chunk may take on a CPU: a few of them stay in cache."""

ACCELERATOR_BYTES = 256 << 20


@torch.no_grad()
def row_sums(a: Float[Tensor, "m v"], b: Float[Tensor, "m v"]) -> Float[Tensor, "m _"]:
    """The table of :class:`klkit.divergences.sums.RowSums` of rows of logits, in double precision."""
    dtype = torch.promote_types(widen(a).dtype, widen(b).dtype)
    table = torch.empty(len(a), COLUMNS, dtype=torch.float64, device=a.device)
    width = -(-a.shape[1] // BLOCK) * BLOCK if a.shape[1] > BLOCK else a.shape[1]
    budget = CHUNK_BYTES if a.device.type == "cpu" else ACCELERATOR_BYTES
    rows = min(max(1, len(a)), rows_per_chunk(width, bytes_per_value=dtype.itemsize, budget=budget))
    # Entries past the vocabulary's end are tokens that both exclude: they contribute nothing.
    x, y = (torch.full((rows, width), FLOOR, dtype=dtype, device=a.device) for _ in range(2))
    for start in range(0, len(a), rows):
        count = min(rows, len(a) - start)
        _chunk(a[start : start + count], b[start : start + count], x[:count], y[:count], table[start : start + count])
    return table


def _chunk(a: Tensor, b: Tensor, x: Tensor, y: Tensor, out: Tensor) -> None:
    """Fill ``out`` from one chunk; ``x`` and ``y`` are overwritten."""
    size = a.shape[1]
    x[:, :size].copy_(a)
    y[:, :size].copy_(b)
    x.clamp_(min=FLOOR)
    y.clamp_(min=FLOOR)
    (reference, top_p), (greatest, top_q) = _max(x), _max(y)
    paired = y.gather(1, top_p[:, None])
    x -= reference
    d = (y - paired).sub_(x)
    y -= greatest
    ea, eb = _exp(x), _exp(y)
    least, most = d.amin(1), d.amax(1)
    # exp(b − R) = kappa exp(b − B)
    kappa = (greatest - paired).clamp(max=FARTHEST).exp()
    near, far = split(d)
    even, odd = excess_series(near)
    gap = (eb * kappa).sub_(ea).abs_()
    direction = far.sign()
    apart = _dot(gap, direction)  # Σ (exp(b − R) − exp(x)) over the far tokens: it has the sign of d
    odd -= far
    weight = ea * d
    drift_p, square_drift = _sum(weight), _dot(weight, d)
    torch.mul(ea, x, out=weight)
    level_p, square_level = _sum(weight), _dot(weight, x)
    out.copy_(
        torch.stack(
            [
                top_p.double(),
                top_q.double(),
                reference[:, 0].double(),
                paired[:, 0].double(),
                greatest[:, 0].double(),
                _sum(ea),
                _sum(eb),
                drift_p,
                _dot(eb, d),
                level_p,
                _dot(eb, y),
                _dot(ea, even + odd) + apart,
                _dot(eb, even.sub_(odd)) - apart / kappa[:, 0].double(),
                square_level,
                square_drift,
                least.double(),
                most.double(),
            ],
            dim=1,
        )
    )


def _exp(x: Tensor) -> Tensor:
    """``exp(x)`` within ``|x|`` units of rounding; ``torch.exp`` takes four times as long on some CPUs."""
    return (x * (1 / LN2)).exp2_()


def _max(x: Float[Tensor, "m v"]) -> tuple[Float[Tensor, "m 1"], Tensor]:
    """Largest entry of each row and its place, the first among equals; long rows by the maxima of blocks."""
    if x.shape[1] <= BLOCK:
        best, place = x.max(dim=1)
        return best[:, None], place
    blocks = x.unflatten(1, (-1, BLOCK))
    best, block = blocks.amax(-1).max(-1)
    place = block * BLOCK + blocks[torch.arange(len(x), device=x.device), block].argmax(-1)
    return best[:, None], place


def _sum(x: Tensor) -> Tensor:
    """Sums over rows: blocks in the working precision, blocks added up in double."""
    return x.sum(-1).double() if x.shape[1] <= BLOCK else x.unflatten(1, (-1, BLOCK)).sum(-1).double().sum(-1)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of rows, added up likewise."""
    if x.shape[1] <= BLOCK:
        return vecdot(x, y).double()
    return vecdot(x.unflatten(1, (-1, BLOCK)), y.unflatten(1, (-1, BLOCK))).double().sum(-1)
