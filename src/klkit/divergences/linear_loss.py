"""Losses of the divergences between two models, from hidden states and output heads.

Logits exist for a chunk of rows at a time. If the weights of the row quantities are known while a chunk's
logits exist, its gradients are formed there and then: four matrix products, nothing computed twice, and no
tensor of the size of all the logits. For gradients that are known only afterwards there is
:mod:`klkit.divergences.linear_tiles`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from klkit.divergences import backends
from klkit.divergences.adaptive import HeadRule
from klkit.divergences.differentiable import Divergences, row_terms, slopes_of, sums_and_weight
from klkit.divergences.linear import Head, Side
from klkit.divergences.sums import RowSums, norms_of, values
from klkit.numerics import rows_per_chunk

TRAINED_ROWS, FROZEN_ROWS = 192, 64
"""Rows a chunk on a CPU. Where a head is trained, its gradient is read and written once a chunk; else small is free."""

ACCELERATOR_ROWS = 4096

CHUNK_BYTES, ACCELERATOR_BYTES = 128 << 20, 2 << 30
"""Bytes that the logits of a chunk may take, of both models together."""


class Weights(NamedTuple):
    """What a loss adds of each quantity of :class:`klkit.divergences.differentiable.Divergences`, ``(m,)`` or None.

    Weights are constants: no gradient flows into them. A weight of 0 silences what is infinite.
    """

    kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    entropy_p: Tensor | None = None
    entropy_q: Tensor | None = None
    logp: Tensor | None = None
    logq: Tensor | None = None
    js: Tensor | None = None

    def rows(self, rows: slice) -> Weights:
        """The weights of some rows."""
        return Weights(*(None if weight is None else weight[rows] for weight in self))


_keeps_graph: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)

Weigh = Callable[[Divergences, slice], Weights]
"""Weights of a chunk of rows, given its quantities and its place."""


def linear_loss(
    hidden_p: Float[Tensor, "m d"],
    head_p: Head,
    hidden_q: Float[Tensor, "m e"],
    head_q: Head,
    tokens: Int[Tensor, " m"] | None,
    weights: Weights | Weigh,
    *,
    js: bool = False,
    head: HeadRule | None = None,
    rows: int | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, ""], Divergences]:
    """``Σ w · (KL, reverse KL, entropies, log-probabilities, JS)`` over rows, without the logits of all of them.

    The loss is differentiable in hidden states, weights and biases of both models, wherever these require a
    gradient: detach the head of a model that is not trained. Gradients are formed with the loss, so that
    the backward pass only hands them over; it cannot be differentiated in turn. Logits are formed in at
    least single precision, and so are all sums, whatever the precision of the weights.

    Weights may depend on the quantities themselves, and on those of *later* rows: given a function, chunks
    are visited from the last row to the first, and the function is called once a chunk. So the gradient of a
    sequence divergence, whose score term weighs a token by the divergences after it, costs no more.

    Shapes: hidden states ``(m, d)`` and ``(m, e)``; quantities ``(m,)``, in nats, without gradients.

    Args:
        hidden_p: what enters the head of ``p``, one row a decision.
        head_q: where it has fewer tokens than the other head, ``q`` excludes the rest; the same for ``head_p``.
        tokens: the token of each row, where log-probabilities are wanted.
        weights: of each row, or a function from a chunk's quantities and its rows to the chunk's weights.
        js: whether the function wants the Jensen-Shannon divergence; it takes another sweep.
        head: whose weight, as in :func:`klkit.divergences.adaptive.adaptive_kl`, the function wants: with
            ``lambda found, rows: Weights(kl=found.head_weight, reverse_kl=1 - found.head_weight)`` the loss is that.
        rows: rows a chunk; by default as many as make the products efficient, within bounded memory.
        backend: by default the one that :func:`klkit.divergences.backends.choose` names for this much work.

    Raises:
        ValueError: shapes do not fit, a weight stands on something that is not computed, a logit is not finite.
        RuntimeError: a second derivative is asked for.

    Example:
        >>> import torch
        >>> hidden = torch.tensor([[0.0], [1.0]], requires_grad=True)
        >>> head = Head(torch.tensor([[0.0], [1.0]]))
        >>> loss, found = linear_loss(hidden, head, torch.zeros(2, 1), head, None, Weights(kl=torch.ones(2)))
        >>> [round(x, 4) for x in found.kl.tolist()], round(float(loss.detach()), 4)
        ([0.0, 0.1109], 0.1109)
        >>> loss.backward()
        >>> [round(x, 4) for x in hidden.grad[:, 0].tolist()]  # p (1 - p) h
        [0.0, 0.1966]
    """
    require_fit(hidden_p, head_p, hidden_q, head_q, tokens)
    if isinstance(weights, Weights):
        js = js or weights.js is not None
        if tokens is None and (weights.logp is not None or weights.logq is not None):
            raise ValueError("expected tokens, whose log-probabilities have weights, got None; pass one a row")
        amounts_of(weights, hidden_p.new_empty(7, len(hidden_p)))
    plan = Plan(head_p, head_q, tokens, weights, js, head, rows, backend, torch.is_grad_enabled())
    inputs = (hidden_p, head_p.weight, head_p.bias, hidden_q, head_q.weight, head_q.bias)
    loss, *found = _Loss.apply(*inputs, plan)  # type: ignore[no-untyped-call]
    return loss, named(found, tokens is not None, js, head is not None)


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """What :func:`linear_loss` was asked for beside the tensors that may need a gradient."""

    head_p: Head
    head_q: Head
    tokens: Tensor | None
    weights: Weights | Weigh
    js: bool
    head: HeadRule | None
    rows: int | None
    backend: str | None
    training: bool

    def weigh(self, found: Divergences, rows: slice) -> Weights:
        """The weights of a chunk."""
        return self.weights.rows(rows) if isinstance(self.weights, Weights) else self.weights(found, rows)


class _Loss(torch.autograd.Function):
    """The loss, and the quantities in the order of :class:`Divergences`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_p: Tensor,
        weight_p: Tensor,
        bias_p: Tensor | None,
        hidden_q: Tensor,
        weight_q: Tensor,
        bias_q: Tensor | None,
        plan: Plan,
    ) -> Any:
        needs = [need and plan.training for need in ctx.needs_input_grad]
        p = Side(hidden_p, plan.head_p, needs[:3])
        q = Side(hidden_q, plan.head_q, needs[3:6], twin=p)
        with torch.autocast(hidden_p.device.type, enabled=False):
            loss, table = _visit(p, q, plan)
        ctx.save_for_backward(*p.gradients(), *q.gradients())
        ctx.set_materialize_grads(False)
        found = tuple(table)
        ctx.mark_non_differentiable(*found)
        return loss.to(table.dtype), *found

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        return *handed_over(ctx.saved_tensors, grad), None


def _visit(p: Side, q: Side, plan: Plan) -> tuple[Float[Tensor, ""], Float[Tensor, "8 m"]]:
    """Loss and quantities of all rows, chunk by chunk from the last; gradients gather in ``p`` and ``q``."""
    count, width, device = len(p.hidden), max(p.head.tokens, q.head.tokens), p.hidden.device
    dtype = torch.promote_types(p.dtype, q.dtype)
    size = plan.rows or chunk_rows(count, width, dtype, device, trained=p.trained or q.trained)
    room_p, room_q = (torch.empty(min(size, count), width, dtype=side.dtype, device=device) for side in (p, q))
    kernels = backends.get(plan.backend or backends.choose(count * width, device, dtype), room_p, room_q)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    table = torch.zeros(8, count, dtype=dtype, device=device)
    drawn = torch.zeros(count, dtype=torch.long, device=device) if plan.tokens is None else plan.tokens.to(device)
    for start in reversed(range(0, count, size)):
        rows = slice(start, min(start + size, count))
        a = p.head.logits(p.hidden[rows], room_p[: rows.stop - start])
        b = q.head.logits(q.hidden[rows], room_q[: rows.stop - start])
        sums_table, weight = sums_and_weight(kernels, a, b, plan.head)
        sums = RowSums(*sums_table.unbind(1))
        found = values(sums)
        norms = norms_of(sums, found)
        mixed = kernels.second_sweep(a, b, norms)[:, :2] if plan.js else torch.zeros_like(norms[:, :2])
        y = drawn[rows, None]
        logp = a.gather(1, y)[:, 0].double() - sums.reference - found.log_mass_p
        logq = b.gather(1, y)[:, 0].double() - sums.greatest - found.log_mass_q
        exact = torch.stack([*row_terms(found), logp, logq, mixed[:, 0]])
        table[:7, rows], table[7, rows] = exact, weight
        known = named(table[:, rows], plan.tokens is not None, plan.js, plan.head is not None)
        weights = plan.weigh(known, rows)
        amounts = amounts_of(weights, exact)
        loss += torch.where(amounts == 0, 0.0, amounts * exact).sum()
        if p.wanted or q.wanted:
            slopes = torch.stack(slopes_of(tuple(amounts), torch.stack([*row_terms(found), *mixed.unbind(1)])), 1)
            _gather(kernels, p, q, a, b, rows, y[:, 0], norms, slopes)
    return loss, table


def _gather(
    kernels: ModuleType,
    p: Side,
    q: Side,
    a: Tensor,
    b: Tensor,
    rows: slice,
    tokens: Tensor,
    norms: Float[Tensor, "c 4"],
    slopes: Float[Tensor, "c 12"],
) -> None:
    """Turn the logits of a chunk into their gradients, where they are, and pass these on."""
    slopes[:, :6] *= p.head.factor
    slopes[:, 6:] *= q.head.factor
    capped = any(side.wanted and side.head.cap is not None for side in (p, q))
    # The cap's derivative needs the logits once more, so then they are kept for a few rows at a time.
    few = rows_per_chunk(a.shape[1], bytes_per_value=a.element_size()) if capped else len(a)
    for start in range(0, len(a), few):
        part = slice(start, start + few)
        x, y = a[part], b[part]
        kept = [x.clone() if p.head.cap else None, y.clone() if q.head.cap else None] if capped else [None, None]
        into = x if p.wanted else None, y if q.wanted else None
        kernels.gradients(x, y, tokens[part], norms[part], slopes[part], *into)
        for side, slope, logits in zip((p, q), into, kept, strict=True):
            if slope is not None and logits is not None:
                side.uncap(slope[:, : side.head.tokens], logits[:, : side.head.tokens])
    for side, slope in ((p, a), (q, b)):
        if side.wanted:
            for tile, weight in side.head.tiles(side.hidden):
                side.gather(rows, tile, weight, slope[:, tile])


def handed_over(kept: tuple[Tensor | None, ...], grad: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients that were formed with a loss, times that of the loss: what its backward pass returns.

    Raises:
        RuntimeError: a second derivative is asked for.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "expected one derivative of a loss from hidden states, got create_graph=True; its gradients are closed "
            "forms without a graph: use klkit.divergences on log_softmax(logits) for second derivatives"
        )
    if grad is None:
        return (None,) * len(kept)
    if _keeps_graph():
        return tuple(None if x is None else x * grad.to(x.dtype) for x in kept)
    # The graph ends here, so the gradients are handed over, not copied. On a CPU the factor is at hand.
    if grad.device.type != "cpu" or float(grad) != 1.0:
        for x in kept:
            if x is not None:
                x.mul_(grad.to(x.dtype))
    return kept


def amounts_of(weights: Weights, like: Float[Tensor, "7 m"]) -> Float[Tensor, "7 m"]:
    """Weights as a table, 0 where there are none.

    Raises:
        ValueError: there are not as many as rows.
    """
    for name, weight in weights._asdict().items():
        if weight is not None and weight.shape != like.shape[1:]:
            raise ValueError(
                f"expected {like.shape[1]} weights of {name}, one a row, got shape {tuple(weight.shape)}; give a "
                f"number for every row of hidden states"
            )
    zero = torch.zeros_like(like[0])
    return torch.stack([zero if weight is None else weight.detach().to(zero) for weight in weights])


def named(table: Iterable[Tensor], drawn: bool, js: bool, head: bool = False) -> Divergences:
    """Rows of a table as quantities, without those that were not asked for."""
    kl, reverse_kl, entropy_p, entropy_q, logp, logq, mixed, *weight = table
    return Divergences(
        kl,
        reverse_kl,
        entropy_p,
        entropy_q,
        logp if drawn else None,
        logq if drawn else None,
        mixed if js else None,
        weight[0] if head else None,
    )


def chunk_rows(count: int, width: int, dtype: torch.dtype, device: torch.device, *, trained: bool) -> int:
    """Rows a chunk: as equal as can be, within ``CHUNK_BYTES`` of logits of both models."""
    on_cpu = device.type == "cpu"
    most = (TRAINED_ROWS if trained else FROZEN_ROWS) if on_cpu else ACCELERATOR_ROWS
    budget = CHUNK_BYTES if on_cpu else ACCELERATOR_BYTES
    most = min(most, rows_per_chunk(2 * width, bytes_per_value=dtype.itemsize, budget=budget))
    chunks = max(1, math.ceil(count / most))
    return max(1, math.ceil(count / chunks))


def require_fit(hidden_p: Tensor, head_p: Head, hidden_q: Tensor, head_q: Head, tokens: Tensor | None) -> None:
    """Refuse hidden states, heads and tokens of different sizes or places.

    Raises:
        ValueError: they do not fit.
    """
    for name, hidden, head in (("p", hidden_p, head_p), ("q", hidden_q, head_q)):
        if hidden.ndim != 2 or hidden.shape[1] != head.weight.shape[1] or hidden.device != head.weight.device:
            raise ValueError(
                f"expected hidden states of {name} as (m, {head.weight.shape[1]}) on {head.weight.device}, where its "
                f"head is, got {tuple(hidden.shape)} on {hidden.device}; pass what enters that head, one row a decision"
            )
    shapes = [x.shape[:1] for x in (hidden_p, hidden_q, *([] if tokens is None else [tokens]))]
    if len(set(shapes)) > 1 or hidden_p.device != hidden_q.device:
        raise ValueError(
            f"expected as many rows of p and of q, and as many tokens, on one device, got "
            f"{[int(x[0]) for x in shapes]} on {hidden_p.device} and {hidden_q.device}; score the same strings"
        )
    width = max(head_p.tokens, head_q.tokens)
    if tokens is not None and len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < width:
        raise ValueError(
            f"expected tokens in 0..{width - 1}, got {int(tokens.min())}..{int(tokens.max())}; leave padding out"
        )
