"""Two methods compared seed by seed: what the differences say, and what they cannot say.

Runs that share a seed share their data and their start, so their difference scatters less than they do. A difference
that no interval separates from zero is not a finding of equality: that takes an interval within a margin, set
beforehand, below which nobody would care.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from klkit.stats.student import student_quantile, student_tail

POWER = 0.8
LARGEST = 1_000_000
"""Seeds beyond which nobody counts."""


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean of ``first − second`` over seeds.

    Attributes:
        mean: the mean difference.
        deviation: standard deviation of the differences.
        seeds: how many there are.
        lower: lower bound of the t interval.
        upper: its upper bound.
        level: of the interval.
        p: two-sided p-value of a t test against no difference; 1 where all differences are 0.
        same_sign: seeds whose difference has the sign of the mean.
    """

    mean: float
    deviation: float
    seeds: int
    lower: float
    upper: float
    level: float
    p: float
    same_sign: int

    @property
    def stderr(self) -> float:
        """``deviation / √seeds``."""
        return self.deviation / math.sqrt(self.seeds)


def paired_difference(
    first: Sequence[float] | NDArray[np.float64], second: Sequence[float] | NDArray[np.float64], *, level: float = 0.95
) -> PairedDifference:
    """``mean(first − second)`` with a t interval over pairs.

    Raises:
        ValueError: different numbers of values, fewer than two, or values that are not finite.

    Example:
        >>> found = paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
        >>> found.mean, found.deviation, round(found.p, 6)
        (2.0, 1.0, 0.07418)

    Source: Student (1908), The probable error of a mean, Biometrika 6(1).
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(
            f"expected as many finite values of both, two at least, got shapes {a.shape} and {b.shape} with "
            f"{int((~np.isfinite(a)).sum() + (~np.isfinite(b)).sum())} that are not finite; pair them by seed"
        )
    gaps = a - b
    mean, deviation = float(gaps.mean()), float(gaps.std(ddof=1))
    stderr = deviation / math.sqrt(len(gaps))
    half = student_quantile((1 + level) / 2, len(gaps) - 1) * stderr
    t = abs(mean) / stderr if stderr > 0 else math.inf if mean else 0.0
    p = 2 * student_tail(t, len(gaps) - 1)
    same = int((np.sign(gaps) == np.sign(mean)).sum())
    return PairedDifference(mean, deviation, len(gaps), mean - half, mean + half, level, p, same)


def equivalence_p(difference: PairedDifference, margin: float) -> float:
    """p-value of two one-sided t tests that the difference is not within ``± margin``.

    Below ``α`` just where the interval of level ``1 − 2α`` lies within the margin.

    Raises:
        ValueError: the margin is not positive.

    Example:
        >>> close = paired_difference([1.0, 2.1, 2.9], [1.1, 2.0, 2.9])
        >>> round(equivalence_p(close, 1.0), 4), equivalence_p(close, 0.01) > 0.05
        (0.0017, True)

    Source: D. Schuirmann (1987), A comparison of the two one-sided tests procedure and the power approach, Journal of
    Pharmacokinetics and Biopharmaceutics 15(6).
    """
    if not margin > 0:
        raise ValueError(f"expected a positive margin, got {margin}; below it nobody would care for a difference")
    if difference.stderr == 0:
        return float(abs(difference.mean) >= margin)
    return student_tail((margin - abs(difference.mean)) / difference.stderr, difference.seeds - 1)


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p-values: those at most ``α`` are rejected with a chance of at most ``α`` of any false rejection.

    Raises:
        ValueError: a p-value is none.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]

    Source: S. Holm (1979), A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics
    6(2).
    """
    values = np.asarray(p, dtype=np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"expected p-values from 0 to 1, got {list(p)}")
    order = np.argsort(values, kind="stable")
    steps = np.arange(len(values), 0, -1) * values[order]
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return [float(x) for x in adjusted]


def seeds_to_resolve(deviation: float, gap: float, *, alpha: float = 0.05, power: float = POWER) -> int:
    """Seeds with which a true difference of ``gap`` is found in ``power`` of all studies, by a two-sided t test.

    The smallest ``n ≥ 2`` with ``n ≥ ((t_{1−α/2} + t_power) · deviation / gap)²``, quantiles at ``n − 1`` degrees of
    freedom; within a seed or two of the exact number.

    Raises:
        ValueError: ``gap`` is not positive, or ``deviation`` is negative.

    Example:
        >>> seeds_to_resolve(0.93, 0.3)
        78
    """
    if not (gap > 0 and deviation >= 0):
        raise ValueError(f"expected a positive gap and a deviation of at least 0, got {gap} and {deviation}")

    def enough(n: int) -> bool:
        quantiles = student_quantile(1 - alpha / 2, n - 1) + student_quantile(power, n - 1)
        return n >= (quantiles * deviation / gap) ** 2

    low, high = 1, 2  # fewer are never enough, and what is needed falls as n grows
    while not enough(high):
        if high > LARGEST:
            return high
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a comparison says.

    Attributes:
        word: ``"better"``, ``"worse"`` or, where no direction is good, ``"higher"``, ``"lower"``; ``"equivalent"``;
            or ``"not resolved"``.
        margin: difference below which nobody cares.
        small: whether there is a difference, and it is shown to be within the margin.
        seeds: seeds that would find a difference as large as the margin; None where the comparison is resolved.
    """

    word: str
    margin: float
    small: bool = False
    seeds: int | None = None

    def __str__(self) -> str:
        if self.word == "equivalent":
            return f"equivalent within {self.margin:.3g}"
        if self.seeds is not None:
            count = f"{self.seeds}" if self.seeds <= LARGEST else f"over {LARGEST}"
            return f"not resolved ({count} seeds would find a difference of {self.margin:.3g})"
        return f"{self.word}, by less than {self.margin:.3g}" if self.small else self.word


def verdicts(
    differences: Sequence[PairedDifference], margins: Sequence[float], *, good: int, alpha: float = 0.05
) -> list[tuple[float, Verdict]]:
    """Holm's adjusted p-value and the verdict of each comparison of one family.

    A difference is one if its adjusted p-value is at most ``alpha``. Equivalence is a second family, adjusted likewise.
    Seeds are counted for the level that the hardest step of the adjustment leaves.

    Args:
        differences: of the comparisons.
        margins: below which a difference does not matter, one each.
        good: 1 where more is better, -1 where less is, 0 where neither is.
        alpha: chance of any false statement of difference, and of any of equivalence.

    Example:
        >>> found = paired_difference([0.9, 1.0, 0.8, 0.9], [1.9, 2.1, 1.8, 2.0])
        >>> [(round(p, 4), str(v)) for p, v in verdicts([found], [0.1], good=-1)]
        [(0.0, 'better')]
    """
    different = holm([d.p for d in differences])
    equal = holm([equivalence_p(d, m) for d, m in zip(differences, margins, strict=True)])
    out = []
    for d, margin, p, p_equal in zip(differences, margins, different, equal, strict=True):
        if p <= alpha:
            up, down = {0: ("higher", "lower"), 1: ("better", "worse"), -1: ("worse", "better")}[good]
            found = Verdict(up if d.mean > 0 else down, margin, small=p_equal <= alpha)
        elif p_equal <= alpha:
            found = Verdict("equivalent", margin)
        else:
            seeds = seeds_to_resolve(d.deviation, margin, alpha=alpha / len(differences))
            found = Verdict("not resolved", margin, seeds=seeds)
        out.append((p, found))
    return out
