"""Results in words: one sentence, and one statement a line beside the table."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from klkit.models.token_classes import NAMES
from klkit.results import Estimate
from klkit.stats.planning import plan

ODDS = 20.0  # a likelihood-ratio observer's odds in the plain-language line
FINE = 0.01  # relative half-width that the plan line plans for


def say(headline: Estimate, models: str, source: str) -> str:
    """The headline as one sentence that names estimand, direction, unit, interval method and n."""
    per = {"S": "nats per response", "R": "nats per token", "F": "nats per token of this text"}[headline.estimand]
    per = per.replace("nats", headline.unit).replace("token", headline.symbol)
    value = headline.in_unit(headline.value)
    interval = headline.interval()
    if math.isnan(interval.lower):
        width = interval_text(math.nan, math.nan, interval.method)
    else:
        lower, upper = headline.in_unit(interval.lower), headline.in_unit(interval.upper)
        method = f"({interval.method}, {headline.clusters} clusters)"
        width = f"{interval.level:.0%} interval {lower:.4g} to {upper:.4g} {method}"
    return f"{headline.direction} = {value:.4g} {per}, {width}; {models}; {headline.method} {source}."


def interval_text(lower: float, upper: float, method: str) -> str:
    """An interval and its method in words, or why there is none."""
    if math.isnan(lower):
        return f"no interval ({method.removeprefix('none (').removesuffix(')')})"
    return f"{lower:.4g} to {upper:.4g} ({method})"


def renamed(audited: Mapping[str, Any], roles: tuple[str, str]) -> dict[str, Any]:
    """An audit whose advice calls the models by their names in the run: a reverse run draws its strings from q."""
    if roles == ("p", "q"):
        return dict(audited)
    names = {"p": roles[0], "q": roles[1]}

    def say_right(text: str) -> str:
        return re.sub(r"\b[pq]\b", lambda found: names[found.group()], text)

    checks = {name: {**check, "advice": say_right(check["advice"])} for name, check in audited["checks"].items()}
    return {**audited, "exempt": say_right(audited["exempt"]), "checks": checks}


def both_audits(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Two audits as one record, each check named after the model whose strings it looked at."""
    checks = {
        f"{name} (strings of {role})": check
        for role, part in (("p", first), ("q", second))
        for name, check in part["checks"].items()
    }
    exempt = first["exempt"] or second["exempt"]
    return {"passed": first["passed"] and second["passed"], "exempt": exempt, "checks": checks}


def plan_line(headline: Estimate) -> str | None:
    """How precise the estimate is, and what it would take to be precise to one per cent; None if nothing follows."""
    interval, value = headline.interval(), headline.value
    if headline.estimand != "S" or not (math.isfinite(value) and value > 0 and interval.upper > interval.lower):
        return None
    now = (interval.upper - interval.lower) / 2 / value
    if headline.divergence in ("js", "jeffreys"):
        # Strings of p and of q in one cluster are not alike, so their variance components mean nothing.
        what = f"{(now / FINE) ** 2:.1f} times as many"
    else:
        needed = plan(headline.contributions, headline.weights, headline.cluster, rtol=FINE)
        each = f" with {needed.strings_per_prompt} response{'s' if needed.strings_per_prompt > 1 else ''} each"
        what = f"{needed.prompts:,} responses" if headline.prompts < 2 else f"{needed.prompts:,} prompts{each}"
    return f"± {now:.1%} with {headline.n} responses; ± {FINE:.0%} would take about {what}"


def lines(
    headline: Estimate,
    audited: Mapping[str, Any],
    floor: Mapping[str, Any],
    lower_bound: Mapping[str, Any],
    tail_verdict: str | None,
    companions: Mapping[str, Any],
    parts: Mapping[str, Any],
    first: str,
) -> dict[str, str]:
    """What a reader should see beside the table, one statement a line; ``first`` names the model of the strings."""
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
        scores = [f"{name} {float(check['value']):+.2f}" for name, check in checks.items() if "_z" in name]
        said["audit"] = f"passed {len(checks)} checks" + (f" ({', '.join(scores)})" if scores else "")
        if audited["exempt"]:
            said["audit"] += f"; {audited['exempt']}"
    engine = checks.get("engine_mismatch")
    if engine is not None and engine["verdict"] == "pass":
        said["engine"] = engine["advice"]
    for name in warned:
        label = "warning" if name == warned[0] else f"warning {warned.index(name) + 1}"
        whose = name[name.index("(") + 1 : -1] + ": " if name.endswith(")") else ""
        said[label] = whose + checks[name]["advice"]
    if floor["n"]:
        noise = float(floor["value"])
        said["floor"] = f"{headline.in_unit(noise):.2g} {unit} per response of numerical noise ({floor['kind']})"
        if headline.estimand == "S" and value < 10 * noise:
            said["floor"] += ": the estimate is not clearly above it"
    precision = plan_line(headline)
    if precision is not None:
        said["precision"] = precision
    if lower_bound:
        when = " at any stopping time" if lower_bound["anytime"] else ""
        bound = headline.in_unit(float(lower_bound["value"]))
        said["lower bound"] = f"at least {bound:.4g} {unit}, with 95 % confidence{when}"
        if math.isfinite(value) and value > 0:
            count = max(1, math.ceil(math.log(ODDS) / value))
            said["meaning"] = (
                f"after about {count} response{'s' if count > 1 else ''}, one who knows both models has odds of "
                f"{ODDS:.0f}:1 for the right one"
            )
    if tail_verdict and tail_verdict != "light":
        said["tail"] = tail_verdict
    agreement, variation = companions["same_top"], companions["total_variation"]
    # Where only parts of the first model's laws were kept, their variation is not known.
    apart = "" if variation["value"] == "nan" else f"total variation {float(variation['value']):.3g}, "
    said[f"per {headline.symbol}"] = (
        f"same top-1 {float(agreement['value']):.1%}, {apart}"
        f"entropy of {first} {headline.in_unit(float(companions[f'entropy_{first}']['value'])):.3g} {unit}"
    )
    named = [name for name in companions if name.startswith("bits_per_byte_")]
    if named:
        values = (f"{name.rpartition('_')[2]} {float(companions[name]['value']):.4g}" for name in named)
        said["bits per byte"] = f"{', '.join(values)}, of these texts, ends counted"
    if f"js_at_{first}" in companions:
        js = headline.in_unit(float(companions[f"js_at_{first}"]["value"]))
        said[f"per {headline.symbol}"] += (
            f", Jensen-Shannon of next-token laws at contexts of {first} {js:.3g} {unit} (not that of whole responses)"
        )
    rest = companions.get("kl_of_finite_decisions")
    if rest is not None:
        said["finite part"] = (
            f"{headline.in_unit(float(rest['value'])):.4g} {unit} per {headline.symbol} at the {rest['share']:.1%} of "
            f"decisions at which it is finite: not the divergence, which is infinite"
        )
    if parts["end"]:
        said["where"] = where(headline, parts)
    return said


def where(headline: Estimate, parts: Mapping[str, Any]) -> str:
    """End against content, the kind of tokens that carries most, and the farthest and the nearest group."""
    said = f"{parts['end']['end_share']:.1%} of it is when to stop, {parts['end']['content_share']:.1%} what to say"
    classes = [row for row in parts["by_class"] if row["share"] > 0]
    if classes:
        most = max(classes, key=lambda row: float(row["share"]))
        said += f"; {most['share']:.1%} at {NAMES[most['class']]}"
    groups = [row for row in parts["by_group"] if row["strings"]]
    if len(groups) > 1:
        ordered = sorted(groups, key=lambda row: float(row["nats_per_response"]))
        ends = (
            f"{row['group']!r} {headline.in_unit(float(row['nats_per_response'])):.4g}"
            for row in (ordered[-1], ordered[0])
        )
        said += f"; groups from {' down to '.join(ends)} {headline.unit} per response"
    return said
