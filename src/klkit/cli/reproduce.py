"""``klkit reproduce``: experiments of papers, on models at hand."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, TypeVar

import typer

from klkit.cli.progress import PLAIN_EVERY
from klkit.report.text import clock

AnyStudy = TypeVar("AnyStudy")

reproduce_app = typer.Typer(
    help="Reproduce a paper's experiment: estimators, gradient, rlhf, toy or distill.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Out = Annotated[Path, typer.Option(help="Folder for tables, figures and finished pieces; what is there is not redone.")]
Workers = Annotated[int | None, typer.Option(help="Processes, by default one a core; each computes with one thread.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="Everything in seconds, far too small to say anything.")]


@reproduce_app.command("estimators")
def estimators_command(
    p: Annotated[str, typer.Option("--p", help="Model that generates.")] = "klkit:docs-tuned",
    q: Annotated[
        str, typer.Option("--q", help="Model compared with it; with network: lvwerra/gpt2-imdb and a tuned twin.")
    ] = "klkit:docs",
    prompts: Annotated[str, typer.Option(help="File of prompts, or klkit:NAME.")] = "klkit:docs",
    count: Annotated[int, typer.Option(help="Use the first so many prompts.")] = 32,
    pool: Annotated[int, typer.Option(help="Strings drawn for each prompt.")] = 100,
    max_tokens: Annotated[int, typer.Option(help="Longest response.")] = 50,
    seed: Annotated[int, typer.Option(help="Names every random draw.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for table.md, table.csv, table.json and per_prompt.png.")] = Path(
        "klkit-reproduce"
    ),
) -> None:
    """The estimator table of arXiv 2504.10637: mean, spread and negative share of each estimator."""
    from klkit.api.reproduce import reproduce_estimators, save_table
    from klkit.cli.progress import Watcher

    with Watcher("nats") as watcher:
        table = reproduce_estimators(
            p,
            q,
            prompts=prompts,
            count=count,
            pool=pool,
            max_tokens=max_tokens,
            seed=seed,
            observe=watcher.observe,
        )
    typer.echo(
        f"KL(p‖q) in nats per response of at most {max_tokens} tokens; p = {p}, q = {q}; "
        f"{table.prompts} prompts, {pool} strings each\n"
    )
    typer.echo(table.to_markdown())
    save_table(table, out)
    typer.echo(f"\nsaved in {out}")


@reproduce_app.command("gradient")
def gradient_command(
    prompts: Annotated[int | None, typer.Option(help="Prompts a batch, one string each.")] = None,
    rollouts: Annotated[int | None, typer.Option(help="Independent batches at each checkpoint.")] = None,
    seed: Annotated[int | None, typer.Option(help="Names every random draw.")] = None,
    workers: Workers = None,
    smoke: Smoke = False,
    out: Out = Path("klkit-reproduce-gradient"),
) -> None:
    """Variance of each estimator of the KL gradient along a training run; minutes on two cores."""
    from klkit.api.jobs import cores
    from klkit.api.reproduce_gradient import SMOKE, GradientStudy, reproduce_gradient
    from klkit.api.reproduce_report import save_gradient

    study = changed(SMOKE if smoke else GradientStudy(), prompts=prompts, rollouts=rollouts, seed=seed)
    with Countdown("checkpoints") as countdown:
        rows = reproduce_gradient(study, out, workers=workers or cores(), observe=countdown.observe)
    typer.echo(save_gradient(study, rows, out))
    typer.echo(f"saved in {out}")


@reproduce_app.command("rlhf")
def rlhf_command(
    steps: Annotated[int | None, typer.Option(help="Training steps of a run.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Repeated runs of each penalty and coefficient.")] = None,
    workers: Workers = None,
    smoke: Smoke = False,
    out: Out = Path("klkit-reproduce-rlhf"),
) -> None:
    """Sentiment control with every KL penalty: scatter between runs, Pareto frontiers, tests; minutes on two cores."""
    from klkit.api.jobs import cores
    from klkit.api.reproduce_report import save_rlhf
    from klkit.api.reproduce_rlhf import SMOKE, Study, held_out_prompts, reproduce_rlhf
    from klkit.api.tradeoff import analyse, exact_frontier

    study = changed(SMOKE if smoke else Study(), steps=steps, seeds=seeds)
    exact = exact_frontier(study, held_out_prompts(study))
    with Countdown("runs") as countdown:
        points = reproduce_rlhf(study, out, workers=workers or cores(), observe=countdown.observe)
    typer.echo(save_rlhf(analyse(study, points, exact), out))
    typer.echo(f"saved in {out}")


@reproduce_app.command("toy")
def toy_command(
    draws: Annotated[int | None, typer.Option(help="Random starts.")] = None,
    seed: Annotated[int | None, typer.Option(help="Names every random draw.")] = None,
    smoke: Smoke = False,
    out: Annotated[Path, typer.Option(help="Folder for the page, tables and figures.")] = Path("klkit-reproduce-toy"),
) -> None:
    """Figures 2 and 3 of arXiv 2404.02657: which KL fits the head first and which the tail; a minute."""
    from klkit.api.reproduce_toy import SMOKE, ToyStudy, reproduce_toy
    from klkit.api.reproduce_toy_report import save_toy

    study = changed(SMOKE if smoke else ToyStudy(), draws=draws, seed=seed)
    typer.echo(save_toy(reproduce_toy(study), out))
    typer.echo(f"saved in {out}")


@reproduce_app.command("distill")
def distill_command(
    seeds: Annotated[int | None, typer.Option(help="Students of each loss.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps of a student.")] = None,
    workers: Workers = None,
    smoke: Smoke = False,
    out: Out = Path("klkit-reproduce-distill"),
) -> None:
    """Students distilled with every divergence, compared seed by seed; about 20 minutes on two cores."""
    from klkit.api.jobs import cores
    from klkit.api.reproduce_distill import SMOKE, DistillStudy, reproduce_distill
    from klkit.api.reproduce_distill_report import save_distillation

    study = changed(SMOKE if smoke else DistillStudy(), seeds=seeds, steps=steps)
    with Countdown("students") as countdown:
        found = reproduce_distill(study, out, workers=workers or cores(), observe=countdown.observe)
    typer.echo(save_distillation(found, out))
    typer.echo(f"saved in {out}")


def changed(study: AnyStudy, **options: int | None) -> AnyStudy:
    """The study with the options that were given; those that are None stay as they are."""
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    return replace(study, **given)  # type: ignore[type-var]


class Countdown:
    """A line on standard error: pieces done, and how long the rest will take."""

    def __init__(self, what: str) -> None:
        self.what, self.printed, self.width = what, float("-inf"), 0

    def __enter__(self) -> Countdown:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.width:
            sys.stderr.write("\r" + " " * self.width + "\r")
            sys.stderr.flush()

    def observe(self, done: int, total: int, left: float) -> None:
        """Show where the work stands: at once on a terminal, every few seconds elsewhere."""
        line = f"{done}/{total} {self.what}, {clock(left)} left"
        if sys.stderr.isatty():
            sys.stderr.write("\r" + line.ljust(self.width))
            self.width = len(line)
        elif time.monotonic() - self.printed >= PLAIN_EVERY:
            sys.stderr.write(line + "\n")
            self.printed = time.monotonic()
        sys.stderr.flush()
