"""What a comparison of many models leaves behind: result.json, a table in Markdown, and one page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from klkit.caches.sizes import readable
from klkit.files import write_text
from klkit.ranking import gaps
from klkit.report.html import number, page
from klkit.report.ranking_plots import pareto_figure, ranking_figure
from klkit.report.record import REPORT, RESULT, disk_errors
from klkit.report.text import printable
from klkit.results import ESTIMANDS

TABLE = "table.md"
COMPANIONS = {
    "total_variation": "total variation",
    "js_at_p": "JS at p's contexts",
    "reverse_kl_at_p": "KL(q‖p) at p's contexts",
    "entropy_p": "entropy of p",
    "entropy_q": "entropy of q",
    "bits_per_byte_p": "bits per byte, p",
    "bits_per_byte_q": "bits per byte, q",
}
MOST_PAIRS = 60


def write_ranking(folder: Path, result: Mapping[str, Any], pages: Mapping[str, Path | None]) -> None:
    """Write ``result.json``, ``table.md`` and ``report.html`` of a ranking.

    Args:
        pages: the folder of each candidate's own page, by its name.

    Raises:
        RunFolderError: the disk refuses.
    """
    links = {name: f"{path.relative_to(folder)}/{REPORT}" for name, path in pages.items() if path is not None}
    with disk_errors(folder):
        write_text(folder / RESULT, json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        write_text(folder / TABLE, markdown(result))
        write_text(folder / REPORT, render(result, links))


def place(row: Mapping[str, Any]) -> str:
    """The rank of a candidate, or the places it may have.

    Example:
        >>> place({"rank_first": 1, "rank_last": 1}), place({"rank_first": 2, "rank_last": 4})
        ('1', '2–4')
    """
    first, last = row["rank_first"], row["rank_last"]
    return f"{first}" if first == last else f"{first}–{last}"


def interval(bounds: Mapping[str, Any]) -> str:
    """``lower to upper`` of a record with these two, or a dash."""
    lower, upper = number(bounds["lower"]), number(bounds["upper"])
    return "–" if "–" in (lower, upper) else f"{lower} to {upper}"


def size_text(size: Mapping[str, Any]) -> str:
    """File size and bits per weight of a candidate, as far as they are known.

    Example:
        >>> size_text({"file_bytes": 2_262_120, "bits_per_weight": 32.07, "nominal": ""}), size_text({})
        ('2.26 MB, 32.1 bits', '–')
    """
    found = [readable(size["file_bytes"])] if size.get("file_bytes") else []
    if size.get("bits_per_weight"):
        found.append(f"{float(size['bits_per_weight']):.3g} bits{' (nominal)' if size.get('nominal') else ''}")
    return ", ".join(found) or "–"


def rows_of(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """The table of a ranking: one row a candidate, every cell as text."""
    less_closest = gaps(result, result["candidates"][0]["name"])
    compared = [name for name, _ in beside(result)]
    rows = []
    for row in result["candidates"]:
        head, companions = row["result"]["headline"], row["result"]["companions"]
        gap = less_closest.get(row["name"])
        rows.append(
            {
                "rank": place(row),
                "candidate": printable(row["name"]),
                "value": number(head["value"]),
                "interval": interval(head["ci"]),
                "per_token": number(row["per_token"]["value"]),
                "gap": "" if gap is None else f"{number(gap.difference)} ({interval(gap._asdict())})",
                "top": f"{100 * float(companions['same_top']['value']):.1f} %",
                "variation": number(companions["total_variation"]["value"]),
                "size": size_text(row["size"]),
                "floor": row["against_floor"]["verdict"],
                "reverse": "" if row["reverse"] is None else number(row["reverse"]["value"]),
                "reverse_interval": "" if row["reverse"] is None else interval(row["reverse"]["ci"]),
                "companions": [number(companions[name]["value"]) for name in compared],
                "audit": "passed" if row["result"]["audit"]["passed"] else "FAILED",
            }
        )
    return rows


def beside(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Companions that all candidates have, per token at the contexts of ``p``: their names, and words for them."""
    known = [row["result"]["companions"] for row in result["candidates"]]
    return [(name, words) for name, words in COMPANIONS.items() if all(name in found for found in known)]


def markdown(result: Mapping[str, Any]) -> str:
    """The ranking as a Markdown table, with what one must know to read it above and below."""
    per = f"{result['unit']} {ESTIMANDS[result['estimand']]}"
    head = [
        "rank", "candidate", f"{result['direction']}, {per}", f"{result['level']:.0%} interval",
        f"{result['unit']} per token", "less the closest (paired)", "same top-1", "total variation", "size",
    ]  # fmt: skip
    keys = ["rank", "candidate", "value", "interval", "per_token", "gap", "top", "variation", "size"]
    if any(row["reverse"] for row in result["candidates"]):
        head, keys = [*head, "KL(q‖p)"], [*keys, "reverse"]
    lines = [f"p = {cell(result['reference'])}. {cell(result['sentence'])}", ""]
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(cell(row[key]) for key in keys)} |" for row in rows_of(result)]
    clusters = result["candidates"][0]["result"]["headline"]["ci"]["method"]
    lines += [
        "",
        (f"Nothing was tested: {result['reason']}. " if result["reason"] else "")
        + f"Ranks with ties: Holm-adjusted paired tests at {1 - result['level']:.0%}. Intervals: {clusters}, "
        f"{result['n_clusters']} independent units, {result['n_sequences']} strings. Method: {result['method']}.",
    ]
    lines += [f"- {cell(note)}" for note in result["notes"]]
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    """Text that may stand in a Markdown table.

    Example:
        >>> cell("a|b")
        'a\\\\|b'
    """
    return printable(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def render(result: Mapping[str, Any], links: Mapping[str, str]) -> str:
    """The page as text.

    Args:
        links: to each candidate's own page, by its name.
    """
    rows = [
        {**row, "link": links.get(entry["name"], "")}
        for row, entry in zip(rows_of(result), result["candidates"], strict=True)
    ]
    return page(
        "ranking.html",
        result=result,
        rows=rows,
        beside=[words for _, words in beside(result)],
        pairs=result["pairs"][:MOST_PAIRS],
        more_pairs=max(0, len(result["pairs"]) - MOST_PAIRS),
        per=f"{result['unit']} {ESTIMANDS[result['estimand']]}",
        both=any(row["reverse"] for row in result["candidates"]),
        failed=[row["name"] for row in result["candidates"] if not row["result"]["audit"]["passed"]],
        figure_ranking=ranking_figure(result),
        figure_pareto=pareto_figure(result),
    )
