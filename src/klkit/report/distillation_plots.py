"""Curves of a distillation run, as SVG text for its page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from klkit.report.plots import BLUE, ORANGE, _figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE, HALF = (7.2, 2.8), (4.6, 2.5)
POINTS = 400  # of a curve; more become means of as many blocks

Line = Mapping[str, Any]
Curve = tuple[str, str, str]
"""Name in the lines, words for the legend, colour."""


def sequence_figure(evaluations: Sequence[Line]) -> str:
    """Both sequence-level divergences against the step, with their intervals."""
    curves = [("kl", "KL(teacher‖student)", BLUE), ("reverse_kl", "KL(student‖teacher)", ORANGE)]
    with _figure(*WIDE) as canvas:
        _evaluated(canvas.axes, evaluations, curves)
        canvas.axes.set_ylabel("nats per response")
        return canvas.svg()


def evaluated_figure(evaluations: Sequence[Line], curves: Sequence[Curve], label: str) -> str:
    """Some numbers of the evaluations against the step, with their intervals; "" where none is there."""
    curves = [curve for curve in curves if any(curve[0] in line for line in evaluations)]
    if not curves:
        return ""
    with _figure(*HALF) as canvas:
        _evaluated(canvas.axes, evaluations, curves)
        canvas.axes.set_ylabel(label)
        return canvas.svg()


def loss_figure(metrics: Sequence[Line]) -> str:
    """The loss of every step."""
    with _figure(*HALF) as canvas:
        _stepwise(canvas.axes, metrics, "loss", "loss")
        return canvas.svg()


def rate_figure(metrics: Sequence[Line]) -> str:
    """The learning rate of every step."""
    with _figure(*HALF) as canvas:
        _stepwise(canvas.axes, metrics, "learning_rate", "learning rate")
        canvas.axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
        return canvas.svg()


def _evaluated(axes: Axes, evaluations: Sequence[Line], curves: Sequence[Curve]) -> None:
    for name, words, colour in curves:
        lines = [line for line in evaluations if name in line]
        steps, values = ([float(line[key]) for line in lines] for key in ("step", name))
        axes.plot(steps, values, "o-", color=colour, ms=3.5, lw=1.5, label=words)
        low, high = ([float(line.get(f"{name}_{end}", math.nan)) for line in lines] for end in ("lower", "upper"))
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
    top = max((float(line[name]) for name, _, _ in curves for line in evaluations if _finite(line, name)), default=1.0)
    bounds = [float(line[f"{n}_upper"]) for n, _, _ in curves for line in evaluations if _finite(line, f"{n}_upper")]
    # An interval from few prompts can be so wide that nothing else could be seen.
    axes.set_ylim(0, 1.08 * max(top, min(max(bounds, default=top), 2.5 * top)) or 1.0)
    _by_step(axes)
    axes.legend(frameon=False, fontsize=8)


def _stepwise(axes: Axes, metrics: Sequence[Line], name: str, label: str) -> None:
    size = math.ceil(len(metrics) / POINTS)
    values = [[float(line[key]) for line in metrics] for key in ("step", name)]
    steps, numbers = ([float(np.mean(v[i : i + size])) for i in range(0, len(v), size)] for v in values)
    axes.plot(steps, numbers, color=BLUE, lw=1)
    _by_step(axes)
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)


def _by_step(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _finite(line: Line, name: str) -> bool:
    return name in line and math.isfinite(float(line[name]))
