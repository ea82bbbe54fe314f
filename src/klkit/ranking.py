"""Many models compared with one: each with its divergence, and which of them are resolved from which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from klkit.results import Comparison, Estimate, html_table, jsonable, plain
from klkit.stats.ranking import CLOSER, Order

SCHEMA = "klkit.ranking/1"


@dataclass(frozen=True, slots=True)
class Entry:
    """A candidate's part of a ranking.

    Attributes:
        name: the candidate, as it was named.
        result: ``p`` against it, as ``klkit estimate`` gives it.
        per_token: the same divergence per token; of a fixed text the headline itself.
        size: of its weights: ``file_bytes``, ``parameters``, ``bits_per_weight``, ``nominal``; empty if not known.
        floor: against the numerical floor: ``verdict``, ``difference``, ``lower``, ``upper``, ``n``.
        reverse: ``KL(q‖p)`` from the candidate's own strings, if it was asked for.
    """

    name: str
    result: Comparison
    per_token: Estimate
    size: Mapping[str, Any]
    floor: Mapping[str, Any]
    reverse: Comparison | None = None


class Gap(NamedTuple):
    """A paired difference of two candidates, in the ranking's unit.

    Attributes:
        adjusted: p-value, adjusted for the number of pairs; NaN where nothing was tested.
        tied: whether the two are not resolved from each other.
    """

    difference: float
    stderr: float
    lower: float
    upper: float
    adjusted: float
    tied: bool


def gaps(ranking: Mapping[str, Any], other: str) -> dict[str, Gap]:
    """Every other candidate less the one called ``other``, paired, from a ranking as :meth:`Ranking.to_dict` gives it.

    Example:
        >>> numbers = {"difference": 1.0, "stderr": 0.4, "lower": 0.5, "upper": 2.0, "p_adjusted": 0.01}
        >>> pair = {"first": "a", "second": "b", **numbers, "verdict": "tied"}
        >>> gaps({"pairs": [pair]}, "a")
        {'b': Gap(difference=-1.0, stderr=0.4, lower=-2.0, upper=-0.5, adjusted=0.01, tied=True)}
    """
    found = {}
    for pair in ranking["pairs"]:
        if other in (pair["first"], pair["second"]):
            value, error, lower, upper, adjusted = (
                float(pair[name]) for name in ("difference", "stderr", "lower", "upper", "p_adjusted")
            )
            rest = adjusted, pair["verdict"] != CLOSER
            if pair["second"] == other:
                found[pair["first"]] = Gap(value, error, lower, upper, *rest)
            else:
                found[pair["second"]] = Gap(0.0 - value, error, 0.0 - upper, 0.0 - lower, *rest)  # no minus 0
    return found


@dataclass(frozen=True, slots=True)
class Ranking:
    """Candidates by their divergence from ``p``, with ties.

    All candidates were scored on the same strings of ``p``, so their differences are far more precise than their
    divergences: intervals of two divergences may overlap where the interval of the difference excludes 0.

    Attributes:
        entries: the candidates, in the order in which they were given.
        order: what the paired differences say of them.
        sentence: the outcome in one sentence.
        settings: the resolved options.
        provenance: versions, digests: what one needs to repeat the run.
        notes: what a reader must be told beside the numbers.
    """

    entries: tuple[Entry, ...]
    order: Order
    sentence: str
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether the self-audit of any pair found something that makes its number untrustworthy."""
        return any(
            entry.result.failed or (entry.reverse is not None and entry.reverse.failed) for entry in self.entries
        )

    @property
    def ranked(self) -> tuple[int, ...]:
        """Indices of ``entries``, the closest to ``p`` first."""
        return tuple(int(i) for i in self.order.order)

    def rank(self, i: int) -> tuple[int, int]:
        """First and last place that entry ``i`` may have: equal where it is resolved from all others."""
        return int(self.order.first[i]), int(self.order.last[i])

    def tied_with(self, i: int) -> tuple[str, ...]:
        """Names of the candidates that entry ``i`` is not resolved from."""
        return self._ties()[i]

    def _ties(self) -> list[tuple[str, ...]]:
        others: list[set[int]] = [set() for _ in self.entries]
        for pair in self.order.pairs:
            if pair.verdict != CLOSER:
                others[pair.first].add(pair.second)
                others[pair.second].add(pair.first)
        return [tuple(self.entries[j].name for j in self.ranked if j in others[i]) for i in range(len(self.entries))]

    def frontier(self) -> tuple[str, ...]:
        """Names of the candidates that no smaller file beats, by the estimates; those of known size alone."""
        sized = [
            (e.size["file_bytes"], e.result.headline.value, e.name) for e in self.entries if e.size.get("file_bytes")
        ]
        best, found = float("inf"), []
        for _, value, name in sorted(sized):
            if value < best:
                best = value
                found.append(name)
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """The ranking as plain JSON values under a versioned schema; divergences in the printing unit."""
        head, ties = self.entries[0].result.headline, self._ties()
        return {
            "schema": SCHEMA,
            "sentence": self.sentence,
            "reference": self.settings["p"],
            "estimand": head.estimand,
            "direction": head.direction,
            "unit": head.unit,
            "method": head.method,
            "level": self.order.level,
            "reason": self.order.reason,
            "n_sequences": head.n,
            "n_clusters": head.clusters,
            "candidates": [self._entry(i, ties[i]) for i in self.ranked],
            "pairs": [self._pair(pair) for pair in self.order.pairs],
            "frontier": list(self.frontier()),
            "notes": list(self.notes),
            "settings": plain(self.settings),
            "provenance": plain(self.provenance),
        }

    def to_dataframe(self) -> Any:
        """One row a candidate, the closest to ``p`` first, in nats, as a pandas ``DataFrame``.

        Raises:
            ImportError: pandas is not installed.
        """
        from klkit.frames import candidate_rows, frame

        return frame(candidate_rows(self.to_dict()))

    def _entry(self, i: int, ties: tuple[str, ...]) -> dict[str, Any]:
        entry = self.entries[i]
        scale = entry.result.headline.in_unit
        first, last = self.rank(i)
        floor = {
            name: jsonable(scale(value)) if name in ("difference", "lower", "upper") else value
            for name, value in entry.floor.items()
        }
        return {
            "name": entry.name,
            "rank_first": first,
            "rank_last": last,
            "tied_with": list(ties),
            "size": plain(entry.size),
            "against_floor": plain(floor),
            "per_token": entry.per_token.to_dict(),
            "reverse": None if entry.reverse is None else entry.reverse.headline.to_dict(),
            "result": entry.result.to_dict(),
        }

    def _pair(self, pair: Any) -> dict[str, Any]:
        scale = self.entries[0].result.headline.in_unit
        return {
            "first": self.entries[pair.first].name,
            "second": self.entries[pair.second].name,
            "difference": jsonable(scale(pair.difference)),
            "stderr": jsonable(scale(pair.stderr)),
            "lower": jsonable(scale(pair.lower)),
            "upper": jsonable(scale(pair.upper)),
            "method": pair.method,
            "p": jsonable(pair.p),
            "p_adjusted": jsonable(pair.adjusted),
            "verdict": pair.verdict,
        }

    def __str__(self) -> str:
        return ("THE SELF-AUDIT FAILED: do not use these numbers. " if self.failed else "") + self.sentence

    def _repr_html_(self) -> str:
        head = self.entries[0].result.headline
        unit = f"{head.direction}, {head.unit} {head.per}"
        rows = [("rank", "candidate", unit, "interval", "same top-1")]
        for i in self.ranked:
            entry, (first, last) = self.entries[i], self.rank(i)
            own = entry.result.headline
            top = float(entry.result.companions["same_top"]["value"])
            place = f"{first}" if first == last else f"{first}–{last}"
            rows.append((place, entry.name, f"{own.in_unit(own.value):.6g}", own.describe_interval(), f"{top:.1%}"))
        return html_table(str(self), rows)
