"""What ``torch.compile`` makes kernels of: the same sums and gradients, written so that memory is read once.

A row is cut into blocks that stay in registers or the first-level cache, each summed relative to references
of its own, so no sweep over the row has to come first. Moving from the references of a block to those of the
row is exact algebra, done in double precision. It costs no digits because in a block ``d`` is ``b − a`` less
its average over the likely tokens, so that every term of the moved sums is non-negative; and ``b − a``, once
large offsets are gone, is exact where the logits are near each other.

Plain functions of tensors, which also run uncompiled; tests/conftest.py spares them checks at run time, which
would break the graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from klkit.numerics import FLOOR, LN2, NEAR, excess_series

BLOCK = 1024
"""Entries that are summed in single precision: the most that Inductor keeps in registers on a GPU."""

FAR = 0.5
"""Log-ratios up to this size go through series."""

WIDEST = 1e6
"""Bound on the average of ``b − a``, far below what stands for a token that one law excludes."""

HIGHEST = 100.0
"""Where exponents of sums are cut that only rows far beyond the joint form can reach."""

TURNED = (1, 1, -1, -1, 1, 1)
"""What exchanging the laws does to the six coefficients of a gradient."""


def floored(x: Tensor) -> Tensor:
    """``x`` in single precision, with ``FLOOR`` for ``-inf``."""
    return x.float().clamp(min=FLOOR)


def exp(x: Tensor) -> Tensor:
    """``exp(x)`` within ``|x|`` units of rounding, by the instruction that a GPU has."""
    return (x * (1 / LN2)).exp2()


def level(top: Tensor) -> Tensor:
    """What may be taken from logits with such a largest one, and leaves the likely ones exact: a multiple of 64."""
    return (top * (1 / 64)).round().clamp(min=-1e9) * 64


def block_sums(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """Largest logits, reference of ``q`` and sums of blocks ``(m, n, BLOCK)``, each in references of its own."""
    a, b = floored(a), floored(b)
    top_a, top_b = a.amax(-1), b.amax(-1)
    x, y, ratio = (
        a - top_a[..., None],
        b - top_b[..., None],
        (b - level(top_b)[..., None]) - (a - level(top_a)[..., None]),
    )
    # The average of the ratio over the tokens likely under p: (1 + x/8)^8 stands in for exp(x).
    weight = torch.where(b > FLOOR / 2, (x * 0.125 + 1).clamp(min=0), 0.0)
    weight = weight * weight
    weight = weight * weight
    weight = weight * weight
    centre = (weight * ratio).sum(-1) / (weight.sum(-1) + 1e-30)
    centre = centre.clamp(-WIDEST, WIDEST)[..., None]
    d = ratio - centre
    ea, eb = exp(x), exp(y)
    even, odd = excess_parts(d)
    near = d.abs() < FAR
    ead, ebd, eax = ea * d, eb * d, ea * x
    sums = (
        ea,
        eb,
        ead,
        ebd,
        eax,
        eb * y,
        # Of the far tokens, exp(d) is left to the sums of ea and eb over them.
        torch.where(near, ea * (even + odd), -ead),
        torch.where(near, eb * (even - odd), ebd),
        torch.where(near, 0.0, ea),
        torch.where(near, 0.0, eb),
        eax * x,
        ead * d,
    )
    # x is never above 0. A reduction like all others leaves Inductor one nest of loops, so that blocks stay in cache.
    centre = torch.where(x > 0, x, centre).amax(-1)
    return top_a, top_b, centre, *(z.sum(-1) for z in sums), d.amin(-1), d.amax(-1)


def excess_parts(d: Tensor) -> tuple[Tensor, Tensor]:
    """Even and odd part of ``exp(d) − 1 − d`` up to ``FAR``."""
    s = d * d
    even = (((s * (1 / 40320) + 1 / 720) * s + 1 / 24) * s + 1 / 2) * s
    odd = ((s * (1 / 5040) + 1 / 120) * s + 1 / 6) * s * d
    return even, odd


def top(x: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """Place and value of each row's largest entry, the first among equals, ``(m, 1)``; ``best`` of each block."""
    value, block = best.max(1, keepdim=True)
    columns = (block * BLOCK + torch.arange(BLOCK, device=x.device)).clamp(max=x.shape[1] - 1)
    return columns.gather(1, x.gather(1, columns).argmax(1, keepdim=True)), value


def row_sums(a: Tensor, b: Tensor, parts: Tensor) -> Tensor:
    """The table of :class:`klkit.divergences.sums.RowSums` from what :func:`block_sums` returns, ``(17, m, n)``."""
    centre = parts[2].double() + level(parts[1].double()) - level(parts[0].double())
    return joined(b, parts, centre, top(a, parts[0]), top(b, parts[1]))


def joined(
    b: Tensor, parts: Tensor, centre: Tensor, top_a: tuple[Tensor, Tensor], top_b: tuple[Tensor, Tensor]
) -> Tensor:
    """The same, given what was taken from ``b − a`` in each block, and the largest entries and their places.

    The sums of each block are carried over to the references of its row, and added up; in double precision.
    """
    (top_p, reference), (top_q, greatest) = top_a, top_b
    paired = floored(b.gather(1, top_p))
    paired = torch.where(paired > FLOOR / 2, paired, greatest).double()
    reference, greatest = reference.double(), greatest.double()
    best_a, best_b, _, sa, sb, t, u, va, vb, fa, fb, far_a, far_b, qa, qd, least, most = parts.double().unbind(0)
    down_p, down_q = best_a - reference, best_b - greatest
    wa, wb = down_p.exp(), down_q.exp()
    shift = centre - (paired - reference)  # d of the row is d of the block and this
    near = shift.abs() < NEAR
    even, odd = excess_series(torch.where(near, shift, 0.0))
    # wa and wb times exp(±shift), then that less wa and wb, then without its linear part too.
    grown, shrunk = ((z.clamp(max=HIGHEST)).exp() for z in (down_p + shift, down_q - shift))
    rise = torch.where(near, wa * (shift + (even + odd)), grown - wa)
    fall = torch.where(near, wb * ((even - odd) - shift), shrunk - wb)
    bend = torch.where(near, wa * (even + odd), rise - wa * shift)
    sag = torch.where(near, wb * (even - odd), fall + wb * shift)
    gain_q, gain_p = (best_b - paired).clamp(max=HIGHEST).exp(), (paired - greatest).exp() * wa
    columns = (
        wa * sa,
        wb * sb,
        wa * (t + sa * shift),
        wb * (u + sb * shift),
        wa * (va + sa * down_p),
        wb * (vb + sb * down_q),
        grown * (fa - far_a) + gain_q * far_b + sa * bend + t * rise,
        shrunk * (fb - far_b) + gain_p * far_a + sb * sag - u * fall,
        wa * (qa + down_p * (2 * va + down_p * sa)),
        # Where p excludes a whole block, squares of what stands for that may be infinite.
        torch.where(wa > 0, wa * (qd + shift * (2 * t + shift * sa)), 0.0),
    )
    places = [z[:, 0].double() for z in (top_p, top_q, reference, paired, greatest)]
    return torch.stack([*places, *(z.sum(1) for z in columns), (least + shift).amin(1), (most + shift).amax(1)], 1)


def laws(a: Tensor, b: Tensor, norms: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``log p``, ``log q``, ``p``, ``q``, ``log q − log p`` in single precision, of norms ``(..., 4)``."""
    reference, paired, norm, shift = norms[..., None, :].unbind(-1)
    # Normalisers are factors, which round once; taken from exponents where these would overflow.
    norm_q = norm + shift
    ahead = torch.where(norm_q < HIGHEST / 2, 0.0, norm_q).float()
    scale_p, scale_q = (-norm).exp().float(), (ahead.double() - norm_q).exp().float()
    # The difference of logits near each other is exact; what it is compared with is taken in two parts.
    level_p, level_q = level(reference), level(paired)
    apart = (paired - level_q) - (reference - level_p) + shift
    coarse = apart.float()
    fine = (apart - coarse.double()).float()
    a, b = floored(a), floored(b)
    d = (((b - level_q.float()) - (a - level_p.float())) - coarse) - fine
    x, y = a - reference.float(), b - paired.float()
    # Where p excludes a token, log p + d has no digits left: log q is formed apart.
    return x - norm.float(), y - norm_q.float(), exp(x) * scale_p, exp(y - ahead) * scale_q, d


def difference(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """``q − p``, by a series in ``d = log q − log p`` where the difference would cancel."""
    even, odd = excess_parts(d)
    return torch.where(d.abs() < FAR, p * (d + (even + odd)), q - p)


def mixed(d: Tensor) -> tuple[Tensor, Tensor]:
    """``log(p/m)`` with ``m`` the even mixture, and ``t tanh t − log cosh t`` at ``t = d/2``; see ``eager``."""
    s = 0.25 * d * d
    log_cosh = s * (1 / 2 - s * (1 / 12 - s * (1 / 45 - s * (17 / 2520 - s * (31 / 14175)))))
    series = s * (1 / 2 - s * (1 / 4 - s * (1 / 9 - s * (17 / 360 - s * (62 / 3150)))))
    size = d.abs()
    t = exp(-size)
    rest = LN2 - t.log1p()
    near = size < 0.5
    return (
        torch.where(near, -0.5 * d - log_cosh, rest - d.clamp(min=0)),
        torch.where(near, series, rest - size * t / (1 + t)),
    )


def second_sweep(a: Tensor, b: Tensor, norms: Tensor) -> tuple[Tensor, ...]:
    """Jensen-Shannon divergence, ``KL(p‖½p + ½q)`` and total variation: the part of each block ``(m, n, BLOCK)``."""
    _, _, p, q, d = laws(a, b, norms)
    over, psi = mixed(d)
    terms = 0.5 * (p + q) * psi, p * over, 0.5 * difference(p, q, d).abs()
    return tuple(z.sum(-1) for z in terms)


def probabilities(a: Tensor, norms: Tensor) -> None:
    """Leave ``p`` in the place of its logits."""
    a.copy_(laws(a, a, norms)[2])


def slopes_p(a: Tensor, b: Tensor, norms: Tensor, k: Tensor, gaps: bool, mixes: bool) -> Tensor:
    """Gradient in the logits of ``p``, but for the drawn token; ``k`` are coefficients ``(m, 6)``."""
    log_p, _, p, q, d = laws(a, b, norms)
    return slope(log_p, p, q, d, k, lost(norms[:, 2], k), gaps, mixes)


def slopes_q(a: Tensor, b: Tensor, norms: Tensor, k: Tensor, gaps: bool, mixes: bool) -> Tensor:
    """The same in the logits of ``q``; ``k`` with the sign turned of what is odd in ``d``, as :data:`TURNED` says."""
    _, log_q, p, q, d = laws(a, b, norms)
    return slope(log_q, q, p, -d, k, lost(norms[:, 2] + norms[:, 3], k), gaps, mixes)


def lost(norm: Tensor, k: Tensor) -> Tensor:
    """What single precision takes from the first coefficient, and from the norm under the second, ``(m, 1)``.

    All of a row would shift by it: too little to see in an entry, and plain to see in their sum.
    """
    return ((k[:, 0] - k[:, 0].float().double()) + k[:, 1] * (norm.float().double() - norm)).float()[:, None]


def slope(log_p: Tensor, p: Tensor, q: Tensor, d: Tensor, k: Tensor, rest: Tensor, gaps: bool, mixes: bool) -> Tensor:
    """``p (k0 + k1 log p + k2 d) + k3 (q − p) + k4 p log(p/m)``, without the parts not wanted; ``rest`` joins k0."""
    k0, k1, k2, k3, k4, _ = k.float()[:, :, None].unbind(1)
    # One-sided exclusion: 0 times a large number, never 0 times infinity.
    inner = (k0 + k1 * log_p + k2 * d) + rest
    if mixes:
        inner = inner + k4 * mixed(d)[0]
    return p * inner + k3 * difference(p, q, d) if gaps else p * inner


def write(
    a: Tensor,
    b: Tensor,
    norms: Tensor,
    k_p: Tensor,
    k_q: Tensor,
    parts_p: tuple[bool, bool],
    parts_q: tuple[bool, bool],
    out_a: Tensor | bool | None,
    out_b: Tensor | bool | None,
) -> None:
    """Gradients into tensors, with True into the logits themselves; both are computed before either is written."""
    # What is not written is not compiled either.
    found = slopes_p(a, b, norms, k_p, *parts_p), slopes_q(a, b, norms, k_q, *parts_q)
    for logits, out, value in zip((a, b), (out_a, out_b), found, strict=True):
        if isinstance(out, Tensor):
            out.copy_(value)
        elif out:
            logits.copy_(value)
