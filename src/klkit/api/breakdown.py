"""Where a divergence sits: by position, by token, end against content, and in which strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klkit.estimators.statistics import TokenStatistics
from klkit.results import jsonable
from klkit.stats.intervals import cluster_totals, ratio_stderr

SINGLE_POSITIONS = 32  # positions shown one by one; later ones in bins that grow by a quarter
LISTED_TOKENS = 30
MINIMUM_COUNT = 3  # a token drawn less often is not listed: it would be an accident
HISTOGRAM_BINS = 40

Array = NDArray[np.float64]


def breakdown(statistics: TokenStatistics, pieces: Callable[[Sequence[int]], list[str]]) -> dict[str, Any]:
    """The parts that a report shows, as plain values in nats.

    Args:
        pieces: turns token ids into readable text (``model.pieces``).
    """
    rows, x = statistics.rows, statistics.x
    kl = rows.kl.double().numpy()
    if not np.isfinite(kl).all():
        # Shares and means of an infinite total say nothing; the infinite positions are listed elsewhere.
        return no_breakdown()
    end_kl = rows.end_kl.double().numpy()
    total = float(kl.sum())
    return {
        "by_position": by_position(kl, end_kl, x.position().numpy(), x.cluster.numpy()[x.row().numpy()], len(x)),
        "tokens": by_token(kl, statistics.log_ratio.double().numpy(), x.targets().numpy(), pieces),
        "strings": by_string(
            statistics.per_string(rows.kl).numpy(), statistics.per_string(statistics.log_ratio).numpy()
        ),
        "end": {
            "end_share": float(end_kl.sum()) / total if total > 0 else 0.0,
            "content_share": 1.0 - float(end_kl.sum()) / total if total > 0 else 0.0,
            "end_nats_per_response": float(end_kl.sum()) / len(x),
        },
    }


def no_breakdown() -> dict[str, Any]:
    """A breakdown of nothing, for divergences that have none."""
    return {"by_position": [], "tokens": [], "strings": {}, "end": {}}


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


def by_position(
    kl: Array, end_kl: Array, position: NDArray[np.int64], cluster: NDArray[np.int64], strings: int
) -> list[dict[str, Any]]:
    """Mean KL of the decisions at each position, given that the string reached it, with its error."""
    found = []
    for start, stop in position_bins(int(position.max()) + 1 if len(position) else 0):
        inside = (position >= start) & (position < stop)
        totals = cluster_totals(kl[inside], np.ones(int(inside.sum())), cluster[inside])
        found.append(
            {
                "start": start,
                "stop": stop,
                "decisions": int(inside.sum()),
                "kl": float(kl[inside].mean()),
                "stderr": jsonable(ratio_stderr(*totals)),
                "end_kl": float(end_kl[inside].mean()),
                "nats_per_response": float(kl[inside].sum()) / strings,
            }
        )
    return found


def by_token(
    kl: Array, log_ratio: Array, tokens: NDArray[np.int64], pieces: Callable[[Sequence[int]], list[str]]
) -> list[dict[str, Any]]:
    """The tokens at whose choice the models differ most, shrunk so that rare ones cannot lead by luck.

    The mean of a token drawn ``c`` times is pulled towards the overall mean as if it had been seen
    ``k`` more times with that mean; ``k`` is the ratio of the variance within tokens to the variance
    between them, estimated from the same data (empirical Bayes; Efron and Morris, 1975).
    """
    ids, inverse, counts = np.unique(tokens, return_inverse=True, return_counts=True)
    mean = np.bincount(inverse, kl) / counts
    overall = float(kl.mean())
    within = float(((kl - mean[inverse]) ** 2).sum()) / max(1, len(kl) - len(ids))
    spread = float((counts * (mean - overall) ** 2).sum()) - (len(ids) - 1) * within
    scale = len(kl) - float((counts.astype(float) ** 2).sum()) / len(kl)
    between = max(spread / scale, 0.0) if scale > 0 else 0.0
    weight = counts / (counts + within / between) if between > 0 else np.zeros(len(ids))
    shrunk = overall + weight * (mean - overall)
    ratio = np.bincount(inverse, log_ratio) / counts
    share = np.bincount(inverse, kl) / kl.sum() if kl.sum() > 0 else np.zeros(len(ids))
    listed = [i for i in np.argsort(-shrunk, kind="stable") if counts[i] >= MINIMUM_COUNT][:LISTED_TOKENS]
    texts = pieces([int(ids[i]) for i in listed])
    return [
        {
            "token": int(ids[i]),
            "text": text,
            "count": int(counts[i]),
            "kl": float(mean[i]),
            "kl_shrunk": float(shrunk[i]),
            "log_ratio": jsonable(float(ratio[i])),
            "share": float(share[i]),
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
