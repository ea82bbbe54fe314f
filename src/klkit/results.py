"""What the verbs return: frozen, printable, mergeable, and the same after a round trip through JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klkit.stats.intervals import Interval, cluster_totals, ratio_interval, ratio_stderr

NATS_PER_BIT = math.log(2.0)
ESTIMANDS = {
    "S": "per response",
    "R": "per token (ratio of expectations)",
    "F": "per token of the given text",
}


@dataclass(frozen=True, slots=True)
class Estimate:
    """A divergence with everything one must know to read it.

    The estimate is a ratio of two means over strings: contributions over weights. For estimand ``S``
    (per response) the weights are one, for ``R`` and ``F`` (per token) they are lengths. Values are
    in nats, always; :meth:`in_unit` converts for printing.

    Attributes:
        method: key of the estimator, e.g. ``"rb_cv"``.
        divergence: ``"kl"``, ``"reverse_kl"``, ``"js"`` or ``"jeffreys"``.
        direction: in words, e.g. ``"KL(p‖q)"``.
        estimand: ``"S"``, ``"R"`` or ``"F"``.
        contributions: numerator of each string, ``(n,)``.
        weights: denominator of each string, ``(n,)``.
        cluster: the independent unit of each string, ``(n,)``.
        truncated: share of strings cut at the length limit.
        infinite: decisions at which ``q`` excludes a token that ``p`` allows.
        notes: whatever a reader must be told beside the number.
    """

    method: str
    divergence: str
    direction: str
    estimand: str
    contributions: NDArray[np.float64]
    weights: NDArray[np.float64]
    cluster: NDArray[np.int64]
    truncated: float = 0.0
    infinite: int = 0
    notes: tuple[str, ...] = ()
    unit: str = "nats"
    _totals: tuple[NDArray[np.float64], NDArray[np.float64]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        n = len(self.contributions)
        if n == 0 or len(self.weights) != n or len(self.cluster) != n:
            raise ValueError(
                f"expected one contribution, weight and cluster for each of at least one string, "
                f"got {n}, {len(self.weights)} and {len(self.cluster)}"
            )
        object.__setattr__(self, "_totals", cluster_totals(self.contributions, self.weights, self.cluster))

    @property
    def value(self) -> float:
        """The estimate, in nats."""
        total, weight = self._totals
        return float(total.sum() / weight.sum())

    @property
    def stderr(self) -> float:
        """Standard error clustered by the independent unit; NaN with fewer than two units."""
        return ratio_stderr(*self._totals)

    @property
    def n(self) -> int:
        """Strings."""
        return len(self.contributions)

    @property
    def clusters(self) -> int:
        """Independent units (prompts, or strings when there is one prompt)."""
        return len(self._totals[0])

    def interval(self, level: float = 0.95) -> Interval:
        """Two-sided interval at ``level``: bootstrap-t below 400 clusters, Student's t above."""
        return ratio_interval(*self._totals, level=level)

    def in_unit(self, value: float) -> float:
        """``value`` nats in this estimate's printing unit."""
        return value / NATS_PER_BIT if self.unit == "bits" else value

    def merge(self, *others: Estimate) -> Estimate:
        """Pool strings of shards, processes or resumed runs that estimate the same thing.

        Raises:
            ValueError: the estimates differ in method, divergence, direction or estimand.
        """
        parts = (self, *others)
        keys = {(e.method, e.divergence, e.direction, e.estimand) for e in parts}
        if len(keys) > 1:
            raise ValueError(f"expected estimates of one quantity by one method, got {sorted(keys)}; merge like with like")
        n = sum(e.n for e in parts)
        return replace(
            self,
            contributions=np.concatenate([e.contributions for e in parts]),
            weights=np.concatenate([e.weights for e in parts]),
            cluster=np.concatenate([e.cluster for e in parts]),
            truncated=sum(e.truncated * e.n for e in parts) / n,
            infinite=sum(e.infinite for e in parts),
            notes=tuple(dict.fromkeys(note for e in parts for note in e.notes)),
        )

    def to_dict(self, level: float = 0.95) -> dict[str, Any]:
        """The estimate as plain JSON values; infinite and undefined numbers become strings."""
        interval = self.interval(level)
        return {
            "method": self.method,
            "divergence": self.divergence,
            "direction": self.direction,
            "estimand": self.estimand,
            "unit": self.unit,
            "value": jsonable(self.in_unit(self.value)),
            "stderr": jsonable(self.in_unit(self.stderr)),
            "ci": {
                "level": level,
                "lower": jsonable(self.in_unit(interval.lower)),
                "upper": jsonable(self.in_unit(interval.upper)),
                "method": interval.method,
            },
            "n_sequences": self.n,
            "n_prompts": self.clusters,
            "truncated_share": self.truncated,
            "infinite": self.infinite,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        interval = self.interval()
        lower, upper = self.in_unit(interval.lower), self.in_unit(interval.upper)
        return (
            f"{self.direction} = {self.in_unit(self.value):.6g} {self.unit} {ESTIMANDS[self.estimand]}, "
            f"{interval.level:.0%} interval [{lower:.6g}, {upper:.6g}] ({interval.method}), "
            f"{self.method}, n = {self.n} strings in {self.clusters} clusters"
        )


def jsonable(value: float) -> float | str:
    """``value``, or the string "inf", "-inf" or "nan": JSON has no such numbers.

    Example:
        >>> jsonable(1.5), jsonable(float("inf"))
        (1.5, 'inf')
    """
    return float(value) if math.isfinite(value) else str(float(value))


@dataclass(frozen=True, slots=True)
class Comparison:
    """The outcome of one run: a headline, its companions, and the checks that vouch for them.

    Attributes:
        headline: the number to quote (estimand ``S`` from the chosen method; ``F`` on fixed text).
        estimates: every estimator folded over the same strings, keyed ``"method/estimand"``.
        audit: name of each check to its outcome (see ``klkit.estimators.audit``).
        floor: size of the numerical noise: kind, value and stderr in nats.
        companions: other per-token quantities of the same pass (entropies, agreement, …).
        provenance: models, dtypes, seeds, versions: what one needs to repeat the run.
    """

    headline: Estimate
    estimates: Mapping[str, Estimate]
    audit: Mapping[str, Any]
    floor: Mapping[str, Any]
    companions: Mapping[str, Any]
    provenance: Mapping[str, Any]
    notes: Sequence[str] = ()

    @property
    def failed(self) -> bool:
        """Whether the self-audit found something that makes the number untrustworthy."""
        return not bool(self.audit.get("passed", True))

    def __str__(self) -> str:
        verdict = "AUDIT FAILED: do not use this number\n" if self.failed else ""
        return verdict + str(self.headline)
