"""Many candidates compared with one reference on the same strings: an order, its ties, and every pair's difference.

All candidates are scored on one set of strings, so two of them differ by the mean of a difference per string, which
scatters far less than either estimate. A pair is resolved by a test of that difference, adjusted for the number of
pairs; whatever is not resolved is a tie, and a rank is a range.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from klkit.stats.intervals import (
    CERTAIN,
    CONSTANT,
    MINIMUM_CLUSTERS,
    NO_INTERVAL,
    ROUNDING,
    cluster_totals,
)
from klkit.stats.paired import holm
from klkit.stats.skewness import Lean, lean
from klkit.stats.student import student_quantile, student_tails

Array = NDArray[np.float64]
BLOCK = 1 << 17  # entries of pairs × clusters held at a time
STRAIGHT = "t, skewness removed"
CLOSER, TIED, BOTH_INFINITE = "closer", "tied", "both infinite"


@dataclass(frozen=True, slots=True)
class Pair:
    """What the strings say of two candidates; the one with the smaller estimate comes first.

    Attributes:
        first: index of the candidate with the smaller estimate.
        second: index of the other one.
        difference: ``estimate(first) − estimate(second)``: at most 0, ``-inf`` before an infinite one, NaN between two.
        stderr: its standard error, clustered and paired; NaN where there is none.
        lower: lower bound of the interval of this difference alone (not of the family); NaN without one.
        upper: its upper bound.
        method: of the interval, or in words why there is none.
        p: two-sided p-value against no difference; NaN with fewer than 10 clusters.
        adjusted: Holm's, over all pairs of finite candidates.
        verdict: ``"closer"`` (first is closer to the reference than second) or ``"tied"``.
    """

    first: int
    second: int
    difference: float
    stderr: float
    lower: float
    upper: float
    method: str
    p: float
    adjusted: float
    verdict: str


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """Candidates in the order of their estimates, with the ranks that the strings allow each.

    Attributes:
        values: estimate of each candidate, ``(k,)``.
        order: indices of the candidates from the closest to the farthest, ``(k,)``.
        first: best rank that candidate ``i`` may have, ``1 +`` candidates resolved closer, ``(k,)``.
        last: worst rank, ``k −`` candidates resolved farther, ``(k,)``.
        pairs: all ``k(k − 1)/2``, sorted by the places of first and second in ``order``.
        clusters: independent units behind the differences.
        level: one minus the chance of any false ``"closer"``.
        reason: why nothing could be tested; empty where pairs were.
    """

    values: Array
    order: NDArray[np.int64]
    first: NDArray[np.int64]
    last: NDArray[np.int64]
    pairs: tuple[Pair, ...]
    clusters: int
    level: float
    reason: str = ""

    def pair(self, i: int, j: int) -> Pair:
        """The pair of candidates ``i`` and ``j``, whichever comes first.

        Raises:
            ValueError: not two candidates.
        """
        k = len(self.order)
        if i == j or not (0 <= i < k and 0 <= j < k):
            raise ValueError(f"expected two different candidates from 0 to {k - 1}, got {i} and {j}")
        a, b = sorted(int(np.flatnonzero(self.order == x)[0]) for x in (i, j))
        return self.pairs[a * k - a * (a + 1) // 2 + b - a - 1]


def rank(
    contributions: Array,
    weights: Array,
    cluster: NDArray[np.int64],
    *,
    level: float = 0.95,
    spread: Array | None = None,
) -> Order:
    """Order candidates by ``Σ contributionsᵢ / Σ weights``, resolving pairs with a family-wise error of ``1 − level``.

    A pair's p-value is the larger of Student's and of the same with the skewness of the difference removed
    (:mod:`klkit.stats.skewness`), and Holm's procedure adjusts it for all pairs. Student's alone is wrong far out in
    the tail of a skewed difference, which is where many pairs are decided; resampling cannot reach so far. The interval
    of a pair holds what this test, unadjusted, does not reject: Student's, widened on the side of the long tail.

    Without variance a difference is certain, and zero (up to rounding) is a tie with ``p = 1``. A candidate with an
    infinite contribution is behind every candidate that has none, and two such are tied. With fewer than 10 clusters no
    other pair is tested and all are tied.

    Args:
        contributions: ``(k, n)``, of each candidate to each string, in nats, on the same strings.
        weights: ``(n,)``, one or the lengths of the strings.
        cluster: ``(n,)``, the independent unit of each string.
        spread: ``(k,)``, by how much a candidate's errors exceed what its contributions say
            (:attr:`klkit.results.Estimate.spread`); a pair takes the larger of its two.

    Raises:
        ValueError: arrays that do not fit, no candidate, NaN or negative infinite contributions, weights that are
            none, a spread that is not positive, or a level outside (0, 1).

    Source: S. Holm (1979), Scandinavian Journal of Statistics 6(2); P. Hall (1992), On the removal of skewness by
    transformation, Journal of the Royal Statistical Society B 54(1). Rank ranges as in C. Mogstad, J. Romano,
    A. Shaikh and D. Wilhelm (2024), Inference for ranks with applications to mobility across neighborhoods, Review of
    Economic Studies 91(1).

    Example:
        >>> shared = np.random.default_rng(0).exponential(size=(1, 200))
        >>> noise = np.random.default_rng(1).normal(size=(3, 200))
        >>> found = rank(np.array([[1.0], [1.0], [2.0]]) * shared + 0.1 * noise, np.ones(200), np.arange(200))
        >>> found.first.tolist(), found.last.tolist(), found.pair(0, 2).verdict
        ([1, 1, 3], [2, 2, 3], 'closer')
    """
    spread = np.ones(len(contributions)) if spread is None else spread
    _require_usable(contributions, weights, cluster, level, spread)
    by_cluster = [cluster_totals(row, weights, cluster) for row in contributions]
    totals, sizes = np.stack([mine for mine, _ in by_cluster]), by_cluster[0][1]
    values, clusters = totals.sum(1) / sizes.sum(), len(sizes)
    order = np.argsort(values, kind="stable")
    first, second = (order[side] for side in np.triu_indices(len(order), 1))
    finite = np.isfinite(values[second])  # and so is the first, being smaller
    certain = ~finite & np.isfinite(values[first])
    with np.errstate(invalid="ignore"):
        difference = values[first] - values[second]
    nothing = np.full(len(first), np.nan)
    stderr, lower, upper = nothing.copy(), np.where(finite, nothing, difference), np.where(finite, nothing, difference)
    p = np.where(certain, 0.0, np.where(finite, nothing, 1.0))
    adjusted = p.copy()
    tested = finite & (clusters >= MINIMUM_CLUSTERS)
    constant = np.zeros(len(first), dtype=bool)
    if tested.any():
        a, b = first[tested], second[tested]
        found = _differences(totals, sizes, a, b, np.maximum(spread[a], spread[b]), level)
        stderr[tested], lower[tested], upper[tested], p[tested], constant[tested] = found
        adjusted[tested] = holm(p[tested].tolist())
    cases = [certain, ~finite, ~tested, constant]
    method = np.select(cases, [CERTAIN, BOTH_INFINITE, NO_INTERVAL, CONSTANT], STRAIGHT)
    closer = adjusted <= 1 - level
    verdict = np.where(closer, CLOSER, TIED)
    columns = (first, second, difference, stderr, lower, upper, method, p, adjusted, verdict)
    few = f"fewer than {MINIMUM_CLUSTERS} clusters ({clusters}): no difference can be tested"
    return Order(
        values=values,
        order=order,
        first=1 + np.bincount(second[closer], minlength=len(values)),
        last=len(values) - np.bincount(first[closer], minlength=len(values)),
        pairs=tuple(Pair(*row) for row in zip(*(column.tolist() for column in columns), strict=True)),
        clusters=clusters,
        level=level,
        reason=few if clusters < MINIMUM_CLUSTERS and len(values) > 1 else "",
    )


def _require_usable(
    contributions: Array, weights: Array, cluster: NDArray[np.int64], level: float, spread: Array
) -> None:
    k = len(contributions)
    if contributions.ndim != 2 or k == 0 or contributions.shape[1:] != weights.shape or weights.shape != cluster.shape:
        raise ValueError(
            f"expected contributions of shape (candidates, strings) and a weight and cluster for each string, got "
            f"{contributions.shape}, {weights.shape} and {cluster.shape}; score every candidate on the same strings"
        )
    wrong = (np.isnan(contributions) | (contributions == -np.inf)).any(1)
    if wrong.any():
        raise ValueError(
            f"expected contributions that are numbers or +inf, got NaN or -inf for candidate {int(wrong.argmax())}; "
            f"look at that model's outputs"
        )
    if not 0 < level < 1 or spread.shape != (k,) or not (np.isfinite(spread) & (spread > 0)).all():
        raise ValueError(
            f"expected a level between 0 and 1 and one finite positive spread for each of {k} candidates, got "
            f"{level} and {spread}"
        )


def _differences(
    totals: Array, sizes: Array, first: NDArray[np.int64], second: NDArray[np.int64], spread: Array, level: float
) -> tuple[Array, Array, Array, Array, NDArray[np.bool_]]:
    """Standard error, bounds and p-value of ``first − second``, and whether it is constant, ``(m,)`` each.

    Candidates are finite. Pairs go through in blocks, so that what is held grows with the pairs or with the clusters,
    never with both.
    """
    clusters = len(sizes)
    rows = max(1, BLOCK // clusters)
    largest = np.abs(totals).max(1)
    blocks = []
    for start in range(0, len(first), rows):
        a, b, s = (x[start : start + rows] for x in (first, second, spread))
        gaps = totals[a] - totals[b]
        value = gaps.sum(1) / sizes.sum()
        residuals = gaps - value[:, None] * sizes
        noise = ROUNDING * np.maximum(largest[a], largest[b])  # what the sums of either candidate were rounded by
        constant, same = np.abs(residuals).max(1) <= noise, np.abs(gaps).max(1) <= noise
        squares = np.einsum("mc,mc->m", residuals, residuals)
        stderr = np.where(constant, 0.0, s * np.sqrt(clusters / (clusters - 1) * squares) / sizes.sum())
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.where(stderr > 0, np.abs(value) / stderr, np.where(same, 0.0, np.inf))
        found = lean(residuals, sizes)
        p = _two_sided(t, np.sign(value), found, clusters - 1)
        q = student_quantile((1 + level) / 2, clusters - 1)
        lower, upper = (
            value - stderr * np.maximum(q, found.restored(q)),
            value - stderr * np.minimum(-q, found.restored(-q)),
        )
        blocks.append((stderr, lower, upper, p, constant))
    return tuple(np.concatenate(parts) for parts in zip(*blocks, strict=True))  # type: ignore[return-value]


def _two_sided(t: Array, sign: Array, found: Lean, df: int) -> Array:
    """The larger of Student's p-value of ``|t|`` and of that with the skewness removed, ``(m,)``."""
    with np.errstate(invalid="ignore"):
        straight = np.where(np.isinf(t), t, sign * found.removed(sign * t))
    return np.minimum(1.0, 2 * student_tails(np.minimum(t, straight), df))
