"""From per-decision statistics to a result: estimates, checks, bounds, breakdowns, and words for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from klkit.api.breakdown import breakdown
from klkit.api.settings import Settings
from klkit.api.strings import Plan, no_details
from klkit.api.text import Windows
from klkit.estimators import mixture, summarise
from klkit.estimators.audit import Audit, audit
from klkit.estimators.statistics import TokenStatistics
from klkit.models.base import LanguageModel
from klkit.report.record import Batch
from klkit.results import Comparison, Estimate, jsonable
from klkit.stats.intervals import cluster_totals, ratio_stderr
from klkit.stats.quantiles import quantile_interval
from klkit.stats.sequential import running_lower_bound
from klkit.stats.tails import tail

Array = NDArray[np.float64]
TABLE = ("rb_cv", "rb", "mc", "cv_string", "k3_string", "k3_token", "ht")
TEXT_QUANTILES = (0.5, 0.99, 0.999)
ODDS = 20.0  # a likelihood-ratio observer's odds in the plain-language line


def from_strings(
    whole: Batch,
    p: LanguageModel,
    q: LanguageModel,
    settings: Settings,
    plan: Plan,
    notes: Sequence[str],
    env: Mapping[str, Any],
    dtype_floor: Float[Tensor, " k"] | None = None,
) -> Comparison:
    """Result of a run that sampled strings from ``p`` (for the reverse divergence: from the original q)."""
    statistics = whole.statistics
    reverse = settings.divergence == "reverse_kl"
    direction = "KL(q‖p)" if reverse else "KL(p‖q)"

    def estimate(method: str, estimand: str) -> Estimate:
        summary = summarise(method, statistics, estimand=estimand, divergence=settings.divergence, direction=direction)
        return replace(summary, unit=settings.unit)

    table = [estimate(method, "S") for method in TABLE]
    headline = next(e for e in table if e.method == settings.method)
    rate = estimate(settings.method if settings.method in ("rb_cv", "rb", "mc") else "rb", "R")
    checks = audit(statistics, same=p is q, pieces=p.pieces)
    floor = describe_floor(whole.floor, "sampling pass against a teacher-forced pass of the same model", settings.floor)
    if dtype_floor is not None:
        floor = describe_floor(dtype_floor, "the model in fp32 against the model as run", "dtype")
    first, second = ("q", "p") if reverse else ("p", "q")
    sentence = say(
        headline,
        f"{first} = {p.name}, {second} = {q.name}",
        f"from {headline.n} responses of {first} of at most {plan.max_tokens} tokens",
    )
    return put_together(
        headline, (*table, rate), statistics, checks, floor, settings, env, (*notes, *headline.notes), sentence, p
    )


def from_two_directions(
    forward: Batch,
    backward: Batch,
    p: LanguageModel,
    q: LanguageModel,
    settings: Settings,
    plan: Plan,
    notes: Sequence[str],
    env: Mapping[str, Any],
) -> Comparison:
    """Result for a divergence of which half is estimated from strings of ``p`` and half from those of ``q``."""
    one, two = forward.statistics, backward.statistics
    if settings.divergence == "js":
        estimates = [mixture.jensen_shannon(one, two)]
    else:
        halves = [
            (summarise(m, one), summarise(m, two, divergence="reverse_kl", direction="KL(q‖p)"))
            for m in ("rb_cv", "rb", "mc")
        ]
        estimates = [mixture.jeffreys(*pair) for pair in halves] + [half for pair in halves for half in pair]
    estimates = [replace(e, unit=settings.unit) for e in estimates]
    headline = next((e for e in estimates if e.method == settings.method), estimates[0])
    checks = both_audits(audit(one, same=p is q, pieces=p.pieces), audit(two, same=p is q, pieces=q.pieces))
    floor = describe_floor(
        forward.floor, "sampling pass against a teacher-forced pass of the same model", settings.floor
    )
    sentence = say(
        headline,
        f"p = {p.name}, q = {q.name}",
        f"from {len(one.x)} responses of p and {len(two.x)} of q of at most {plan.max_tokens} tokens",
    )
    return put_together(
        headline, tuple(estimates), one, checks, floor, settings, env, (*notes, *headline.notes), sentence, p
    )


def from_text(
    statistics: TokenStatistics,
    p: LanguageModel,
    q: LanguageModel,
    settings: Settings,
    windows: Windows,
    notes: Sequence[str],
    env: Mapping[str, Any],
) -> tuple[Batch, Comparison]:
    """Result of scoring a fixed text: estimand F, with the quantiles that users of llama.cpp know."""
    headline = replace(summarise("rb", statistics, estimand="F"), unit=settings.unit, method="exact")
    checks = audit(statistics, given=True, same=p is q, pieces=p.pieces)
    sentence = say(
        headline,
        f"p = {p.name}, q = {q.name}",
        f"over {statistics.x.decisions} scored tokens of {len(set(windows.x.prompt.tolist()))} document(s)",
    )
    floor = describe_floor(torch.zeros(0), "", "none")
    result = put_together(
        headline,
        (headline,),
        statistics,
        checks,
        floor,
        settings,
        env,
        (*notes, *windows.notes, *headline.notes),
        sentence,
        p,
    )
    rows = text_rows(statistics, headline)
    lines = {name: text for name, text in result.lines.items() if name not in ("meaning", "lower bound")}
    lines = {**{row["name"]: row["text"] for row in rows}, **lines}
    companions = {**result.companions, "text_rows": rows}
    return Batch(statistics, no_details(), torch.zeros(0)), replace(result, lines=lines, companions=companions)


def put_together(
    headline: Estimate,
    estimates: tuple[Estimate, ...],
    statistics: TokenStatistics,
    checks: Audit | Mapping[str, Any],
    floor: Mapping[str, Any],
    settings: Settings,
    env: Mapping[str, Any],
    notes: Sequence[str],
    sentence: str,
    p: LanguageModel,
) -> Comparison:
    """The parts that all kinds of runs share."""
    audited = checks.to_dict() if isinstance(checks, Audit) else dict(checks)
    sums = statistics.per_string(statistics.rows.kl).numpy()
    totals, weights = cluster_totals(sums, np.ones(len(sums)), statistics.x.cluster.numpy())
    means = totals / weights
    bound = float(running_lower_bound(means)[-1])
    # Rounds of several strings a prompt revise earlier means, so then the bound is for the end of the run only.
    anytime = len(means) == len(sums)
    finite = np.isfinite(means).all()
    shape = tail(means) if finite else None
    companions = per_token(statistics)
    parts = breakdown(statistics, p.pieces)
    return Comparison(
        headline=headline,
        estimates=estimates,
        audit=audited,
        floor=floor,
        lower_bound={
            "level": 0.95,
            "value": jsonable(bound),
            "unit": "nats",
            "method": "betting on per-cluster RB sums" + ("; holds at any stopping time" if anytime else ""),
            "anytime": anytime,
        },
        tail={}
        if shape is None
        else {"k_hat": jsonable(shape.khat), "top_share": shape.top_share, "verdict": shape.verdict},
        companions=companions,
        breakdown=parts,
        settings=settings.to_dict(),
        provenance=env,
        lines=lines(headline, audited, floor, bound, anytime, shape.verdict if shape else None, companions, parts),
        sentence=sentence,
        notes=tuple(dict.fromkeys(notes)),
    )


def say(headline: Estimate, models: str, source: str) -> str:
    """The headline as one sentence that names estimand, direction, unit, interval method and n."""
    per = {"S": "nats per response", "R": "nats per token", "F": "nats per token of this text"}[headline.estimand]
    per = per.replace("nats", headline.unit)
    value = headline.in_unit(headline.value)
    interval = headline.interval()
    if math.isnan(interval.lower):
        width = interval_text(math.nan, math.nan, interval.method)
    else:
        lower, upper = headline.in_unit(interval.lower), headline.in_unit(interval.upper)
        method = f"({interval.method}, {headline.clusters} clusters)"
        width = f"{interval.level:.0%} interval {lower:.4g} to {upper:.4g} {method}"
    return f"{headline.direction} = {value:.4g} {per}, {width}; {models}; {headline.method} {source}."


def describe_floor(values: Float[Tensor, " k"], kind: str, wanted: str) -> dict[str, Any]:
    """Mean and standard error of the per-string floor, in nats; empty when it was not asked for."""
    if wanted == "none" or not len(values):
        return {"kind": "not measured", "value": "nan", "stderr": "nan", "n": 0, "unit": "nats"}
    x = values.double()
    error = float(x.std() / len(x) ** 0.5) if len(x) > 1 else math.nan
    return {"kind": kind, "value": jsonable(float(x.mean())), "stderr": jsonable(error), "n": len(x), "unit": "nats"}


def per_token(statistics: TokenStatistics) -> dict[str, Any]:
    """Companions of the divergence at the same decisions, per token, with clustered errors."""
    rows, x = statistics.rows, statistics.x
    lengths = x.lengths.double().numpy()
    cluster = x.cluster.numpy()
    columns = {
        "entropy_p": rows.entropy_p,
        "entropy_q": rows.entropy_q,
        "reverse_kl_at_p": rows.reverse_kl,
        "total_variation": rows.total_variation,
        "same_top": rows.same_top.double(),
        "log_ratio": statistics.log_ratio,
    }
    found: dict[str, Any] = {}
    for name, values in columns.items():
        totals, weights = cluster_totals(statistics.per_string(values).numpy(), lengths, cluster)
        with np.errstate(invalid="ignore"):
            mean, error = float(totals.sum() / weights.sum()), ratio_stderr(totals, weights)
        found[name] = {"value": jsonable(mean), "stderr": jsonable(error)}
    found["mean_length"] = {"value": float(lengths.mean()), "stderr": float(lengths.std() / len(lengths) ** 0.5)}
    return found


def text_rows(statistics: TokenStatistics, headline: Estimate) -> list[dict[str, Any]]:
    """Mean, median, 99 and 99.9 %, largest and same-top-1 of the per-token KL, each with its error."""
    kl = statistics.rows.kl.double().numpy()
    cluster = statistics.x.cluster[statistics.x.row()].numpy()
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
    same = per_token(statistics)["same_top"]
    value, error = same["value"], float(same["stderr"])
    rows.append(
        {
            "name": "same top-1",
            "value": value,
            "lower": jsonable(value - 1.96 * error),
            "upper": jsonable(value + 1.96 * error),
            "method": "clustered normal",
        }
    )
    for row in rows:
        row["text"] = (
            f"{float(row['value']):.4g}   {interval_text(float(row['lower']), float(row['upper']), str(row['method']))}"
        )
    return rows


def interval_text(lower: float, upper: float, method: str) -> str:
    """An interval and its method in words, or why there is none."""
    if math.isnan(lower):
        return f"no interval ({method.removeprefix('none (').removesuffix(')')})"
    return f"{lower:.4g} to {upper:.4g} ({method})"


def both_audits(one: Audit, two: Audit) -> dict[str, Any]:
    """Two audits as one record, each check named after the model whose strings it looked at."""
    first, second = one.to_dict(), two.to_dict()
    checks = {
        f"{name} (strings of {role})": check
        for role, part in (("p", first), ("q", second))
        for name, check in part["checks"].items()
    }
    return {"passed": one.passed and two.passed, "exempt": first["exempt"] or second["exempt"], "checks": checks}


def lines(
    headline: Estimate,
    audited: Mapping[str, Any],
    floor: Mapping[str, Any],
    bound: float,
    anytime: bool,
    tail_verdict: str | None,
    companions: Mapping[str, Any],
    parts: Mapping[str, Any],
) -> dict[str, str]:
    """What a reader should see beside the table, one statement a line."""
    unit, value = headline.unit, headline.value
    said: dict[str, str] = {}
    checks: Mapping[str, Any] = audited["checks"]
    failed = [name for name, check in checks.items() if check["verdict"] == "fail"]
    warned = [name for name, check in checks.items() if check["verdict"] == "warn"]
    if failed:
        said["audit"] = "FAILED: " + "; ".join(
            f"{name} = {float(checks[name]['value']):.3g}. {checks[name]['advice']}" for name in failed
        )
    else:
        scores = [f"{name} {float(check['value']):+.2f}" for name, check in checks.items() if name.endswith("_z")]
        said["audit"] = f"passed {len(checks)} checks" + (f" ({', '.join(scores)})" if scores else "")
        if audited["exempt"]:
            said["audit"] += f"; {audited['exempt']}"
    for name in warned:
        said[f"warning {len(said)}"] = checks[name]["advice"]
    if floor["n"]:
        noise = float(floor["value"])
        said["floor"] = f"{headline.in_unit(noise):.2g} {unit} per response of numerical noise ({floor['kind']})"
        if headline.estimand == "S" and value < 10 * noise:
            said["floor"] += ": the estimate is not clearly above it"
    if headline.divergence in ("kl", "reverse_kl") and headline.estimand == "S":
        when = " at any stopping time" if anytime else ""
        said["lower bound"] = f"at least {headline.in_unit(bound):.4g} {unit}, with 95 % confidence{when}"
        if math.isfinite(value) and value > 0:
            count = max(1, math.ceil(math.log(ODDS) / value))
            said["meaning"] = (
                f"after about {count} response{'s' if count > 1 else ''}, one who knows both models has odds of "
                f"{ODDS:.0f}:1 for the right one"
            )
    if tail_verdict and tail_verdict != "light":
        said["tail"] = tail_verdict
    agreement, variation = companions["same_top"], companions["total_variation"]
    said["per token"] = (
        f"same top-1 {float(agreement['value']):.1%}, total variation {float(variation['value']):.3g}, "
        f"entropy of p {headline.in_unit(float(companions['entropy_p']['value'])):.3g} {unit}"
    )
    if parts["end"]:
        said["where"] = (
            f"{parts['end']['end_share']:.1%} of it is when to stop, {parts['end']['content_share']:.1%} what to say"
        )
    return said
