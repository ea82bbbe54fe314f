"""The Kullback-Leibler divergence, its reverse and its symmetric sum, and the entropies they are made of."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx

from klkit.numerics import by_rows, divergence_terms, floored, lost, mass, paired, require_mass, widen


class _NonNegativeKL(torch.autograd.Function):
    """``Σ (q - p - p (log q - log p))``, keeping nothing for its backward pass but its two arguments."""

    @staticmethod
    def forward(logp: Tensor, logq: Tensor) -> Tensor:
        return by_rows(_value, logp, logq)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        inputs = (*ctx.saved_tensors, grad.unsqueeze(-1))
        slopes = (_slope_p, _slope_q)
        in_p, in_q = (by_rows(f, *inputs) if n else None for f, n in zip(slopes, ctx.needs_input_grad, strict=True))
        return in_p, in_q


def _value(logp: Tensor, logq: Tensor) -> Tensor:
    a, b = floored(logp), floored(logq)
    d = b - a
    return divergence_terms(a.exp(), b.exp(), d).sum(-1).masked_fill(lost(d), torch.inf)


def _slope_p(logp: Tensor, logq: Tensor, grad: Tensor) -> Tensor:
    """``p (log p - log q)``, times ``grad``; 0 in infinite rows."""
    d = floored(logq) - floored(logp)
    return -grad.masked_fill(lost(d).unsqueeze(-1), 0.0) * logp.exp() * d


def _slope_q(logp: Tensor, logq: Tensor, grad: Tensor) -> Tensor:
    """``q - p``, times ``grad``; 0 in infinite rows."""
    d = floored(logq) - floored(logp)
    return grad.masked_fill(lost(d).unsqueeze(-1), 0.0) * (logq.exp() - logp.exp())


def nonnegative_kl(logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"]) -> Float[Tensor, "*b"]:
    """:func:`kl` of rows that are known to be of one shape, one precision, and normalised."""
    value: Tensor = _NonNegativeKL.apply(logp, logq)  # type: ignore[no-untyped-call]
    return value


def kl(logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"]) -> Float[Tensor, "*b"]:
    """``Σ p (log p - log q)`` over the last axis, in nats: the divergence of ``q`` from ``p``.

    It is summed as ``Σ (q - p - p (log q - log p))``, whose terms are non-negative: the result is
    never below 0, exactly 0 for identical rows, and accurate far below 1e-7 nats. A token that both
    exclude (``-inf``) or only ``p`` excludes contributes as it should; where ``q`` excludes a token that
    ``p`` allows the row is ``+inf``.

    Gradients: ``p (log p - log q)`` in ``logp`` and ``q - p`` in ``logq``. With rows that come from a
    log-softmax they yield the gradients of the plain form (those of ``klkit.divergences.gradients``);
    taken in ``logp`` and ``logq`` themselves the two forms differ by multiples of ``p`` and ``q``, that is
    off the simplex only. An infinite row stays infinite under any small step, so its gradient is 0.

    Shapes: ``(*b, v)`` and ``(*b, v)`` to ``(*b)``; half precision is widened, double is kept.

    Raises:
        ValueError: the shapes differ, or a row is not normalised.

    Example:
        >>> import torch
        >>> p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.75, 0.0])
        >>> round(float(kl(p.log(), q.log())), 6)
        0.143841

    Source: S. Kullback and R. Leibler, 1951; the summands are those of the Bregman divergence of the
    negative entropy (L. Bregman, 1967).
    """
    return nonnegative_kl(*paired(logp, logq))


def reverse_kl(logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"]) -> Float[Tensor, "*b"]:
    """``Σ q (log q - log p)`` over the last axis, in nats: :func:`kl` with its arguments swapped.

    Shapes, gradients, errors: as for :func:`kl`.

    Example:
        >>> import torch
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])
        >>> round(float(reverse_kl(p.log(), q.log())), 6), float(kl(p.log(), q.log()))
        (0.693147, inf)
    """
    return kl(logq, logp)


def jeffreys(logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"]) -> Float[Tensor, "*b"]:
    """``Σ (p - q)(log p - log q)`` over the last axis, in nats: :func:`kl` plus :func:`reverse_kl`.

    Infinite unless both exclude the same tokens. Shapes, gradients, errors: as for :func:`kl`.

    Example:
        >>> import torch
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> round(float(jeffreys(p.log(), q.log())), 6)
        0.274653

    Source: H. Jeffreys, 1946 (the sum, not the half of it).
    """
    logp, logq = paired(logp, logq)
    value = nonnegative_kl(logp, logq) + nonnegative_kl(logq, logp)
    return value.masked_fill(value == torch.inf, torch.inf)  # also stops the gradient of the finite summand


def entropy(logp: Float[Tensor, "*b v"]) -> Float[Tensor, "*b"]:
    """``-Σ p log p`` over the last axis, in nats; excluded tokens contribute 0, also to the gradient.

    Shapes: ``(*b, v)`` to ``(*b)``.

    Raises:
        ValueError: a row is not normalised.

    Example:
        >>> import torch
        >>> round(float(entropy(torch.tensor([0.5, 0.5, 0.0]).log())), 6)
        0.693147

    Source: C. Shannon, 1948.
    """
    logp = widen(logp)
    require_mass(by_rows(mass, logp.detach()), "p")
    return -(logp.exp() * floored(logp)).sum(-1)


def cross_entropy(logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"]) -> Float[Tensor, "*b"]:
    """``-Σ p log q`` over the last axis, in nats: :func:`kl` plus the entropy of ``p``, so not a divergence.

    ``+inf``, with gradient 0, where ``q`` excludes a token that ``p`` allows. Shapes, errors: as for
    :func:`kl`.

    Example:
        >>> import torch
        >>> p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
        >>> round(float(cross_entropy(p.log(), q.log())), 6)
        0.693147
    """
    logp, logq = paired(logp, logq)
    value = -(logp.exp() * floored(logq)).sum(-1)
    return value.masked_fill(lost(floored(logq) - floored(logp)), torch.inf)
