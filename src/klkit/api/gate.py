"""Is a divergence within a limit? A verdict with an error rate, for a person or for a pipeline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from klkit.results import Comparison, Estimate, jsonable
from klkit.stats.decision import FAIL, Decision, decide
from klkit.stats.intervals import cluster_totals

SCHEMA = "klkit.gate/1"
PER = {"response": "S", "token": "R"}


@dataclass(frozen=True, slots=True)
class Gate:
    """A verdict on a measured divergence.

    Attributes:
        result: what was measured.
        estimate: the estimate that the limit is held against: per response, per token, or per token of a text.
        decision: pass, fail or undecided; in nats.
    """

    result: Comparison
    estimate: Estimate
    decision: Decision

    @property
    def verdict(self) -> str:
        """``"pass"``, ``"fail"`` or ``"undecided"``; a failed self-audit fails whatever the number."""
        return FAIL if self.result.failed else self.decision.verdict

    def __str__(self) -> str:
        e, d = self.estimate, self.decision
        what = f"{e.direction} against {e.in_unit(d.limit):.4g} {e.unit} {e.per}"
        if self.result.failed:
            return f"FAIL: {what}: the self-audit failed, so the number means nothing"
        if math.isinf(d.value):
            return f"FAIL: {what}: infinite (at {e.infinite} decisions p allows tokens that q excludes)"
        value = f"{e.in_unit(d.value):.4g}, n = {e.n} strings in {d.clusters} clusters, {e.method}"
        lower, upper = (f"{e.in_unit(bound):.4g}" for bound in (d.lower, d.upper))
        if d.verdict == "undecided":
            limits = (
                f"one-sided {d.level:.0%} limits {lower} and {upper} ({d.method})" if d.lower == d.lower else d.method
            )
            return f"UNDECIDED: {what}: {value}; {limits}; {d.more} would decide"
        bound = f"below {upper}" if d.verdict == "pass" else f"above {lower}"
        return f"{d.verdict.upper()}: {what}: {bound} with {d.level:.0%} confidence ({d.method}); estimate {value}"

    def to_dict(self) -> dict[str, Any]:
        """The verdict and the result behind it as plain JSON values; divergences in the printing unit."""
        e, d = self.estimate, self.decision
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "sentence": str(self),
            "estimand": e.estimand,
            "direction": e.direction,
            "unit": e.unit,
            "limit": e.in_unit(d.limit),
            "level": d.level,
            "value": jsonable(e.in_unit(d.value)),
            "lower": jsonable(e.in_unit(d.lower)),
            "upper": jsonable(e.in_unit(d.upper)),
            "method": d.method,
            "n_sequences": e.n,
            "n_clusters": d.clusters,
            "n_clusters_to_decide": d.needed,
            "result": self.result.to_dict(),
        }


def gate(result: Comparison, limit: float, *, per: str = "response", level: float = 0.95) -> Gate:
    """Hold ``result`` against ``limit`` nats, with a nominal error of ``1 − level`` either way.

    A pass says that the divergence is below the limit, a failure that it is above, and neither is said where the
    interval holds the limit. Of a fixed text the quantity is that per token of this text, whatever ``per`` is.

    Args:
        result: of :func:`klkit.estimate`, of a divergence that is measured directly.
        limit: largest acceptable divergence, nats.
        per: ``"response"`` or ``"token"``.
        level: one minus the chance of each error.

    Raises:
        ValueError: a limit or level out of range, an unknown ``per``, or a result without that quantity.

    Example:
        >>> import klkit
        >>> from klkit.models.automaton import coin
        >>> result = klkit.estimate(coin(end=0.5), coin(end=0.25), samples=100, max_tokens=60)
        >>> gate(result, 0.5).verdict, gate(result, 0.1).verdict
        ('pass', 'fail')
    """
    if per not in PER:
        raise ValueError(f"expected per response or per token, got {per!r}; choose one of them")
    wanted = "F" if result.headline.estimand == "F" else PER[per]
    chosen = result.headline
    if chosen.estimand != wanted:
        found = [e for e in result.estimates if e.estimand == wanted and e.direction == chosen.direction]
        if not found:
            raise ValueError(
                f"expected a divergence that is measured per {per}, got {result.headline.divergence}; leave --per out"
            )
        chosen = found[0]
    totals, weights = cluster_totals(chosen.contributions, chosen.weights, chosen.cluster)
    return Gate(result, chosen, decide(totals, weights, limit, level=level, spread=chosen.spread))
