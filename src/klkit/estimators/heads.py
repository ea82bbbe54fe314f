"""Where two next-token laws differ: among the likely tokens of ``p`` (its head), or among the others (its tail)."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from klkit.divergences.adaptive import head_weight
from klkit.numerics import log_softmax, mass_slack

MASS = 0.5
FAR = 1e-4


@dataclass(frozen=True, slots=True)
class HeadStatistics:
    """Scalars of each decision about the head of ``p``, on the CPU; all fields are ``(m,)``.

    The head is the fewest of the likeliest tokens whose mass under ``p`` reaches ½.

    Attributes:
        head_gap: ``Σ_head |p − q|``.
        tail_gap: ``Σ |p − q|`` over the other tokens.
        weight: ``head_gap / (head_gap + tail_gap)``, the weight of ``KL(p‖q)`` in adaptive KL; ½ where both are 0.
        far_p: ``p``-mass of the tokens with ``p < 1e-4``.
        far_q: ``q``-mass of the same tokens: what leaks to where ``p`` hardly ever goes.
        single: whether the head is one token.
    """

    head_gap: Float[Tensor, " m"]
    tail_gap: Float[Tensor, " m"]
    weight: Float[Tensor, " m"]
    far_p: Float[Tensor, " m"]
    far_q: Float[Tensor, " m"]
    single: Bool[Tensor, " m"]


@torch.no_grad()
def head_statistics(logits_p: Float[Tensor, "m v"], logits_q: Float[Tensor, "m v"]) -> HeadStatistics:
    """``Σ_head |p − q|`` and its companions for each row of logits, normalised or not.

    Raises:
        ValueError: a logit is NaN or ``+inf``, a row excludes every token, or the shapes differ.

    Example:
        >>> import torch
        >>> p, q = torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.tensor([[0.5, 0.1, 0.4]]).log()
        >>> found = head_statistics(p, q)
        >>> round(float(found.head_gap), 6), round(float(found.tail_gap), 6), bool(found.single)
        (0.1, 0.5, True)

    Source: T. Wu et al., 2024, arXiv 2404.02657.
    """
    logp, logq = log_softmax(logits_p), log_softmax(logits_q)
    weight = head_weight(logp, logq, mass=MASS)
    p, q = logp.exp(), logq.exp()
    gap = (p - q).abs().sum(-1)
    far = logp < math.log(FAR)
    head_gap = torch.where(gap > 0, weight * gap, 0.0)
    return HeadStatistics(
        head_gap=head_gap,
        tail_gap=gap - head_gap,
        weight=weight,
        far_p=torch.where(far, p, 0.0).sum(-1),
        far_q=torch.where(far, q, 0.0).sum(-1),
        single=p.amax(-1) >= MASS - mass_slack(p.dtype),
    )


class HeadTally:
    """Collects head statistics of rows that are shown some at a time: ``score(..., watch=tally)``.

    Example:
        >>> from klkit.estimators.statistics import score
        >>> from klkit.models.automaton import coin
        >>> from klkit.sampling.ancestral import sample
        >>> p, q = coin(end=0.5), coin(end=0.25)
        >>> x = sample(p, [p.context(None)] * 4, max_tokens=50, seed=0).sequences
        >>> tally = HeadTally()
        >>> statistics = score(p, q, x, watch=tally)
        >>> len(tally.statistics().weight) == x.decisions
        True
    """

    def __init__(self) -> None:
        self._parts: list[HeadStatistics] = []

    def __call__(self, logits_p: Float[Tensor, "m v"], logits_q: Float[Tensor, "m v"]) -> None:
        """Take in the next rows."""
        self._parts.append(head_statistics(logits_p, logits_q))

    def statistics(self) -> HeadStatistics:
        """All that was seen, in order."""
        names = [f.name for f in fields(HeadStatistics)]
        return HeadStatistics(**{n: torch.cat([getattr(part, n) for part in self._parts]).cpu() for n in names})
