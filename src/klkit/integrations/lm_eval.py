"""Benchmark results of lm-evaluation-harness beside divergences: what changed on tasks, paired document by document.

All models answer the same documents, so what counts is the scatter of their differences, not of their scores: two
accuracies whose error bars overlap may well differ. Where the harness kept its samples (``--log_samples``), each
difference from the reference gets an interval and a test; elsewhere it gets none, rather than one that pretends that
the models had seen different documents. Nothing of the harness itself is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from klkit.frames import frame
from klkit.integrations.lm_eval_files import Evaluation, by_document, read_results, units_of
from klkit.ranking import Ranking
from klkit.report.html import number
from klkit.report.markdown import quantity, table
from klkit.report.ranking import cell
from klkit.results import Comparison
from klkit.stats.intervals import MINIMUM_CLUSTERS, cluster_totals, ratio_interval, ratio_stderr
from klkit.stats.mcnemar import mcnemar_p
from klkit.stats.paired import holm
from klkit.stats.student import student_tail

LEVEL = 0.95
NO_SAMPLES = "not tested: no samples (run lm_eval with --log_samples)"


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One metric of one task, of a candidate and of the reference.

    Attributes:
        candidate: the model.
        kl: its divergence from the reference, as the result has it: ``value``, ``unit``, ``ci``, …
        task: name of the task.
        metric: name of the metric and of the harness' filter, such as ``"acc,none"``.
        reference: the metric of the reference.
        value: the metric of the candidate.
        difference: ``value − reference``.
        stderr: standard error of the paired difference; NaN where there is no test.
        lower: bounds of its 95 % interval, ``lower`` and ``upper``.
        upper: see ``lower``.
        p: two-sided p-value of no difference.
        adjusted: the same after Holm's correction over all tests of the table.
        verdict: ``"better"``, ``"worse"`` (``"higher"``, ``"lower"`` where no direction is good) or ``"not resolved"``;
            else why there is no test.
        documents: how many both models answered.
        method: of the test.
    """

    candidate: str
    kl: Mapping[str, Any]
    task: str
    metric: str
    reference: float
    value: float
    difference: float
    stderr: float = math.nan
    lower: float = math.nan
    upper: float = math.nan
    p: float = math.nan
    adjusted: float = math.nan
    verdict: str = NO_SAMPLES
    documents: int = 0
    method: str = ""


@dataclass(frozen=True, slots=True)
class Beside:
    """Divergences and benchmark results side by side.

    Attributes:
        reference: the model that all are compared with.
        rows: one a candidate, task and metric.
    """

    reference: str
    rows: tuple[TaskRow, ...]

    def markdown(self) -> str:
        """A table in Markdown."""
        columns = ["candidate", quantity(self.rows[0].kl), "task", "metric", "p's", "candidate's"]
        columns += ["difference", f"{LEVEL:.0%} interval (paired)", "p-value", "adjusted", "verdict"]
        lines = []
        for row in self.rows:
            tested = not math.isnan(row.p)
            width = f"{number(row.lower)} to {number(row.upper)}" if not math.isnan(row.lower) else "–"
            numbers = [number(row.reference), number(row.value), f"{row.difference:+.4g}", width]
            numbers += [f"{row.p:.2g}" if tested else "–", f"{row.adjusted:.2g}" if tested else "–", row.verdict]
            names = [row.candidate, number(row.kl["value"]), row.task, row.metric.removesuffix(",none")]
            lines.append([cell(text) for text in (*names, *numbers)])
        tests = sum(not math.isnan(row.p) for row in self.rows)
        said = (
            f"Differences from p = {cell(self.reference)} on the same documents. {tests} tests, Holm-adjusted together "
            f"at {1 - LEVEL:.0%}: exact McNemar for right and wrong, paired t over independent units otherwise."
        )
        return "\n".join([*table(columns, lines), "", said]) + "\n"

    def to_dataframe(self) -> Any:
        """One row a candidate, task and metric, as a pandas ``DataFrame``.

        Raises:
            ImportError: pandas is not installed.
        """
        names = [name for name in TaskRow.__slots__ if name != "kl"]
        return frame([{"kl": row.kl["value"], **{name: getattr(row, name) for name in names}} for row in self.rows])

    def _repr_markdown_(self) -> str:
        return self.markdown()


def beside(
    measured: Ranking | Comparison | Mapping[str, Any],
    results: Mapping[str, str | Path],
    *,
    cluster: str | None = None,
) -> Beside:
    """Put each candidate's task results beside its divergence, with its paired difference from the reference.

    ``d = Σ_i (x_i − y_i) / n`` over documents ``i``, with ``x`` the candidate's score and ``y`` the reference's.

    Args:
        measured: a ranking, a result, or either read from ``result.json``.
        results: the harness' ``results_….json`` by model: of the reference (its name, or ``"p"``) and of candidates
            (their names; ``"q"`` for that of a single result). Samples are looked for beside each file.
        cluster: field of the documents that says which of them belong together, such as a passage with several
            questions; without it documents are independent.

    Raises:
        ValueError: no file of the reference, a model that was not measured, files that cannot be read, or that differ
            in their documents, tasks' versions or numbers of shots.

    Example:
        >>> result = {"settings": {"p": "base", "q": "int4"}, "headline": {}}
        >>> beside(result, {"int4": "int4/results.json"})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: expected result files of the reference ...

    Source: Q. McNemar (1947), Psychometrika 12(2), for right and wrong; clusters as in E. Miller (2024), Adding Error
    Bars to Evals, arXiv 2411.00640.
    """
    result = measured if isinstance(measured, Mapping) else measured.to_dict()
    reference, candidates = models_of(result)
    given = {("p" if name == reference else name): Path(path) for name, path in results.items()}
    if "q" in given and "candidates" not in result:
        given[next(iter(candidates))] = given.pop("q")
    unknown = [name for name in given if name != "p" and name not in candidates]
    if "p" not in given or len(given) < 2 or unknown:
        got = f"{unknown[0]!r}, which was not measured" if unknown else f"those of {', '.join(results) or 'none'}"
        raise ValueError(
            f"expected result files of the reference {reference!r} (or 'p') and of at least one of "
            f"{', '.join(candidates)}, got {got}; name each file after its model"
        )
    base = read_results(given.pop("p"))
    rows = [
        row
        for name, kl in candidates.items()
        if name in given
        for row in rows_of(name, kl, read_results(given[name]), base, cluster)
    ]
    tested = [i for i, row in enumerate(rows) if not math.isnan(row.p)]
    for i, adjusted in zip(tested, holm([rows[i].p for i in tested]) if tested else [], strict=True):
        verdict = rows[i].verdict if adjusted <= 1 - LEVEL else "not resolved"
        rows[i] = replace(rows[i], adjusted=adjusted, verdict=verdict)
    if not rows:
        raise ValueError(
            f"expected metrics of tasks that the reference and a candidate share, got none in "
            f"{', '.join(map(str, results.values()))}; evaluate all models on the same tasks"
        )
    return Beside(reference, tuple(rows))


def models_of(result: Mapping[str, Any]) -> tuple[str, dict[str, Mapping[str, Any]]]:
    """Name of the reference, and each candidate's divergence from it."""
    if "candidates" in result:
        return result["reference"], {entry["name"]: entry["result"]["headline"] for entry in result["candidates"]}
    return result["settings"]["p"], {result["settings"]["q"]: result["headline"]}


def rows_of(name: str, kl: Mapping[str, Any], own: Evaluation, base: Evaluation, cluster: str | None) -> list[TaskRow]:
    """One row a metric of every task that both models were evaluated on."""
    found = []
    for task, scores in own.content["results"].items():
        if task not in base.content["results"]:
            continue
        for what in ("versions", "n-shot"):
            one, two = (e.content.get(what, {}).get(task) for e in (base, own))
            if one != two:
                raise ValueError(
                    f"expected {task} alike for both models, got {what} {one} in {base.path} and {two} in {own.path}; "
                    f"evaluate both in one way"
                )
        group = bool(own.content.get("group_subtasks", {}).get(task))
        samples = None if group else (base.samples(task), own.samples(task))
        for metric, value in scores.items():
            theirs = base.content["results"][task].get(metric)
            if "," not in metric or metric.split(",")[0].endswith("_stderr") or not (number_like(value, theirs)):
                continue
            row = TaskRow(name, kl, task, metric, float(theirs), float(value), float(value) - float(theirs))
            if samples is None:
                row = replace(row, verdict="not tested: a group of tasks")
            elif samples[0] is not None and samples[1] is not None:
                good = own.content.get("higher_is_better", {}).get(task)
                better = good.get(metric.split(",")[0]) if isinstance(good, dict) else None
                row = paired_row(row, samples[0], samples[1], cluster, better)
            found.append(row)
    return found


def number_like(*values: Any) -> bool:
    """Whether all values are numbers (true and false are)."""
    return all(isinstance(value, int | float) for value in values)


def paired_row(
    row: TaskRow,
    base: list[dict[str, Any]],
    own: list[dict[str, Any]],
    cluster: str | None,
    higher_is_better: bool | None,
) -> TaskRow:
    """``row`` with interval and p-value of its difference, from the documents of both models."""
    metric, _, chosen = row.metric.partition(",")
    one, two = (by_document(lines, metric, chosen, row.task) for lines in (base, own))
    if one.keys() != two.keys() or any(one[i].get("doc_hash") != two[i].get("doc_hash") for i in one):
        raise ValueError(
            f"expected the same documents of {row.task} for both models, got {len(one)} and {len(two)} of which "
            f"{len(one.keys() & two.keys())} share their number; evaluate both with the same --limit and data"
        )
    if not all(number_like(line[metric]) for lines in (one, two) for line in lines.values()) or not one:
        return replace(row, verdict="not tested: no number a document")
    x, y = (np.array([lines[i][metric] for i in one], dtype=np.float64) for lines in (two, one))
    for scores, whole in ((x, row.value), (y, row.reference)):
        if abs(scores.mean() - whole) > 1e-6 * max(1.0, abs(whole)):
            return replace(row, verdict="not tested: the metric is no mean over documents", documents=len(x))
    units = np.arange(len(x)) if cluster is None else units_of(list(one.values()), cluster, row.task)
    totals, weights = cluster_totals(x - y, np.ones(len(x)), units)
    interval, stderr = ratio_interval(totals, weights, level=LEVEL), ratio_stderr(totals, weights)
    if cluster is None and np.isin([x, y], [0.0, 1.0]).all():
        p, method = mcnemar_p(int((x > y).sum()), int((y > x).sum())), "exact McNemar"
    elif len(totals) < MINIMUM_CLUSTERS:
        few = f"not tested: fewer than {MINIMUM_CLUSTERS} independent units"
        return replace(row, verdict=few, documents=len(x))
    else:
        t = abs(row.difference) / stderr if stderr > 0 else math.inf if row.difference else 0.0
        p, method = 2 * student_tail(t, len(totals) - 1), "paired t"
    up, down = {True: ("better", "worse"), False: ("worse", "better"), None: ("higher", "lower")}[higher_is_better]
    return replace(
        row,
        stderr=stderr,
        lower=interval.lower,
        upper=interval.upper,
        p=p,
        verdict=up if row.difference > 0 else down,
        documents=len(x),
        method=method,
    )
