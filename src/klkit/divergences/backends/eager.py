"""Kernels in plain PyTorch: always there, on any device, in any precision.

Rows go through in chunks that stay in a core's cache, in buffers that every chunk uses again; nothing
of the logits' size is allocated.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from klkit.divergences.adaptive import HeadRule, head_gap
from klkit.divergences.sums import COLUMNS, FARTHEST, RowSums, norms_of, values
from klkit.numerics import FLOOR, LN2, excess_series, rows_per_chunk, split, wide_dtype

BLOCK = 1024
"""Entries that are summed in the working precision; blocks are added up in double."""

CHUNK_BYTES = 512 << 10
"""Bytes a buffer of a chunk may take on a CPU: a few of them stay in cache."""

ACCELERATOR_BYTES = 256 << 20

ALIKE = 1.0 / 16
"""``Σ |p − q|`` from which plain differences are good enough for it."""


@torch.no_grad()
def row_sums(a: Float[Tensor, "m v"], b: Float[Tensor, "m v"]) -> Float[Tensor, "m _"]:
    """The table of :class:`klkit.divergences.sums.RowSums`, in double precision."""
    table = torch.empty(len(a), COLUMNS, dtype=torch.float64, device=a.device)
    for rows, x, y in _chunks(a, b):
        _sums(x, y, table[rows])
    return table


@torch.no_grad()
def second_sweep(
    a: Float[Tensor, "m v"],
    b: Float[Tensor, "m v"],
    norms: Float[Tensor, "m 4"],
    *,
    mixture: bool = True,
    overwrite: bool = False,
) -> Float[Tensor, "m 3"]:
    """Jensen-Shannon divergence, ``KL(p‖½p + ½q)`` and total variation of rows whose norms are known."""
    table = torch.empty(len(a), 3, dtype=torch.float64, device=a.device)
    for rows, x, y in _chunks(a, b):
        _, p, q, d = _laws(x, y, norms[rows])
        if mixture:
            table[rows, 0] = 0.5 * _dot(p + q, _psi(d))
            table[rows, 1] = _dot(p, _log_over_mixture(d))
        table[rows, 2] = 0.5 * _sum(_gap(p, q, d).abs_())
        if overwrite:
            a[rows] = p[:, : a.shape[1]].to(a.dtype)
    return table


@torch.no_grad()
def sums_and_gaps(
    a: Float[Tensor, "m v"], b: Float[Tensor, "m v"], rule: HeadRule
) -> tuple[Float[Tensor, "m _"], Float[Tensor, "m 2"]]:
    """The table of sums, and ``Σ |p − q|`` over the head of each row and over all of it."""
    table = row_sums(a, b)
    return table, gaps_of(a, b, table, rule)


def gaps_of(
    a: Float[Tensor, "m v"], b: Float[Tensor, "m v"], table: Float[Tensor, "m _"], rule: HeadRule
) -> Float[Tensor, "m 2"]:
    """The second of :func:`sums_and_gaps`, given the first."""
    sums = RowSums(*table.unbind(1))
    norms, size = norms_of(sums, values(sums)), a.shape[1]
    gaps = torch.empty(len(a), 2, dtype=torch.float64, device=a.device)
    scales = (-norms[:, 2]).exp(), (-norms[:, 2] - norms[:, 3]).exp()
    for rows, x, y in _chunks(a, b):
        p, q = (
            _exp(z - norms[rows, i, None].to(x.dtype)).mul_(scales[i][rows, None].to(x.dtype))
            for i, z in enumerate((x, y))
        )
        gap = (p - q).abs_()
        whole = _sum(gap)
        alike = whole < ALIKE
        if bool(alike.any()):
            _, *laws = _laws(x[alike], y[alike], norms[rows][alike])
            gap[alike] = _gap(*laws).abs_()
            whole[alike] = _sum(gap[alike])
        gaps[rows, 0], gaps[rows, 1] = head_gap(x[:, :size], p[:, :size], gap[:, :size], rule).double(), whole
    return gaps


@torch.no_grad()
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
    for rows, x, y in _chunks(a, b):
        k, norm, shift = slopes[rows], norms[rows, 2], norms[rows, 3]
        log_p, p, q, d = _laws(x, y, norms[rows])
        # What rounding takes from norm and shift would move all of a row alike.
        lost, slack = norm.to(x.dtype).double() - norm, shift.to(x.dtype).double() - shift
        if out_a is not None:
            rest = k[:, 0] + k[:, 1] * lost + k[:, 2] * slack
            slope = _slope(log_p, p, q, d, k[:, :6], rest, slack, tokens[rows])
            out_a[rows] = slope[:, : a.shape[1]].to(out_a.dtype)
        if out_b is not None:
            turned = k[:, 6:] * torch.tensor([1, 1, -1, -1, 1, 1], dtype=k.dtype, device=k.device)
            rest = turned[:, 0] + turned[:, 1] * (lost + slack) - turned[:, 2] * slack
            # Not log p + d: where p excludes the token that has no digits left.
            log_q = (y - norm.to(x.dtype)[:, None]).sub_(shift.to(x.dtype)[:, None])
            slope = _slope(log_q, q, p, -d, turned, rest, -slack, tokens[rows])
            out_b[rows] = slope[:, : b.shape[1]].to(out_b.dtype)


def _chunks(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows a few at a time, widened and floored, in two buffers that every chunk uses again."""
    dtype = wide_dtype(a, b)
    size = a.shape[1]
    width = -(-size // BLOCK) * BLOCK if size > BLOCK else size
    budget = CHUNK_BYTES if a.device.type == "cpu" else ACCELERATOR_BYTES
    count = min(max(1, len(a)), rows_per_chunk(width, bytes_per_value=dtype.itemsize, budget=budget))
    # Entries past the vocabulary's end are tokens that both exclude: they contribute nothing.
    x, y = (torch.full((count, width), FLOOR, dtype=dtype, device=a.device) for _ in range(2))
    for start in range(0, len(a), count):
        rows = slice(start, min(start + count, len(a)))
        few = rows.stop - start
        x[:few, :size].copy_(a[rows])
        y[:few, :size].copy_(b[rows])
        x.clamp_(min=FLOOR)
        y.clamp_(min=FLOOR)
        x[:few, size:] = y[:few, size:] = FLOOR
        yield rows, x[:few], y[:few]


def _sums(x: Tensor, y: Tensor, out: Tensor) -> None:
    """Fill ``out`` from one chunk; ``x`` and ``y`` are overwritten."""
    (reference, top_p), (greatest, top_q) = _max(x), _max(y)
    paired = y.gather(1, top_p[:, None])
    paired = torch.where(paired > FLOOR / 2, paired, greatest)
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


def _laws(x: Tensor, y: Tensor, norms: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``log p``, ``p``, ``q`` and ``d = log q − log p``; ``x`` is overwritten, and ``y`` less its reference."""
    reference, paired, norm, shift = norms.unbind(1)
    x -= reference.to(x.dtype)[:, None]
    y -= paired.to(x.dtype)[:, None]
    d = (y - x).sub_(shift.to(x.dtype)[:, None])
    scale_p, scale_q = (-norm).exp().to(x.dtype), (-norm - shift).exp().to(x.dtype)
    p, q = _exp(x).mul_(scale_p[:, None]), _exp(y).mul_(scale_q[:, None])
    return x.sub_(norm.to(x.dtype)[:, None]), p, q, d


def _gap(p: Tensor, q: Tensor, d: Tensor, slack: Tensor | None = None) -> Tensor:
    """``q − p``, by a series in ``d = log q − log p`` where the difference would cancel; ``slack`` is owed to ``d``."""
    near, far = split(d)
    even, odd = excess_series(near)
    beyond = far.sign().abs_()
    series = (even + odd).add_(near)
    if slack is not None:
        series += slack * (1 - beyond)
    return series.mul_(p).add_((q - p).mul_(beyond))


def _log_over_mixture(d: Tensor) -> Tensor:
    """``log(p/m) = log 2 − log(1 + exp(d))`` with ``m`` the even mixture, by a series where it is small."""
    near, far = _split_mixed(d)
    s = (0.5 * near).square_()
    log_cosh = s * (1 / 2 - s * (1 / 12 - s * (1 / 45 - s * (17 / 2520 - s * (31 / 14175)))))
    beyond = LN2 - torch.nn.functional.softplus(far)
    return (-0.5 * near).sub_(log_cosh).add_(beyond.mul_(far.sign().abs_()))


def _psi(d: Tensor) -> Tensor:
    """``t tanh t − log cosh t`` at ``t = d/2``: the Jensen-Shannon divergence is ``½ Σ (p + q)`` of it."""
    near, far = _split_mixed(d)
    s = (0.5 * near).square_()
    series = s * (1 / 2 - s * (1 / 4 - s * (1 / 9 - s * (17 / 360 - s * (62 / 3150)))))
    size = far.abs()
    t = torch.exp(-size)
    beyond = LN2 - size * t / (1 + t) - t.log1p()
    return series.add_(beyond.mul_(far.sign().abs_()))


def _split_mixed(d: Tensor) -> tuple[Tensor, Tensor]:
    """``d`` as a near and a far part, cut where the series of this module end; narrower in double precision."""
    far = torch.nn.functional.hardshrink(d, 0.5 if d.dtype == torch.float32 else 0.02)
    return d - far, far


def _slope(
    log_p: Tensor, p: Tensor, q: Tensor, d: Tensor, k: Tensor, k0: Tensor, slack: Tensor, tokens: Tensor
) -> Tensor:
    """``p (k0 + k1 log p + k2 d) + k3 (q − p) + k4 p log(p/m) + k5 1[y]``."""
    _, k1, k2, k3, k4, k5 = k.to(p.dtype)[:, :, None].unbind(1)
    head = k0.to(p.dtype)
    tail = (k0 - head.double()).to(p.dtype)
    value = p * ((head[:, None] + k1 * log_p + k2 * d) + tail[:, None])
    if bool(k3.any()):
        value += k3 * _gap(p, q, d, slack.to(p.dtype)[:, None])
    if bool(k4.any()):
        value += k4 * p * _log_over_mixture(d)
    return value.scatter_add_(1, tokens[:, None], k5)


def _exp(x: Tensor) -> Tensor:
    """``exp(x)`` within ``|x|`` units of rounding; ``torch.exp`` takes four times as long on some CPUs."""
    return (x * (1 / LN2)).exp2_()


def _max(x: Float[Tensor, "m v"]) -> tuple[Float[Tensor, "m 1"], Tensor]:
    """Largest entry of each row and its place, the first among equals; long rows by the maxima of blocks."""
    if x.shape[1] <= BLOCK:
        best, place = x.max(dim=1)
        return best[:, None], place
    blocks = x.view(len(x), -1, BLOCK)
    best, block = blocks.amax(-1).max(-1)
    place = block * BLOCK + blocks[torch.arange(len(x), device=x.device), block].argmax(-1)
    return best[:, None], place


def _sum(x: Tensor) -> Tensor:
    """Sums over rows: blocks in the working precision, blocks added up in double."""
    return x.sum(-1).double() if x.shape[1] <= BLOCK else x.view(len(x), -1, BLOCK).sum(-1).double().sum(-1)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of rows, added up likewise; not by a product that autocast would round."""
    return _sum(x * y)
