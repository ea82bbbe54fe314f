"""Sums over all decisions from which the self-audit draws its verdicts, batch by batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from klkit.estimators.statistics import TokenStatistics

ROUNDING = {torch.float64: 1e-18, torch.float32: 1e-9}  # a decision's divergence that rounding explains


@dataclass(frozen=True, slots=True)
class Deviation:
    """Sums over differences ``X_n`` that have mean zero given the prefix, and a known variance.

    Attributes:
        total: ``Σ X_n``.
        squares: ``Σ X_n²``.
        variance: ``Σ Var(X_n | prefix)``.
    """

    total: float = 0.0
    squares: float = 0.0
    variance: float = 0.0

    @classmethod
    def of(cls, difference: Float[Tensor, " m"], variance: Float[Tensor, " m"]) -> Deviation:
        """Those of some decisions."""
        return cls(float(difference.sum()), float(difference @ difference), float(variance.sum()))

    def __add__(self, other: Deviation) -> Deviation:
        return Deviation(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Deviation)))


@dataclass(frozen=True, slots=True)
class Gaps:
    """How far ``p`` is, at the tokens drawn, from the law that drew them.

    Attributes:
        largest: ``max |log p(y_n) − log μ(y_n)|``.
        outside: tokens whose ratio of probabilities ``p/μ`` is off 1 by more than a tenth.
    """

    largest: float = 0.0
    outside: int = 0

    @classmethod
    def of(cls, ratio: Float[Tensor, " m"]) -> Gaps:
        """Those of some decisions, from ``log p(y_n) − log μ(y_n)``."""
        return cls(float(ratio.abs().max()) if len(ratio) else 0.0, count((ratio.exp() - 1).abs() > 0.1))

    def __add__(self, other: Gaps) -> Gaps:
        return Gaps(max(self.largest, other.largest), self.outside + other.outside)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the decisions of a run say about where its strings come from, and about the numbers themselves.

    Attributes:
        decisions: how many.
        undefined: decisions with a statistic that is not a number.
        impossible: tokens to which ``p`` gives no probability at all.
        log_ratio: of the log-ratios of the drawn tokens from their means.
        surprisal: of their surprisals from ``p``'s entropies.
        noise: what rounding may add to the sum of such differences, at most.
        against: ``Σ log q(y_n) − log p(y_n)``.
        lost: ``p``-mass on tokens that ``q`` excludes, in all.
        infinite: decisions with such a token.
        excluded: how often each token was the most probable one of them.
        negligible: decisions whose divergence rounding explains.
        gaps: to the law that drew the strings, where that was not ``p``.
    """

    decisions: int = 0
    undefined: int = 0
    impossible: int = 0
    log_ratio: Deviation = Deviation()
    surprisal: Deviation = Deviation()
    noise: float = 0.0
    against: float = 0.0
    lost: float = 0.0
    infinite: int = 0
    excluded: Counter[int] = field(default_factory=Counter)
    negligible: int = 0
    gaps: Gaps = Gaps()

    @classmethod
    def of(cls, statistics: TokenStatistics) -> Evidence:
        """That of one batch."""
        rows, ratio, usable = statistics.rows, statistics.log_ratio.double(), statistics.usable()
        values = torch.stack([rows.logp, rows.logq, rows.kl, rows.entropy_p, rows.variance_logp])
        infinite = rows.lost > 0

        def deviation(difference: Tensor, variance: Tensor) -> Deviation:
            return Deviation.of(difference[usable], variance.double()[usable])

        return cls(
            decisions=len(ratio),
            undefined=count(values.isnan().any(0)),
            impossible=count(rows.logp == -torch.inf),
            log_ratio=deviation(ratio - rows.kl.double(), rows.variance_ratio),
            surprisal=deviation(-rows.logp.double() - rows.entropy_p.double(), rows.variance_logp),
            noise=float(rounding(statistics)[usable].sum()),
            against=float(-ratio[~ratio.isnan()].sum()),
            lost=float(rows.lost[infinite].double().sum()),
            infinite=count(infinite),
            excluded=Counter(rows.excluded[infinite].tolist()),
            negligible=count(rows.kl <= ROUNDING[rows.kl.dtype]),
            gaps=Gaps.of(statistics.importance_ratio()),
        )

    def __add__(self, other: Evidence) -> Evidence:
        return Evidence(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Evidence)))


def count(flags: Bool[Tensor, " m"]) -> int:
    """How many are set."""
    return int(flags.sum())


def rounding(statistics: TokenStatistics) -> Float[Tensor, " m"]:
    """What rounding may add to each difference: a few units in the last place of the log-probabilities."""
    logp, logq = statistics.rows.logp, statistics.rows.logq
    size = 1 + logp.double().abs() + logq.double().abs().where(logq > -torch.inf, 0.0)
    return 8 * torch.finfo(logp.dtype).eps * size
