"""Figures of reproduced experiments, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from klkit.report.plots import GREY, _figure

# Okabe and Ito's palette, told apart by colour-blind readers too.
COLOURS = ("#777777", "#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#000000")
MARKERS = "os^vDPX*"
STROKES = ("-", "--")


def ratios_figure(rows: Sequence[Mapping[str, Any]], quantity: str, label: str) -> bytes:
    """A ratio with its interval against the step of the run, a line for each method.

    Args:
        rows: with ``step``, ``method`` and ``{quantity}_ratio``, ``_lower``, ``_upper``.
        label: of the vertical axis.
    """
    from matplotlib.ticker import MaxNLocator

    methods = list(dict.fromkeys(row["method"] for row in rows))
    with _figure(7.2, 4.0) as canvas:
        axes = canvas.axes
        for method, colour, marker in zip(methods, COLOURS, MARKERS, strict=False):
            mine = [row for row in rows if row["method"] == method]
            steps, ratio, lower, upper = (
                np.array([float(row[key]) for row in mine])
                for key in ("step", f"{quantity}_ratio", f"{quantity}_lower", f"{quantity}_upper")
            )
            axes.fill_between(steps, lower, upper, color=colour, alpha=0.12, lw=0)
            axes.plot(steps, ratio, color=colour, marker=marker, ms=4, lw=1.3, label=method)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("step of the training run")
        axes.set_ylabel(label)
        axes.legend(frameon=False, fontsize=8, ncol=2)
        return canvas.png()


def frontier_figure(
    points: Sequence[Mapping[str, Any]], kl: Sequence[float], reward: Sequence[float], worst: tuple[float, float]
) -> bytes:
    """Reward against KL of every run, and the best that any policy could do.

    Args:
        points: with ``arm``, ``kl`` and ``reward``.
        kl: of the optimum, ascending.
        reward: of the optimum.
        worst: (KL, reward) of the hypervolume's reference point.
    """
    arms = list(dict.fromkeys(point["arm"] for point in points))
    with _figure(7.2, 4.6) as canvas:
        axes = canvas.axes
        axes.plot(kl, reward, color="black", lw=1.2, label="exact optimum")
        axes.plot(*worst, "+", color="black", ms=9, label="reference point")
        for arm, colour, marker in zip(arms, COLOURS, MARKERS, strict=False):
            mine = [point for point in points if point["arm"] == arm]
            x, y = ([float(point[key]) for point in mine] for key in ("kl", "reward"))
            axes.plot(x, y, marker, color=colour, ms=5, alpha=0.75, mew=0, label=arm)
        axes.set_xlim(0, 1.05 * max([worst[0], *(float(point["kl"]) for point in points)]))
        axes.set_xlabel("KL(p‖q), nats per response")
        axes.set_ylabel("reward")
        axes.legend(frameon=False, fontsize=8, ncol=2)
        return canvas.png()


def scatter_figure(arms: Sequence[Mapping[str, Any]]) -> bytes:
    """Standard deviation between repeated runs over the first arm's, of reward and KL, with intervals."""
    with _figure(6.2, 1.0 + 0.36 * len(arms)) as canvas:
        axes = canvas.axes
        for shift, key, colour in ((-0.13, "reward", COLOURS[1]), (0.13, "kl", COLOURS[3])):
            for i, arm in enumerate(arms[1:]):
                ratio = arm[f"{key}_ratio"]
                axes.plot([ratio["lower"], ratio["upper"]], [i + shift] * 2, color=colour, lw=1.8)
                axes.plot([ratio["value"]], [i + shift], "o", color=colour, ms=5, label=key if i == 0 else None)
        axes.axvline(1.0, color=GREY, lw=1.0)
        axes.set_xscale("log")
        axes.set_yticks(range(len(arms) - 1), [arm["name"] for arm in arms[1:]])
        axes.invert_yaxis()
        axes.set_xlabel(f"standard deviation between repeated runs, over that of {arms[0]['name']}")
        axes.legend(frameon=False, fontsize=8)
        return canvas.png()


def laws_figure(pictures: Sequence[tuple[str, Sequence[float], Mapping[str, Sequence[float]]]], columns: int) -> bytes:
    """Laws over points, a panel each: the target filled in, and what tries to match it as lines.

    Args:
        pictures: (title, target, name to law) of each panel, row by row.
        columns: panels side by side.
    """
    rows = -(-len(pictures) // columns)
    with _figure(2.7 * columns, 1.9 * rows, rows=rows, columns=columns) as canvas:
        for axes, (title, target, laws) in zip(canvas.panels, pictures, strict=False):
            axes.fill_between(range(len(target)), target, color="#dddddd", lw=0, label="teacher")
            for (name, law), colour in zip(laws.items(), COLOURS[1::2], strict=False):
                axes.plot(law, color=colour, lw=1.1, label=name)
            axes.set_title(title, fontsize=8)
            axes.set_yticks([])
            axes.set_ylim(bottom=0)
        canvas.panels[0].legend(frameon=False, fontsize=7)
        return canvas.png()


def curves_figure(
    panels: Sequence[tuple[str, Mapping[str, tuple[Sequence[int], Sequence[float]]]]],
    *,
    columns: int,
    steps: str,
    logarithmic: bool = False,
) -> bytes:
    """Quantities against the step, a panel each and a line for each name.

    Args:
        panels: (label of the vertical axis, name to (steps, values)) of each.
        columns: panels side by side.
        steps: label of the horizontal axis.
        logarithmic: whether the vertical axes are.
    """
    rows = -(-len(panels) // columns)
    with _figure(3.4 * columns, 2.7 * rows, rows=rows, columns=columns) as canvas:
        for axes, (label, lines) in zip(canvas.panels, panels, strict=False):
            for i, (name, (x, y)) in enumerate(lines.items()):
                axes.plot(x, y, color=COLOURS[i % len(COLOURS)], ls=STROKES[i // len(COLOURS)], lw=1.3, label=name)
            if logarithmic:
                axes.set_yscale("log")
            axes.set_xlabel(steps)
            axes.set_ylabel(label)
        canvas.panels[0].legend(frameon=False, fontsize=7, ncol=2)
        return canvas.png()


def points_figure(
    points: Mapping[str, tuple[float, float, float, float]], across: str, up: str, *, diagonal: bool = False
) -> bytes:
    """A point with error bars for each name, from ``(x, its error, y, its error)``."""
    with _figure(5.6, 4.0) as canvas:
        axes = canvas.axes
        for i, (name, (x, dx, y, dy)) in enumerate(points.items()):
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            filled = colour if i < len(COLOURS) else "white"
            axes.errorbar(
                x, y, xerr=dx, yerr=dy, fmt=marker, color=colour, mfc=filled, ms=6, lw=0.9, capsize=0, label=name
            )
        if diagonal:
            ends = [min(*axes.get_xlim(), *axes.get_ylim()), max(*axes.get_xlim(), *axes.get_ylim())]
            axes.plot(ends, ends, color=GREY, lw=0.8, ls=":")
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.legend(frameon=False, fontsize=8, ncol=2)
        return canvas.png()
