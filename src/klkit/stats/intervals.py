"""Error bars of a ratio of two means over independent units (clusters), in NumPy alone.

An estimate per response, and one per token, are both ``Σ contributions / Σ weights`` over strings. What
is independent of what is the *cluster*: the prompt when several strings answer one, the document on
fixed text, else the string. Everything here therefore works on cluster totals.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klkit.stats.student import student_quantile

MINIMUM_CLUSTERS = 10  # below this no method is worth printing
STUDENT_FROM = 400  # from here on Student's t is as good as resampling
RESAMPLES = 1999  # (B + 1)·α/2 is a whole number at the usual levels
CHUNK = 1 << 18  # resampled entries held at a time
CERTAIN, CONSTANT = "exact: an infinite contribution", "exact: no variance"
NO_INTERVAL = f"none (fewer than {MINIMUM_CLUSTERS} clusters)"
ROUNDING = 1e-13  # of the largest total: residuals below it only say how sums were rounded


@dataclass(frozen=True, slots=True)
class Interval:
    """A two-sided confidence interval and how it was found.

    Attributes:
        level: nominal coverage, e.g. 0.95.
        lower: lower bound, in the units of the estimate; NaN where there is no interval.
        upper: upper bound.
        method: ``"bootstrap-t"``, ``"t"``, or in words why neither applies.
    """

    level: float
    lower: float
    upper: float
    method: str


def cluster_totals(
    contributions: NDArray[np.float64], weights: NDArray[np.float64], cluster: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``Σ contributions`` and ``Σ weights`` of each cluster, in ascending order of its label.

    Shapes: three of ``(n,)`` to two of ``(c,)``. Contributions may be infinite.

    Raises:
        ValueError: a contribution is NaN, infinite ones have both signs, a weight is negative or not finite, or all
            weights are zero.

    Example:
        >>> totals, weights = cluster_totals(np.array([1.0, 2.0, 4.0]), np.ones(3), np.array([0, 0, 7]))
        >>> totals.tolist(), weights.tolist()
        ([3.0, 4.0], [2.0, 1.0])
    """
    if not (len(contributions) == len(weights) == len(cluster)):
        raise ValueError(
            f"expected one contribution, weight and cluster for each string, got {len(contributions)}, "
            f"{len(weights)} and {len(cluster)}; pass three arrays of one length"
        )
    undefined = np.isnan(contributions)
    if undefined.any():
        raise ValueError(
            f"expected contributions that are numbers, got NaN for {int(undefined.sum())} of {len(contributions)} "
            f"strings (first: {int(undefined.argmax())}); look at the models' outputs on that string"
        )
    if contributions.max(initial=0) == np.inf and contributions.min(initial=0) == -np.inf:
        raise ValueError("expected infinite contributions of one sign, got both signs; their sum is undefined")
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
        raise ValueError(
            f"expected finite non-negative weights that are not all zero, got values from {np.min(weights, initial=0)} "
            f"to {np.max(weights, initial=0)}; a weight is one, or the length of a string"
        )
    _, unit = np.unique(cluster, return_inverse=True)
    totals = np.bincount(unit, weights=contributions).astype(np.float64)
    return totals, np.bincount(unit, weights=weights).astype(np.float64)


def ratio_stderr(totals: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """Linearised standard error of ``R = Σ totals / Σ weights``: ``√(c/(c−1) Σ (totalᵢ − R weightᵢ)²) / Σ weights``.

    Shapes: two of ``(c,)``, one entry a cluster, to a number in the units of ``R``. NaN with fewer than two
    clusters or an infinite total. With equal weights it is the textbook ``sd/√c``.

    Source: W. G. Cochran, Sampling Techniques, 3rd ed. (1977), sections 6.3 and 9A; clustering as in
    E. Miller, Adding Error Bars to Evals (2024), arXiv 2411.00640.

    Example:
        >>> round(ratio_stderr(np.array([1.0, 2.0, 3.0]), np.ones(3)), 6)  # sd 1, over √3
        0.57735
    """
    clusters = len(totals)
    if clusters < 2 or not np.isfinite(totals).all():
        return float("nan")
    residuals = totals - totals.sum() / weights.sum() * weights
    return float(np.sqrt(clusters / (clusters - 1) * np.sum(residuals**2)) / weights.sum())


def clustered_ratio(
    contributions: NDArray[np.float64], weights: NDArray[np.float64], cluster: NDArray[np.int64]
) -> tuple[float, float]:
    """``Σ contributions / Σ weights``, and its standard error between clusters.

    Args:
        contributions: of each string, ``(n,)``.
        weights: what each counts for, ``(n,)``.
        cluster: the independent unit of each, ``(n,)``.

    Example:
        >>> clustered_ratio(np.array([1.0, 3.0]), np.ones(2), np.arange(2))
        (2.0, 1.0)
    """
    totals, sizes = cluster_totals(contributions, weights, cluster)
    return float(totals.sum() / sizes.sum()), ratio_stderr(totals, sizes)


def ratio_interval(
    totals: NDArray[np.float64],
    weights: NDArray[np.float64],
    *,
    level: float = 0.95,
    method: str = "auto",
    seed: int = 0,
) -> Interval:
    """Two-sided confidence interval of ``Σ totals / Σ weights`` for independent clusters.

    Args:
        totals: ``(c,)``, sum of contributions of each cluster.
        weights: ``(c,)``, sum of weights of each cluster.
        level: nominal coverage.
        method: ``"t"``, ``"bootstrap-t"``, or ``"auto"``: bootstrap-t below 400 clusters and t from there on.
        seed: of the resampling; one seed gives one interval.

    There is no interval (NaN bounds) below 10 clusters. An infinite total makes the mean itself
    infinite, with certainty, so both bounds are. Without any variance the interval is the value.

    Raises:
        ValueError: an unknown method or a level outside (0, 1).

    Example:
        >>> x = np.random.default_rng(0).exponential(size=100)
        >>> interval = ratio_interval(x, np.ones(100))
        >>> interval.lower < 1 < interval.upper, interval.method
        (True, 'bootstrap-t')
    """
    if method not in ("auto", "t", "bootstrap-t") or not 0 < level < 1:
        raise ValueError(
            f"expected method 'auto', 't' or 'bootstrap-t' and a level between 0 and 1, got {method!r} and {level}"
        )
    clusters = len(totals)
    value = float(totals.sum() / weights.sum())
    if np.isinf(totals).any():
        return Interval(level, value, value, CERTAIN)
    if clusters < MINIMUM_CLUSTERS:
        return Interval(level, float("nan"), float("nan"), NO_INTERVAL)
    residuals = totals - value * weights
    # Equal up to the rounding of the sums: resampling would only study the rounding.
    if np.abs(residuals).max() <= ROUNDING * max(np.abs(totals).max(), abs(value) * weights.max()):
        return Interval(level, value, value, CONSTANT)
    stderr = ratio_stderr(totals, weights)
    if method == "t" or (method == "auto" and clusters >= STUDENT_FROM):
        half = student_quantile((1 + level) / 2, clusters - 1) * stderr
        return Interval(level, value - half, value + half, "t")
    drawn = repeatable(clusters, seed) if clusters < STUDENT_FROM else resamples(clusters, np.random.default_rng(seed))
    deviates = np.sort(studentised(residuals, weights, drawn))
    rank = max(1, int((RESAMPLES + 1) * (1 - level) / 2 + 1e-9))
    lower, upper = value - float(deviates[-rank]) * stderr, value - float(deviates[rank - 1]) * stderr
    bounded = np.isfinite([lower, upper]).all()
    return Interval(level, lower, upper, "bootstrap-t" if bounded else "bootstrap-t: too few clusters differ")


def studentised(
    residuals: NDArray[np.float64], weights: NDArray[np.float64], drawn: Iterable[NDArray[Any]]
) -> NDArray[np.float64]:
    """``t* = (R* − R)/se*`` of resamples of whole clusters, where ``residual = total − R·weight``.

    A resample without variance says only on which side it fell: its deviate is infinite with that sign. It can thus
    widen an interval, never narrow it.

    Args:
        drawn: how often each cluster is in each resample, arrays ``(some, c)``.

    Shapes: two of ``(c,)``, and ``r`` resamples, to ``(r,)``.

    Source: B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993), section 12.5; P. Hall,
    Theoretical comparison of bootstrap confidence intervals, Annals of Statistics 16 (1988).
    """
    clusters = len(residuals)
    products = np.stack([residuals, weights, residuals**2, residuals * weights, weights**2], axis=1)
    e, w, ee, ew, ww = np.concatenate([counts @ products for counts in drawn]).T
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = e / w  # R* − R; zero over zero where a resample has no weight at all
        squares = np.maximum(ee - 2 * shift * ew + shift**2 * ww, 0.0)
        deviates: NDArray[np.float64] = shift / (np.sqrt(clusters / (clusters - 1) * squares) / w)
    return np.where(np.isnan(deviates), 0.0, deviates)


@lru_cache(maxsize=64)
def repeatable(clusters: int, seed: int) -> tuple[NDArray[np.uint16], ...]:
    """:func:`resamples` from a seed, kept: the parts of a breakdown are many intervals over the same few numbers."""
    return tuple(counts.astype(np.uint16) for counts in resamples(clusters, np.random.default_rng(seed)))


def resamples(clusters: int, generator: np.random.Generator) -> Iterator[NDArray[np.float64]]:
    """How often each cluster is drawn in 1999 bootstrap resamples, some at a time: arrays ``(some, c)``."""
    rows = max(1, CHUNK // clusters)
    for first in range(0, RESAMPLES, rows):
        size = min(rows, RESAMPLES - first)
        drawn = generator.integers(clusters, size=(size, clusters)) + clusters * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * clusters).reshape(size, clusters).astype(np.float64)
