"""The alpha-beta divergences, which hold both directions of KL, and a way between them that is no mixture."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from klkit.numerics import excess_series, floored, lost, paired, split


def alpha_beta_divergence(
    logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"], *, p_power: float = 0.2, q_power: float = 0.7
) -> Float[Tensor, "*b"]:
    """``Σ [a/(a+b) p^(a+b) + b/(a+b) q^(a+b) - p^a q^b] / (a b)`` with ``a = p_power``, ``b = q_power``, in nats.

    Tends to ``KL(p‖q)`` at ``(1, 0)`` and to ``KL(q‖p)`` at ``(0, 1)``, where it is these; on ``a + b = 1`` it is the
    alpha divergence. A power of 0 stands for the limit: then it is infinite where the law of the other power has a
    token that this one excludes. Each term is non-negative.

    Shapes: ``(*b, v)`` and ``(*b, v)`` to ``(*b)``; half precision is widened, double is kept.

    Raises:
        ValueError: the shapes differ, a row is not normalised, a power is negative or not finite, or both are 0.

    Example:
        >>> import torch
        >>> p = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
        >>> q = torch.tensor([0.0, 0.5, 1.0, -0.5, 0.3]).softmax(-1)
        >>> round(float(alpha_beta_divergence(p.log(), q.log(), p_power=0.2, q_power=0.7)), 6)
        0.401105

    Source: A. Cichocki, S. Cruces and S. Amari, 2011; G. Wang et al. (ABKD), 2025, arXiv 2505.04560.
    """
    a, b = p_power, q_power
    if not (math.isfinite(a) and math.isfinite(b)):
        raise ValueError(
            f"expected two finite powers, got p_power={a} and q_power={b}; choose them between 0 and about 3, as 0.2 "
            f"and 0.7"
        )
    if min(a, b) < 0 or a + b == 0:
        raise ValueError(
            f"expected powers of 0 or more, one of them above, got p_power={a} and q_power={b}; others are infinite "
            f"wherever a law excludes a token"
        )
    logp, logq = paired(logp, logq)
    x, y = floored(logp), floored(logq)
    if b == 0:
        return _limit(x, y, a)
    if a == 0:
        return _limit(y, x, b)
    near, far = split(y - x)
    whole = a + b
    close = (whole * x).exp() * (b / whole * _excess(whole * near, whole) - _excess(b * near, b))
    apart = a / whole * (whole * x).exp() + b / whole * (whole * y).exp() - (a * x + b * y).exp()
    return (close + far.sign().square() * apart).clamp(min=0.0).sum(-1) / (a * b)


def _limit(x: Tensor, y: Tensor, power: float) -> Tensor:
    """``Σ [p^a a log(p/q) - p^a + q^a] / a²``, of floored log-probabilities."""
    d = y - x
    near, far = split(d)
    p = (power * x).exp()
    beyond = far.sign().square()
    apart = (power * y).exp() - p - p * power * d
    value = (p * _excess(power * near, power) + beyond * apart).sum(-1) / power**2
    return value.masked_fill(lost(d), float("inf"))


def _excess(d: Tensor, scale: float) -> Tensor:
    """``exp(d) - 1 - d`` of ``d`` up to ``scale`` times what the series is meant for."""
    if scale <= 1:
        return sum(excess_series(d), start=d.new_zeros(()))
    # exp(2t) - 1 - 2t = (exp(t) - 1)² + 2 (exp(t) - 1 - t): halve until the series holds.
    half = _excess(0.5 * d, 0.5 * scale)
    return (half + 0.5 * d).square() + 2 * half
