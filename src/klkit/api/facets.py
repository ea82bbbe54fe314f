"""Where a divergence sits by kinds of decisions: by p's confidence, by the class of the drawn token; and by group.

Each is a partition: decisions, divergences and shares of the parts add up to those of the whole. Intervals are over
clusters, as the headline's. A part that too few clusters come to has none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from klkit.estimators.statistics import TokenStatistics
from klkit.estimators.strings import StringStatistics
from klkit.models.token_classes import DECISION_CLASSES, NAMES, decision_classes
from klkit.results import jsonable
from klkit.stats.intervals import MINIMUM_CLUSTERS, NO_INTERVAL, STUDENT_FROM, Interval, cluster_totals, ratio_interval

CONFIDENCE = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
"""Edges of the buckets of p's largest probability, each closed below; the last is closed above too."""

LEVEL = 0.95

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class FacetSums:
    """Sums over the decisions of some strings by kind of decision, for each cluster.

    Attributes:
        cluster: names of the clusters, ``(c,)``.
        kl: ``Σ D_n`` in each bucket of confidence, then in each of ``DECISION_CLASSES``, ``(c, b)``.
        decisions: how many, ``(c, b)``.
        end_kl: the part of the divergence that is whether to end, ``(c,)``.
    """

    cluster: NDArray[np.int64]
    kl: Array
    decisions: NDArray[np.int32]
    end_kl: Array

    @classmethod
    def of(
        cls, statistics: TokenStatistics, classes: Int[Tensor, " v"] | None = None, *, first: bool = True
    ) -> FacetSums:
        """Those of one batch; decisions that are infinitely apart count as 0 (see ``breakdown``).

        Args:
            classes: of each token (:func:`klkit.models.token_classes.token_classes`); without, nothing by class.
            first: whether strings begin where responses do.

        Raises:
            ValueError: statistics that do not know p's confidence.
        """
        x, rows = statistics.x, statistics.rows
        confidence = rows.confidence.double().numpy()
        if np.isnan(confidence).any():
            raise ValueError(
                "expected the confidence of p at every decision, got strings scored by an earlier version, which did "
                "not keep it; run them again in another --out"
            )
        bins, width = len(CONFIDENCE) - 1, 0 if classes is None else len(DECISION_CLASSES)
        names, index = np.unique(x.cluster.numpy(), return_inverse=True)
        unit, kl = index[x.row().numpy()], finite(rows.kl.double().numpy())
        places = [np.searchsorted(CONFIDENCE[1:-1], confidence, side="right")]
        if classes is not None:
            places.append(bins + decision_classes(x, classes, first=first).numpy())
        shape = (len(names), bins + width)
        cell = np.concatenate([unit * shape[1] + place for place in places])
        return cls(
            names,
            totals(cell, np.tile(kl, len(places)), shape[0] * shape[1]).reshape(shape),
            np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape).astype(np.int32),
            totals(unit, finite(rows.end_kl.double().numpy()), len(names)),
        )

    @staticmethod
    def cat(parts: Sequence[FacetSums]) -> FacetSums:
        """Those of several batches together."""
        names, index = np.unique(np.concatenate([part.cluster for part in parts]), return_inverse=True)
        found = FacetSums(
            names,
            np.zeros((len(names), parts[0].kl.shape[1])),
            np.zeros((len(names), parts[0].kl.shape[1]), np.int32),
            np.zeros(len(names)),
        )
        ends = np.cumsum([len(part.cluster) for part in parts])
        for part, rows in zip(parts, np.split(index, ends[:-1]), strict=True):
            found.kl[rows] += part.kl
            found.decisions[rows] += part.decisions
            found.end_kl[rows] += part.end_kl
        return found

    @property
    def total(self) -> Array:
        """``Σ D_n`` of each cluster, ``(c,)``."""
        every: Array = self.kl[:, : len(CONFIDENCE) - 1].sum(1)
        return every


def totals(group: NDArray[np.int64], values: Array, groups: int) -> Array:
    """Sum ``values`` over the members of each group, ``(groups,)``."""
    return np.bincount(group, values, minlength=groups).astype(np.float64, copy=False)


def finite(values: Array) -> Array:
    """``values`` with 0 for what is infinite or undefined."""
    return np.where(np.isfinite(values), values, 0.0)


def by_confidence(sums: FacetSums, strings: int) -> list[dict[str, Any]]:
    """Decisions by p's largest probability: the undecided and the certain, see :data:`CONFIDENCE`."""
    return [
        {"start": start, "stop": stop, **part(sums.kl[:, i], sums.decisions[:, i], sums, strings)}
        for i, (start, stop) in enumerate(pairwise(CONFIDENCE))
    ]


def by_class(sums: FacetSums, strings: int) -> list[dict[str, Any]]:
    """Decisions by the kind of the token that p drew there.

    It is a biased lens on where q would do otherwise: a decision counts where p's token puts it, also where q's mass
    lies on tokens of another kind. Kinds that never occur are left out.
    """
    bins = len(CONFIDENCE) - 1
    columns = {name: bins + i for i, name in enumerate(DECISION_CLASSES)} if sums.kl.shape[1] > bins else {}
    return [
        {"class": name, **part(sums.kl[:, columns[name]], sums.decisions[:, columns[name]], sums, strings)}
        for name in NAMES
        if name in columns and sums.decisions[:, columns[name]].any()
    ]


def part(kl: Array, decisions: NDArray[np.int32], sums: FacetSums, strings: int) -> dict[str, Any]:
    """One part of a partition: its decisions, their mean divergence, and its share of the whole, in nats.

    Args:
        kl: ``Σ D_n`` of each cluster in this part, ``(c,)``.
        decisions: how many, ``(c,)``.
        strings: of the run.
    """
    count, every = float(decisions.sum()), float(sums.decisions[:, : len(CONFIDENCE) - 1].sum())
    reached = decisions > 0
    mean = interval(kl[reached], decisions[reached].astype(np.float64))
    return {
        "decisions": int(count),
        "decision_share": count / every,
        "kl": jsonable(float(kl.sum()) / count if count else math.nan),
        **bounds(mean),
        **share(kl, sums.total, int(reached.sum())),
        "nats_per_response": float(kl.sum()) / strings,
        "level": LEVEL,
    }


def by_group(strings: StringStatistics, groups: Sequence[str]) -> list[dict[str, Any]]:
    """Nats per response in each group of prompts, in the order of the prompts.

    A group's share has no interval: it is above all the number of its prompts, which is no accident.

    Args:
        groups: the group of each prompt of the run; clusters lie within one group each.
    """
    names = list(dict.fromkeys(groups))
    prompt, cluster, kl = strings.prompt.numpy(), strings.cluster.numpy(), strings.kl.numpy()
    number = {name: i for i, name in enumerate(names)}
    member = np.array([number[group] for group in groups])[prompt]
    total = float(kl.sum())
    found = []
    for i, name in enumerate(names):
        inside = member == i
        own = cluster_totals(kl[inside], np.ones(int(inside.sum())), cluster[inside]) if inside.any() else None
        found.append(
            {
                "group": name,
                "prompts": len(np.unique(prompt[inside])),
                "strings": int(inside.sum()),
                "nats_per_response": jsonable(math.nan if own is None else float(own[0].sum() / own[1].sum())),
                **bounds(interval(*own) if own is not None else none("none (no strings)")),
                "share": float(kl[inside].sum()) / total if total > 0 else 0.0,
                "level": LEVEL,
            }
        )
    return found


def end_share(sums: FacetSums) -> dict[str, Any]:
    """How much of the divergence is whether to end, and how much what to say, with the interval of the first."""
    found = share(sums.end_kl, sums.total, len(sums.cluster))
    end = found["share"]
    return {
        "end_share": end,
        "end_share_lower": found["share_lower"],
        "end_share_upper": found["share_upper"],
        "level": LEVEL,
        "method": found["share_method"],
        "content_share": 1.0 - end if sums.total.sum() > 0 else 0.0,
    }


def share(part: Array, whole: Array, reached: int) -> dict[str, Any]:
    """``Σ part / Σ whole`` over clusters with its interval, cut to [0, 1]; 0 of nothing is 0.

    Args:
        reached: clusters that the part has anything of.
    """
    total = float(whole.sum())
    if total <= 0:
        value, found = 0.0, none("none (no divergence)")
    elif reached < MINIMUM_CLUSTERS:
        value, found = float(part.sum()) / total, none(NO_INTERVAL)
    else:
        # Many clusters are no large sample where few of them have any part in it.
        method = "bootstrap-t" if reached < STUDENT_FROM else "auto"
        value, found = float(part.sum()) / total, ratio_interval(part, whole, level=LEVEL, method=method)
    return {
        "share": value,
        "share_lower": jsonable(float(np.clip(found.lower, 0, 1))),
        "share_upper": jsonable(float(np.clip(found.upper, 0, 1))),
        "share_method": found.method,
    }


def interval(totals: Array, weights: Array) -> Interval:
    """The interval of ``Σ totals / Σ weights``; none of nothing."""
    return ratio_interval(totals, weights, level=LEVEL) if len(totals) else none("none (no decisions)")


def none(why: str) -> Interval:
    """No interval."""
    return Interval(LEVEL, math.nan, math.nan, why)


def bounds(found: Interval) -> dict[str, Any]:
    """An interval's bounds and method as plain values."""
    return {"lower": jsonable(found.lower), "upper": jsonable(found.upper), "method": found.method}
