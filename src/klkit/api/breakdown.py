"""Where a divergence sits: by position, by token, end against content, in which strings; with ``facets`` by kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klkit.api.facets import (
    FacetSums,
    bounds,
    by_class,
    by_confidence,
    by_group,
    end_share,
    finite,
    interval,
    totals,
)
from klkit.estimators.statistics import TokenStatistics
from klkit.estimators.strings import StringStatistics
from klkit.results import jsonable
from klkit.stats.intervals import ratio_stderr

SINGLE_POSITIONS = 32  # positions shown one by one; later ones in bins that grow by a quarter
LISTED_TOKENS = 30
MINIMUM_COUNT = 3  # a token drawn less often is not listed: it would be an accident
HISTOGRAM_BINS = 40

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class PositionSums:
    """Sums over the decisions of some strings by where in their strings they are.

    Attributes:
        cluster: names of the clusters, ``(c,)``.
        kl: ``Σ D_n`` of each cluster in each bin of :func:`position_bins`, ``(c, b)``.
        decisions: how many, ``(c, b)``.
        end_kl: the part of the end tokens, over all clusters, ``(b,)``.
        longest: decisions of the longest string.
    """

    cluster: NDArray[np.int64]
    kl: Array
    decisions: Array
    end_kl: Array
    longest: int

    @classmethod
    def of(cls, statistics: TokenStatistics) -> PositionSums:
        """Those of one batch; decisions that are infinitely apart count as 0 (see :func:`breakdown`)."""
        x = statistics.x
        position, longest = x.position().numpy(), int(x.lengths.max())
        starts = np.array([start for start, _ in position_bins(longest)])
        place = np.searchsorted(starts, position, side="right") - 1
        names, index = np.unique(x.cluster.numpy(), return_inverse=True)
        shape = (len(names), len(starts))
        cell = index[x.row().numpy()] * len(starts) + place
        kl = finite(statistics.rows.kl.double().numpy())
        return cls(
            names,
            totals(cell, kl, shape[0] * shape[1]).reshape(shape),
            totals(cell, np.ones(len(cell)), shape[0] * shape[1]).reshape(shape),
            totals(place, finite(statistics.rows.end_kl.double().numpy()), len(starts)),
            longest,
        )

    @staticmethod
    def cat(parts: Sequence[PositionSums]) -> PositionSums:
        """Those of several batches together."""
        names, index = np.unique(np.concatenate([part.cluster for part in parts]), return_inverse=True)
        longest = max(part.longest for part in parts)
        width = len(position_bins(longest))
        kl, decisions, end_kl = np.zeros((len(names), width)), np.zeros((len(names), width)), np.zeros(width)
        ends = np.cumsum([len(part.cluster) for part in parts])
        for part, rows in zip(parts, np.split(index, ends[:-1]), strict=True):
            bins = len(part.end_kl)
            kl[rows, :bins] += part.kl
            decisions[rows, :bins] += part.decisions
            end_kl[:bins] += part.end_kl
        return PositionSums(names, kl, decisions, end_kl, longest)


@dataclass(frozen=True, slots=True, eq=False)
class TokenSums:
    """Sums over some decisions by which token was drawn, each ``(t,)``.

    Attributes:
        token: the tokens' ids, ascending.
        count: how often each was drawn.
        mean: mean ``D_n`` of those decisions.
        squares: ``Σ (D_n − mean)²``.
        log_ratio: sum of the log-ratios.
    """

    token: NDArray[np.int64]
    count: Array
    mean: Array
    squares: Array
    log_ratio: Array

    @classmethod
    def of(cls, token: NDArray[np.int64], kl: Array, log_ratio: Array) -> TokenSums:
        """Those of decisions whose token, divergence and log-ratio are given, ``(m,)`` each."""
        return cls._sum(token, np.ones(len(token)), kl, np.zeros(len(token)), log_ratio)

    @staticmethod
    def cat(parts: Sequence[TokenSums]) -> TokenSums:
        """Those of several batches together."""
        names = ("token", "count", "mean", "squares", "log_ratio")
        return TokenSums._sum(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    @classmethod
    def _sum(cls, token: NDArray[np.int64], count: Array, mean: Array, squares: Array, log_ratio: Array) -> TokenSums:
        token, index = np.unique(token, return_inverse=True)
        total = totals(index, count, len(token))
        centre = totals(index, count * mean, len(token)) / total
        squares = totals(index, squares + count * (mean - centre[index]) ** 2, len(token))
        return cls(token, total, centre, squares, totals(index, log_ratio, len(token)))


def breakdown(
    strings: StringStatistics,
    positions: PositionSums,
    tokens: TokenSums,
    facets: FacetSums,
    pieces: Callable[[Sequence[int]], list[str]],
    groups: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The parts that a report shows, as plain values in nats.

    Args:
        pieces: turns token ids into readable text (``model.pieces``).
        groups: the group of each prompt, if prompts have one.
    """
    kl = strings.kl.numpy()
    if not np.isfinite(kl).all():
        # Shares and means of an infinite total say nothing; the infinite positions are listed elsewhere.
        return no_breakdown()
    return {
        "by_position": by_position(positions, len(strings)),
        "by_confidence": by_confidence(facets, len(strings)),
        "by_class": by_class(facets, len(strings)),
        "by_group": by_group(strings, groups) if groups is not None else [],
        "tokens": by_token(tokens, pieces),
        "strings": by_string(kl, strings.log_ratio.numpy()),
        "end": {**end_share(facets), "end_nats_per_response": float(positions.end_kl.sum()) / len(strings)},
    }


def no_breakdown() -> dict[str, Any]:
    """A breakdown of nothing, for divergences that have none."""
    lists = ("by_position", "by_confidence", "by_class", "by_group", "tokens")
    return {**{name: [] for name in lists}, "strings": {}, "end": {}}


def position_bins(longest: int) -> list[tuple[int, int]]:
    """Half-open ranges of positions: single at first, then growing by a quarter.

    Example:
        >>> position_bins(3)
        [(0, 1), (1, 2), (2, 3)]
    """
    bins = [(i, i + 1) for i in range(min(longest, SINGLE_POSITIONS))]
    start = len(bins)
    while start < longest:
        stop = min(longest, start + max(2, start // 4))
        bins.append((start, stop))
        start = stop
    return bins


def by_position(sums: PositionSums, strings: int) -> list[dict[str, Any]]:
    """Mean KL of the decisions at each position, given that the string reached it, with its error and interval."""
    found = []
    for i, (start, stop) in enumerate(position_bins(sums.longest)):
        reached = sums.decisions[:, i] > 0
        kl, decisions = sums.kl[reached, i], sums.decisions[reached, i]
        total, count = float(kl.sum()), float(decisions.sum())
        found.append(
            {
                "start": start,
                "stop": stop,
                "decisions": int(count),
                "kl": total / count,
                "stderr": jsonable(ratio_stderr(kl, decisions)),
                **bounds(interval(kl, decisions)),
                "end_kl": float(sums.end_kl[i]) / count,
                "nats_per_response": total / strings,
            }
        )
    return found


def by_token(sums: TokenSums, pieces: Callable[[Sequence[int]], list[str]]) -> list[dict[str, Any]]:
    """The tokens at whose choice the models differ most, shrunk so that rare ones cannot lead by luck.

    The mean of a token drawn ``c`` times is pulled towards the overall mean as if it had been seen
    ``k`` more times with that mean; ``k`` is the ratio of the variance within tokens to the variance
    between them, estimated from the same data (empirical Bayes; Efron and Morris, 1975).
    """
    ids, counts, mean = sums.token, sums.count, sums.mean
    decisions, total = float(counts.sum()), float(counts @ mean)
    overall = total / decisions
    within = float(sums.squares.sum()) / max(1.0, decisions - len(ids))
    spread = float((counts * (mean - overall) ** 2).sum()) - (len(ids) - 1) * within
    scale = decisions - float((counts**2).sum()) / decisions
    between = max(spread / scale, 0.0) if scale > 0 else 0.0
    weight = counts / (counts + within / between) if between > 0 else np.zeros(len(ids))
    shrunk = overall + weight * (mean - overall)
    listed = [i for i in np.argsort(-shrunk, kind="stable") if counts[i] >= MINIMUM_COUNT][:LISTED_TOKENS]
    texts = pieces([int(ids[i]) for i in listed])
    return [
        {
            "token": int(ids[i]),
            "text": text,
            "count": int(counts[i]),
            "kl": float(mean[i]),
            "kl_shrunk": float(shrunk[i]),
            "log_ratio": jsonable(float(sums.log_ratio[i] / counts[i])),
            "share": float(counts[i] * mean[i]) / total if total > 0 else 0.0,
        }
        for i, text in zip(listed, texts, strict=True)
    ]


def by_string(kl: Array, log_ratio: Array) -> dict[str, Any]:
    """Histograms over strings of the RB sum and of the log-ratio, on one set of bins, and quantiles."""
    finite = log_ratio[np.isfinite(log_ratio)]
    both = np.concatenate([kl, finite])
    edges = np.histogram_bin_edges(both, bins=HISTOGRAM_BINS)
    quantiles = (0.01, 0.1, 0.5, 0.9, 0.99)
    return {
        "edges": edges.tolist(),
        "rb": np.histogram(kl, edges)[0].tolist(),
        "mc": np.histogram(finite, edges)[0].tolist(),
        "quantiles": {
            f"{level:g}": float(value) for level, value in zip(quantiles, np.quantile(kl, quantiles), strict=True)
        },
        "max": float(kl.max()),
        "mean": float(kl.mean()),
        "sd_rb": float(kl.std(ddof=1)) if len(kl) > 1 else 0.0,
        "sd_mc": float(finite.std(ddof=1)) if len(finite) > 1 else 0.0,
    }
