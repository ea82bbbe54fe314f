"""Is a divergence within a limit? Pass, fail, or how much more it would take to say."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from klkit.stats.intervals import MINIMUM_CLUSTERS, ratio_interval, ratio_stderr
from klkit.stats.paired import LARGEST, POWER, seeds_to_resolve
from klkit.stats.skewness import lean
from klkit.stats.student import student_quantile

PASS, FAIL, UNDECIDED = "pass", "fail", "undecided"


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether an estimate is within a limit, with a nominal error of ``1 − level`` either way.

    Attributes:
        verdict: ``"pass"``, ``"fail"`` or ``"undecided"``.
        value: the estimate, in the units of the limit.
        lower: one-sided lower confidence limit; NaN without one.
        upper: one-sided upper confidence limit.
        limit: what was asked for.
        level: confidence of each of the two limits.
        clusters: independent units behind the estimate.
        needed: clusters with which 80 % of all studies would decide, if value and scatter are what they seem; None
            where no number would (the estimate sits at the limit), where nothing is left to decide, or where nothing
            is known of the scatter.
        method: of the limits, or in words why there are none.
    """

    verdict: str
    value: float
    lower: float
    upper: float
    limit: float
    level: float
    clusters: int
    needed: int | None
    method: str

    def __str__(self) -> str:
        if self.verdict == PASS:
            return f"pass: below {self.upper:.4g} with {self.level:.0%} confidence, and the limit is {self.limit:.4g}"
        if self.verdict == FAIL:
            return f"fail: above {self.lower:.4g} with {self.level:.0%} confidence, and the limit is {self.limit:.4g}"
        if math.isnan(self.lower):
            return f"undecided: {self.method.removeprefix('none (').removesuffix(')')}; take {self.more}"
        between = f"the {self.level:.0%} limits {self.lower:.4g} and {self.upper:.4g} lie on both sides of"
        return f"undecided: {between} {self.limit:.4g}; {self.more} would decide"

    @property
    def more(self) -> str:
        """How many clusters would decide, in words."""
        if self.needed is None and self.clusters < 2:
            return f"at least {MINIMUM_CLUSTERS} clusters"
        if self.needed is None:
            return "never as things look: no number of clusters"
        return f"about {self.needed:,} clusters" if self.needed <= LARGEST else f"more than {LARGEST:,} clusters"


def decide(
    totals: NDArray[np.float64],
    weights: NDArray[np.float64],
    limit: float,
    *,
    level: float = 0.95,
    spread: float = 1.0,
) -> Decision:
    """Pass if the upper one-sided limit of ``Σ totals / Σ weights`` is below ``limit``, fail if the lower is above it.

    The limits are the bounds of the two-sided interval of level ``2·level − 1``, bootstrap-t below 400 clusters and
    Student's t from there on, or those of t with the skewness removed (:mod:`klkit.stats.skewness`) where these are
    more cautious: the two errors of an interval of skewed values are not alike, and a gate is judged by the larger.
    Tails too heavy for either pass too often (docs/coverage.md says by how much). Infinite estimates fail with
    certainty. Below 10 clusters nothing is decided. Clusters without any variance pass or fail by their common value:
    whether rare strings would differ is not in the sample.

    Args:
        totals: ``(c,)``, sum of contributions of each cluster.
        weights: ``(c,)``, sum of weights of each cluster.
        limit: largest acceptable value, in the units of the estimate; positive.
        level: one minus the chance of each error, a pass beyond the limit or a failure within it; above one half.
        spread: by how much errors exceed what the totals say (:attr:`klkit.results.Estimate.spread`).

    Raises:
        ValueError: a limit that is not positive and finite, a level outside (½, 1), or a spread that is not positive.

    Source: D. Schuirmann (1987), A comparison of the two one-sided tests procedure and the power approach, Journal of
    Pharmacokinetics and Biopharmaceutics 15(6); P. Hall (1992), On the removal of skewness by transformation, Journal
    of the Royal Statistical Society B 54(1).

    Example:
        >>> x = np.random.default_rng(0).exponential(size=100)
        >>> [decide(x, np.ones(100), limit).verdict for limit in (2.0, 1.2, 0.5)]
        ['pass', 'undecided', 'fail']
    """
    if not (0 < limit < math.inf and 0.5 < level < 1 and 0 < spread < math.inf):
        raise ValueError(
            f"expected a positive finite limit, a level between 0.5 and 1 and a positive spread, got {limit}, "
            f"{level} and {spread}; a divergence of exactly zero is no limit that a different model could keep"
        )
    clusters, value = len(totals), float(totals.sum() / weights.sum())
    lower, upper, method = _limits(totals, weights, value, level)
    if not math.isinf(value):
        lower, upper = (value + spread * (bound - value) for bound in (lower, upper))
    verdict = PASS if upper < limit else FAIL if lower > limit else UNDECIDED
    needed = None
    gap = abs(value - limit)
    # At the limit up to the rounding of a sum: there a number of clusters would be about rounding only.
    if verdict == UNDECIDED and clusters >= 2 and gap > 1e-12 * limit:
        deviation = spread * ratio_stderr(totals, weights) * math.sqrt(clusters)
        enough = seeds_to_resolve(deviation, gap, alpha=2 * (1 - level), power=POWER)
        needed = max(enough, MINIMUM_CLUSTERS, clusters + 1)
    return Decision(verdict, value, lower, upper, limit, level, clusters, needed, method)


def _limits(
    totals: NDArray[np.float64], weights: NDArray[np.float64], value: float, level: float
) -> tuple[float, float, str]:
    """The more cautious of two one-sided limits on either side, and what they are."""
    interval = ratio_interval(totals, weights, level=2 * level - 1)
    if math.isinf(value) or math.isnan(interval.lower) or interval.lower == interval.upper:
        return interval.lower, interval.upper, interval.method
    stderr, q = ratio_stderr(totals, weights), student_quantile(level, len(totals) - 1)
    found = lean(totals - value * weights, weights)
    lower, upper = value - stderr * float(found.restored(q)), value - stderr * float(found.restored(-q))
    return min(lower, interval.lower), max(upper, interval.upper), f"{interval.method}, skewness removed"
