"""Experiment trackers, where they are installed: trackio, wandb and tensorboard behind one function."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from klkit.frames import candidate_rows, result_row
from klkit.ranking import Ranking
from klkit.results import Comparison

TRACKERS = {"trackio": "trackio", "wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}
"""Module of each tracker."""


class Tracker(NamedTuple):
    """An open run in a tracker.

    Attributes:
        log: takes numbers by name and the step they belong to.
        close: ends the run.
    """

    log: Callable[[Mapping[str, float], int], None]
    close: Callable[[], None]


def open_tracker(name: str, *, run: str, config: Mapping[str, Any], folder: Path, project: str = "klkit") -> Tracker:
    """Open a run called ``run`` in the tracker ``name``.

    Args:
        config: the run's options, for its record.
        folder: where a tracker that keeps files writes them.

    Raises:
        ValueError: no such tracker, or it is not installed.

    Example:
        >>> open_tracker("paper", run="first", config={}, folder=Path())
        Traceback (most recent call last):
            ...
        ValueError: expected a tracker among trackio, wandb, tensorboard, got 'paper'
    """
    module = module_of(name)
    if name == "tensorboard":
        writer = module.SummaryWriter(log_dir=str(folder / "tensorboard"))

        def write(numbers: Mapping[str, float], step: int) -> None:
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)

        return Tracker(write, writer.close)
    opened = module.init(project=project, name=run, config=dict(config))
    log = getattr(opened, "log", None) or module.log
    return Tracker(lambda numbers, step: log(dict(numbers), step=step), module.finish)


def module_of(name: str) -> Any:
    """The module of a tracker.

    Raises:
        ValueError: no such tracker, or it is not installed.
    """
    if name not in TRACKERS:
        raise ValueError(f"expected a tracker among {', '.join(TRACKERS)}, got {name!r}")
    try:
        return importlib.import_module(TRACKERS[name])
    except ImportError as error:
        raise ValueError(
            f"expected {name} to be installed for --track {name}, got: {error}; pip install {name}, or leave --track "
            f"out: the run folder has every number"
        ) from error


def numbers_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Every number of a result or a ranking by a name with its unit, such as ``kl_nats_per_response``; nats throughout.

    Those of a ranking stand below their candidate's name: ``int4/kl_nats_per_response``. What is undefined is left out;
    what is infinite is infinite.

    Args:
        result: as ``to_dict`` gives it, or as ``result.json`` holds it.

    Example:
        >>> import klkit
        >>> from klkit.models.automaton import coin
        >>> result = klkit.estimate(coin(end=0.5), coin(end=0.25), samples=20, max_tokens=60)
        >>> numbers = numbers_of(result.to_dict())
        >>> numbers["n_strings"], numbers["audit_passed"], "kl_nats_per_response_lower" in numbers
        (20.0, 1.0, True)
    """
    if "candidates" not in result:
        return finite_of(result_row(result), "")
    rows = candidate_rows(result)
    return {name: value for row in rows for name, value in finite_of(row, f"{row['candidate']}/").items()}


def finite_of(row: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The numbers of a row that are defined, by name after ``prefix``."""
    numbers = {name: float(value) for name, value in row.items() if isinstance(value, int | float)}
    return {prefix + name: value for name, value in numbers.items() if value == value}


def log_result(tracker: Tracker, result: Comparison | Ranking | Mapping[str, Any], step: int = 0) -> None:
    """Log every number of a result or a ranking: see :func:`numbers_of`."""
    tracker.log(numbers_of(result if isinstance(result, Mapping) else result.to_dict()), step)


def log_comparison(name: str, result: Mapping[str, Any], run: str, folder: Path) -> None:
    """Log a finished result or ranking as a run of its own, with its settings as the run's configuration.

    Args:
        name: of the tracker.
        result: as ``to_dict`` gives it, or as ``result.json`` holds it.
        run: what the tracker calls the run.
        folder: where a tracker that keeps files writes them.

    Raises:
        ValueError: no such tracker, or it is not installed.
    """
    tracker = open_tracker(name, run=run, config=result["settings"], folder=folder)
    try:
        log_result(tracker, result)
    finally:
        tracker.close()
