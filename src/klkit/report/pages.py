"""A report of text, tables and figures, as one self-contained page and as plain text for a terminal."""

from __future__ import annotations

import base64
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from klkit.report import html

WIDTH = 80


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading.

    Attributes:
        text: its words.
    """

    text: str


@dataclass(frozen=True, slots=True)
class Items:
    """A list.

    Attributes:
        lines: one entry each.
    """

    lines: Sequence[str]


@dataclass(frozen=True, slots=True)
class Table:
    """A table.

    Attributes:
        head: names of the columns.
        rows: cells as text, a row as long as the head.

    Raises:
        ValueError: rows of other lengths.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        wrong = [len(row) for row in self.rows if len(row) != len(self.head)]
        if wrong:
            raise ValueError(f"expected {len(self.head)} cells in every row, got {wrong}; leave none out")


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure.

    Attributes:
        png: the file's bytes.
        name: of the file beside the page.
        caption: what it shows.
    """

    png: bytes
    name: str
    caption: str


Block = str | Heading | Items | Table | Picture


def plain_text(blocks: Sequence[Block]) -> str:
    """The blocks for a terminal; figures by the names of their files.

    Example:
        >>> print(plain_text(["A table.", Table(["loss", "KL"], [["fkl", "0.5"]])]))
        A table.
        <BLANKLINE>
        loss   KL
        ---------
        fkl   0.5
    """
    return "\n\n".join(_as_text(block) for block in blocks)


def _as_text(block: Block) -> str:
    if isinstance(block, str):
        return textwrap.fill(block, WIDTH)
    if isinstance(block, Heading):
        return f"{block.text}\n{'=' * len(block.text)}"
    if isinstance(block, Items):
        return "\n".join(
            textwrap.fill(line, WIDTH, initial_indent="- ", subsequent_indent="  ") for line in block.lines
        )
    if isinstance(block, Picture):
        return textwrap.fill(f"[{block.name}] {block.caption}", WIDTH)
    widths = [max(map(len, column)) for column in zip(block.head, *block.rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        rest = "  ".join(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return f"{cells[0].ljust(widths[0])}  {rest}".rstrip()

    return "\n".join([line(block.head), "-" * (sum(widths) + 2 * (len(widths) - 1)), *map(line, block.rows)])


def page(title: str, blocks: Sequence[Block]) -> str:
    """The blocks as one page that needs nothing else."""
    shown = [
        {
            "kind": "Text" if isinstance(block, str) else type(block).__name__,
            "block": block,
            "data": base64.b64encode(block.png).decode() if isinstance(block, Picture) else "",
        }
        for block in blocks
    ]
    return html.page("study.html", title=title, blocks=shown)
