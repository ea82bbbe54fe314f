"""Divergences between two models from hidden states and heads, in the least memory and for any gradient.

All rows go through a few tokens at a time: what a row's tokens sum up to is joined tile by tile, and the
backward pass forms the same logits again. That is six matrix products where
:mod:`klkit.divergences.linear_loss` takes four, but the gradients that come from above may be any.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from klkit.divergences import backends
from klkit.divergences.differentiable import Divergences, row_terms, slopes_of
from klkit.divergences.linear import Head, Side
from klkit.divergences.linear_loss import named, require_fit
from klkit.divergences.sums import FARTHEST, RowSums, norms_of, values
from klkit.numerics import FLOOR, excess, rows_per_chunk

TILE_BYTES, ACCELERATOR_BYTES = 32 << 20, 1 << 30
"""Bytes that the logits of a tile may take, of both models together."""

LEAST_TOKENS, MOST_TOKENS = 128, 8192

ALIKE = 30.0
"""References whose log-ratios differ by less are exchanged in the accurate form."""


def linear_divergences(
    hidden_p: Float[Tensor, "m d"],
    head_p: Head,
    hidden_q: Float[Tensor, "m e"],
    head_q: Head,
    tokens: Int[Tensor, " m"] | None = None,
    *,
    js: bool = False,
    tile: int | None = None,
    backend: str | None = None,
) -> Divergences:
    """``Σ p (log p − log q)``, its reverse, entropies and log-probabilities of each row, each differentiable.

    As :func:`klkit.divergences.differentiable.divergences`, but from what enters the heads: the logits exist for a
    few tokens at a time only. The gradient that reaches each row may be anything; where it is known beforehand,
    :func:`klkit.divergences.linear_loss.linear_loss` takes two thirds of the time.

    Shapes: hidden states ``(m, d)`` and ``(m, e)``; each field ``(m,)``, in nats and at least single precision.

    Args:
        head_q: where it has fewer tokens than the other head, ``q`` excludes the rest; the same for ``head_p``.
        tokens: tokens whose log-probabilities are wanted.
        js: also the Jensen-Shannon divergence, for two more products.
        tile: tokens at a time.
        backend: by default the one that :func:`klkit.divergences.backends.choose` names for this much work.

    Raises:
        ValueError: shapes do not fit, a logit is NaN or ``+inf``.
        RuntimeError: a second derivative is asked for.

    Example:
        >>> import torch
        >>> hidden = torch.tensor([[0.0], [1.0]], requires_grad=True)
        >>> head = Head(torch.tensor([[0.0], [1.0]]))
        >>> found = linear_divergences(hidden, head, torch.zeros(2, 1), head, tile=1)
        >>> [round(x, 4) for x in found.kl.tolist()]
        [0.0, 0.1109]
        >>> found.kl.square().sum().backward()
        >>> [round(x, 4) for x in hidden.grad[:, 0].tolist()]
        [0.0, 0.0436]
    """
    require_fit(hidden_p, head_p, hidden_q, head_q, tokens)
    drawn = torch.zeros(len(hidden_p), dtype=torch.long) if tokens is None else tokens
    inputs = (hidden_p, head_p.weight, head_p.bias, hidden_q, head_q.weight, head_q.bias)
    options = (drawn.to(hidden_p.device), head_p, head_q, js, tile, backend)
    found = _Tiled.apply(*inputs, *options)  # type: ignore[no-untyped-call]
    return named(found, tokens is not None, js)


class _Tiled(torch.autograd.Function):
    """The quantities in the order of :class:`Divergences`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_p: Tensor,
        weight_p: Tensor,
        bias_p: Tensor | None,
        hidden_q: Tensor,
        weight_q: Tensor,
        bias_q: Tensor | None,
        tokens: Tensor,
        head_p: Head,
        head_q: Head,
        js: bool,
        tile: int | None,
        backend: str | None,
    ) -> Any:
        none = [False] * 3
        p, q = Side(hidden_p, head_p, none), Side(hidden_q, head_q, none)
        size, width = tile or tile_tokens(p, q), max(head_p.tokens, head_q.tokens)
        dtype = torch.promote_types(p.dtype, q.dtype)
        name = backend or backends.choose(len(tokens) * width, hidden_p.device, dtype)
        joined: RowSums | None = None
        at_token = torch.zeros(2, len(tokens), dtype=torch.float64, device=hidden_p.device)
        for part, a, b in _tiles(p, q, size):
            sums = RowSums(*backends.get(name, a, b).row_sums(a, b).unbind(1))
            sums = sums._replace(top_p=sums.top_p + part.start, top_q=sums.top_q + part.start)
            joined = sums if joined is None else join(joined, sums)
            inside, place = _inside(tokens, part)
            at_token += inside * torch.stack([x.gather(1, place[:, None])[:, 0].double() for x in (a, b)])
        assert joined is not None
        found = values(joined)
        norms, mixed = norms_of(joined, found), torch.zeros_like(at_token)
        if js:
            for _, a, b in _tiles(p, q, size):
                mixed += backends.get(name, a, b).second_sweep(a, b, norms)[:, :2].t()
        logp = (at_token[0] - joined.reference - found.log_mass_p).masked_fill(at_token[0] < FLOOR / 2, -torch.inf)
        logq = (at_token[1] - joined.greatest - found.log_mass_q).masked_fill(at_token[1] < FLOOR / 2, -torch.inf)
        terms = torch.stack([*row_terms(found), *mixed])
        ctx.save_for_backward(hidden_p, weight_p, bias_p, hidden_q, weight_q, bias_q, tokens, norms, terms)
        ctx.heads, ctx.size, ctx.backend = (head_p, head_q), size, name
        return tuple(x.to(dtype) for x in (*row_terms(found), logp, logq, mixed[0]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "expected one derivative of linear_divergences, got create_graph=True; its gradients are closed forms "
                "without a graph: use klkit.divergences on log_softmax(logits) for second derivatives"
            )
        hidden_p, weight_p, bias_p, hidden_q, weight_q, bias_q, tokens, norms, terms = ctx.saved_tensors
        needs, (head_p, head_q) = ctx.needs_input_grad, ctx.heads
        p = Side(hidden_p, replace(head_p, weight=weight_p, bias=bias_p), needs[:3])
        q = Side(hidden_q, replace(head_q, weight=weight_q, bias=bias_q), needs[3:6], twin=p)
        slopes = torch.stack(slopes_of(grads, terms), 1)
        slopes[:, :6] *= head_p.factor
        slopes[:, 6:] *= head_q.factor
        for part, a, b in _tiles(p, q, ctx.size):
            inside, place = _inside(tokens, part)
            here = slopes.clone()
            here[:, [5, 11]] *= inside[:, None]
            _gather(backends.get(ctx.backend, a, b), p, q, part, a, b, place, norms, here)
        return (*p.gradients(), *q.gradients(), *[None] * 6)


def _gather(
    kernels: ModuleType,
    p: Side,
    q: Side,
    part: slice,
    a: Tensor,
    b: Tensor,
    tokens: Tensor,
    norms: Float[Tensor, "m 4"],
    slopes: Float[Tensor, "m 12"],
) -> None:
    """Turn the logits of a tile into their gradients, where they are, and pass these on."""
    kept = [x.clone() if side.wanted and side.head.cap is not None else None for side, x in ((p, a), (q, b))]
    kernels.gradients(a, b, tokens, norms, slopes, a if p.wanted else None, b if q.wanted else None)
    rows = slice(0, len(a))
    for side, slope, logits in ((p, a, kept[0]), (q, b, kept[1])):
        if side.wanted:
            head = side.head.rows(part)
            if logits is not None:
                side.uncap(slope[:, : head.tokens], logits[:, : head.tokens])
            for tile, weight in head.tiles(side.hidden):
                whole = slice(part.start + tile.start, part.start + tile.stop)
                side.gather(rows, whole, weight, slope[:, tile])


def _tiles(p: Side, q: Side, size: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Logits of all rows for ``size`` tokens at a time, each in a buffer that the next ones use again."""
    width, count, device = max(p.head.tokens, q.head.tokens), len(p.hidden), p.hidden.device
    rooms = [torch.empty(count * min(size, width), dtype=side.dtype, device=device) for side in (p, q)]
    for start in range(0, width, size):
        part = slice(start, min(start + size, width))
        tokens = part.stop - part.start
        read = []
        for side, room in zip((p, q), rooms, strict=True):
            head = side.head.rows(part)
            logits = head.logits(side.hidden, room[: count * tokens].view(count, tokens))
            logits[:, head.tokens :] = FLOOR  # also where a tile has no token of this head
            read.append(logits)
        yield part, read[0], read[1]


def _inside(tokens: Int[Tensor, " m"], part: slice) -> tuple[Tensor, Int[Tensor, " m"]]:
    """Whether each token is in a tile, and its place there, or some place if not."""
    return (tokens >= part.start) & (tokens < part.stop), (tokens - part.start).clamp(0, part.stop - part.start - 1)


def tile_tokens(p: Side, q: Side) -> int:
    """Tokens a tile: as many as ``TILE_BYTES`` of logits of both models allow, for all rows at once."""
    budget = TILE_BYTES if p.hidden.device.type == "cpu" else ACCELERATOR_BYTES
    values_a_token = len(p.hidden) * (p.dtype.itemsize + q.dtype.itemsize)
    return min(max(rows_per_chunk(max(1, values_a_token), bytes_per_value=1, budget=budget), LEAST_TOKENS), MOST_TOKENS)


def join(first: RowSums, second: RowSums) -> RowSums:
    """The sums of rows whose tokens were visited in two parts.

    Each part's sums are carried over to the larger of the two references. With ``δ`` the change of ``d``,
    ``Σ exp(x) f(d + δ) = e^δ Σ exp(x) f(d) + (e^δ − 1) Σ exp(x) d + f(δ) Σ exp(x)``, in which small things stay small.

    Example:
        >>> import torch
        >>> from klkit.divergences.backends.eager import row_sums
        >>> a, b = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2.0, 2.0, 1.0]])
        >>> one, other, whole = (RowSums(*row_sums(a[:, i], b[:, i]).unbind(1)) for i in (
        ...     slice(0, 2), slice(2, 3), slice(0, 3)))
        >>> joined = join(one, other._replace(top_p=other.top_p + 2, top_q=other.top_q + 2))
        >>> bool(torch.allclose(torch.stack(joined), torch.stack(whole), rtol=1e-6))
        True
    """
    left_p, left_q = first.reference >= second.reference, first.greatest >= second.greatest
    reference = torch.where(left_p, first.reference, second.reference)
    paired = torch.where(left_p, first.paired, second.paired)
    greatest = torch.where(left_q, first.greatest, second.greatest)
    paired = torch.where(paired > FLOOR / 2, paired, greatest)
    one, two = _carried(first, reference, paired, greatest), _carried(second, reference, paired, greatest)
    total = {name: getattr(one, name) + getattr(two, name) for name in RowSums._fields[5:15]}
    return RowSums(
        top_p=torch.where(left_p, first.top_p, second.top_p),
        top_q=torch.where(left_q, first.top_q, second.top_q),
        reference=reference,
        paired=paired,
        greatest=greatest,
        least=torch.minimum(one.least, two.least),
        most=torch.maximum(one.most, two.most),
        **total,
    )


def _carried(s: RowSums, reference: Tensor, paired: Tensor, greatest: Tensor) -> RowSums:
    """Sums relative to other references, none of them below their own."""
    rise, rise_q = reference - s.reference, greatest - s.greatest
    fade_p, fade_q = (-rise).exp(), (-rise_q).exp()
    # Of d; first the differences that are small where the laws are alike.
    shift = (reference - paired) - (s.reference - s.paired)
    near = shift.clamp(-ALIKE, ALIKE)
    accurate = (shift == near) & (s.greatest - s.paired < FARTHEST)
    excess_p = near.exp() * s.excess_p + near.expm1() * s.drift_p + excess(near) * s.mass_p
    excess_q = (-near).exp() * s.excess_q - (-near).expm1() * s.drift_q + excess(-near) * s.mass_q
    drift_p, drift_q = fade_p * (s.drift_p + shift * s.mass_p), fade_q * (s.drift_q + shift * s.mass_q)
    mass_p, mass_q = fade_p * s.mass_p, fade_q * s.mass_q
    # Where they are not alike, from exp(x) f(d) = exp(b − R) − exp(x) − exp(x) d and its like: capped as in a backend.
    span = (greatest - paired).clamp(max=FARTHEST).exp()
    plain_p = span * mass_q - mass_p - drift_p
    plain_q = mass_p / span - mass_q + drift_q
    return s._replace(
        mass_p=mass_p,
        mass_q=mass_q,
        drift_p=drift_p,
        drift_q=drift_q,
        level_p=fade_p * (s.level_p - rise * s.mass_p),
        level_q=fade_q * (s.level_q - rise_q * s.mass_q),
        excess_p=torch.where(accurate, fade_p * excess_p, plain_p),
        excess_q=torch.where(accurate, fade_q * excess_q, plain_q),
        square_level=fade_p * (s.square_level - 2 * rise * s.level_p + rise.square() * s.mass_p),
        square_drift=fade_p * (s.square_drift + 2 * shift * s.drift_p + shift.square() * s.mass_p),
        least=s.least + shift,
        most=s.most + shift,
    )
