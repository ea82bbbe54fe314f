"""What the training commands share: a live line, trackers, and how a run that was stopped says so."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from klkit.cli import AUDIT_FAILED, INTERRUPTED
from klkit.cli.progress import Line
from klkit.report.text import clock

if TYPE_CHECKING:
    from klkit.api.distill_plan import Distillation, DistillReport
    from klkit.api.train import Report, Training


@contextmanager
def ended_well(folder: Path, line: Line, close: Callable[[], None]) -> Iterator[None]:
    """Close line and trackers after a run, and exit with what is kept of it where it was stopped."""
    from klkit.train.checkpoints import checkpoints
    from klkit.train.folder import CHECKPOINTS
    from klkit.train.rl import TrainingStopped

    try:
        yield
    except (KeyboardInterrupt, TrainingStopped) as error:
        line.close()
        whole = checkpoints(folder / CHECKPOINTS)
        kept = f"the last checkpoint is {whole[-1]}" if whole else "there was no checkpoint yet"
        if isinstance(error, TrainingStopped):
            print(f"klkit: training stopped: {error}; {kept}", file=sys.stderr)
            sys.exit(AUDIT_FAILED)
        again = f"repeat the command with --out {quote(str(folder))} --resume"
        print(f"\nklkit: interrupted; {kept}. To continue, {again}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    finally:
        line.close()
        close()


def tracking(
    name: str | None, plan: Training | Distillation, folder: Path
) -> tuple[Callable[[Report | DistillReport], None], Callable[[], None]]:
    """What sends reports to the tracker of that name, if there is one, and what closes it."""
    if name is None:
        return lambda report: None, lambda: None
    from dataclasses import asdict

    from klkit.integrations.trackers import open_tracker

    tracker = open_tracker(name, run=folder.name, config=asdict(plan), folder=folder)

    def send(report: Report | DistillReport) -> None:
        if report.metrics is not None:
            measured = {k: v for k, v in report.metrics.to_dict().items() if isinstance(v, int | float) and k != "step"}
            tracker.log({f"train/{k}": v for k, v in measured.items()}, report.step)
        if report.evaluation is not None:
            found = report.evaluation.to_dict()
            numbers = {f"held_out/{k}": v for k, v in found.items() if isinstance(v, float)}
            tracker.log(numbers, report.step)

    return send, tracker.close


def progress_line(report: Report | DistillReport, measured: str) -> str:
    """Where a run is, what its step measured, and how long it will take, in a line of at most 79 columns.

    Example:
        >>> from klkit.api.train import Report
        >>> progress_line(Report(3, 10, None, None, 6.0, 3), "")
        'step 3/10  evaluating  14s left'
    """
    rate = report.fresh / report.seconds if report.fresh else 0.0
    left = clock((report.steps - report.step) / rate if rate else float("inf"))
    what = "evaluating" if report.metrics is None else f"{measured}  {rate:.3g} steps/s"
    return f"step {report.step}/{report.steps}  {what}  {left} left"
