"""Many models compared with one: each with its divergence, and which of them are resolved from which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from klkit.results import ESTIMANDS, Comparison, Estimate, html_table, jsonable, plain
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
        pairs = [p for p in self.order.pairs if i in (p.first, p.second) and p.verdict != CLOSER]
        others = [p.second if p.first == i else p.first for p in pairs]
        return tuple(self.entries[j].name for j in self.ranked if j in others)

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
        head = self.entries[0].result.headline
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
            "candidates": [self._entry(i) for i in self.ranked],
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

    def _entry(self, i: int) -> dict[str, Any]:
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
            "tied_with": list(self.tied_with(i)),
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
        unit = f"{head.direction}, {head.unit} {ESTIMANDS[head.estimand]}"
        rows = [("rank", "candidate", unit, "interval", "same top-1")]
        for i in self.ranked:
            entry, (first, last) = self.entries[i], self.rank(i)
            own = entry.result.headline
            top = float(entry.result.companions["same_top"]["value"])
            place = f"{first}" if first == last else f"{first}–{last}"
            rows.append((place, entry.name, f"{own.in_unit(own.value):.6g}", own.describe_interval(), f"{top:.1%}"))
        return html_table(str(self), rows)
