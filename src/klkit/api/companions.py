"""Companions of the divergence: other quantities of the same pass, and the rows that users of llama.cpp know."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from klkit.api.words import interval_text
from klkit.estimators.audit import mismatch
from klkit.estimators.strings import StringStatistics
from klkit.estimators.tally import Tally
from klkit.results import NATS_PER_BIT, Estimate, jsonable
from klkit.stats.intervals import cluster_totals, clustered_ratio, ratio_interval
from klkit.stats.quantiles import quantile_interval

TEXT_QUANTILES = (0.5, 0.99, 0.999)


def describe_floor(values: Float[Tensor, " k"], kind: str, wanted: str) -> dict[str, Any]:
    """Mean and standard error of the per-string floor, in nats; empty when it was not asked for."""
    if wanted == "none" or not len(values):
        return {"kind": "not measured", "value": "nan", "stderr": "nan", "n": 0, "unit": "nats"}
    x = values.double()
    error = float(x.std() / len(x) ** 0.5) if len(x) > 1 else math.nan
    return {"kind": kind, "value": jsonable(float(x.mean())), "stderr": jsonable(error), "n": len(x), "unit": "nats"}


def per_token(strings: StringStatistics, roles: tuple[str, str] = ("p", "q")) -> dict[str, Any]:
    """Companions of the divergence at the same decisions, per token, with clustered errors, by the models' names."""
    first, second = roles
    lengths, cluster = strings.lengths.double().numpy(), strings.cluster.numpy()
    columns = {
        f"entropy_{first}": strings.entropy_p,
        f"entropy_{second}": strings.entropy_q,
        f"reverse_kl_at_{first}": strings.reverse_kl,
        "total_variation": strings.total_variation,
        "same_top": strings.same_top,
    }
    if strings.js is not None:
        # Of the next-token laws at the contexts that the first model wrote: not that of the two laws over strings.
        columns[f"js_at_{first}"] = strings.js
    found: dict[str, Any] = {}
    for name, values in columns.items():
        if bool(values.isnan().all()):  # not known where only parts of the first model's laws were kept
            found[name] = {"value": "nan", "stderr": "nan"}
            continue
        with np.errstate(invalid="ignore"):
            mean, error = clustered_ratio(values.numpy(), lengths, cluster)
        found[name] = {"value": jsonable(mean), "stderr": jsonable(error)}
    finite = lengths - strings.infinite.numpy()
    if 0 < finite.sum() < lengths.sum():
        # What is left of an infinite divergence: another quantity, under a name of its own.
        value, error = clustered_ratio(strings.finite_kl.numpy(), finite, cluster)
        share = float(finite.sum() / lengths.sum())
        found["kl_of_finite_decisions"] = {"value": jsonable(value), "stderr": jsonable(error), "share": share}
    mean, error = clustered_ratio(lengths, np.ones(len(lengths)), cluster)
    found["mean_length"] = {"value": mean, "stderr": jsonable(error)}
    return found


def bits_per_byte(
    strings: StringStatistics, sizes: Float[Tensor, " n"] | None, roles: tuple[str, str] = ("p", "q")
) -> dict[str, Any]:
    """``−Σ log2 p(y) / Σ bytes(y)`` of both models over the same completions, with clustered errors, by their names.

    The one number that two tokenizers share. An end has no bytes, but what it cost to say that the text is over is
    counted. Empty where the sizes of the texts are not known, or are all zero.

    Args:
        sizes: bytes of each completion's text.
    """
    if sizes is None or not float(sizes.sum()) > 0:
        return {}
    logp, cluster = strings.logp.double(), strings.cluster.numpy()
    found: dict[str, Any] = {}
    for role, values in zip(roles, (logp, logp - strings.log_ratio), strict=True):
        bits = -values.numpy() / NATS_PER_BIT
        if np.isnan(bits).any():  # neither model allows a given text
            found[f"bits_per_byte_{role}"] = {"value": "nan", "stderr": "nan"}
            continue
        value, error = clustered_ratio(bits, sizes.double().numpy(), cluster)
        found[f"bits_per_byte_{role}"] = {"value": jsonable(value), "stderr": jsonable(error)}
    return found


def engine_gaps(tally: Tally, model: str) -> dict[str, Any]:
    """How far the engine that drew the strings is from the ``model`` that scores them, per token."""
    value, error = mismatch(tally.strings())
    gaps = tally.evidence.gaps
    return {
        f"kl_engine_{model}": {"value": jsonable(value), "stderr": jsonable(error)},
        "largest_gap": jsonable(gaps.largest),
        "share_outside_tenth": gaps.outside / max(tally.evidence.decisions, 1),
    }


def text_rows(strings: StringStatistics, kl: NDArray[np.float64], headline: Estimate) -> list[dict[str, Any]]:
    """Mean, median, 99 and 99.9 %, largest and same-top-1 of the per-token KL, each with its error.

    Args:
        kl: of every decision, string by string, ``(m,)``: quantiles cannot be had from sums.
    """
    cluster = np.repeat(strings.cluster.numpy(), strings.lengths.numpy())
    scale = headline.in_unit(1.0)
    interval = headline.interval()
    rows = [
        {
            "name": "mean",
            "value": jsonable(headline.in_unit(headline.value)),
            "lower": jsonable(headline.in_unit(interval.lower)),
            "upper": jsonable(headline.in_unit(interval.upper)),
            "method": interval.method,
        }
    ]
    for level in TEXT_QUANTILES:
        quantile, found = quantile_interval(kl, cluster, level)
        rows.append(
            {
                "name": "median" if level == 0.5 else f"{level * 100:g} %",
                "value": jsonable(quantile * scale),
                "lower": jsonable(found.lower * scale),
                "upper": jsonable(found.upper * scale),
                "method": found.method,
            }
        )
    largest = jsonable(float(kl.max()) * scale)
    rows.append(
        {
            "name": "largest",
            "value": largest,
            "lower": largest,
            "upper": "inf",
            "method": "of this text; other text may exceed it",
        }
    )
    agree = cluster_totals(strings.same_top.numpy(), strings.lengths.double().numpy(), strings.cluster.numpy())
    share = ratio_interval(*agree)
    rows.append(
        {
            "name": "same top-1",
            "value": float(agree[0].sum() / agree[1].sum()),
            "lower": jsonable(float(np.clip(share.lower, 0, 1))),
            "upper": jsonable(float(np.clip(share.upper, 0, 1))),
            "method": share.method,
        }
    )
    for row in rows:
        row["text"] = (
            f"{float(row['value']):.4g}, {interval_text(float(row['lower']), float(row['upper']), str(row['method']))}"
        )
    return rows
