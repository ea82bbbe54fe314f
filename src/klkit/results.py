"""What the verbs return: frozen, printable, mergeable, and the same after a round trip through JSON."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klkit.stats.intervals import Interval, cluster_totals, ratio_interval, ratio_stderr

NATS_PER_BIT = math.log(2.0)
SCHEMA = "klkit.result/1"
ESTIMANDS = {
    "S": "per response",
    "R": "per token (ratio of expectations)",
    "F": "per token of the given text",
}


@dataclass(frozen=True, slots=True, eq=False)
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
        cluster: the independent unit of each string, ``(n,)``; estimates that are merged share these names.
        truncated: share of strings cut at the length limit.
        infinite: decisions at which ``q`` excludes a token that ``p`` allows.
        notes: whatever a reader must be told beside the number.
        unit: ``"nats"`` or ``"bits"``, for printing.
        symbol: what a decision chooses, for printing: ``"token"`` or ``"byte"``.
        prompts: different prompts behind the strings; 0 if not known, and then the clusters stand for them.
        spread: by how much errors exceed what the spread of the contributions says (fitted coefficients).

    Raises:
        ValueError: no strings, arrays of different lengths, an unknown estimand or unit, or contributions and
            weights that have no mean (see :func:`klkit.stats.intervals.cluster_totals`).

    Example:
        >>> ones = np.ones(4)
        >>> estimate = Estimate("rb", "kl", "KL(p‖q)", "S", np.array([0.5, 1.0, 1.5, 1.0]), ones, np.arange(4))
        >>> estimate.value, round(estimate.stderr, 3)
        (1.0, 0.204)
        >>> print(estimate)
        KL(p‖q) = 1 nats per response, no 95% interval (fewer than 10 clusters), rb, n = 4 strings in 4 clusters
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
    spread: float = 1.0
    prompts: int = 0
    symbol: str = "token"
    _totals: tuple[NDArray[np.float64], NDArray[np.float64]] = field(init=False, repr=False, compare=False)
    _intervals: dict[float, Interval] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.contributions)
        if n == 0 or len(self.weights) != n or len(self.cluster) != n:
            raise ValueError(
                f"expected one contribution, weight and cluster for each of at least one string, "
                f"got {n}, {len(self.weights)} and {len(self.cluster)}"
            )
        if self.estimand not in ESTIMANDS or self.unit not in ("nats", "bits"):
            raise ValueError(
                f"expected an estimand among {', '.join(ESTIMANDS)} and the unit nats or bits, got {self.estimand!r} "
                f"and {self.unit!r}"
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
        return self.spread * ratio_stderr(*self._totals)

    @property
    def per(self) -> str:
        """The estimand in words."""
        return ESTIMANDS[self.estimand].replace("token", self.symbol)

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
        if level not in self._intervals:
            found, value = ratio_interval(*self._totals, level=level), self.value
            if self.spread != 1.0:
                lower, upper = (value + self.spread * (bound - value) for bound in (found.lower, found.upper))
                found = replace(found, lower=lower, upper=upper)
            self._intervals[level] = found
        return self._intervals[level]

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
            raise ValueError(
                f"expected estimates of one quantity by one method, got {sorted(keys)}; merge like with like"
            )
        n = sum(e.n for e in parts)
        return replace(
            self,
            contributions=np.concatenate([e.contributions for e in parts]),
            weights=np.concatenate([e.weights for e in parts]),
            cluster=np.concatenate([e.cluster for e in parts]),
            truncated=sum(e.truncated * e.n for e in parts) / n,
            infinite=sum(e.infinite for e in parts),
            spread=max(e.spread for e in parts),
            prompts=0 if any(e.prompts == e.clusters for e in parts) else max(e.prompts for e in parts),
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
            "symbol": self.symbol,
            "value": jsonable(self.in_unit(self.value)),
            "stderr": jsonable(self.in_unit(self.stderr)),
            "ci": {
                "level": level,
                "lower": jsonable(self.in_unit(interval.lower)),
                "upper": jsonable(self.in_unit(interval.upper)),
                "method": interval.method,
            },
            "n_sequences": self.n,
            "n_prompts": self.prompts or self.clusters,
            "n_clusters": self.clusters,
            "truncated_share": self.truncated,
            "infinite": self.infinite,
            "notes": list(self.notes),
        }

    def describe_interval(self, level: float = 0.95) -> str:
        """The interval in words and in the printing unit, with its method."""
        interval = self.interval(level)
        if math.isnan(interval.lower):
            return f"no {level:.0%} interval {interval.method.removeprefix('none ')}"
        lower, upper = self.in_unit(interval.lower), self.in_unit(interval.upper)
        return f"{level:.0%} interval [{lower:.6g}, {upper:.6g}] ({interval.method})"

    def __str__(self) -> str:
        return (
            f"{self.direction} = {self.in_unit(self.value):.6g} {self.unit} {self.per}, "
            f"{self.describe_interval()}, {self.method}, n = {self.n} strings in {self.clusters} clusters"
        )

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(str(self))}</p>"


def html_table(sentence: str, rows: Sequence[Sequence[str]]) -> str:
    """A sentence and a table of text, for notebooks; whatever they hold, it is shown and not obeyed.

    Example:
        >>> html_table("a < b", [["x"]])
        '<p><strong>a &lt; b</strong></p><table><tr><td>x</td></tr></table>'
    """
    cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    table = "".join(f"<tr>{row}</tr>" for row in cells)
    return f"<p><strong>{html.escape(sentence)}</strong></p><table>{table}</table>"


def jsonable(value: float) -> float | str:
    """``value``, or the string "inf", "-inf" or "nan": JSON has no such numbers.

    Example:
        >>> jsonable(1.5), jsonable(float("inf"))
        (1.5, 'inf')
    """
    return float(value) if math.isfinite(value) else str(float(value))


def plain(value: Any) -> Any:
    """``value`` with every infinite or undefined number inside its mappings and sequences spelled out.

    Example:
        >>> plain({"a": (1, float("nan")), "b": "c"})
        {'a': [1, 'nan'], 'b': 'c'}
    """
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return jsonable(value) if isinstance(value, float) else value


@dataclass(frozen=True, slots=True)
class Comparison:
    """The outcome of one run: a headline, its companions, and the checks that vouch for them.

    Attributes:
        headline: the number to quote: per response (``S``), or per token of a given text (``F``).
        estimates: every estimator folded over the same strings, in the order of a table.
        audit: the self-audit: ``passed``, and each check with its value, threshold and verdict.
        floor: size of the numerical noise, in nats: ``kind``, ``value``, ``stderr``, ``n``.
        lower_bound: a bound below the divergence that holds at any stopping time, in nats.
        tail: Pareto k̂ of the per-string sums and what follows from it.
        companions: other quantities of the same pass, each with value and standard error.
        breakdown: where the divergence sits: by position, confidence, class and group, token, string, end against
            content.
        settings: the resolved options.
        provenance: models, precisions, versions, digests: what one needs to repeat the run.
        lines: short statements for a terminal or a page, by name.
        sentence: the headline in one sentence.
        notes: what a reader must be told beside the numbers.
        roles: the model that wrote the strings, and the one it is compared with: ``("q", "p")`` in reverse.
    """

    headline: Estimate
    estimates: tuple[Estimate, ...]
    audit: Mapping[str, Any]
    floor: Mapping[str, Any]
    lower_bound: Mapping[str, Any]
    tail: Mapping[str, Any]
    companions: Mapping[str, Any]
    breakdown: Mapping[str, Any]
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]
    lines: Mapping[str, str]
    sentence: str
    notes: tuple[str, ...] = ()
    roles: tuple[str, str] = ("p", "q")

    @property
    def failed(self) -> bool:
        """Whether the self-audit found something that makes the number untrustworthy."""
        return not self.audit["passed"]

    @property
    def variance_ratio_vs_mc(self) -> dict[str, float]:
        """Variance of each per-response estimator over that of Monte Carlo, from the same strings."""
        same = [e for e in self.estimates if e.estimand == "S" and e.direction == self.headline.direction]
        errors = {e.method: e.stderr for e in same}
        mc = errors.get("mc", math.nan)
        return {method: (error / mc) ** 2 for method, error in errors.items()} if mc > 0 else {}

    def to_dict(self) -> dict[str, Any]:
        """The result as plain JSON values under a versioned schema; divergences in the printing unit."""
        return {
            "schema": SCHEMA,
            "roles": list(self.roles),
            "sentence": self.sentence,
            "headline": self.headline.to_dict(),
            "estimates": [estimate.to_dict() for estimate in self.estimates],
            "variance_ratio_vs_mc": {name: jsonable(ratio) for name, ratio in self.variance_ratio_vs_mc.items()},
            "audit": plain(self.audit),
            "floor": plain(self.floor),
            "truncated_share": self.headline.truncated,
            "infinite": self.headline.infinite,
            "lower_bound": plain(self.lower_bound),
            "tail": plain(self.tail),
            "companions": plain(self.companions),
            "breakdown": plain(self.breakdown),
            "lines": dict(self.lines),
            "notes": list(self.notes),
            "settings": plain(self.settings),
            "provenance": plain(self.provenance),
        }

    def to_dataframe(self) -> Any:
        """One row an estimator, in nats, as a pandas ``DataFrame``.

        Raises:
            ImportError: pandas is not installed.
        """
        from klkit.frames import estimator_rows, frame

        return frame(estimator_rows(self.to_dict()))

    def __str__(self) -> str:
        return ("THE SELF-AUDIT FAILED: do not use this number. " if self.failed else "") + self.sentence

    def _repr_html_(self) -> str:
        rows = [("method", "estimand", "value", "standard error", "interval")]
        for e in self.estimates:
            value, stderr = (f"{e.in_unit(x):.6g} {e.unit}" for x in (e.value, e.stderr))
            rows.append((e.method, e.per, value, stderr, e.describe_interval()))
        return html_table(str(self), rows)
