"""Which methods reach the best trade-offs of a cost and a gain, and whether labels could have been dealt by chance.

Points are ``(cost, gain)``, such as the divergence and the reward of a trained model. What belongs together (all
points of one training run) is a *unit*; units are compared within *blocks*, such as runs of one coefficient and seed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Labels = NDArray[np.int64]
EXACT = 20_000  # arrangements that are all visited rather than drawn from
DRAWS = 9_999  # (DRAWS + 1)·α is a whole number at the usual levels


def non_dominated(cost: Array, gain: Array) -> NDArray[np.bool_]:
    """Points that no other point matches in both coordinates and beats in one; equal points stay together.

    Shapes: two of ``(n,)`` to ``(n,)``.

    Raises:
        ValueError: different lengths, or a coordinate that is NaN.

    Example:
        >>> non_dominated(np.array([1.0, 2.0, 2.0, 3.0]), np.array([1.0, 3.0, 3.0, 2.0])).tolist()
        [True, True, True, False]
    """
    _check(cost, gain)
    no_more = cost[:, None] <= cost[None, :]  # [i, j]: i costs no more than j
    no_less = gain[:, None] >= gain[None, :]
    better = (cost[:, None] < cost[None, :]) | (gain[:, None] > gain[None, :])
    beaten: NDArray[np.bool_] = np.any(no_more & no_less & better, axis=0)
    return ~beaten


def frontier_shares(cost: Array, gain: Array, labels: Labels, *, below: float = math.inf) -> dict[int, float]:
    """Share of the non-dominated points with ``cost < below`` that bears each label; the shares sum to 1.

    Args:
        labels: method of each point, ``(n,)``.
        below: points that cost as much or more are left out of the count (not of the comparison).

    Raises:
        ValueError: as :func:`non_dominated`.

    Example:
        >>> frontier_shares(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0]), np.array([0, 1, 1]))
        {0: 0.5, 1: 0.5}
    """
    front = labels[non_dominated(cost, gain) & (cost < below)]
    return {int(m): float((front == m).mean()) if len(front) else math.nan for m in np.unique(labels)}


def hypervolume(cost: Array, gain: Array, *, worst_cost: float, worst_gain: float) -> float:
    """Area of all ``(c, g)`` that some point is as good as, down to the fixed point ``(worst_cost, worst_gain)``.

    Points beyond the reference point add nothing. Larger is better; units are those of cost times gain.

    Source: E. Zitzler and L. Thiele (1999), Multiobjective evolutionary algorithms, IEEE Trans. Evol. Comput. 3(4).

    Raises:
        ValueError: as :func:`non_dominated`, or a reference point that is not finite.

    Example:
        >>> hypervolume(np.array([1.0, 2.0]), np.array([1.0, 3.0]), worst_cost=3.0, worst_gain=0.0)
        4.0
    """
    _check(cost, gain)
    if not (math.isfinite(worst_cost) and math.isfinite(worst_gain)):
        raise ValueError(f"expected a finite reference point, got ({worst_cost}, {worst_gain}); areas need an edge")
    order = np.argsort(cost, kind="stable")
    edges = np.minimum(np.append(cost[order], worst_cost), worst_cost)
    # From one point's cost to the next one's, the best gain so far is what can be had.
    height = np.maximum.accumulate(np.maximum(gain[order] - worst_gain, 0.0))
    return float((np.diff(edges) * height).sum())


@dataclass(frozen=True, slots=True)
class PermutationTest:
    """How unusual a statistic is among rearrangements of the labels within blocks.

    Attributes:
        statistic: its value for the labels as they are.
        p_value: share of arrangements whose statistic is as far from zero or farther (two-sided).
        arrangements: how many were looked at, the given one included.
        exact: whether these are all there are.
    """

    statistic: float
    p_value: float
    arrangements: int
    exact: bool


def permutation_test(
    statistic: Callable[[Labels], float],
    labels: Labels,
    blocks: Sequence[object] | NDArray[np.int64],
    *,
    random: np.random.Generator,
    draws: int = DRAWS,
) -> PermutationTest:
    """Two-sided test that labels within each block could as well have been dealt otherwise.

    All distinct arrangements are visited where there are at most :data:`EXACT`; else ``draws`` random ones and the
    given one, which keeps the level. Give it a statistic that is zero when methods do not differ, such as a
    difference of hypervolumes.

    Args:
        statistic: of rearranged ``labels``, one a unit.
        labels: method of each unit, ``(n,)``.
        blocks: block of each unit; labels change places within a block only.

    Source: R. A. Fisher (1935), The Design of Experiments, section 21; B. Phipson and G. K. Smyth (2010),
    Permutation p-values should never be zero, arXiv 1603.05766.

    Raises:
        ValueError: different numbers of labels and blocks.

    Example:
        >>> gain = np.array([3.0, 1.0, 5.0, 2.0])
        >>> def gap(labels):
        ...     return float(gain[labels == 0].sum() - gain[labels == 1].sum())
        >>> permutation_test(gap, np.array([0, 1, 0, 1]), [0, 0, 1, 1], random=np.random.default_rng(0)).p_value
        0.5
    """
    if len(labels) != len(blocks):
        raise ValueError(f"expected a block for each of {len(labels)} labels, got {len(blocks)}; give one a unit")
    found: dict[object, list[int]] = {}
    for unit, block in enumerate(blocks):
        found.setdefault(block, []).append(unit)
    groups = [np.array(units) for units in found.values()]
    observed = statistic(labels)
    exact = math.prod(_arrangements(labels[units]) for units in groups) <= EXACT
    extreme, total = (0, 0) if exact else (1, 1)
    edge = abs(observed) * (1 - 1e-12) - 1e-300  # sums of the same terms in another order are the same statistic
    for dealt in _all(labels, groups) if exact else _some(labels, groups, random, draws):
        total += 1
        extreme += abs(statistic(dealt)) >= edge
    return PermutationTest(observed, extreme / total, total, exact)


def _arrangements(labels: Labels) -> int:
    """Distinct orders of the labels of one block."""
    counts = np.unique(labels, return_counts=True)[1].tolist()
    return math.factorial(len(labels)) // math.prod(math.factorial(c) for c in counts)


def _all(labels: Labels, groups: Sequence[NDArray[np.int64]]) -> Iterator[Labels]:
    """Every distinct arrangement, the given one included."""
    orders = [sorted(set(itertools.permutations(labels[units].tolist()))) for units in groups]
    for chosen in itertools.product(*orders):
        dealt = labels.copy()
        for units, order in zip(groups, chosen, strict=True):
            dealt[units] = order
        yield dealt


def _some(
    labels: Labels, groups: Sequence[NDArray[np.int64]], random: np.random.Generator, draws: int
) -> Iterator[Labels]:
    """Arrangements drawn at random."""
    for _ in range(draws):
        dealt = labels.copy()
        for units in groups:
            dealt[units] = random.permutation(labels[units])
        yield dealt


def _check(cost: Array, gain: Array) -> None:
    if cost.shape != gain.shape or cost.ndim != 1 or np.isnan(cost).any() or np.isnan(gain).any():
        raise ValueError(
            f"expected a cost and a gain for each point, got shapes {cost.shape} and {gain.shape} with "
            f"{int(np.isnan(cost).sum() + np.isnan(gain).sum())} NaN; leave out points that have no number"
        )
