"""A loss of one model's logits, whatever it is, from its hidden states and head: any divergence, in bounded memory.

Where :mod:`klkit.divergences.linear_loss` has closed forms for the divergences everybody uses, this takes any function
of a chunk of logits and leaves its gradient in those logits to autograd, a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from klkit.divergences.linear import Head, Side
from klkit.divergences.linear_loss import chunk_rows, handed_over

WORKSPACE = 4
"""Tensors of a chunk's size that a function of logits and its gradient take, at a guess, beside the logits."""

RowFunction = Callable[[Tensor, slice], tuple[Tensor, tuple[Tensor, ...]]]
"""From the logits of a chunk and its rows to what each row adds to the loss, and to further numbers a row."""


def linear_rows(
    hidden: Float[Tensor, "m d"], head: Head, function: RowFunction, *, rows: int | None = None
) -> tuple[Float[Tensor, ""], tuple[Float[Tensor, " m"], ...]]:
    """``Σ f(z)`` over rows of logits ``z = head(hidden)``, without the logits of all of them.

    The loss is differentiable in hidden states, weight and bias, wherever these require a gradient. The gradient is
    formed with the loss; it cannot be differentiated in turn.

    Shapes: hidden states ``(m, d)``; each of the further numbers ``(m,)``, without gradients.

    Args:
        hidden: what enters the head, one row a decision.
        head: the output head.
        function: from logits ``(c, v)``, at least single precision, and the rows they belong to, to what each row adds
            to the loss, ``(c,)``, and to a tuple of further numbers, ``(c,)`` each. Rows must not depend on each other.
        rows: rows a chunk; by default as many as fit into bounded memory.

    Raises:
        RuntimeError: a second derivative is asked for.

    Example:
        >>> hidden = torch.tensor([[0.0], [1.0]], requires_grad=True)
        >>> loss, (first,) = linear_rows(
        ...     hidden, Head(torch.tensor([[2.0], [3.0]])), lambda z, rows: (z.square().sum(-1), (z[:, 0],))
        ... )
        >>> loss.backward()
        >>> float(loss), first.tolist(), hidden.grad[:, 0].tolist()
        (13.0, [0.0, 2.0], [0.0, 26.0])
    """
    plan = _Plan(head, function, rows, torch.is_grad_enabled())
    loss, *found = _Rows.apply(hidden, head.weight, head.bias, plan)  # type: ignore[no-untyped-call]
    return loss, tuple(found)


@dataclass(frozen=True, eq=False, slots=True)
class _Plan:
    """What :func:`linear_rows` was asked for beside the tensors that may need a gradient."""

    head: Head
    function: RowFunction
    rows: int | None
    training: bool


class _Rows(torch.autograd.Function):
    """The loss, and the further numbers."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: _Plan) -> Any:
        side = Side(hidden, plan.head, [need and plan.training for need in ctx.needs_input_grad[:3]])
        with torch.autocast(hidden.device.type, enabled=False):
            loss, found = _visit(side, plan)
        ctx.save_for_backward(*side.gradients())
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*found)
        return loss.to(side.dtype), *found

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        return *handed_over(ctx.saved_tensors, grad), None


def _visit(side: Side, plan: _Plan) -> tuple[Float[Tensor, ""], list[Float[Tensor, " m"]]]:
    """Loss and further numbers of all rows; the gradients gather in ``side``."""
    head, device = side.head, side.hidden.device
    count = len(side.hidden)
    size = plan.rows or chunk_rows(count, WORKSPACE * head.tokens, side.dtype, device, trained=side.trained)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    found: list[tuple[Tensor, ...]] = []
    for start in range(0, max(count, 1), size):
        rows = slice(start, min(start + size, count))
        logits = head.logits(side.hidden[rows]).requires_grad_(side.wanted)
        with torch.set_grad_enabled(side.wanted):
            added, numbers = plan.function(logits, rows)
            together = added.sum()
        loss += added.detach().double().sum()
        found.append(tuple(x.detach() for x in numbers))
        if side.wanted and count:
            (slope,) = torch.autograd.grad(together, logits)
            side.uncap(slope, logits.detach())
            slope *= head.factor
            for tile, weight in head.tiles(side.hidden):
                side.gather(rows, tile, weight, slope[:, tile])
    return loss, [torch.cat(parts) for parts in zip(*found, strict=True)]
