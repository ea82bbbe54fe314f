"""Further f-divergences ``Σ q f(p/q)``; all of them stay finite whatever either law excludes."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from klkit.numerics import excess_series, floored, paired, split


def total_variation(logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"]) -> Float[Tensor, "*b"]:
    """``½ Σ |p - q|`` over the last axis: between 0 and 1, no unit.

    One minus it is the chance that speculative decoding accepts a token. Where ``p = q`` the gradient
    is the subgradient 0.

    Shapes: ``(*b, v)`` and ``(*b, v)`` to ``(*b)``; half precision is widened, double is kept.

    Raises:
        ValueError: the shapes differ, or a row is not normalised.

    Example:
        >>> import torch
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> float(total_variation(p.log(), q.log()))
        0.25
    """
    logp, logq = paired(logp, logq)
    return 0.5 * (logp.exp() - logq.exp()).abs().sum(-1)


def squared_hellinger(logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"]) -> Float[Tensor, "*b"]:
    """``½ Σ (√p - √q)²`` over the last axis: between 0 and 1, no unit.

    Shapes, errors: as for :func:`total_variation`.

    Example:
        >>> import torch
        >>> p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.75])
        >>> float(squared_hellinger(p.log(), q.log()))
        0.5

    Source: E. Hellinger, 1909.
    """
    logp, logq = paired(logp, logq)
    return 0.5 * ((0.5 * logp).exp() - (0.5 * logq).exp()).square().sum(-1)


def alpha_divergence(
    logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"], *, p_power: float = 0.5
) -> Float[Tensor, "*b"]:
    """``(1 - Σ p^α q^(1-α)) / (α (1 - α))`` with ``α = p_power``, in nats: at most ``1 / (α (1 - α))``.

    Tends to ``KL(p‖q)`` as α tends to 1 and to ``KL(q‖p)`` as it tends to 0; at ½ it is four times the
    squared Hellinger distance. Summed as ``Σ (α p + (1 - α) q - p^α q^(1-α))``, term by term non-negative.

    Shapes: as for :func:`total_variation`.

    Raises:
        ValueError: the shapes differ, a row is not normalised, or ``p_power`` is not within (0, 1).

    Example:
        >>> import torch
        >>> p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.75])
        >>> float(alpha_divergence(p.log(), q.log(), p_power=0.5))
        2.0

    Source: S. Amari, 1985, in the parametrisation of T. Minka, 2005.
    """
    if not 0 < p_power < 1:
        raise ValueError(f"expected p_power strictly between 0 and 1, got {p_power}; use kl for 1, reverse_kl for 0")
    logp, logq = paired(logp, logq)
    a, b = floored(logp), floored(logq)
    p, q, alpha, beta = a.exp(), b.exp(), p_power, 1 - p_power
    near, far = split(b - a)
    close = p * (beta * sum(excess_series(near)) - sum(excess_series(beta * near)))
    apart = alpha * p + beta * q - (alpha * a + beta * b).exp()
    return (close + far.sign().square() * apart).clamp(min=0.0).sum(-1) / (alpha * beta)
