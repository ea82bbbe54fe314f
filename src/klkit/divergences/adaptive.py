"""Adaptive KL: both directions of the divergence, weighed by where the two laws differ.

The likeliest tokens of ``p`` are its *head*. How much of the difference between ``p`` and ``q`` lies there is what
``KL(p‖q)`` counts for, and the rest is what ``KL(q‖p)`` counts for. The weights are constants: a gradient through them
would move weight to whichever divergence happens to be smaller.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from klkit.divergences.kl import kl, reverse_kl
from klkit.numerics import paired

HEADS = ("cover", "inside")
WIDTHS = (64, 1024)
"""Likeliest tokens that are looked at for a head, before a row is sorted whole."""


@dataclass(frozen=True, slots=True)
class HeadRule:
    """Which of the likeliest tokens of ``p`` are its head; see :func:`head_weight`.

    Attributes:
        mass: share of ``p`` that makes a head.
        rule: ``"cover"`` or ``"inside"``.

    Raises:
        ValueError: there is no such rule, or the mass is not within [0, 1].
    """

    mass: float = 0.5
    rule: str = "cover"

    def __post_init__(self) -> None:
        if self.rule not in HEADS:
            raise ValueError(f"expected head to be {' or '.join(HEADS)}, got {self.rule!r}")
        if not 0 <= self.mass <= 1:
            raise ValueError(f"expected a mass from 0 to 1, got {self.mass}; it is the share of p that makes a head")


def adaptive_kl(
    logp: Float[Tensor, "*b v"],
    logq: Float[Tensor, "*b v"],
    *,
    mass: float = 0.5,
    head: str = "cover",
    swapped: bool = False,
) -> Float[Tensor, "*b"]:
    """``w KL(p‖q) + (1 - w) KL(q‖p)`` in nats, with ``w`` of :func:`head_weight`, through which no gradient passes.

    Its minimum is at ``q = p``, as that of both parts. It lies between them, and is ``KL(p‖q)`` where the head is
    everything. It is no f-divergence: merging tokens may raise it.

    Shapes: ``(*b, v)`` and ``(*b, v)`` to ``(*b)``; half precision is widened, double is kept.

    Args:
        mass: share of ``p`` that makes a head.
        head: see :func:`head_weight`.
        swapped: give ``KL(q‖p)`` the head's weight and ``KL(p‖q)`` the tail's, which is an ablation.

    Raises:
        ValueError: the shapes differ, a row is not normalised, or an option is none.

    Example:
        >>> import torch
        >>> p = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
        >>> q = torch.tensor([0.0, 0.5, 1.0, -0.5, 0.3]).softmax(-1)
        >>> round(float(adaptive_kl(p.log(), q.log())), 6)
        0.342151

    Source: T. Wu et al., 2024, arXiv 2404.02657.
    """
    logp, logq = paired(logp, logq)
    weight = head_weight(logp, logq, mass=mass, head=head)
    if swapped:
        weight = 1 - weight
    # A direction without weight is no part of the sum, even if it is infinite.
    forward = torch.where(weight > 0, kl(logp, logq), 0.0)
    return weight * forward + (1 - weight) * torch.where(weight < 1, reverse_kl(logp, logq), 0.0)


@torch.no_grad()
def head_weight(
    logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"], *, mass: float = 0.5, head: str = "cover"
) -> Float[Tensor, "*b"]:
    """``Σ_head |p - q| / Σ |p - q|``: how much of the difference between two laws is in the head of ``p``.

    Without a gradient, and ½ where the laws are equal. With one token in the head it is at most ½, because what the
    head gains the tail loses.

    Shapes: ``(*b, v)`` and ``(*b, v)`` to ``(*b)``.

    Args:
        mass: share of ``p`` that makes a head.
        head: ``"cover"`` takes the fewest of the likeliest tokens whose mass reaches ``mass``; ``"inside"`` as many as
            have at most that, and at least one. Of tokens equally likely the first come first.

    Raises:
        ValueError: the shapes differ, a row is not normalised, or an option is none.

    Example:
        >>> import torch
        >>> p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.5, 0.1, 0.4])
        >>> [round(float(head_weight(p.log(), q.log(), mass=m)), 6) for m in (0.5, 0.6, 1.0)]
        [0.0, 0.5, 1.0]

    Source: T. Wu et al., 2024, arXiv 2404.02657; "inside" is the rule of the code released with it.
    """
    HeadRule(mass, head)
    logp, logq = paired(logp, logq)
    p = logp.exp().reshape(-1, logp.shape[-1])
    gap = (p - logq.exp().reshape(p.shape)).abs()
    in_head = p.new_empty(len(p))
    rows = torch.arange(len(p), device=p.device)
    for width in (*(w for w in WIDTHS if w < p.shape[1]), p.shape[1]):
        if not len(rows):
            break
        found, done = _head_gap(p[rows], gap[rows], width, mass, head)
        in_head[rows[done]] = found[done]
        rows = rows[~done]
    total = gap.sum(-1)
    return torch.where(total > 0, in_head / total, 0.5).clamp(max=1.0).reshape(logp.shape[:-1])


def _head_gap(p: Tensor, gap: Tensor, width: int, mass: float, head: str) -> tuple[Tensor, Tensor]:
    """``Σ_head gap`` from the ``width`` likeliest tokens, and the rows in which these are enough to tell."""
    if width < p.shape[1]:
        likely, token = p.topk(width, dim=-1)
    else:
        likely, token = p.sort(dim=-1, descending=True, stable=True)
    reached = likely.double().cumsum(-1)
    before = reached - likely.double()
    # Sums of rounded probabilities miss round numbers by a little.
    slack = 1e-12 if p.dtype == torch.float64 else 1e-6
    inside = before < mass - slack if head == "cover" else reached <= mass + slack
    inside[:, 0] = True
    found = (gap.gather(-1, token) * inside).sum(-1)
    if width == p.shape[1]:
        return found, torch.ones_like(inside[:, 0])
    # Enough if the head ends within, and not among equals, whose order the selection does not keep.
    last = inside.sum(-1, keepdim=True) - 1
    ends = last[:, 0] < width - 1
    following = likely.gather(-1, (last + 1).clamp(max=width - 1))
    return found, ends & (likely.gather(-1, last) > following)[:, 0]
