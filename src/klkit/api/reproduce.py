"""The estimator table of arXiv 2504.10637 on a pair of one's own: means, spreads, negative estimates.

One pool of strings is drawn for every prompt. It is cut into groups of M strings, each group gives one
estimate a prompt, and the spread of those estimates over groups is what the table shows. Estimators
that fit coefficients do so across the prompts of one group, cross-fitted.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from klkit.api.prepare import load_models, make_plan, prepare, resolved
from klkit.api.prompts import read_prompts
from klkit.api.run import draw_batches
from klkit.api.settings import Settings
from klkit.api.strings import Observer
from klkit.estimators import ESTIMATORS
from klkit.estimators.statistics import TokenStatistics
from klkit.files import write_text
from klkit.report.plots import per_prompt_figure
from klkit.results import jsonable
from klkit.rng import numpy_stream
from klkit.sequences import Prompts

Array = NDArray[np.float64]
NAMES = {
    "mc": "Monte Carlo",
    "k3_string": "control variate, alpha = 1",
    "cv_string": "control variate, fitted alpha",
    "ht": "Horvitz-Thompson",
    "rb": "Rao-Blackwell",
    "rb_cv": "Rao-Blackwell with variates",
}
SIZES = (1, 5, 10)
GROUPS = 200  # estimates a prompt, at most
RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Row:
    """One estimator at one number of strings a prompt; all numbers in nats per response.

    Attributes:
        method: key of the estimator.
        strings: strings a prompt and estimate (M).
        estimates: estimates a prompt, over which spreads are taken.
        mean: average over prompts and estimates.
        mean_error: its standard error.
        std: root mean square over prompts of the standard deviation of a prompt's estimate.
        std_error: its standard error (bootstrap over groups).
        std_of_average: standard deviation of the average over all prompts.
        negative: share of a prompt's estimates below zero.
    """

    method: str
    strings: int
    estimates: int
    mean: float
    mean_error: float
    std: float
    std_error: float
    std_of_average: float
    negative: float


@dataclass(frozen=True, slots=True)
class Table:
    """The table, and the per-prompt spreads behind the figure.

    Attributes:
        rows: a row for each estimator and size.
        per_prompt: method to the standard deviation of each prompt's single-string estimate, ``(k,)``.
        prompts: how many prompts.
    """

    rows: tuple[Row, ...]
    per_prompt: dict[str, Array]
    prompts: int

    def to_csv(self) -> str:
        """The rows as CSV."""
        out = io.StringIO()
        writer = csv.DictWriter(out, fieldnames=list(asdict(self.rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        return out.getvalue()

    def to_markdown(self) -> str:
        """The rows as a Markdown table: mean ± its error, spread ± its error, share of negative estimates."""
        sizes = sorted({row.strings for row in self.rows})
        head = "| estimator | mean | " + " | ".join(f"std, M = {m}" for m in sizes) + " | negative, M = 1 |"
        text = [head, "|" + "---|" * (len(sizes) + 3)]
        for method, name in NAMES.items():
            mine = {row.strings: row for row in self.rows if row.method == method}
            first = mine[sizes[0]]
            spreads = " | ".join(f"{mine[m].std:.3g} ± {mine[m].std_error:.1g}" for m in sizes)
            text.append(f"| {name} | {first.mean:.3f} ± {first.mean_error:.3f} | {spreads} | {first.negative:.1%} |")
        return "\n".join(text)


def estimator_table(statistics: TokenStatistics, *, sizes: Sequence[int] = SIZES, seed: int = 0) -> Table:
    """Spread of every estimator over groups of M strings a prompt, from one pool of strings.

    Args:
        statistics: the pool: equally many strings for each of several prompts.

    Raises:
        ValueError: the pool is uneven, or too small for two groups of the largest size.
    """
    prompt = statistics.x.prompt.numpy()
    labels, counts = np.unique(prompt, return_counts=True)
    if len(set(counts.tolist())) != 1 or counts[0] < 2 * max(sizes):
        raise ValueError(
            f"expected equally many strings for every prompt and at least {2 * max(sizes)}, got from {counts.min()} "
            f"to {counts.max()}; draw a larger pool"
        )
    order = np.argsort(prompt, kind="stable").reshape(len(labels), counts[0])  # (prompt, replicate)
    rows: list[Row] = []
    per_prompt: dict[str, Array] = {}
    for size in sizes:
        groups = min(int(counts[0]) // size, GROUPS)
        found: dict[str, list[Array]] = {method: [] for method in NAMES}
        for g in range(groups):
            chosen = order[:, g * size : (g + 1) * size]
            part = statistics.select(torch.from_numpy(chosen.reshape(-1)))
            for method, values in found.items():
                values.append(ESTIMATORS[method](part).reshape(chosen.shape).mean(1))
        for method, values in found.items():
            estimates = np.stack(values)  # (group, prompt)
            rows.append(summarise_spread(method, size, estimates, seed))
            if size == sizes[0]:
                per_prompt[method] = estimates.std(0, ddof=1)
    return Table(tuple(rows), per_prompt, len(labels))


def summarise_spread(method: str, size: int, estimates: Array, seed: int) -> Row:
    """A row of the table from estimates ``(group, prompt)``."""
    groups, _ = estimates.shape
    averages = estimates.mean(1)
    pick = numpy_stream(seed, "reproduce", method, size).integers(0, groups, (RESAMPLES, groups))
    squares, first = (estimates**2).mean(1), estimates
    resampled = []
    for chosen in pick:
        mean = first[chosen].mean(0)
        resampled.append(np.sqrt(max(squares[chosen].mean() - (mean**2).mean(), 0.0)))
    return Row(
        method=method,
        strings=size,
        estimates=groups,
        mean=float(averages.mean()),
        mean_error=float(averages.std(ddof=1) / groups**0.5),
        std=float(np.sqrt(estimates.var(0, ddof=1).mean())),
        std_error=float(np.std(resampled)),
        std_of_average=float(averages.std(ddof=1)),
        negative=float((estimates < 0).mean()),
    )


def reproduce_estimators(
    p_spec: str,
    q_spec: str,
    *,
    prompts: str,
    count: int,
    pool: int,
    max_tokens: int,
    seed: int,
    observe: Observer | None = None,
) -> Table:
    """Draw the pool and make the table.

    Raises:
        ValueError: as :func:`klkit.api.run.run` and :func:`estimator_table`.
    """
    settings = resolved(Settings(p=p_spec, q=q_spec, prompts=prompts, samples=pool, max_tokens=max_tokens, seed=seed))
    chosen = Prompts(read_prompts(prompts).contents[:count])
    pair = prepare(*load_models(settings), settings)
    plan, _ = make_plan(pair, settings, chosen)
    batches: list[TokenStatistics] = []
    draw_batches(pair, plan, settings, lambda batch: batches.append(batch.statistics), observe=observe)
    return estimator_table(TokenStatistics.cat(batches), seed=seed)


def save_table(table: Table, out: Path) -> None:
    """Write table.md, table.csv, table.json and per_prompt.png into ``out``.

    Raises:
        ValueError: ``out`` cannot be written.
    """
    rows = [{name: jsonable(v) if isinstance(v, float) else v for name, v in asdict(row).items()} for row in table.rows]
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "table.md", table.to_markdown() + "\n")
        write_text(out / "table.csv", table.to_csv())
        write_text(out / "table.json", json.dumps({"rows": rows}, indent=2))
        (out / "per_prompt.png").write_bytes(per_prompt_figure({NAMES[m]: s for m, s in table.per_prompt.items()}))
    except OSError as error:
        raise ValueError(f"expected to write the table into {out}, got: {error}; choose another --out") from error
