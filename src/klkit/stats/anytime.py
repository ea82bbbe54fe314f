"""Which of two candidates is closer, looked at after every string: a test that peeking does not break.

A difference of two unbounded contributions has no exact test of its mean at any sample size, let alone at every one
(R. Bahadur and L. Savage, 1956: whatever is seen, a string too rare to be in the sample may carry the mean). What there
is holds asymptotically: a confidence sequence around the running mean, whose width needs the variance only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from klkit.stats.skewness import Lean

Array = NDArray[np.float64]
ASYMPTOTIC, BOTH_INFINITE = "asymptotic confidence sequence, skewness removed", "both infinite"
START = 32
"""Differences before which nothing is said: fewer tell too little of their variance and skewness."""
AROUND = 500
"""Differences at which the sequence is narrowest, relative to the best for that number."""


@dataclass(frozen=True, slots=True, eq=False)
class AnytimeDifference:
    """Bounds on ``E[first − second]`` that hold, asymptotically, at every look together.

    Attributes:
        lower: lower bound after each difference, ``(t,)``; ``-inf`` before the first look.
        upper: upper bound, ``(t,)``.
        level: one minus the chance that a bound is ever wrong.
        closer: ``"first"`` or ``"second"``, or ``""`` where the sequence never excludes zero.
        resolved: differences that had been seen when it first did; None if never.
        method: what the bounds are.
    """

    lower: Array
    upper: Array
    level: float
    closer: str
    resolved: int | None
    method: str


def anytime_difference(
    first: Array, second: Array, *, level: float = 0.95, start: int = START, around: int = AROUND
) -> AnytimeDifference:
    """``mean(d) ± u σ̂/√t`` after every ``d = first − second``: bounds that hold at all looks together.

    ``u² = 2 (1 + 1/(tρ²)) log(√(tρ² + 1)/(1 − level))``. Each side is widened by what the skewness
    seen so far calls for (:mod:`klkit.stats.skewness`), which keeps the error where the plain sequence loses it: when
    differences are skewed and few. From an infinite contribution on, the other
    candidate is closer; if both have one the two are tied and the bounds NaN.

    Args:
        first: ``(t,)``, contribution of one candidate to each string, or its total over each cluster, in order of
            arrival; independent of each other.
        second: ``(t,)``, of the other candidate, on the same strings.
        level: of the whole sequence.
        start: differences before the first look, 2 or more.
        around: difference count at which the bounds are to be narrowest; fixed before the data are seen.

    The sign of a difference per token is that of the difference of the sums, so weights are not needed.

    Raises:
        ValueError: arrays of different shapes, a contribution that is NaN or ``-inf``, or options out of range.

    Source: I. Waudby-Smith, D. Arbour, R. Sinha, E. Kennedy and A. Ramdas, Time-uniform central limit theory and
    asymptotic confidence sequences (2021), arXiv 2103.06476; the skewness as in P. Hall (1992), Journal of the Royal
    Statistical Society B 54(1).

    Example:
        >>> shared = np.random.default_rng(0).exponential(size=1000)
        >>> found = anytime_difference(shared, 1.3 * shared)
        >>> found.closer, found.resolved < 100
        ('first', True)
    """
    _require_usable(first, second, level, start, around)
    one, other = np.logical_or.accumulate(np.isinf(first)), np.logical_or.accumulate(np.isinf(second))
    ordinary = int((~(one | other)).sum())
    lower, upper = np.full(len(first), -np.inf), np.full(len(first), np.inf)
    lower[:ordinary], upper[:ordinary] = _sequence(first[:ordinary] - second[:ordinary], 1 - level, start, around)
    for places, bound in ((one & ~other, np.inf), (other & ~one, -np.inf), (one & other, np.nan)):
        lower[places] = upper[places] = bound
    if len(first) and one[-1] and other[-1]:
        return AnytimeDifference(lower, upper, level, "", None, BOTH_INFINITE)
    second_closer, first_closer = lower > 0, upper < 0
    if len(first) and (one[-1] or other[-1]):  # which is certain, whatever the sequence said before
        second_closer, first_closer = second_closer & one[-1], first_closer & other[-1]
    apart = first_closer | second_closer
    if not apart.any():
        return AnytimeDifference(lower, upper, level, "", None, ASYMPTOTIC)
    when = int(apart.argmax())
    return AnytimeDifference(lower, upper, level, "first" if first_closer[when] else "second", when + 1, ASYMPTOTIC)


def _require_usable(first: Array, second: Array, level: float, start: int, around: int) -> None:
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"expected one contribution of each to every string, got {first.shape} and {second.shape}")
    for name, x in (("first", first), ("second", second)):
        wrong = np.isnan(x) | (x == -np.inf)
        if wrong.any():
            raise ValueError(
                f"expected contributions that are numbers or +inf, got {x[wrong][0]} of the {name} candidate at string "
                f"{int(wrong.argmax())}; look at that model's outputs"
            )
    if not (0 < level < 1 and start >= 2 and around >= 1):
        raise ValueError(
            f"expected a level between 0 and 1, a start of 2 or more and around of 1 or more, got {level}, {start} and "
            f"{around}"
        )


def _sequence(d: Array, error: float, start: int, around: int) -> tuple[Array, Array]:
    """The bounds after each of ``d``, infinite before ``start``."""
    t = np.arange(1, len(d) + 1)
    scale = np.abs(d).max(initial=0.0) or 1.0
    x = (d - (d[0] if len(d) else 0.0)) / scale  # moments about a value among them, so that little cancels
    mean, square, cube = np.cumsum(x) / t, np.cumsum(x**2) / t, np.cumsum(x**3) / t
    variance = np.maximum(square - mean**2, 0.0)
    varies = variance > 1e-24
    safe = np.where(varies, variance, 1.0)
    skewness = np.where(varies, (cube - 3 * mean * square + 2 * mean**3) / safe**1.5, 0.0)
    stderr = np.sqrt(np.where(varies, variance, 0.0) / np.maximum(t - 1, 1))
    log = -2 * math.log(error)
    tightness = t * (log + math.log1p(log)) / around  # tρ²
    u = np.sqrt(2 * (1 + 1 / tightness) * np.log(np.sqrt(tightness + 1) / error))
    found = Lean(skewness / (3 * np.sqrt(t)), skewness / (6 * np.sqrt(t)))
    middle = mean * scale + (d[0] if len(d) else 0.0)
    lower = middle - scale * stderr * np.maximum(u, found.restored(u))
    upper = middle - scale * stderr * np.minimum(-u, found.restored(-u))
    early = t < start
    return np.where(early, -np.inf, lower), np.where(early, np.inf, upper)
