"""An approximate comparison on a terminal: its sentence, its numbers, and what they are not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from klkit.cli.show import number, show_facts, show_rows
from klkit.report.text import printable

if TYPE_CHECKING:
    from klkit.api.approximation import Approximation


def show_approximation(found: Approximation) -> None:
    """Print a result; every standard error is called what it is."""
    console = Console(highlight=False)
    console.print()
    console.print(escape(printable(str(found))), style="bold")
    console.print()
    unit = found.unit
    readings = [
        ("approximate", f"{unit} per response", found.per_response.scaled(found.scale)),
        ("approximate", f"{unit} per byte", found.per_byte.scaled(found.scale)),
        ("upper bound, canonical p", f"{unit} per response", found.upper_bound.scaled(found.scale)),
        ("p as it wrote", "bits per byte", found.bits_p),
        ("q, canonical", "bits per byte", found.bits_q),
    ]
    rows = [
        {"": name, "unit": per, "value": number(reading.value), "± sampling only": number(reading.stderr)}
        for name, per, reading in readings
    ]
    show_rows(rows, ["", "unit", "value", "± sampling only"])
    console.print()
    show_facts((*found.lines.items(), *(("note", printable(note)) for note in found.notes)))
