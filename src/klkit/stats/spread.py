"""How far repeated runs scatter: pooled standard deviations, their intervals, and ratios of two, in NumPy alone.

Runs of one setting scatter about that setting's mean; what they scatter by is pooled over settings. Intervals are those
of normal runs (chi-squared, and F for a ratio); their quantiles are simulated, to about half a percent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIMULATED = 200_000


@dataclass(frozen=True, slots=True)
class Scatter:
    """A pooled standard deviation, or a ratio of two, with its 95 % interval.

    Attributes:
        value: the estimate.
        lower: lower bound.
        upper: upper bound.
        df: degrees of freedom behind it (of the first one, in a ratio).
    """

    value: float
    lower: float
    upper: float
    df: int


def pooled_scatter(values: NDArray[np.float64], random: np.random.Generator) -> Scatter:
    """Root mean variance within rows of ``(setting, run)``; each row has a mean of its own.

    Raises:
        ValueError: fewer than two runs a setting, or values that are not finite.

    Example:
        >>> round(pooled_scatter(np.array([[1.0, 3.0], [10.0, 12.0]]), np.random.default_rng(0)).value, 6)
        1.414214
    """
    settings, runs = values.shape
    if runs < 2 or not np.isfinite(values).all():
        raise ValueError(f"expected at least two runs a setting with finite values, got shape {values.shape}")
    df = settings * (runs - 1)
    value = math.sqrt(float(values.var(1, ddof=1).mean()))
    low, high = np.quantile(random.chisquare(df, SIMULATED) / df, [0.025, 0.975])
    return Scatter(value, value / math.sqrt(high), value / math.sqrt(low), df)


def scatter_ratio(first: Scatter, second: Scatter, random: np.random.Generator) -> Scatter:
    """``first / second``, two independent pooled standard deviations.

    Example:
        >>> one = Scatter(2.0, math.nan, math.nan, 16)
        >>> ratio = scatter_ratio(one, one, np.random.default_rng(0))
        >>> ratio.value, round(ratio.lower, 1), round(ratio.upper, 1)
        (1.0, 0.6, 1.7)
    """
    if second.value == 0:
        return Scatter(math.nan, math.nan, math.nan, first.df)
    value = first.value / second.value
    f = (random.chisquare(first.df, SIMULATED) / first.df) / (random.chisquare(second.df, SIMULATED) / second.df)
    low, high = np.quantile(f, [0.025, 0.975])
    return Scatter(value, value / math.sqrt(high), value / math.sqrt(low), first.df)
