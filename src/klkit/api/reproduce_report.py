"""What reproductions say: tables, figures and plain words, every word computed from the numbers."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from klkit.api.reproduce_gradient import BIASED, FORMULAS, PUBLISHED, GradientStudy, Spread
from klkit.api.reproduce_rlhf import Point
from klkit.api.tradeoff import ROOM, Comparison, ExactFrontier, Findings
from klkit.files import write_text
from klkit.report.pages import Block, Picture, page, plain_text
from klkit.report.reproductions import frontier_figure, ratios_figure, scatter_figure
from klkit.results import plain
from klkit.stats.spread import Scatter

LEVEL = 0.05


def gradient_markdown(study: GradientStudy, rows: Sequence[Spread]) -> str:
    """The table of a gradient study, and what it shows."""
    lines = [
        f"Gradients of KL(p‖q) in all weights: {study.prompts} prompts, one string each, {study.rollouts} rollouts a "
        f"checkpoint; the run was trained with {study.penalty}, coefficient {study.coefficient:g}. Ratios are over "
        f"mc_full, with 95 % intervals.",
        "",
        "| step | KL, nats | estimator | tr Cov | ratio | Var of norm | ratio | bias | z of bias |",
        "|" + "---|" * 9,
    ]
    for r in rows:
        total = f"{r.total:.4g} | {r.total_ratio:.3f} ({r.total_lower:.3f} to {r.total_upper:.3f})"
        norm = f"{r.norm:.4g} | {r.norm_ratio:.3f} ({r.norm_lower:.3f} to {r.norm_upper:.3f})"
        bias = f"{r.bias:.0%} ({r.bias_lower:.0%} to {r.bias_upper:.0%}) | {r.bias_z:+.1f}"
        lines.append(f"| {r.step} | {r.kl:.4f} ± {r.kl_error:.4f} | {r.method} | {total} | {norm} | {bias} |")
    formulas = (f"{name}: {formula}" for name, formula in FORMULAS.items())
    return "\n".join([*lines, "", "; ".join(formulas) + ".", "", *(f"- {x}" for x in gradient_words(rows)), ""])


def gradient_words(rows: Sequence[Spread]) -> list[str]:
    """What was found of each estimator, over the checkpoints."""
    out = []
    for method in FORMULAS:
        if method == "mc_full":
            continue
        mine = [row for row in rows if row.method == method]
        total = _count([(row.total_ratio, row.total_lower, row.total_upper) for row in mine])
        norm = _count([(row.norm_ratio, row.norm_lower, row.norm_upper) for row in mine])
        line = f"{method} against mc_full: total variance {total}; variance of the norm {norm}."
        if method in BIASED:
            seen = [row for row in mine if row.bias_z > 3]
            sizes = [row.bias for row in mine]
            line += (
                f" Biased: the bias is resolved (z > 3) at {len(seen)} of {len(mine)} checkpoints, from "
                f"{min(sizes):.0%} to {max(sizes):.0%} of the gradient's length."
            )
        out.append(line)
    free = [abs(row.bias_z) for row in rows if row.method not in (*BIASED, "rb")]
    out.append(f"Largest |z| of a bias among the unbiased estimators: {max(free):.1f} in {len(free)} looks.")
    ratio = PUBLISHED[1] / PUBLISHED[0]
    for other in ("mc_full", "mc"):
        ours, base = ([row.norm for row in rows if row.method == m] for m in ("rb", other))
        ratios = [one / two for one, two in zip(ours, base, strict=True)]
        out.append(
            f"Variance of the norm, rb over {other}: {np.median(ratios):.3f} (median over checkpoints; from "
            f"{min(ratios):.3f} to {max(ratios):.3f}). The paper prints {PUBLISHED[1]:.2f} / {PUBLISHED[0]:.2f} = "
            f"{ratio:.3f} for a set-up it does not describe."
        )
    return out


def _count(found: Sequence[tuple[float, float, float]]) -> str:
    """At how many checkpoints a ratio is below or above one, and its median."""
    less, more = sum(upper < 1 for _, _, upper in found), sum(lower > 1 for _, lower, _ in found)
    return (
        f"less at {less}, more at {more}, not resolved at {len(found) - less - more} of {len(found)} checkpoints "
        f"(median ratio {np.median([ratio for ratio, _, _ in found]):.3f})"
    )


def save_gradient(study: GradientStudy, rows: Sequence[Spread], out: Path) -> str:
    """Write gradient.md, .csv, .json, total.png and norm.png into ``out``; the text of the first.

    Raises:
        ValueError: ``out`` cannot be written.
    """
    text, table = gradient_markdown(study, rows), [asdict(row) for row in rows]
    files: dict[str, str | bytes] = {
        "gradient.md": text,
        "gradient.csv": csv_text(table),
        "gradient.json": json.dumps(plain({"study": asdict(study), "rows": table}), indent=2),
    }
    for name, label in (
        ("total", "total variance over that of mc_full"),
        ("norm", "variance of the norm over that of mc_full"),
    ):
        files[f"{name}.png"] = ratios_figure(table, name, label)
    write_files(files, out)
    return text


def save_rlhf(found: Findings, out: Path) -> str:
    """Write rlhf.md, points.csv, penalties.csv, rlhf.json, frontier.png and scatter.png; the text of the first.

    Raises:
        ValueError: ``out`` cannot be written.
    """
    text, points = rlhf_markdown(found), [asdict(point) for point in found.points]
    files: dict[str, str | bytes] = {
        "rlhf.md": text,
        "points.csv": csv_text(points),
        "penalties.csv": csv_text(arms_table(found)),
        "rlhf.json": json.dumps(plain(found.to_dict()), indent=2),
        "frontier.png": frontier_figure(
            [point for point in points if point["final"]], found.exact.divergences, found.exact.rewards, found.worst
        ),
        "scatter.png": scatter_figure(found.to_dict()["arms"]),
    }
    write_files(files, out)
    return text


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same names as CSV."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def write_files(files: Mapping[str, str | bytes], out: Path) -> None:
    """Write files by name into ``out``.

    Raises:
        ValueError: ``out`` cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            if isinstance(content, bytes):
                (out / name).write_bytes(content)
            else:
                write_text(out / name, content)
    except OSError as error:
        raise ValueError(f"expected to write into {out}, got: {error}; choose another --out") from error


def write_pages(name: str, title: str, blocks: Sequence[Block], files: Mapping[str, str], out: Path) -> str:
    """Write a report as ``{name}.txt`` and ``{name}.html``, its pictures and other files into ``out``; its text.

    Raises:
        ValueError: ``out`` cannot be written.
    """
    text = plain_text(blocks) + "\n"
    pictures = {block.name: block.png for block in blocks if isinstance(block, Picture)}
    write_files({f"{name}.txt": text, f"{name}.html": page(title, blocks), **files, **pictures}, out)
    return text


def rlhf_markdown(found: Findings) -> str:
    """Tables and plain words; every word is computed from the numbers."""
    study, first = found.study, found.arms[0]
    lines = [
        f"{len(study.arms)} KL penalties x {len(study.coefficients)} coefficients "
        f"({', '.join(f'{c:g}' for c in study.coefficients)}) x {study.seeds} seeds = "
        f"{sum(arm.runs for arm in found.arms)} runs of {study.steps} steps, {2 * study.prompts} strings a step; every "
        f"point measured on the same {study.held_out} held-out prompts, {study.strings} strings each, KL by rb_cv.",
        "",
        "| penalty | sd of reward | sd of KL, nats | sd ratio, reward | sd ratio, KL | mean objective | frontier | "
        "frontier, low KL | with half-way points | hypervolume |",
        "|" + "---|" * 10,
    ]
    for arm in found.arms:
        lines.append(
            f"| {arm.name} | {_range(arm.reward_scatter)} | {_range(arm.kl_scatter)} | {_range(arm.reward_ratio)} | "
            f"{_range(arm.kl_ratio)} | {arm.objective:.3f} | {_percent(arm.share)} | {_percent(arm.share_low)} | "
            f"{_percent(arm.share_all)} | {arm.area:.2f} |"
        )
    lines += [
        "",
        f"Intervals are 95 %; ratios are over {first.name}. The frontier of all final points has {found.frontier}; low "
        f"KL is below {found.worst[0] / 2:.2f} nats. A frontier of pooled runs also favours penalties whose runs "
        f"scatter, since the best of many tries count. Hypervolumes are those of single repetitions (all coefficients, "
        f"one seed), mean over seeds; they reach from the untrained reward "
        f"{found.worst[1]:.3f} to a KL of {found.worst[0]:.2f} nats, {ROOM:g} times the exact "
        f"optimum's at coefficient {min(study.coefficients):g}. The objective is reward - coefficient x KL.",
        "",
        f"| against {first.name} | its share of their common frontier | p | hypervolume | p | objective | p |",
        "|" + "---|" * 7,
    ]
    for arm in found.arms[1:]:
        v = arm.versus
        assert v is not None
        lines.append(
            f"| {arm.name} | {_percent(v.share)} | {v.share_p:.2g} | {v.area:+.3f} | {v.area_p:.2g} | "
            f"{v.objective:+.4f} | {v.objective_p:.2g} |"
        )
    lines += [
        "",
        f"Permutation tests of the labels within coefficient and seed, two-sided. With {len(found.arms) - 1} "
        f"comparisons a difference counts as resolved at p <= {LEVEL / (len(found.arms) - 1):.3g}.",
        "",
        *(f"- {line}" for line in rlhf_words(found)),
        "",
        *_objectives(found),
    ]
    return "\n".join(lines) + "\n"


def rlhf_words(found: Findings) -> list[str]:
    """What was found, a sentence a comparison: more, less, better, worse, or not resolved."""
    first, out = found.arms[0].name, []
    limit = LEVEL / (len(found.arms) - 1)
    for arm in found.arms[1:]:
        v = arm.versus
        assert v is not None
        scatter = ", ".join(
            f"{what} {_scatter_word(ratio)} (x {ratio.value:.2f}, {ratio.lower:.2f} to {ratio.upper:.2f})"
            for what, ratio in (("reward", arm.reward_ratio), ("KL", arm.kl_ratio))
        )
        tested = ", ".join(
            f"{what} {_word(gap, p, limit)} ({gap:+.3f}, p = {p:.2g})"
            for what, gap, p in (
                ("hypervolume", v.area, v.area_p),
                ("objective", v.objective, v.objective_p),
                ("frontier share", 2 * v.share - 1, v.share_p),
            )
        )
        ends = f"; {arm.stopped} of {arm.runs} runs came apart" if arm.stopped else ""
        out.append(f"{arm.name} against {first}: scatter of {scatter}; {tested}{ends}.")
    if found.arms[0].stopped:
        out.append(f"{found.arms[0].stopped} of {found.arms[0].runs} runs of {first} came apart.")
    beyond = sum(_above(found.exact, point) for point in found.points)
    out.append(
        f"{beyond} of {len(found.points)} points lie above the exact frontier of the grammar by more than three "
        f"standard errors of their reward (the reference model is not quite the grammar)."
    )
    return out


def _objectives(found: Findings) -> list[str]:
    """Mean objective by coefficient, beside the exact optimum's."""
    study = found.study
    lines = [
        "| mean objective | " + " | ".join(f"coefficient {c:g}" for c in study.coefficients) + " |",
        "|" + "---|" * (len(study.coefficients) + 1),
    ]
    for name in study.arms:
        cells = []
        for c in study.coefficients:
            mine = [x.reward - c * x.kl for x in found.points if x.final and x.arm == name and x.coefficient == c]
            cells.append(f"{np.mean(mine):.3f} ± {np.std(mine, ddof=1) / len(mine) ** 0.5:.3f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    best = [found.exact.at(c) for c in study.coefficients]
    exact = (f"{r - c * k:.3f}" for c, (r, k) in zip(study.coefficients, best, strict=True))
    return [*lines, "| exact optimum of the grammar | " + " | ".join(exact) + " |"]


def _above(exact: ExactFrontier, point: Point) -> bool:
    """Whether a point has more reward than any law of its KL can have."""
    best = float(np.interp(point.kl, exact.divergences, exact.rewards))
    return point.reward - 3 * point.reward_error > best


def _scatter_word(ratio: Scatter) -> str:
    return "smaller" if ratio.upper < 1 else "larger" if ratio.lower > 1 else "not resolved"


def _word(gap: float, p: float, limit: float) -> str:
    return "not resolved" if p > limit or gap == 0 else "better" if gap > 0 else "worse"


def _range(x: Scatter) -> str:
    return f"{x.value:.3g} ({x.lower:.3g} to {x.upper:.3g})"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.0%}"


def arms_table(found: Findings) -> list[Mapping[str, Any]]:
    """One flat row an arm, for a CSV file."""
    rows: list[Mapping[str, Any]] = []
    for arm in found.arms:
        row: dict[str, Any] = {}
        for name, value in asdict(arm).items():
            nested = value if isinstance(value, dict) else {"": value}
            row |= {f"{name}_{key}".rstrip("_"): cell for key, cell in nested.items()}
        if arm.versus is None:
            empty = Comparison(*[math.nan] * 6)
            row |= {f"versus_{key}": value for key, value in asdict(empty).items()}
            row.pop("versus", None)
        rows.append(row)
    return rows
