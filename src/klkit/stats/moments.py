"""Running moments of a ratio estimate: fold clusters in as they arrive, merge shards, never look back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from klkit.stats.intervals import cluster_totals
from klkit.stats.student import student_quantile


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, means and central second moments of cluster totals ``T`` and cluster weights ``W``.

    Six numbers are enough for ``R = ΣT/ΣW`` and its linearised standard error: the residuals
    ``T − R W`` have mean zero, and their squares sum to ``S_TT − 2 R S_TW + R² S_WW``.

    Attributes:
        clusters: independent units seen.
        total: mean of ``T``; infinite once a contribution was.
        weight: mean of ``W``.
        total_total: ``S_TT = Σ (T − mean T)²``.
        total_weight: ``S_TW``, the same for the product.
        weight_weight: ``S_WW``.

    Example:
        >>> first = Moments.of(np.array([1.0, 2.0]), np.ones(2), np.array([0, 1]))
        >>> both = first.merge(Moments.of(np.array([6.0]), np.ones(1), np.array([2])))
        >>> both.clusters, both.value
        (3, 3.0)
    """

    clusters: int = 0
    total: float = 0.0
    weight: float = 0.0
    total_total: float = 0.0
    total_weight: float = 0.0
    weight_weight: float = 0.0

    @staticmethod
    def of(contributions: NDArray[np.float64], weights: NDArray[np.float64], cluster: NDArray[np.int64]) -> Moments:
        """Moments of a batch of strings. A cluster must not be split between batches that are merged.

        Shapes: three of ``(n,)``. Raises ``ValueError`` as :func:`klkit.stats.intervals.cluster_totals` does.
        """
        totals, sizes = cluster_totals(contributions, weights, cluster)
        total, weight = float(totals.mean()), float(sizes.mean())
        with np.errstate(invalid="ignore"):
            t, w = totals - total, sizes - weight
            return Moments(len(totals), total, weight, float(t @ t), float(t @ w), float(w @ w))

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of clusters together.

        Source: T. Chan, G. Golub and R. LeVeque, Algorithms for computing the sample variance,
        The American Statistician 37 (1983), pairwise update.
        """
        if not (self.clusters and other.clusters):
            return self if self.clusters else other
        n = self.clusters + other.clusters
        mine, theirs = self.clusters / n, other.clusters / n
        dt, dw = other.total - self.total, other.weight - self.weight
        between = self.clusters * theirs
        return Moments(
            clusters=n,
            total=mine * self.total + theirs * other.total,
            weight=mine * self.weight + theirs * other.weight,
            total_total=self.total_total + other.total_total + between * dt * dt,
            total_weight=self.total_weight + other.total_weight + between * dt * dw,
            weight_weight=self.weight_weight + other.weight_weight + between * dw * dw,
        )

    @property
    def value(self) -> float:
        """``R = mean T / mean W``; NaN before the first cluster."""
        return self.total / self.weight if self.weight else math.nan

    @property
    def stderr(self) -> float:
        """Linearised standard error of ``R``; NaN with fewer than two clusters or an infinite value."""
        if self.clusters < 2 or not math.isfinite(self.value):
            return math.nan
        r = self.value
        squares = self.total_total - 2 * r * self.total_weight + r * r * self.weight_weight
        # Rounding can leave a sum of squares that is zero a little below it.
        return math.sqrt(max(squares, 0.0) / (self.clusters * (self.clusters - 1))) / self.weight

    def half_width(self, level: float = 0.95) -> float:
        """Half the width of the t interval at ``level``: the running error bar of a progress line."""
        return student_quantile((1 + level) / 2, self.clusters - 1) * self.stderr if self.clusters > 1 else math.nan
