"""How many strings it takes to tell two candidates apart: planned on their difference, string by string."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from klkit.stats.paired import POWER
from klkit.stats.planning import Plan, allocate, components
from klkit.stats.student import student_quantile


def plan_contrast(
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    weights: NDArray[np.float64],
    cluster: NDArray[np.int64],
    *,
    difference: float | None = None,
    level: float = 0.95,
    power: float = POWER,
    comparisons: int = 1,
    seconds_per_string: float = math.nan,
    seconds_per_prompt: float = 0.0,
    available_prompts: int | None = None,
) -> Plan:
    """Prompts and strings a prompt with which a difference ``Δ`` between two candidates is resolved.

    ``(t_{1 − α/2} + t_power) √((σ_b² + σ_w²/m)/P) ≤ Δ`` with ``α = (1 − level)/comparisons`` and the variance
    components of the paired difference per string, which are mostly far below those of either candidate. The plan's
    ``half_width`` is the difference that it resolves with this power, not the half-width of an interval.

    Args:
        first: ``(n,)``, contributions of one candidate to each string of a pilot; likewise ``second`` of the other on
            the same strings, ``weights`` and ``cluster``.
        difference: ``Δ``, in the units of the estimate; by default what the pilot saw, which is a guess.
        power: chance of resolving it.
        comparisons: pairs that are tested together; Holm's procedure may ask this much of the hardest.
        seconds_per_string: of drawing a string and scoring it with both candidates.
        seconds_per_prompt: what a further prompt costs beyond its strings.

    Raises:
        ValueError: a difference of zero, contributions that are not finite, options out of range, fewer than two
            clusters, or more than ``available_prompts`` can give.

    Source: E. Miller (2024), Adding Error Bars to Evals, arXiv 2411.00640; components as in
    :func:`klkit.stats.planning.plan`.

    Example:
        >>> shared = np.random.default_rng(0).exponential(size=100)
        >>> noise = np.random.default_rng(1).normal(size=100)
        >>> plan_contrast(shared, shared + 0.1 * noise, np.ones(100), np.arange(100), difference=0.02).prompts
        146
    """
    if first.shape != second.shape or not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError(
            f"expected finite contributions of both candidates to the same strings, got shapes {first.shape} and "
            f"{second.shape} with {int((~np.isfinite(first)).sum())} and {int((~np.isfinite(second)).sum())} that are "
            f"not finite; an infinite divergence is apart from a finite one already"
        )
    gaps = first - second
    target = abs(float(gaps.sum() / weights.sum())) if difference is None else difference
    if not (0 < target < math.inf and 0 < level < 1 and 0.5 <= power < 1 and comparisons >= 1):
        raise ValueError(
            f"expected a positive difference, a level below 1, a power from 0.5 to 1 and at least one comparison, got "
            f"{target}, {level}, {power} and {comparisons}; name the smallest difference that would matter"
        )
    found = 1 - (1 - level) / comparisons / 2

    def quantile(prompts: int) -> float:
        df = max(1, prompts - 1)
        return student_quantile(found, df) + student_quantile(power, df)

    return allocate(
        components(gaps, weights, cluster),
        target,
        quantile,
        seconds_per_string=seconds_per_string,
        seconds_per_prompt=seconds_per_prompt,
        available_prompts=available_prompts,
    )
