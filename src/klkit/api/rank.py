"""From the results of candidates to a ranking: paired differences, the floor, and words for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from klkit.api.compare_settings import CompareSettings
from klkit.estimators.strings import StringStatistics
from klkit.ranking import Entry, Ranking
from klkit.stats.intervals import MINIMUM_CLUSTERS, cluster_totals, ratio_interval
from klkit.stats.ranking import rank

LEVEL = 0.95
NOISE = 10.0  # times the floor: what is below is not clearly above it, where too few strings say more


def rank_entries(
    entries: Sequence[Entry], settings: CompareSettings, env: Mapping[str, Any], notes: Sequence[str]
) -> Ranking:
    """The candidates in order, with ties; all of them were scored on the same strings."""
    heads = [entry.result.headline for entry in entries]
    order = rank(
        np.stack([head.contributions for head in heads]),
        heads[0].weights,
        heads[0].cluster,
        level=LEVEL,
        spread=np.array([head.spread for head in heads]),
    )
    found = Ranking(tuple(entries), order, "", settings.to_dict(), env, tuple(dict.fromkeys((*notes, *said(entries)))))
    return replace(found, sentence=say(found))


def said(entries: Sequence[Entry]) -> list[str]:
    """What must be told of some candidates beside the numbers."""
    found = []
    holders = Counter(note for entry in entries for note in set(entry.result.notes))
    common = {note for note, count in holders.items() if count == len(entries) > 1}
    for entry in entries:
        if entry.floor["verdict"] == "at the floor":
            found.append(
                f"{entry.name} is at the numerical floor: what it differs by from p is no more than what p's own "
                f"arithmetic does, so its place says nothing"
            )
        if entry.result.headline.infinite:
            found.append(f"{entry.name} excludes tokens that p allows at {entry.result.headline.infinite} decisions")
        own = [note for note in entry.result.notes if note not in common]
        found += [f"{entry.name}: {note.removeprefix(f'{entry.name}: ')}" for note in own]
    return [note for note in entries[0].result.notes if note in common] + found


def say(ranking: Ranking) -> str:
    """The outcome in one sentence that names estimand, direction, unit, interval method and n."""
    first, *rest = ranking.ranked
    entry = ranking.entries[first]
    head = entry.result.headline
    per = f"{head.unit} {head.per}"
    value = f"{head.direction} = {head.in_unit(head.value):.4g} {per}, {head.describe_interval(ranking.order.level)}"
    counted = f"{head.n} {'windows of the given text' if head.estimand == 'F' else 'responses of p'}"
    if not rest:
        return f"{entry.name}: {value}; {head.method} from {counted}."
    among = f"{len(rest) + 1} candidates on the same {counted}"
    if ranking.order.reason:
        return f"{entry.name} has the smallest estimate of {among}, {value}; {ranking.order.reason}."
    tied = ranking.tied_with(first)
    tests = f"paired {head.method} differences, Holm at {1 - ranking.order.level:.0%}"
    if not tied:
        return f"{entry.name} is closest to p: {value}; of {among} ({tests})."
    names = ", ".join(tied[:3]) + (f" and {len(tied) - 3} more" if len(tied) > 3 else "")
    return f"{entry.name} is not resolved from {names}: it is at {value}; of {among} ({tests})."


def against_floor(strings: StringStatistics, floor: Float[Tensor, " k"]) -> dict[str, Any]:
    """Whether a candidate differs from ``p`` by more than ``p`` does from itself, on the same strings, nats.

    The floor is what two passes of ``p`` differ by, string by string, so the comparison is paired.

    Args:
        strings: of the candidate, the first ones those that the floor was measured on.
        floor: ``KL(p‖p)`` of these, nats.
    """
    noise = floor.double().numpy()
    n = len(noise)
    nothing = {"verdict": "not measured", "difference": float("nan"), "lower": float("nan"), "upper": float("nan")}
    if not n:
        return {**nothing, "n": 0, "method": "none"}
    kl, cluster = strings.kl.numpy()[:n], strings.cluster.numpy()[:n]
    totals, weights = cluster_totals(kl - noise, np.ones(n), cluster)
    interval = ratio_interval(totals, weights, level=LEVEL)
    few = len(totals) < MINIMUM_CLUSTERS
    above = float(kl.mean()) > NOISE * float(noise.mean()) if few else interval.lower > 0
    return {
        "verdict": "above the floor" if above else "at the floor",
        "difference": float(totals.sum() / n),
        "lower": interval.lower,
        "upper": interval.upper,
        "n": n,
        "method": interval.method,
    }
