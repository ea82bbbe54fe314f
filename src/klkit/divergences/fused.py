"""Every per-decision quantity from one visit to a chunk of rows.

Callers pass a cache-sized chunk (``klkit.numerics.rows_per_chunk``), so the temporaries below stay
in cache and nothing of the size of all the logits is ever allocated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from klkit.numerics import excess, masked_difference


@dataclass(frozen=True, slots=True)
class RowStatistics:
    """Scalars of each row of ``p``- and ``q``-log-probabilities; every field is ``(m,)``, in nats.

    Attributes:
        logp: ``log p(y)`` of the drawn token.
        logq: ``log q(y)`` of the drawn token.
        kl: ``Σ p (log p − log q)``.
        reverse_kl: ``Σ q (log q − log p)`` at the same prefix.
        total_variation: ``½ Σ |p − q|``.
        entropy_p: ``−Σ p log p``.
        entropy_q: ``−Σ q log q``.
        variance_logp: variance of ``log p(a)`` for ``a`` drawn from ``p``.
        variance_ratio: variance of ``log p(a) − log q(a)`` for ``a`` drawn from ``p``.
        end_p: probability of ending here under ``p`` (all end tokens together).
        end_q: the same under ``q``.
        end_kl: the part of ``kl`` due to ending or not: KL between the two coin flips.
        top_p: ``p``'s most probable token.
        top_q: ``q``'s most probable token.
        lost: ``p``-mass on tokens that ``q`` excludes; above 0 exactly when ``kl`` is infinite.
        excluded: the most probable such token, or −1.
    """

    logp: Float[Tensor, " m"]
    logq: Float[Tensor, " m"]
    kl: Float[Tensor, " m"]
    reverse_kl: Float[Tensor, " m"]
    total_variation: Float[Tensor, " m"]
    entropy_p: Float[Tensor, " m"]
    entropy_q: Float[Tensor, " m"]
    variance_logp: Float[Tensor, " m"]
    variance_ratio: Float[Tensor, " m"]
    end_p: Float[Tensor, " m"]
    end_q: Float[Tensor, " m"]
    end_kl: Float[Tensor, " m"]
    top_p: Int[Tensor, " m"]
    top_q: Int[Tensor, " m"]
    lost: Float[Tensor, " m"]
    excluded: Int[Tensor, " m"]

    @property
    def same_top(self) -> Bool[Tensor, " m"]:
        """Whether both models agree on the most probable token."""
        return self.top_p == self.top_q


def row_statistics(
    logp: Float[Tensor, "m v"], logq: Float[Tensor, "m v"], tokens: Int[Tensor, " m"], ends: tuple[int, ...]
) -> RowStatistics:
    """Reduce rows of log-probabilities to the scalars that estimators, audit and report need.

    Args:
        tokens: the token drawn at each row.
        ends: ids that end a response.
    """
    p, q = logp.exp(), logq.exp()
    d = masked_difference(logq, logp, logp)  # log q − log p on p's support, 0 off it
    u = -d
    # p (e^d − 1 − d) on p's support, q off it: each term is non-negative and the sum is KL when both
    # rows normalise; second order, not first, in the rounding of the normalisers.
    terms = p * excess(d)
    shared = (p > 0) & (q > 0)
    off_p = p == 0
    kl = torch.where(off_p, q, terms).sum(-1)
    reverse_terms = torch.where(shared, q * excess(torch.where(shared, u, 0.0)), torch.where(off_p & (q > 0), torch.inf, p))
    finite_u = torch.where(shared, u, 0.0)
    finite_logp = torch.where(off_p, 0.0, logp)
    mean_u = (p * finite_u).sum(-1, keepdim=True)
    entropy_p = -(p * finite_logp).sum(-1)
    lost_terms = torch.where(logq == -torch.inf, p, 0.0)
    lost = lost_terms.sum(-1)
    infinite = lost > 0
    variance_ratio = (p * torch.where(shared, finite_u - mean_u, 0.0).square()).sum(-1)
    y = tokens[:, None]
    end = torch.tensor(ends, dtype=torch.long, device=logp.device)
    end_p, end_q = p[:, end].sum(-1).clamp(max=1.0), q[:, end].sum(-1).clamp(max=1.0)
    return RowStatistics(
        logp=logp.gather(1, y)[:, 0],
        logq=logq.gather(1, y)[:, 0],
        kl=kl,
        reverse_kl=reverse_terms.sum(-1),
        total_variation=0.5 * (p - q).abs().sum(-1),
        entropy_p=entropy_p,
        entropy_q=-(q * torch.where(q > 0, logq, 0.0)).sum(-1),
        variance_logp=(p * torch.where(off_p, 0.0, finite_logp + entropy_p[:, None]).square()).sum(-1),
        variance_ratio=torch.where(infinite, torch.inf, variance_ratio),
        end_p=end_p,
        end_q=end_q,
        end_kl=bernoulli_kl(end_p, end_q),
        top_p=logp.argmax(-1),
        top_q=logq.argmax(-1),
        lost=lost,
        excluded=torch.where(infinite, lost_terms.argmax(-1), -1),
    )


def bernoulli_kl(p: Float[Tensor, " m"], q: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """``p log(p/q) + (1−p) log((1−p)/(1−q))``, with ``0 log 0 = 0`` and ``+inf`` where q excludes."""
    return torch.special.xlogy(p, p / q.where(p > 0, torch.ones_like(q))) + torch.special.xlogy(
        1 - p, (1 - p) / (1 - q).where(p < 1, torch.ones_like(q))
    )


def mixture_kl(
    logp: Float[Tensor, "m v"], logq: Float[Tensor, "m v"], log_odds: Float[Tensor, " m"]
) -> Float[Tensor, " m"]:
    """``Σ p (log p − log m)`` for ``m = w p + (1 − w) q``, ``w = sigmoid(log_odds)``.

    With ``log_odds`` the log-ratio of the prefix under the two string laws, ``m`` is the next-token
    law of their equal mixture, so summed over strings from ``p`` this is ``KL(P ‖ ½P + ½Q)``.
    """
    w = log_odds[:, None]
    logm = torch.logaddexp(logp + torch.nn.functional.logsigmoid(w), logq + torch.nn.functional.logsigmoid(-w))
    d = masked_difference(logm, logp, logp)
    return torch.where(logp == -torch.inf, logm.exp(), logp.exp() * excess(d)).sum(-1)
