"""Quantiles of values that come in clusters (tokens in documents), with an honest error bar or none."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from klkit.stats.intervals import MINIMUM_CLUSTERS, Interval, resamples


def quantile_interval(
    values: NDArray[np.float64],
    cluster: NDArray[np.int64],
    probability: float,
    *,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, Interval]:
    """``F⁻¹(probability)``, the smallest value with at least that share at or below it, and its interval.

    The interval is the percentile bootstrap over whole clusters. A resample's quantile is at most ``x`` exactly
    when its share of values up to ``x`` reaches ``probability``, so the bounds are found by bisection over the
    sorted values, and no resample is ever built.

    A quantile of the upper (lower) half is carried by the values beyond it: unless at least 10 clusters have
    such values the bounds are NaN and the method says so. The maximum (``probability=1``) and the minimum have
    no interval at all.

    Args:
        values: ``(n,)``, finite or infinite.
        cluster: ``(n,)``, the independent unit of each value.
        probability: between 0 and 1, both included.

    Raises:
        ValueError: no values, a NaN among them, unequal lengths, or a probability outside [0, 1].

    Source: B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993), chapter 13; the inversion is that of
    R. S. Woodruff, Confidence intervals for medians and other position measures, JASA 47 (1952).

    Example:
        >>> values = np.random.default_rng(0).normal(size=2000)
        >>> median, interval = quantile_interval(values, np.arange(2000) // 20, 0.5)
        >>> interval.lower < 0 < interval.upper, interval.method
        (True, 'percentile bootstrap')
        >>> quantile_interval(values, np.arange(2000) // 20, 0.9999)[1].method
        'none (0 of 100 clusters reach beyond this quantile)'
    """
    n = len(values)
    if n == 0 or len(cluster) != n or np.isnan(values).any() or not 0 <= probability <= 1:
        raise ValueError(
            f"expected at least one value, none NaN, one cluster each, and a probability in [0, 1]; got {n} values "
            f"({int(np.isnan(values).sum())} NaN), {len(cluster)} clusters and probability {probability}"
        )
    _, unit = np.unique(cluster, return_inverse=True)
    order = np.argsort(values, kind="stable")
    ordered, unit = values[order], unit[order]
    sizes = np.bincount(unit)
    clusters = len(sizes)
    estimate = float(ordered[_rank(probability, n) - 1])
    nothing = float("nan")
    if probability in (0, 1):
        return estimate, Interval(level, nothing, nothing, "none (an extreme has no interval)")
    beyond = unit[ordered > estimate] if probability >= 0.5 else unit[ordered < estimate]
    carriers = len(np.unique(beyond))
    if carriers < MINIMUM_CLUSTERS:
        reason = f"none ({carriers} of {clusters} clusters reach beyond this quantile)"
        return estimate, Interval(level, nothing, nothing, reason)
    drawn = np.concatenate(list(resamples(clusters, np.random.default_rng(seed))))
    needed = probability * (drawn @ sizes)

    def reached(rank: int) -> float:
        """Share of resamples whose quantile is at most the value of this rank."""
        below = drawn @ np.bincount(unit[:rank], minlength=clusters)
        return float(np.mean(below >= needed - 1e-9 * n))

    def first(share: float) -> float:
        low, high = 1, n
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if reached(middle) >= share else (middle + 1, high)
        return float(ordered[low - 1])

    return estimate, Interval(level, first((1 - level) / 2), first((1 + level) / 2), "percentile bootstrap")


def _rank(probability: float, n: int) -> int:
    """Smallest rank, from one, whose share of ``n`` is at least ``probability`` (up to rounding of the product)."""
    return max(1, math.ceil(probability * n - 1e-9 * n))
