"""How many prompts, and strings for each, a wanted precision takes: from a pilot, in strings and seconds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from klkit.stats.intervals import MINIMUM_CLUSTERS, cluster_totals
from klkit.stats.student import student_quantile

LARGEST = 1 << 40  # prompts at which Student's t is the normal law


@dataclass(frozen=True, slots=True)
class Plan:
    """What a target half-width costs.

    Attributes:
        prompts: clusters to draw.
        strings_per_prompt: strings for each of them.
        half_width: expected half-width of the t interval of this plan, in the units of the estimate.
        between: variance between prompts of the residual per unit of weight, ``σ_b²``.
        within: the same between strings of one prompt, ``σ_w²``; NaN when the pilot has one string a prompt
            (``between`` is then the sum of both).
        design_effect: variance of the pilot's estimate over that of as many independent strings,
            ``1 + (m̄ − 1) σ_b²/(σ_b² + σ_w²)``.
        seconds: expected duration; NaN without timings.
    """

    prompts: int
    strings_per_prompt: int
    half_width: float
    between: float
    within: float
    design_effect: float
    seconds: float

    @property
    def strings(self) -> int:
        """Strings in all."""
        return self.prompts * self.strings_per_prompt


def plan(
    contributions: NDArray[np.float64],
    weights: NDArray[np.float64],
    cluster: NDArray[np.int64],
    *,
    rtol: float | None = None,
    atol: float | None = None,
    level: float = 0.95,
    seconds_per_string: float = math.nan,
    seconds_per_prompt: float = 0.0,
    available_prompts: int | None = None,
) -> Plan:
    """Prompts ``P`` and strings a prompt ``m`` with ``t √((σ_b² + σ_w²/m)/P) ≤`` the target half-width.

    The variance components are those of the residuals ``(contribution − R·weight)/mean weight`` in a one-way
    random-effects model. Strings a prompt minimise the cost of a given variance: ``m = √(σ_w²/σ_b² ·
    seconds_per_prompt/seconds_per_string)``, one where a prompt itself costs nothing. When ``available_prompts``
    are too few for that ``m``, all are used and ``m`` grows. At least 10 are planned:
    fewer give no interval.

    Args:
        contributions: ``(n,)``, of a pilot of about 32 strings or more; likewise ``weights`` and ``cluster``.
        rtol: target half-width as a share of the estimate; or
        atol: the target half-width itself. Exactly one of the two.
        seconds_per_prompt: what a further prompt costs beyond its strings, e.g. the prefill.

    Raises:
        ValueError: not exactly one positive target, fewer than two clusters, infinite contributions, or more
            precision than ``available_prompts`` can give however many strings are drawn.

    Source: W. G. Cochran, Sampling Techniques, 3rd ed. (1977), sections 9.10 and 10.6; E. Miller (2024),
    arXiv 2411.00640, for the same components in evaluations.

    Example:
        >>> pilot = np.random.default_rng(0).normal(10, 2, size=400)
        >>> plan(pilot, np.ones(400), np.arange(400), rtol=0.01).prompts
        1551
    """
    target = _target(contributions, weights, rtol, atol)
    return allocate(
        components(contributions, weights, cluster),
        target,
        lambda prompts: student_quantile((1 + level) / 2, max(1, prompts - 1)),
        seconds_per_string=seconds_per_string,
        seconds_per_prompt=seconds_per_prompt,
        available_prompts=available_prompts,
    )


def allocate(
    parts: Components,
    target: float,
    quantile: Callable[[int], float],
    *,
    seconds_per_string: float,
    seconds_per_prompt: float,
    available_prompts: int | None,
) -> Plan:
    """The cheapest prompts ``P`` and strings ``m`` with ``quantile(P) √((σ_b² + σ_w²/m)/P) ≤ target``.

    Raises:
        ValueError: ``available_prompts`` cannot give it however many strings are drawn.
    """
    between, within = parts.between, parts.within
    total = between + (0.0 if math.isnan(within) else within)
    spread = 0.0 if math.isnan(within) else within  # what further strings of one prompt can average away
    strings = 1
    if spread and seconds_per_prompt and seconds_per_string > 0:
        best = math.inf if between == 0 else math.sqrt(spread / between * seconds_per_prompt / seconds_per_string)
        # However dear a prompt is, an interval needs its ten.
        strings = max(1, round(min(best, _prompts(total, target, quantile) / MINIMUM_CLUSTERS)))
    prompts = _prompts(between + spread / strings, target, quantile)
    if available_prompts is not None and prompts > available_prompts:
        prompts, strings = available_prompts, _strings(between, spread, available_prompts, target, quantile)
    variance = (between + spread / strings) / prompts
    return Plan(
        prompts=prompts,
        strings_per_prompt=strings,
        half_width=quantile(prompts) * math.sqrt(variance),
        between=between,
        within=within,
        design_effect=1 + (parts.strings - 1) * between / total if total else 1.0,
        seconds=prompts * (seconds_per_prompt + strings * seconds_per_string),
    )


def _target(
    contributions: NDArray[np.float64], weights: NDArray[np.float64], rtol: float | None, atol: float | None
) -> float:
    given = [x for x in (rtol, atol) if x is not None]
    if len(given) != 1 or not given[0] > 0:
        raise ValueError(f"expected one positive target, got rtol={rtol} and atol={atol}; give one of them")
    if not np.isfinite(contributions).all():
        raise ValueError("expected finite contributions, got infinite ones; no sample size makes their mean finite")
    target = atol if rtol is None else rtol * abs(float(contributions.sum() / weights.sum()))
    if not target:
        raise ValueError("expected an estimate other than zero for a relative target, got 0; give a half-width instead")
    return target


@dataclass(frozen=True, slots=True)
class Components:
    """What a pilot says of its scatter: ``σ_b²``, ``σ_w²`` (NaN with one string a cluster), strings a cluster."""

    between: float
    within: float
    strings: float


def components(
    contributions: NDArray[np.float64], weights: NDArray[np.float64], cluster: NDArray[np.int64]
) -> Components:
    """Variance components of ``(contribution − R·weight)/mean weight`` between and within clusters.

    Strings a cluster are their mean over strings.

    Raises:
        ValueError: fewer than two clusters.

    Source: analysis of variance of a one-way layout; Cochran (1977), section 10.6.

    Example:
        >>> components(np.array([1.0, 3.0, 5.0, 7.0]), np.ones(4), np.array([0, 0, 1, 1]))
        Components(between=7.0, within=2.0, strings=2.0)
    """
    totals, sizes = cluster_totals(contributions, weights, cluster)
    clusters, n = len(totals), len(contributions)
    if clusters < 2:
        raise ValueError(f"expected a pilot of at least 2 clusters, got {clusters}; draw more prompts (or strings)")
    residuals = (contributions - totals.sum() / sizes.sum() * weights) / weights.mean()
    _, unit, counts = np.unique(cluster, return_inverse=True, return_counts=True)
    means = np.bincount(unit, weights=residuals) / counts
    mean_size = float(counts @ counts) / n
    mean_square_between = float(counts @ means**2) / (clusters - 1)
    if n == clusters:
        return Components(mean_square_between, math.nan, 1.0)
    within = float(np.sum((residuals - means[unit]) ** 2)) / (n - clusters)
    between = max(0.0, (mean_square_between - within) * (clusters - 1) / (n - mean_size))
    return Components(between, within, mean_size)


def _prompts(variance: float, target: float, quantile: Callable[[int], float]) -> int:
    """Smallest number, 10 or more, with ``quantile √(variance/prompts) ≤ target``."""
    prompts = max(MINIMUM_CLUSTERS, math.ceil(variance * (quantile(LARGEST) / target) ** 2))
    while quantile(prompts) * math.sqrt(variance / prompts) > target:
        prompts += 1
    return prompts


def _strings(between: float, within: float, prompts: int, target: float, quantile: Callable[[int], float]) -> int:
    """Strings for each of ``prompts`` that bring the half-width down to ``target``."""
    affordable = prompts * (target / quantile(prompts)) ** 2 - between
    if affordable <= 0 or within == 0:
        best = quantile(prompts) * math.sqrt(between / prompts)
        raise ValueError(
            f"expected a precision that {prompts} prompts can give, got a target of {target:.4g}; the variance "
            f"between prompts alone leaves {best:.4g} however many strings are drawn: add prompts"
        )
    return math.ceil(within / affordable)
