"""The page of a distillation run, from what its folder records: headline, label, curves, every number."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from klkit.files import write_text
from klkit.report.distillation_plots import (
    evaluated_figure,
    loss_figure,
    rate_figure,
    sequence_figure,
)
from klkit.report.html import page
from klkit.report.plots import BLUE, GREY, ORANGE
from klkit.report.quantities import QUANTITIES
from klkit.report.record import REPORT, RunFolderError, disk_errors

CONFIG, ENV, METRICS, EVALUATIONS = "config.yaml", "env.json", "metrics.jsonl", "evaluations.jsonl"

Line = Mapping[str, Any]

COLUMNS = {
    "kl": "KL(t‖s)",
    "reverse_kl": "KL(s‖t)",
    "text_kl": "a token",
    "text_reverse_kl": "reverse",
    "text_head_gap": "head gap",
    "text_tail_gap": "tail gap",
    "text_far_mass": "far mass",
    "text_same_top": "same top",
    "exposure_bias": "exposure",
    "rouge_l": "Rouge-L",
    "distinct_2": "distinct-2",
    "length": "length",
}
"""What the table of evaluations shows; ``a token`` and ``reverse`` are next-token divergences on the held-out text."""

FIGURES = (
    ("Next-token divergences on the held-out text", "nats per token",
     [("text_kl", "KL(teacher‖student)", BLUE), ("text_reverse_kl", "KL(student‖teacher)", ORANGE)]),
    ("Where the laws differ: Σ|p − q|", "per token",
     [("text_head_gap", "in the teacher's head", BLUE), ("text_tail_gap", "in its tail", ORANGE)]),
    ("Mass where the teacher's p < 1e-4", "share",
     [("text_far_mass", "student's", BLUE), ("text_far_mass_teacher", "teacher's own", GREY)]),
    ("After the student's prefixes, and the teacher's", "KL(t‖s), nats per token",
     [("own_kl", "student's", BLUE), ("given_kl", "teacher's", GREY)]),
)  # fmt: skip


def write_distillation_report(folder: str | Path) -> Path:
    """Write ``report.html`` into the folder of a distillation run, finished or not, and return its path.

    Raises:
        RunFolderError: it is no such folder, or cannot be read or written.
    """
    folder = Path(folder)
    try:
        config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        env = json.loads((folder / ENV).read_text(encoding="utf-8"))
        metrics, evaluations = (lines(folder / name) for name in (METRICS, EVALUATIONS))
        text = render(config, env, metrics, evaluations)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise RunFolderError(
            f"expected the folder of a distillation run, with {CONFIG}, {ENV}, {METRICS} and {EVALUATIONS}, got "
            f"{folder}: {type(error).__name__}: {error}; name the --out of klkit distill"
        ) from error
    with disk_errors(folder):
        write_text(folder / REPORT, text)
    return folder / REPORT


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a jsonl file but for one that a crash cut off."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(dict(json.loads(text)))
        except ValueError:
            continue
    return found


def render(config: Line, env: Line, metrics: Sequence[Line], evaluations: Sequence[Line]) -> str:
    """The page as text.

    Args:
        config: options of the run, those of its recipe within ``recipe``.
        env: versions, digests, and ``objective``: lines that say what is optimised.
        metrics: a line a step.
        evaluations: a line an evaluation, the first one before any step.
    """
    label, *notes = env["objective"]
    first, last = (evaluations[0], evaluations[-1]) if evaluations else (None, None)
    return page(
        "distillation.html",
        config=config,
        env=env,
        label=label,
        label_holds="NOT" not in label,
        notes=[*notes, *(last["notes"] if last else [])],
        first=first,
        last=last,
        steps=metrics[-1]["step"] if metrics else 0,
        figure_sequence=sequence_figure(evaluations) if evaluations else "",
        figures=[
            *(
                (title, figure)
                for title, label, curves in FIGURES
                if (figure := evaluated_figure(evaluations, curves, label))
            ),
            *(
                [("Loss of each step", loss_figure(metrics)), ("Learning rate", rate_figure(metrics))]
                if metrics
                else []
            ),
        ],
        columns={name: words for name, words in COLUMNS.items() if last and name in last},
        evaluations=evaluations,
        quantities={name: q for name, q in QUANTITIES.items() if last and name in last},
    )
