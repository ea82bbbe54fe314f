"""One result in Markdown, for an issue, a pull request or a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from klkit.report.html import number
from klkit.report.ranking import cell, interval
from klkit.results import ESTIMANDS

FAILED = "**THE SELF-AUDIT FAILED: do not use this number.** "


def markdown(result: Mapping[str, Any]) -> str:
    """A result as Markdown: its sentence, every estimator in a table, and what vouches for them.

    Args:
        result: as ``Comparison.to_dict`` gives it, or as ``result.json`` holds it.

    Example:
        >>> import klkit
        >>> from klkit.models.automaton import coin
        >>> text = markdown(klkit.estimate(coin(end=0.5), coin(end=0.25), samples=20, max_tokens=30).to_dict())
        >>> text.splitlines()[2]
        '| estimator | quantity | value | standard error | 95% interval | strings | independent units |'
    """
    head = result["headline"]
    columns = ["estimator", "quantity", "value", "standard error", f"{head['ci']['level']:.0%} interval"]
    rows = []
    for row in result["estimates"]:
        cells = [
            row["method"],
            quantity(row),
            number(row["value"]),
            number(row["stderr"]),
            interval(row["ci"]),
            str(row["n_sequences"]),
            str(row["n_clusters"]),
        ]
        quoted = all(row[key] == head[key] for key in ("method", "estimand", "direction"))
        rows.append([f"**{text}**" if quoted and place < 3 else text for place, text in enumerate(map(cell, cells))])
    lines = [paragraph(result), "", *table([*columns, "strings", "independent units"], rows), ""]
    lines += [f"- {cell(name)}: {cell(text)}" for name, text in result["lines"].items()]
    lines += [f"- note: {cell(note)}" for note in result["notes"]]
    return "\n".join(lines) + "\n"


def paragraph(result: Mapping[str, Any]) -> str:
    """The result in one sentence, after a warning if its audit failed."""
    return ("" if result["audit"]["passed"] else FAILED) + cell(result["sentence"])


def quantity(estimate: Mapping[str, Any]) -> str:
    """What an estimate is of, and in what unit.

    Example:
        >>> quantity({"direction": "KL(p‖q)", "unit": "bits", "estimand": "S"})
        'KL(p‖q), bits per response'
    """
    return f"{estimate['direction']}, {estimate['unit']} {ESTIMANDS[estimate['estimand']]}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table whose cells are Markdown already."""
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]


def facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of what one must know of a result, without its estimators' table."""
    head, settings, companions = result["headline"], result["settings"], result["companions"]
    found = [(quantity(head), number(head["value"]))]
    width = interval(head["ci"])
    found.append((f"{head['ci']['level']:.0%} interval", f"{width} ({head['ci']['method']})"))
    for rate in result["estimates"]:
        if rate["estimand"] == "R" and rate["direction"] == head["direction"]:
            found.append((quantity(rate), f"{number(rate['value'])} ({interval(rate['ci'])})"))
    what = "windows of one text" if head["estimand"] == "F" else f"responses of at most {settings['max_tokens']} tokens"
    found.append(("measured on", f"{head['n_sequences']} {what}, {head['n_clusters']} independent units"))
    found.append(("estimator", head["method"]))
    if result["floor"]["n"]:
        noise = f"{number(result['floor']['value'])} nats per response ({result['floor']['kind']})"
        found.append(("numerical floor", noise))
    if result["lower_bound"]:
        bound = result["lower_bound"]
        found.append(("lower bound", f"{number(bound['value'])} nats per response, {bound['level']:.0%} confidence"))
    found.append(("same most probable token", f"{100 * float(companions['same_top']['value']):.1f} % of decisions"))
    found.append(("total variation, per token", number(companions["total_variation"]["value"])))
    if head["infinite"]:
        found.append(("decisions at which q excludes what p allows", str(head["infinite"])))
    models = result["provenance"]["models"]
    found.append(("arithmetic", ", ".join(f"{role} in {model['dtype']}" for role, model in models.items())))
    found.append(("self-audit", "passed" if result["audit"]["passed"] else "FAILED"))
    return found
