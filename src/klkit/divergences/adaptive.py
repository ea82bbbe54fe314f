"""Adaptive KL: both directions of the divergence, weighed by where the two laws differ.

The likeliest tokens of ``p`` are its *head*. How much of the difference between ``p`` and ``q`` lies there is what
``KL(p‖q)`` counts for, and the rest is what ``KL(q‖p)`` counts for. The weights are constants: a gradient through them
would move weight to whichever divergence happens to be smaller.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from klkit.divergences.kl import nonnegative_kl
from klkit.numerics import by_rows, mass_slack, paired

HEADS = ("cover", "inside")
WIDTHS = (64, 1024, 16384)
"""Likeliest tokens that are looked at for a head, before a row is sorted whole."""

BLOCK = 64
"""Tokens of which the likeliest stands for all, in the search for these."""


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
    rule = HeadRule(mass, head)
    logp, logq = paired(logp, logq)
    weight = _weight(logp, logq, rule)
    if swapped:
        weight = 1 - weight
    # A direction without weight is no part of the sum, even if it is infinite.
    forward = torch.where(weight > 0, nonnegative_kl(logp, logq), 0.0)
    return weight * forward + (1 - weight) * torch.where(weight < 1, nonnegative_kl(logq, logp), 0.0)


def head_weight(
    logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"], *, mass: float = 0.5, head: str = "cover"
) -> Float[Tensor, "*b"]:
    """``Σ_head |p - q| / Σ |p - q|``: how much of the difference between two laws is in the head of ``p``.

    Without a gradient, and ½ where the laws are equal. With one token in the head it is at most ½, because what the
    head gains the tail loses.

    Shapes: ``(*b, v)`` and ``(*b, v)`` to ``(*b)``.

    Args:
        mass: share of ``p`` that makes a head; at 1 everything does.
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
    rule = HeadRule(mass, head)
    return _weight(*paired(logp, logq), rule)


@torch.no_grad()
def _weight(logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"], rule: HeadRule) -> Float[Tensor, "*b"]:
    """:func:`head_weight` of rows that are known to be of one shape, one precision, and normalised."""

    def gaps(logp: Tensor, logq: Tensor) -> Tensor:
        p = logp.exp()
        gap = (p - logq.exp()).abs_()
        return torch.stack([head_gap(logp, p, gap, rule), gap.sum(-1)], -1)

    return share(by_rows(gaps, logp.detach(), logq.detach()))


def share(gaps: Float[Tensor, "*b 2"]) -> Float[Tensor, "*b"]:
    """The head's weight, from ``Σ |p − q|`` over the head and over everything."""
    head, whole = gaps.unbind(-1)
    return torch.where(whole > 0, head / whole, 0.5).clamp(max=1.0)


def head_gap(
    order: Float[Tensor, "m v"], p: Float[Tensor, "m v"], gap: Float[Tensor, "m v"], rule: HeadRule
) -> Float[Tensor, " m"]:
    """``Σ gap`` over the head of each row, the likeliest tokens of ``p``.

    Whole rows are sorted only where the likeliest few do not tell where the head ends.

    Args:
        order: something that grows with ``p``, like log-probabilities or logits.
    """
    if rule.mass == 1:
        return gap.sum(-1)
    found = gap.new_empty(len(gap))
    rows = torch.arange(len(gap), device=gap.device)
    for width in (*(w for w in WIDTHS if w < gap.shape[1]), gap.shape[1]):
        if not len(rows):
            break
        part = (order, p, gap) if len(rows) == len(gap) else (order[rows], p[rows], gap[rows])
        value, done = _gap_of_likeliest(*part, width, rule)
        found[rows[done]] = value[done]
        rows = rows[~done]
    return found


def within(
    likely: Float[Tensor, "m _k"], rule: HeadRule, slack: float
) -> tuple[Float[Tensor, "m _k"], Bool[Tensor, "m _k"]]:
    """Mass of each probability and those before it, and whether it is in the head; the likeliest come first."""
    reached = likely.cumsum(-1)
    inside = reached - likely < rule.mass - slack if rule.rule == "cover" else reached <= rule.mass + slack
    inside[:, :1] = True
    return reached, inside


def _gap_of_likeliest(order: Tensor, p: Tensor, gap: Tensor, width: int, rule: HeadRule) -> tuple[Tensor, Tensor]:
    """``Σ gap`` over the head, if it is among the ``width`` likeliest tokens, and the rows in which that is certain."""
    whole = width == p.shape[1]
    if whole:
        value, token = order.sort(dim=-1, descending=True, stable=True)
    else:
        # Of equals those with the least ids come first, which a selection does not keep.
        token = _likeliest(order, width).sort(dim=-1).values
        value, place = order.gather(-1, token).sort(dim=-1, descending=True, stable=True)
        token = token.gather(-1, place)
    _, inside = within(p.gather(-1, token).double(), rule, mass_slack(p.dtype))
    last = value.gather(-1, inside.sum(-1, keepdim=True) - 1)[:, 0]
    # Tokens as likely as the least likely of these may have been left out.
    return (gap.gather(-1, token) * inside).sum(-1), (last > value[:, -1]) | whole


def _likeliest(order: Tensor, width: int) -> Tensor:
    """Places of the ``width`` largest entries of each row, which are in the blocks with the largest maxima."""
    size = order.shape[1]
    if size < 4 * BLOCK * width:
        return order.topk(width, dim=-1, sorted=False).indices
    whole = size // BLOCK * BLOCK
    block = order[:, :whole].reshape(len(order), -1, BLOCK).amax(-1).topk(width, dim=-1, sorted=False).indices
    columns = torch.arange(size, device=order.device)
    place = (block[..., None] * BLOCK + columns[:BLOCK]).flatten(1)
    place = torch.cat([place, columns[whole:].expand(len(order), -1)], -1)
    return place.gather(-1, order.gather(-1, place).topk(width, dim=-1, sorted=False).indices)
