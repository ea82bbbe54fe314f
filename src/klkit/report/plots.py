"""Figures of a result, as SVG text for the page and PNG bytes for files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from klkit.results import ESTIMANDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by colour-blind readers too.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": "#333333",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "svg.hashsalt": "klkit",
}


def estimators_figure(result: Mapping[str, Any]) -> str:
    """Every estimate of the headline's quantity, in its direction, with its interval, in the order of the table."""
    head = result["headline"]
    rows = [r for r in result["estimates"] if all(r[key] == head[key] for key in ("estimand", "direction"))]
    with _figure(5.2, 0.6 + 0.32 * len(rows)) as canvas:
        axes = canvas.axes
        for i, row in enumerate(reversed(rows)):
            value, lower, upper = (float(v) for v in (row["value"], row["ci"]["lower"], row["ci"]["upper"]))
            if not np.isfinite(value):
                continue
            chosen = row["method"] == head["method"]  # estimand and direction are the headline's in every row
            colour = BLUE if chosen else GREY
            if np.isfinite([lower, upper]).all():
                axes.plot([lower, upper], [i, i], color=colour, lw=2.5 if chosen else 1.5, solid_capstyle="round")
            axes.plot([value], [i], "o", color=colour, ms=5)
        axes.set_yticks(range(len(rows)), [r["method"] for r in reversed(rows)])
        axes.set_xlabel(f"{head['direction']}, {head['unit']} {ESTIMANDS[head['estimand']]}")
        axes.set_ylim(-0.6, len(rows) - 0.4)
        return canvas.svg()


def position_figure(parts: Sequence[Mapping[str, Any]], counted: str = "responses") -> str:
    """Mean KL of a decision by its position, with ±2 standard errors; the end-token part beneath.

    Args:
        counted: what the strings are: ``"responses"``, or ``"windows"`` of a given text.
    """
    from matplotlib.ticker import MaxNLocator

    middle = [(part["start"] + part["stop"] - 1) / 2 + 1 for part in parts]
    kl = np.array([part["kl"] for part in parts])
    error = 2 * np.nan_to_num(np.array([float(part["stderr"]) for part in parts]))
    with _figure(7.2, 2.4) as canvas:
        axes = canvas.axes
        axes.fill_between(middle, kl - error, kl + error, color=BLUE, alpha=0.18, lw=0)
        axes.plot(middle, kl, color=BLUE, lw=1.5, label="all tokens")
        axes.plot(middle, [part["end_kl"] for part in parts], color=ORANGE, lw=1.5, label="whether to end")
        axes.set_xlabel(f"position in the {counted.removesuffix('s')}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("nats per decision")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        return canvas.svg()


def strings_figure(strings: Mapping[str, Any], counted: str = "responses") -> str:
    """Histogram of the per-string sums: exact next-token KLs (RB) over log-ratios (MC).

    Args:
        counted: what the strings are: ``"responses"``, or ``"windows"`` of a given text.
    """
    edges = np.array(strings["edges"])
    with _figure(7.2, 2.4) as canvas:
        axes = canvas.axes
        axes.stairs(strings["mc"], edges, color=GREY, lw=1.2, label=f"log-ratio (MC), sd {strings['sd_mc']:.3g}")
        axes.stairs(
            strings["rb"], edges, color=BLUE, fill=True, alpha=0.55, label=f"sum of KLs (RB), sd {strings['sd_rb']:.3g}"
        )
        axes.axvline(strings["mean"], color=ORANGE, lw=1.2, label="mean")
        axes.set_xlabel(f"nats per {counted.removesuffix('s')}")
        axes.set_ylabel(counted)
        axes.legend(frameon=False)
        return canvas.svg()


def per_prompt_figure(spreads: Mapping[str, NDArray[np.float64]]) -> bytes:
    """Standard deviation of each prompt's estimate, prompts sorted by the first estimator's, as PNG."""
    order = np.argsort(next(iter(spreads.values())))
    with _figure(7.2, 3.6) as canvas:
        axes = canvas.axes
        for (name, values), marker in zip(spreads.items(), "os^vDP*", strict=False):
            axes.plot(np.arange(1, len(order) + 1), values[order], marker, ms=4, alpha=0.8, label=name)
        axes.set_yscale("log")
        axes.set_xlabel("prompt, sorted by the spread of the first estimator")
        axes.set_ylabel("std of one-string estimates, nats")
        axes.legend(frameon=False, fontsize=8, ncol=2)
        return canvas.png()


def reward_kl_figure(evaluations: Sequence[Mapping[str, Any]], best: Sequence[tuple[float, float]] = ()) -> bytes:
    """Mean reward against KL along a training run, with 95 % intervals of both, as PNG.

    Args:
        evaluations: records with ``step``, ``kl``, ``kl_lower``, ``kl_upper``, and the same of ``reward``.
        best: ``(KL, reward)`` that no policy surpasses, where it is known.
    """
    rows = [{name: float(value) for name, value in row.items() if name != "method"} for row in evaluations]
    with _figure(6.0, 3.8) as canvas:
        axes = canvas.axes
        kl, reward = (np.array([row[name] for row in rows]) for name in ("kl", "reward"))
        light: dict[str, Any] = {"color": BLUE, "alpha": 0.3, "lw": 1}
        for row in rows:
            axes.plot([row["kl_lower"], row["kl_upper"]], [row["reward"]] * 2, **light)
            axes.plot([row["kl"]] * 2, [row["reward_lower"], row["reward_upper"]], **light)
        axes.plot(kl, reward, "o-", color=BLUE, ms=4, lw=1, label="the run, 95 % intervals over prompts")
        for row in rows[:1] + rows[1:][-1:]:
            axes.annotate(
                f"step {row['step']:g}", (row["kl"], row["reward"]), (5, -11), textcoords="offset points", fontsize=8
            )
        if best:
            reach = max(1.0, float(np.nanmax([row["kl_upper"] for row in rows] + [np.nanmax(kl)])))
            shown = [point for point in best if point[0] <= reach]
            axes.plot(
                *zip(*shown, strict=True), color=GREY, lw=1.2, ls="--", label="best possible on the grammar (exact)"
            )
        axes.set_xlabel("KL(policy‖reference), nats per response")
        axes.set_ylabel("mean reward")
        axes.set_xlim(left=0)
        axes.legend(frameon=False, loc="lower right")
        return canvas.png()


class _figure:
    """A small figure in klkit's style, without pyplot's global state."""

    axes: Axes
    panels: list[Axes]
    figure: Figure

    def __init__(self, width: float, height: float, *, rows: int = 1, columns: int = 1) -> None:
        self.size, self.shape = (width, height), (rows, columns)

    def __enter__(self) -> _figure:
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        self.context = rc_context(STYLE)
        self.context.__enter__()
        self.figure = Figure(figsize=self.size, layout="constrained")
        self.panels = list(self.figure.subplots(*self.shape, squeeze=False).flat)
        self.axes = self.panels[0]
        return self

    def __exit__(self, *error: object) -> None:
        self.context.__exit__(None, None, None)

    def svg(self) -> str:
        """The figure as an ``<svg>`` element, without the XML preamble."""
        out = io.StringIO()
        self.figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        text = out.getvalue()
        return text[text.index("<svg") :]

    def png(self) -> bytes:
        """The figure as a PNG file."""
        out = io.BytesIO()
        self.figure.savefig(out, format="png", dpi=150)
        return out.getvalue()
