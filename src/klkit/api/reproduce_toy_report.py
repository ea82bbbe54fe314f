"""What the two figures show: which claims held, in how many draws, under which optimiser."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from klkit.api.reproduce_report import csv_text, write_pages
from klkit.api.reproduce_toy import CLAIMS, EARLY, OBJECTIVES, OPTIMISERS, Toy, ToyCount, conditions, ends
from klkit.report.pages import Block, Heading, Items, Picture, Table
from klkit.report.reproductions import curves_figure, laws_figure
from klkit.results import plain

TITLE = "Head first, tail first? Figures 2 and 3 of arXiv 2404.02657"
SHOWN = (1, 2, 5, 10, 15, 20)


def toy_blocks(toy: Toy) -> list[Block]:
    """The report, in the order of reading."""
    study = toy.study
    return [
        f"A teacher's law p over 50 or 80 points, a student's law q = softmax(z) with free logits z; z descends each "
        f"objective. {study.draws} random draws, the same for every objective; medians over draws.",
        Heading("Do all objectives end at the teacher?"),
        "Larger of KL(p‖q) and KL(q‖p) in the worst draw at the last step, in nats. Figure 2 has three settings "
        f"({study.steps_2} steps), Figure 3 one ({study.steps_3} steps).",
        _ends(toy),
        "Adam: learning rate 0.1 and 0.2, as in the paper's notebooks. SGD: 5, the same for all, though gradients "
        "differ in size; so its speeds compare no losses.",
        Picture(_laws(toy, 2), "figure2.png", "Figure 2 under Adam, first draw: after 1 step and later."),
        Heading("Where are they on the way?"),
        f"Figure 3: a long tail (points from the 38th on have 0.4 % of the mass). Medians under FKL / under RKL at "
        f"step 10 (gradients: at the start), and in how many of {study.draws} draws a reading of the claim holds.",
        *(block for name in OPTIMISERS for block in (f"{name}:", _early(toy, name))),
        Items([f"{claim}: {words}." for claim, words in CLAIMS.items()]),
        Picture(_laws(toy, 3), "figure3.png", "Figure 3 under Adam, first draw: the far tail, from the 38th point on."),
        Picture(_curves(toy), "curves.png", "Figure 3: medians over draws under Adam (above) and SGD (below)."),
        Heading("What holds"),
        Items(toy_words(toy)),
        Heading("Conditions of this reproduction"),
        Items([f"{'held' if held else 'NOT HELD'}: {words}" for words, held in conditions(toy)]),
    ]


def toy_words(toy: Toy) -> list[str]:
    """A sentence for each claim and optimiser."""
    left = max(row.worst_kl for row in ends(toy) if row.optimiser == "adam")
    out = [f"All objectives lead to one law, the teacher (adam): largest KL left in any draw {left:.1e} nats."]
    for claim, words in CLAIMS.items():
        for optimiser in OPTIMISERS:
            mine = [c for c in toy.counts if (c.claim, c.optimiser) == (claim, optimiser)]
            if mine[0].step == 0 and optimiser != OPTIMISERS[0]:
                continue  # before the first step there is no optimiser
            where = "at the start" if mine[0].step == 0 else f"{optimiser}, steps 1 to {EARLY}"
            out.append(f"{words} ({where}): {_held(mine)}.")
    return out


def _held(counts: Sequence[ToyCount]) -> str:
    """In how many draws, at how many steps."""
    always = sum(c.held == c.draws for c in counts)
    never = sum(c.held == 0 for c in counts)
    if len(counts) == 1:
        return f"in {counts[0].held} of {counts[0].draws} draws"
    if always == len(counts):
        return "HOLDS, in every draw at every step"
    share = sum(c.held for c in counts) / sum(c.draws for c in counts)
    word = "HOLDS mostly" if share > 0.9 else "DOES NOT HOLD" if share < 0.5 else "depends on the step"
    least, most = min(c.held for c in counts), max(c.held for c in counts)
    return (
        f"{word}: in every draw at {always} of {len(counts)} steps, in none at {never}, in {least} to {most} of "
        f"{counts[0].draws} draws"
    )


def _ends(toy: Toy) -> Table:
    rows = []
    for name in OBJECTIVES:
        cells = []
        for optimiser in OPTIMISERS:
            for figure, setting in ((2, 1), (2, 2), (2, 3), (3, 0)):
                mine = [
                    row for row in toy.rows
                    if (row.figure, row.setting, row.optimiser, row.objective) == (figure, setting, optimiser, name)
                ]  # fmt: skip
                cells.append(f"{mine[-1].worst_kl:.0e}")
        rows.append([name, *cells])
    head = [f"{word}{place}" for word in ("Adam ", "SGD ") for place in ("2.1", "2.2", "2.3", "3")]
    return Table(["loss", *head], rows)


def _early(toy: Toy, optimiser: str) -> Table:
    rows = []
    for claim in CLAIMS:
        counts = {c.step: c for c in toy.counts if (c.claim, c.optimiser) == (claim, optimiser)}
        if 0 in counts and optimiser != OPTIMISERS[0]:
            continue
        middle = counts.get(10, counts.get(0))
        assert middle is not None
        held = [str(counts[step].held) if step in counts else "" for step in (0, *SHOWN)]
        rows.append([claim, f"{middle.fkl:.3g} / {middle.rkl:.3g}", *held])
    return Table(["measure", "FKL / RKL", "start", *(f"at {step}" for step in SHOWN)], rows)


def _laws(toy: Toy, figure: int) -> bytes:
    """Teacher and students of the first draw at the steps that were kept."""
    panels = []
    settings = sorted({setting for f, setting, _, _ in toy.pictures if f == figure})
    steps = sorted({step for f, _, _, step in toy.pictures if f == figure and step})
    first = 37 if figure == 3 else 0
    for start in (0, first) if figure == 3 else (0,):
        for setting in settings:
            for step in steps:
                laws = {
                    name: toy.pictures[figure, setting, name, step][start:]
                    for name in ("fkl", "rkl", "akl")
                }  # fmt: skip
                title = f"setting {setting}, step {step}" if figure == 2 else f"step {step}"
                title += ", far tail" if start else ""
                panels.append((title, toy.pictures[figure, setting, "teacher", 0][start:], laws))
    return laws_figure(panels, columns=len(steps))


def _curves(toy: Toy) -> bytes:
    panels = []
    for optimiser in OPTIMISERS:
        for measure, label in (
            ("head_gap", "gap in the head"), ("tail_gap", "gap outside it"), ("far_ratio", "far tail: |log q/p|"),
        ):  # fmt: skip
            lines = {}
            for name in OBJECTIVES:
                mine = [
                    row for row in toy.rows
                    if (row.figure, row.optimiser, row.objective) == (3, optimiser, name) and row.step <= EARLY
                ]  # fmt: skip
                lines[name] = [row.step for row in mine], [getattr(row, measure) for row in mine]
            panels.append((f"{label} ({optimiser})", lines))
    return curves_figure(panels, columns=3, steps="step")


def save_toy(toy: Toy, out: Path) -> str:
    """Write toy.txt, toy.html, toy.json, rows.csv, counts.csv and the figures into ``out``; the text of the first.

    Raises:
        ValueError: ``out`` cannot be written.
    """
    blocks = toy_blocks(toy)
    rows, counts = [asdict(row) for row in toy.rows], [asdict(count) for count in toy.counts]
    held = [{"condition": words, "held": held} for words, held in conditions(toy)]
    record = {"study": asdict(toy.study), "conditions": held, "counts": counts, "rows": rows}
    files = {
        "toy.json": json.dumps(plain(record), indent=2),
        "rows.csv": csv_text(rows),
        "counts.csv": csv_text(counts),
    }
    return write_pages("toy", TITLE, blocks, files, out)
