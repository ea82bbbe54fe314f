"""A result on a terminal: one sentence, one table, and what vouches for them, within 80 columns."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from klkit.report.text import printable

if TYPE_CHECKING:
    from klkit.results import Comparison

LABELS = {
    "rb_cv": "RB + variates",
    "rb": "Rao-Blackwell",
    "mc": "Monte Carlo (k1)",
    "k3_string": "k3 per string",
    "cv_string": "k3 fitted alpha",
    "k3_token": "k3 per token",
    "ht": "Horvitz-Thompson",
    "exact": "exact on this text",
    "bucketed": "floor as one bucket",
    "llamacpp": "llama.cpp",
}


def number(value: Any) -> str:
    """Four significant digits, or the word for what has none.

    Example:
        >>> number(5.12345), number("inf"), number(float("nan"))
        ('5.123', 'inf', '–')
    """
    value = float(value)
    if value != value:
        return "–"
    return f"{value:.4g}"


def show_result(comparison: Comparison, folder: Path | None, console: Console | None = None) -> None:
    """Print a result.

    Every number of the table names its estimand and unit; the header names direction and interval.
    """
    console = console or Console(highlight=False)
    result = comparison.to_dict()
    head = result["headline"]
    console.print()
    console.print(escape(printable(result["sentence"])), style="bold" if result["audit"]["passed"] else "bold red")
    console.print()
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    ratios = result["variance_ratio_vs_mc"]
    table.add_column("estimator")
    table.add_column("per")
    table.add_column(head["unit"], justify="right")
    table.add_column("±", justify="right")
    table.add_column(f"{head['ci']['level']:.0%} interval")
    table.add_column("var/MC" if ratios else "", justify="right")
    for row in result["estimates"]:
        chosen = all(row[key] == head[key] for key in ("method", "estimand", "direction"))
        same = row["direction"] == head["direction"]
        label = LABELS.get(row["method"], row["method"])
        lower, upper = number(row["ci"]["lower"]), number(row["ci"]["upper"])
        table.add_row(
            label if same else f"{label}, {row['direction']}",
            "response" if row["estimand"] == "S" else row["symbol"],
            number(row["value"]),
            number(row["stderr"]),
            "none" if lower == "–" else f"{lower} to {upper}",
            number(ratios[row["method"]]) if same and row["estimand"] == "S" and row["method"] in ratios else "",
            style="bold" if chosen else "",
        )
    console.print(table)
    console.print()
    said = [(name, text, "red" if text.startswith("FAILED") else "") for name, text in result["lines"].items()]
    show_evidence(console, said, result["notes"], None if folder is None else f"{folder} (report.html, result.json)")


def show_evidence(
    console: Console, said: Iterable[tuple[str, str, str]], notes: Iterable[str], kept: str | None
) -> None:
    """Print what vouches for a table: names, what there is to say and its style; notes; where it is kept."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(justify="right", style="dim", no_wrap=True)
    grid.add_column()
    for name, text, style in (*said, *(("note", note, "") for note in notes)):
        grid.add_row(escape(name), escape(printable(text)), style=style)
    if kept is not None:
        grid.add_row("saved", escape(kept))
    console.print(grid)
    console.print()


def show_rows(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], console: Console | None = None) -> None:
    """Print records as a plain table."""
    console = console or Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(escape(str(row[column])) for column in columns))
    console.print(table)


def show_facts(facts: Iterable[tuple[str, object]], red: Container[str] = ()) -> None:
    """Print names and what there is to say of each, and a blank line.

    Args:
        red: names that are bad news.
    """
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(justify="right", style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts:
        grid.add_row(name, escape(str(value)), style="red" if name in red else "")
    console = Console(highlight=False)
    console.print(grid)
    console.print()
