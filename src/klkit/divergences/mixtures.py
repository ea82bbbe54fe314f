"""Divergences from a mixture of the two laws: finite whatever either of them excludes."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from klkit.divergences.kl import kl, nonnegative_kl, reverse_kl
from klkit.numerics import floored, paired, split


def log_mixture(
    logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"], log_odds: Float[Tensor, "*#b #v"]
) -> Float[Tensor, "*b v"]:
    """``log(w p + (1 - w) q)`` with ``w = sigmoid(log_odds)``, and exactly ``log p`` where ``p = q``.

    Tokens that both exclude come out at ``klkit.numerics.FLOOR``, with gradient 0.

    Shapes: ``(*b, v)`` twice, and odds that broadcast to them, to ``(*b, v)``.

    Example:
        >>> import torch
        >>> p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
        >>> log_mixture(p.log(), q.log(), torch.zeros(1)).exp().tolist()
        [0.75, 0.25]
    """
    a, b = floored(logp), floored(logq)
    near, far = split(b - a)
    close = a + torch.log1p(torch.sigmoid(-log_odds) * torch.expm1(near))
    apart = torch.logaddexp(a + logsigmoid(log_odds), b + logsigmoid(-log_odds))
    return torch.lerp(close, apart, far.sign().square())


def log_odds(weight: float, name: str, like: Tensor) -> Float[Tensor, " 1"]:
    """``log(w / (1 - w))`` in the precision of ``like``; ``name`` is what the error calls the weight.

    Raises:
        ValueError: the weight is not strictly between 0 and 1.
    """
    if not 0 < weight < 1:
        raise ValueError(
            f"expected {name} strictly between 0 and 1, got {weight}; "
            f"at the ends the mixture is one of the two laws: use kl or reverse_kl"
        )
    return torch.full((1,), math.log(weight) - math.log1p(-weight), dtype=like.dtype, device=like.device)


def skew_kl(logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"], *, p_weight: float = 0.1) -> Float[Tensor, "*b"]:
    """``Σ p (log p - log m)`` with ``m = p_weight p + (1 - p_weight) q``, in nats: at most ``-log p_weight``.

    Shapes: ``(*b, v)`` and ``(*b, v)`` to ``(*b)``; half precision is widened, double is kept.

    Raises:
        ValueError: the shapes differ, a row is not normalised, or ``p_weight`` is not within (0, 1).

    Example:
        >>> import torch
        >>> p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> round(float(skew_kl(p.log(), q.log(), p_weight=0.1)), 6)
        2.302585

    Source: L. Lee, 1999; J. Ko et al. (DistiLLM), 2024, arXiv 2402.03898.
    """
    logp, logq = paired(logp, logq)
    return nonnegative_kl(logp, log_mixture(logp, logq, log_odds(p_weight, "p_weight", logp)))


def skew_reverse_kl(
    logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"], *, q_weight: float = 0.1
) -> Float[Tensor, "*b"]:
    """``Σ q (log q - log m)`` with ``m = q_weight q + (1 - q_weight) p``, in nats: at most ``-log q_weight``.

    :func:`skew_kl` with its arguments swapped. Shapes, errors: as there.

    Example:
        >>> import torch
        >>> p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
        >>> round(float(skew_reverse_kl(p.log(), q.log(), q_weight=0.5)), 6)
        0.143841

    Source: J. Ko et al. (DistiLLM), 2024, arXiv 2402.03898.
    """
    logp, logq = paired(logp, logq)
    return nonnegative_kl(logq, log_mixture(logq, logp, log_odds(q_weight, "q_weight", logp)))


def generalised_jensen_shannon(
    logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"], *, p_weight: float = 0.5
) -> Float[Tensor, "*b"]:
    """``w KL(p‖m) + (1 - w) KL(q‖m)`` with ``m = w p + (1 - w) q`` and ``w = p_weight``, in nats.

    At most the entropy of the weights. It vanishes as ``w`` tends to 0 or 1; divided by ``w (1 - w)`` it
    tends to ``KL(p‖q)`` and ``KL(q‖p)``. Shapes, errors: as for :func:`skew_kl`.

    Example:
        >>> import torch
        >>> p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> round(float(generalised_jensen_shannon(p.log(), q.log(), p_weight=0.1)), 6)
        0.325083

    Source: J. Lin, 1991; R. Agarwal et al. (GKD), 2023, arXiv 2306.13649, where ``β`` is this weight.
    """
    logp, logq = paired(logp, logq)
    logm = log_mixture(logp, logq, log_odds(p_weight, "p_weight", logp))
    return p_weight * nonnegative_kl(logp, logm) + (1 - p_weight) * nonnegative_kl(logq, logm)


def normalised_jensen_shannon(
    logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"], *, p_weight: float = 0.5
) -> Float[Tensor, "*b"]:
    """``[w KL(p‖m) + (1 - w) KL(q‖m)] / (w (1 - w))`` with ``m = w p + (1 - w) q`` and ``w = p_weight``, in nats.

    :func:`generalised_jensen_shannon` without its vanishing at the ends: a way from ``KL(p‖q)`` at 0, which is that,
    to ``KL(q‖p)`` at 1, which is that. Shapes: as for :func:`skew_kl`.

    Raises:
        ValueError: the shapes differ, a row is not normalised, or ``p_weight`` is not within [0, 1].

    Example:
        >>> import torch
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> [round(float(normalised_jensen_shannon(p.log(), q.log(), p_weight=w)), 4) for w in (0.0, 1e-6, 0.5, 1.0)]
        [0.1438, 0.1438, 0.1353, 0.1308]

    Source: R. Agarwal et al. (GKD), 2023, arXiv 2306.13649, whose form is divided by ``w (1 - w)`` here.
    """
    if p_weight in (0, 1):
        return (reverse_kl if p_weight else kl)(logp, logq)
    return generalised_jensen_shannon(logp, logq, p_weight=p_weight) / (p_weight * (1 - p_weight))


def jensen_shannon(logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"]) -> Float[Tensor, "*b"]:
    """``½ KL(p‖m) + ½ KL(q‖m)`` with ``m = ½ p + ½ q``, in nats: between 0 and ``log 2``.

    Shapes, errors: as for :func:`klkit.divergences.kl.kl`.

    Example:
        >>> import torch
        >>> p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> round(float(jensen_shannon(p.log(), q.log())), 6)
        0.693147

    Source: J. Lin, 1991.
    """
    return generalised_jensen_shannon(logp, logq, p_weight=0.5)
