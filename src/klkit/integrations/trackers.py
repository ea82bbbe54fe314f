"""Experiment trackers, where they are installed: trackio, wandb and tensorboard behind one function."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
    if name not in TRACKERS:
        raise ValueError(f"expected a tracker among {', '.join(TRACKERS)}, got {name!r}")
    try:
        module: Any = importlib.import_module(TRACKERS[name])
    except ImportError as error:
        raise ValueError(
            f"expected {name} to be installed for --track {name}, got: {error}; pip install {name}, or leave --track "
            f"out: metrics.jsonl has every number"
        ) from error
    if name == "tensorboard":
        writer = module.SummaryWriter(log_dir=str(folder / "tensorboard"))

        def write(numbers: Mapping[str, float], step: int) -> None:
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)

        return Tracker(write, writer.close)
    opened = module.init(project=project, name=run, config=dict(config))
    log = getattr(opened, "log", None) or module.log
    return Tracker(lambda numbers, step: log(dict(numbers), step=step), module.finish)
