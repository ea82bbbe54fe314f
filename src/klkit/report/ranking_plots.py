"""Figures of a ranking: every candidate with its interval, and divergence against size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from klkit.ranking import gaps
from klkit.report.plots import BLUE, GREY, ORANGE, _figure
from klkit.results import ESTIMANDS

MOST_LABELS = 30  # candidates up to which each has its name in the figure


def ranking_figure(result: Mapping[str, Any]) -> str:
    """Each candidate's divergence with its interval, and beside it its paired difference to the closest."""
    rows = result["candidates"]
    best = rows[0]["name"]
    less_closest = gaps(result, best)
    with _figure(8.4, 0.9 + 0.3 * len(rows), columns=2) as canvas:
        left, right = canvas.panels
        for place, row in enumerate(rows):
            y = len(rows) - 1 - place
            head = row["result"]["headline"]
            bar(left, y, float(head["value"]), float(head["ci"]["lower"]), float(head["ci"]["upper"]), BLUE)
            if (gap := less_closest.get(row["name"])) is not None:
                bar(right, y, gap.difference, gap.lower, gap.upper, GREY if row["rank_first"] == 1 else BLUE)
        names = [row["name"] for row in reversed(rows)]
        left.set_yticks(range(len(rows)), [name if len(name) < 34 else name[:31] + "…" for name in names])
        right.set_yticks(range(len(rows)), [""] * len(rows))
        right.axvline(0.0, color=GREY, lw=0.8)
        left.set_xlabel(f"{result['direction']}, {result['unit']} {ESTIMANDS[result['estimand']]}")
        right.set_xlabel(f"less that of {best if len(best) < 30 else best[:27] + '…'} (paired)")
        for axes in (left, right):
            axes.set_ylim(-0.6, len(rows) - 0.4)
        return canvas.svg()


def bar(axes: Any, y: int, value: float, lower: float, upper: float, colour: str) -> None:
    """A point with its interval, if both are finite."""
    if np.isfinite([lower, upper]).all():
        axes.plot([lower, upper], [y, y], color=colour, lw=2.0, solid_capstyle="round")
    if np.isfinite(value):
        axes.plot([value], [y], "o", color=colour, ms=5)


def pareto_figure(result: Mapping[str, Any]) -> str:
    """Divergence against file size, with intervals, frontier and floor; empty if fewer than two sizes are known."""
    rows = [row for row in result["candidates"] if row["size"].get("file_bytes")]
    if len(rows) < 2:
        return ""
    size = np.array([row["size"]["file_bytes"] for row in rows], dtype=np.float64)
    scale, unit = next((s, u) for s, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")) if size.max() >= s)
    frontier = result["frontier"]
    with _figure(6.4, 3.6) as canvas:
        axes = canvas.axes
        on = sorted(
            (row["size"]["file_bytes"] / scale, float(row["result"]["headline"]["value"]))
            for row in rows
            if row["name"] in frontier
        )
        axes.plot(*zip(*on, strict=True), color=BLUE, lw=1.2, drawstyle="steps-post", zorder=1)
        for row, x in zip(rows, size / scale, strict=True):
            head, inside = row["result"]["headline"], row["name"] in frontier
            colour = BLUE if inside else GREY
            value, lower, upper = (float(v) for v in (head["value"], head["ci"]["lower"], head["ci"]["upper"]))
            if not np.isfinite(value):
                continue
            if np.isfinite([lower, upper]).all():
                axes.plot([x, x], [lower, upper], color=colour, lw=1.6)
            axes.plot([x], [value], "o", color=colour, ms=5)
            if len(rows) <= MOST_LABELS:
                axes.annotate(
                    row["name"][:40], (x, value), (5, 4), textcoords="offset points", fontsize=8, color=colour
                )
        noise = floor_of(rows)
        if noise is not None:
            axes.axhline(noise, color=ORANGE, lw=1.0, ls="--")
            axes.annotate(
                "numerical floor", (size.min() / scale, noise), (0, 3), textcoords="offset points", fontsize=8
            )
        values = np.array([float(row["result"]["headline"]["value"]) for row in rows])
        positive = values[np.isfinite(values) & (values > 0)]
        if len(positive) > 1 and positive.max() > 20 * positive.min():
            axes.set_yscale("log")
        axes.margins(x=0.18)
        axes.set_xlabel(f"file size, {unit}")
        axes.set_ylabel(f"{result['direction']}, {result['unit']} {ESTIMANDS[result['estimand']]}")
        return canvas.svg()


def floor_of(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The numerical floor, in the printing unit, where it is large enough to be seen beside the values."""
    floor = rows[0]["result"]["floor"]
    if not floor["n"]:
        return None
    scale = 1.0 if rows[0]["result"]["headline"]["unit"] == "nats" else 1 / np.log(2)
    noise = float(floor["value"]) * scale
    smallest = min(float(row["result"]["headline"]["value"]) for row in rows)
    return noise if noise > 1e-3 * smallest else None
