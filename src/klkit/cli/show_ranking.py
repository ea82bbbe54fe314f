"""A ranking on a terminal: one sentence, one table, and what vouches for it, within 80 columns."""

from __future__ import annotations

import math
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from klkit.cli.show import show_evidence
from klkit.ranking import gaps
from klkit.report.ranking import rows_of
from klkit.report.text import printable

if TYPE_CHECKING:
    from klkit.ranking import Ranking

MOST_NEIGHBOURS = 12


def show_ranking(ranking: Ranking, folder: Path | None, console: Console | None = None) -> None:
    """Print a ranking."""
    console = console or Console(highlight=False)
    result = ranking.to_dict()
    console.print()
    console.print(escape(printable(result["sentence"])), style="bold red" if ranking.failed else "bold")
    console.print()
    rows = rows_of(result)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("rank", justify="right")
    table.add_column("candidate", overflow="fold", max_width=26)
    table.add_column(f"{result['unit']}/{'response' if result['estimand'] == 'S' else 'token'}", justify="right")
    table.add_column(f"{result['level']:.0%} interval")
    table.add_column("same top-1", justify="right")
    table.add_column("size", overflow="fold")
    for place, row in enumerate(rows):
        table.add_row(
            row["rank"], escape(row["candidate"]), row["value"], row["interval"], row["top"], row["size"].split(",")[0],
            style="bold" if place == 0 else "",
        )  # fmt: skip
    console.print(table)
    console.print()
    kept = None if folder is None else f"{folder} (report.html, table.md, result.json)"
    show_evidence(console, lines(result, rows), result["notes"], kept)


def lines(result: dict[str, Any], rows: list[dict[str, str]]) -> list[tuple[str, str, str]]:
    """(name, what there is to say, style) of what vouches for the table."""
    found = []
    names = [row["name"] for row in result["candidates"]]
    for closer, farther in islice(pairwise(names), MOST_NEIGHBOURS):
        gap = gaps(result, closer)[farther]
        if math.isnan(gap.difference):
            continue
        verdict = "tied with" if gap.tied else "farther than"
        tested = "" if math.isnan(gap.adjusted) else f", adjusted p {gap.adjusted:.2g}"
        between = f"{gap.difference:.3g} ({gap.lower:.3g} to {gap.upper:.3g})"
        found.append(("paired", f"{farther} {verdict} {closer} by {between}{tested}", ""))
    failed = [row["candidate"] for row in rows if row["audit"] != "passed"]
    if failed:
        found.append(("audit", f"FAILED for {', '.join(failed)}: see their own pages", "red"))
    else:
        found.append(("audit", f"passed for {len(rows)} of {len(rows)} candidates", ""))
    floor = result["candidates"][0]["result"]["lines"].get("floor")
    if floor is not None:
        found.append(("floor", floor, ""))
    for row in rows:
        if row["reverse"]:
            found.append(("KL(q‖p)", f"{row['candidate']} {row['reverse']} ({row['reverse_interval']})", ""))
    frontier = result["frontier"]
    if len(frontier) > 1 or (frontier and len(names) > 1):
        found.append(("frontier", f"no smaller file has a smaller estimate than {', '.join(frontier)}", ""))
    return found
