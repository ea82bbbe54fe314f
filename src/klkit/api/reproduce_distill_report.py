"""What the students show: paired differences with intervals, a sentence a comparison, and which orderings held."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from klkit.api.reproduce_distill import ARMS, TIERS, Distillation
from klkit.api.reproduce_distill_train import SEQUENCE_REVERSE_KL
from klkit.api.reproduce_report import csv_text, write_pages
from klkit.objectives.distill_labels import claim
from klkit.objectives.distill_losses import token_loss
from klkit.report.pages import Block, Heading, Items, Picture, Table
from klkit.report.reproductions import curves_figure, points_figure
from klkit.results import plain
from klkit.stats.paired import PairedDifference, Verdict, holm, paired_difference, verdicts
from klkit.zoo.instructions import entropy, mean_length

TITLE = "Distillation with every divergence, seed by seed"
LEVEL = 0.05
ORDER = ("better", "worse", "higher", "lower", "equivalent", "not resolved")
SIGNS = "+-><=?"


@dataclass(frozen=True, slots=True)
class Measure:
    """What students are compared by.

    Attributes:
        label: for readers.
        good: 1 where more is better, -1 where less is, 0 where neither.
        margin: difference that does not matter: absolute, or as a share of what ``sum`` reaches.
        relative: which of the two.
        digits: to print.
    """

    label: str
    good: int
    margin: float
    relative: bool = True
    digits: int = 3


MEASURES = {
    "forward_kl": Measure("KL(p‖q) a token", -1, 0.05),
    "reverse_kl": Measure("KL(q‖p) a token", -1, 0.05),
    "head_gap": Measure("head gap", -1, 0.05),
    "far_tail": Measure("far-tail mass", -1, 0.05, digits=4),
    "sequence_forward_kl": Measure("KL(p‖q) a response", -1, 0.05, digits=2),
    "sequence_reverse_kl": Measure("KL(q‖p) a response", -1, 0.05, digits=2),
    "own_reverse_kl": Measure("KL(q‖p) on own text", -1, 0.05),
    "rouge_l": Measure("Rouge-L", 1, 0.5, relative=False, digits=1),
    "distinct_2": Measure("distinct-2", 0, 0.5, relative=False, digits=1),
}
"""Compared, by name; ``p`` is the teacher and ``q`` the student."""
COLUMNS = {
    "forward_kl": "FKL", "reverse_kl": "RKL", "head_gap": "head", "far_tail": "far", "sequence_forward_kl": "seqFKL",
    "sequence_reverse_kl": "seqRKL", "own_reverse_kl": "ownRKL", "rouge_l": "RougeL", "distinct_2": "dist2",
}  # fmt: skip
"""Their names in tables of 80 columns."""
PAIRS = (
    ("fkl", "rkl"), ("sum", "fkl"), ("sum", "rkl"), ("akl", "fkl"), ("akl", "rkl"), ("akl", "sum"),
    ("akl", "akl_inside"), ("akl", "akl_r"), ("jsd", "sum"), ("fkl", "sft"), ("seqkd", "sft"),
    ("fkl_teacher", "seqkd"), ("fkl_teacher", "fkl"), ("akl_teacher", "akl"), ("rkl_own", "rkl"),
    ("rkl_sequence", "rkl_own"),
)  # fmt: skip
"""Comparisons that were chosen before any result."""
ORDERINGS = (
    ("rkl", "fkl", "reverse_kl"), ("rkl", "fkl", "far_tail"), ("rkl", "fkl", "distinct_2"),
    ("sum", "fkl", "reverse_kl"), ("sum", "rkl", "forward_kl"), ("akl", "fkl", "reverse_kl"),
    ("akl", "rkl", "forward_kl"),
)  # fmt: skip
"""(less, more, measure) that robustly came out before, and have to again."""


@dataclass(frozen=True, slots=True)
class Compared:
    """Two losses by one measure.

    Attributes:
        tier: of the experiment.
        first: the first loss.
        second: the second loss.
        measure: key of :data:`MEASURES`.
        difference: ``first − second`` over seeds.
        p: adjusted over the pairs of this tier and measure (Holm).
        verdict: of the first against the second.
    """

    tier: str
    first: str
    second: str
    measure: str
    difference: PairedDifference
    p: float
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Ordering:
    """Whether one loss came out below another.

    Attributes:
        less: the loss that should be below.
        more: the loss that should be above.
        measure: by which measure.
        difference: ``less − more`` over seeds.
        p: adjusted over all orderings (Holm).
        word: ``"held"``, ``"reversed"`` or ``"not resolved"``.
    """

    less: str
    more: str
    measure: str
    difference: PairedDifference
    p: float
    word: str


def comparisons(found: Distillation, tier: str) -> list[Compared]:
    """Every pair of a tier by every measure; one measure's pairs are one family."""
    arms = found.study.sets(tier)[0]
    pairs = [(a, b) for a, b in PAIRS if a in arms and b in arms]
    out = []
    for name, measure in MEASURES.items():
        if not pairs or not _has(found, tier, name):
            continue
        differences = [paired_difference(*(found.values(tier, arm, name) for arm in pair)) for pair in pairs]
        base = float(np.mean(found.values(tier, "sum" if "sum" in arms else pairs[0][1], name)))
        # Where sum leaves nothing, as a far tail that is empty, nothing but equality is equivalent.
        margin = max(measure.margin * (abs(base) if measure.relative else 1.0), 1e-12)
        judged = verdicts(differences, [margin] * len(pairs), good=measure.good, alpha=LEVEL)
        for (a, b), difference, (p, verdict) in zip(pairs, differences, judged, strict=True):
            out.append(Compared(tier, a, b, name, difference, p, verdict))
    return out


def orderings(found: Distillation) -> list[Ordering]:
    """What has to come out again on the instruction language."""
    wanted = [x for x in ORDERINGS if {x[0], x[1]} <= set(found.study.arms)]
    differences = [
        paired_difference(*(found.values("language", arm, measure) for arm in (less, more)))
        for less, more, measure in wanted
    ]
    out = []
    for (less, more, measure), difference, p in zip(wanted, differences, holm([d.p for d in differences]), strict=True):
        word = "not resolved" if p > LEVEL else "held" if difference.mean < 0 else "reversed"
        out.append(Ordering(less, more, measure, difference, p, word))
    return out


def distill_blocks(found: Distillation) -> list[Block]:
    """The report, in the order of reading."""
    study = found.study
    blocks: list[Block] = [
        f"p is the teacher, q a student; FKL = KL(p‖q), RKL = KL(q‖p), in nats. Students of one seed share their "
        f"start, {study.warm} steps on the text's tokens and all batches, and differ in the loss. Every statement is "
        f"about differences between students of the same seed.",
        Heading("Orderings that have to come out again"),
        f"On the instruction language; held if the sign is right and the adjusted p-value (Holm, two-sided) at most "
        f"{LEVEL:g}. Nothing is required of akl against sum.",
        Items([_ordering_words(x) for x in orderings(found)]),
        Heading("What each student descends"),
        "A batch's sum is divided by its tokens: where the quantity is one of whole responses, the gradient is "
        "unbiased up to that factor, which varies.",
        Items([f"{arm}: {_descends(arm)}" for arm in study.arms]),
    ]
    for tier in TIERS:
        blocks += _tier_blocks(found, tier)
    return blocks


def _tier_blocks(found: Distillation, tier: str) -> list[Block]:
    study, teacher = found.study, found.teachers[tier]
    arms, seeds = study.sets(tier)
    if tier == "language":
        where = (
            f"The law of the language is known: {entropy() / mean_length():.3f} nats a token. Teacher: 2 layers, width "
            f"96, {study.teacher_steps} steps; cross-entropy {teacher['cross_entropy']:.3f}, Rouge-L "
            f"{teacher['rouge_l']:.1f}, distinct-2 {teacher['distinct_2']:.1f}. Students: 1 layer, width 32, "
            f"{study.steps} steps on {study.strings} strings."
        )
    else:
        where = (
            f"Teacher: klkit:docs, cross-entropy {teacher['cross_entropy']:.3f}. Students: 1 layer, width 48, "
            f"{study.documentation_steps} steps on {study.documentation_strings} paragraphs of Python's documentation."
        )
    mine = comparisons(found, tier)
    names = [name for name in COLUMNS if _has(found, tier, name)]
    rows = [
        [arm, *(f"{np.mean(found.values(tier, arm, name)):.{MEASURES[name].digits}f}" for name in names)]
        for arm in arms
    ]
    spread = [
        [arm, *(f"{np.std(found.values(tier, arm, name), ddof=1):.{MEASURES[name].digits}f}" for name in names)]
        for arm in arms
    ]
    blocks: list[Block] = [
        Heading("The instruction language" if tier == "language" else "Natural text: Python's documentation"),
        f"{where} {seeds} seeds, {len(arms) * seeds} students.",
        "Means over seeds at the end. FKL, RKL, head gap and far-tail mass per token of held-out text; seqFKL and "
        "seqRKL per response, by rb_cv; ownRKL per token of the student's own answers.",
        Table(["loss", *(COLUMNS[name] for name in names)], rows),
        "Standard deviations over seeds:",
        Table(["loss", *(COLUMNS[name] for name in names)], spread),
        f"Comparisons, first against second: mean difference with its 95 % interval. The words hold for all "
        f"{len({(c.first, c.second) for c in mine})} comparisons of a measure together (Holm, {LEVEL:g}). Equivalent "
        "means within 5 % of what sum reaches, or 0.5 points of Rouge-L or distinct-2: the margin. Where nothing is "
        "resolved, so many seeds (if more than there are) would find a difference as large as the margin.",
        _signs(mine),
        "+ better, - worse, > higher, < lower, = equivalent, ? not resolved; in brackets if within the margin.",
        Items(pair_words(mine)),
    ]
    label = "" if tier == "language" else "documentation-"
    blocks.append(
        Picture(_curves(found, tier), f"{label}curves.png", "Means over seeds on held-out text against the step; "
                "w is the head's share of the difference, which is akl's weight of FKL."),
    )  # fmt: skip
    if _has(found, tier, "rouge_l"):
        blocks.append(
            Picture(_points(found, tier, "rouge_l", "distinct_2", "Rouge-L", "distinct-2"), f"{label}diversity.png",
                    "Quality against variety of free answers; bars are standard errors over seeds."),
        )  # fmt: skip
    blocks.append(
        Picture(_points(found, tier, "reverse_kl", "own_reverse_kl", "KL(q‖p) at prefixes of the text, nats a token",
                        "KL(q‖p) at its own prefixes", diagonal=True), f"{label}exposure.png",
                "Exposure: above the dotted line a student is further from the teacher on its own text."),
    )  # fmt: skip
    return blocks


def _signs(compared: Sequence[Compared]) -> Table:
    """A sign for every comparison by every measure."""
    names = list(dict.fromkeys(c.measure for c in compared))
    rows = []
    for first, second in dict.fromkeys((c.first, c.second) for c in compared):
        cells = []
        for name in names:
            verdict = next(c.verdict for c in compared if (c.first, c.second, c.measure) == (first, second, name))
            sign = SIGNS[ORDER.index(verdict.word)]
            cells.append(f"({sign})" if verdict.small else sign)
        rows.append([f"{first}/{second}", *cells])
    return Table(["first/second", *(COLUMNS[name] for name in names)], rows)


def pair_words(compared: Sequence[Compared]) -> list[str]:
    """A sentence a comparison: by which measures better, worse, equivalent, or not resolved."""
    out = []
    for first, second in dict.fromkeys((c.first, c.second) for c in compared):
        groups: dict[str, list[str]] = {}
        for c in compared:
            if (c.first, c.second) == (first, second):
                d, m = c.difference, MEASURES[c.measure]
                bounds = f"{d.lower:+.{m.digits}f} to {d.upper:+.{m.digits}f}"
                needed = c.verdict.seeds
                seeds = f"; {needed} seeds" if needed is not None and needed > d.seeds else ""
                word = f"{c.verdict.word}, within the margin" if c.verdict.small else c.verdict.word
                groups.setdefault(word, []).append(f"{m.label} {d.mean:+.{m.digits}f} ({bounds}{seeds})")
        words = sorted(groups, key=lambda word: ORDER.index(word.split(",")[0]))
        parts = [f"{word.upper()}: {', '.join(groups[word])}" for word in words]
        out.append(f"{first} against {second}: {'; '.join(parts)}.")
    return out


def _ordering_words(x: Ordering) -> str:
    d, m = x.difference, MEASURES[x.measure]
    return (
        f"{x.word}: {x.less} below {x.more} in {m.label} ({d.mean:+.{m.digits}f}, {d.lower:+.{m.digits}f} to "
        f"{d.upper:+.{m.digits}f}, adjusted p = {x.p:.2g}, same sign in {d.same_sign} of {d.seeds} seeds)"
    )


def _descends(name: str) -> str:
    arm = ARMS[name]
    formula = token_loss(arm.loss).formula.partition(";")[0]
    words = f"{formula}, on {'the text' if arm.text == 'data' else 'answers of the teacher'}"
    if arm.own is None:
        return f"{words}. It optimises: {claim(token_loss(arm.loss), arm.text)}."
    score = arm.own == SEQUENCE_REVERSE_KL
    own = token_loss("reverse_kl" if score else arm.own)
    return (
        f"as {arm.loss} for half of the steps, then at the student's own prefixes"
        f"{', with the score of later divergences' if score else ''}. That optimises: "
        f"{claim(own, 'student', score=score)}."
    )


def _has(found: Distillation, tier: str, name: str) -> bool:
    return all(name in x.final for x in found.students if x.tier == tier)


def _curves(found: Distillation, tier: str) -> bytes:
    panels = []
    for name, label in (
        ("head_gap", "head gap"), ("far_tail", "far-tail mass"), ("head_weight", "w, share of the head"),
        ("forward_kl", "KL(p‖q), nats a token"), ("reverse_kl", "KL(q‖p), nats a token"),
        ("agreement", "same likeliest token"),
    ):  # fmt: skip
        lines = {}
        for arm in found.study.sets(tier)[0]:
            mine = [x.curve for x in found.students if (x.tier, x.arm) == (tier, arm)]
            steps = [int(point["step"]) for point in mine[0]]
            lines[arm] = steps, np.mean([[point[name] for point in curve] for curve in mine], axis=0).tolist()
        panels.append((label, lines))
    return curves_figure(panels, columns=3, steps="step")


def _points(
    found: Distillation, tier: str, across: str, up: str, x_label: str, y_label: str, *, diagonal: bool = False
) -> bytes:
    points = {}
    for arm in found.study.sets(tier)[0]:
        x, y = (np.array(found.values(tier, arm, name)) for name in (across, up))
        error = [float(v.std(ddof=1) / len(v) ** 0.5) for v in (x, y)]
        points[arm] = float(x.mean()), error[0], float(y.mean()), error[1]
    return points_figure(points, x_label, y_label, diagonal=diagonal)


def save_distillation(found: Distillation, out: Path) -> str:
    """Write distill.txt, .html, .json, students.csv, comparisons.csv and the figures into ``out``; the first's text.

    Raises:
        ValueError: ``out`` cannot be written.
    """
    blocks = distill_blocks(found)
    compared = [c for tier in TIERS for c in comparisons(found, tier)]
    checks = [
        {"tier": x.tier, "arm": x.arm, "seed": x.seed, **point} for x in found.students for point in x.curve
    ]  # fmt: skip
    finals = [
        {"tier": x.tier, "arm": x.arm, "seed": x.seed, "measure": name, "value": value}
        for x in found.students
        for name, value in x.final.items()
    ]
    flat = [
        {"tier": c.tier, "first": c.first, "second": c.second, "measure": c.measure, **asdict(c.difference),
         "adjusted_p": c.p, **asdict(c.verdict)}
        for c in compared
    ]  # fmt: skip
    record = {
        "study": asdict(found.study),
        "teachers": found.teachers,
        "orderings": [asdict(x) for x in orderings(found)],
        "comparisons": flat,
        "students": [asdict(x) for x in found.students],
    }
    files = {
        "distill.json": json.dumps(plain(record), indent=1),
        "curves.csv": csv_text(checks),
        "finals.csv": csv_text(finals),
        "comparisons.csv": csv_text(flat),
    }
    return write_pages("distill", TITLE, blocks, files, out)
