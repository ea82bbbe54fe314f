"""``klkit explain``: what a configured KL penalty optimises, in formulas and in numbers of a small model."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from klkit.objectives.explain import Penalty
    from klkit.objectives.gradient_check import GradientReport

WIDTH = 80

FOLLOWS = {
    "kl": "KL(p‖q) of responses",
    "forward_kl": "KL(q‖p) of responses",
    "token_local": "token by token only",
    "token_local_forward": "tokens only, KL(q‖p)",
}
"""Short words for :data:`klkit.objectives.gradient_check.TARGETS`."""

EXAMPLES = "Examples: klkit explain --preset trl-grpo · klkit explain --estimator k3 --placement reward · --list"


def explain_command(
    preset: Annotated[str | None, typer.Option(help="Start from what a library does; names: --list.")] = None,
    estimator: Annotated[str | None, typer.Option(help="k1, k2, k3, abs or full. \\[default: k3]")] = None,
    placement: Annotated[
        str | None, typer.Option(help="loss, reward, reward_to_go, advantage or rb. \\[default: loss]")
    ] = None,
    weight: Annotated[
        str | None, typer.Option(help="Importance weight: none, token, token_detached or prefix. \\[default: none]")
    ] = None,
    gradient: Annotated[str | None, typer.Option(help="Straight-through: whose gradient the value has.")] = None,
    detach: Annotated[
        bool | None, typer.Option("--detach/--no-detach", help="Whether a reward is cut off from the policy.")
    ] = None,
    normalise: Annotated[str | None, typer.Option(help="Over a response: sum or length. \\[default: sum]")] = None,
    off_policy: Annotated[bool, typer.Option("--off-policy", help="Strings of an older policy.")] = False,
    every: Annotated[bool, typer.Option("--list", help="Every preset, compared.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON to standard output.")] = False,
) -> None:
    """Say what the gradient of a KL penalty follows, by exact enumeration of a small model."""
    from klkit.objectives.explain import Penalty, explain
    from klkit.objectives.presets import customised, described

    parts = {
        "estimator": estimator,
        "placement": placement,
        "weight": weight,
        "gradient": gradient,
        "detach": detach,
        "normalise": normalise,
    }
    given: dict[str, Any] = {name: value for name, value in parts.items() if value is not None}
    if every:
        if given or preset or off_policy:
            raise ValueError("expected --list alone or with --json, got other options too; it shows every preset")
        _list(as_json)
        return
    penalty = Penalty(**given) if preset is None else customised(preset, **given)
    title = "" if preset is None else described(preset)[0] + (", changed" if given else "")
    report = explain(penalty, off_policy=off_policy)
    best = explain(Penalty("full", "rb", "prefix" if off_policy else "none"), off_policy=off_policy)
    if as_json:
        record = {"preset": preset, **_penalty(penalty), **_report(report), "variance_klkit": best.variance}
        typer.echo(json.dumps(record, indent=2, ensure_ascii=False))
    else:
        _show(title, penalty, report, best)


def _show(title: str, penalty: Penalty, report: GradientReport, best: GradientReport) -> None:
    """Print what one penalty does."""
    if title:
        typer.echo(title + "\n")
    for name, text in (("loss", penalty.formula), ("gradient", penalty.slope)):
        typer.echo(_wrapped(name, text))
    for symbol, meaning in penalty.symbols.items():
        typer.echo(_wrapped("", f"{symbol} {'' if symbol == 'sg' else '= '}{meaning}"))
    typer.echo("\n" + _wrapped("follows", report.verdict) + "\n")
    typer.echo(f"In numbers: five symbols, up to four tokens, KL(p‖q) = {report.kl:.3f} nats, no sampling.")
    typer.echo(f"  {'expected gradient against that of':42s} {'rel. error':>10s} {'cosine':>8s}")
    names = {
        "kl": "KL(p‖q), whole responses",
        "forward_kl": "KL(q‖p), whole responses",
        "token_local": "KL(p‖q), tokens at prefixes held fixed",
        "token_local_forward": "KL(q‖p), tokens at prefixes held fixed",
    }
    for name, found in report.agreement.items():
        typer.echo(f"  {names[name]:42s} {found.relative_error:10.3f} {found.cosine:8.2f}")
    typer.echo(f"  variance of one response's gradient {report.variance:.3g}; klkit's rb {best.variance:.3g}")


def _list(as_json: bool) -> None:
    """Print every preset, best first."""
    from klkit.objectives.presets import PRESETS, table

    rows = table()
    if as_json:
        records = [
            {
                "preset": row.preset,
                "what": PRESETS[row.preset][0],
                **_penalty(PRESETS[row.preset][1]),
                "on_policy": _report(row.on_policy),
                "off_policy": _report(row.off_policy),
            }
            for row in rows
        ]
        typer.echo(json.dumps(records, indent=2, ensure_ascii=False))
        return
    typer.echo("Expected gradient against that of KL(p‖q), by enumeration; var: of one response.")
    typer.echo(f"{'':21s} {'own strings':^18s}  {'older policy':^12s}")
    typer.echo(f"{'preset':21s} {'error':>5s} {'cos':>5s} {'var':>6s}  {'error':>6s} {'cos':>5s}  on own: follows")
    for row in rows:
        on, off = (report.agreement["kl"] for report in (row.on_policy, row.off_policy))
        typer.echo(
            f"{row.preset:21s} {on.relative_error:5.2f} {_plain(on.cosine):>5s} {row.on_policy.variance:6.3f}  "
            f"{off.relative_error:6.2f} {_plain(off.cosine):>5s}  {_follows(row.on_policy)}"
        )
    typer.echo("\nklkit explain --preset NAME tells more of each.")


def _plain(x: float) -> str:
    return f"{0.0 if abs(x) < 0.005 else x:.2f}"


def _follows(report: GradientReport) -> str:
    if report.vanishes:
        return "nothing (mean zero)"
    return FOLLOWS.get(report.target or "", "nothing known")


def _wrapped(name: str, text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=f"{name:9s} ", subsequent_indent=" " * 10)


def _penalty(penalty: Penalty) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(penalty), "loss": penalty.formula, "loss_gradient": penalty.slope}


def _report(report: GradientReport) -> dict[str, Any]:
    return {
        "off_policy": report.off_policy,
        "verdict": report.verdict,
        "target": report.target,
        "vanishes": report.vanishes,
        "agreement": {
            name: {"relative_error": found.relative_error, "cosine": found.cosine}
            for name, found in report.agreement.items()
        },
        "variance": report.variance,
        "kl": report.kl,
    }
