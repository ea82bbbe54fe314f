"""``klkit reproduce``: tables of papers, on models at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

WHAT = ("estimators",)


def reproduce_command(
    what: Annotated[str, typer.Argument(help="estimators: the estimator table of arXiv 2504.10637.")] = "estimators",
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
    """Reproduce a paper's table: mean, spread and negative share of each estimator."""
    from klkit.api.reproduce import reproduce_estimators, save_table
    from klkit.cli.progress import Watcher

    if what not in WHAT:
        raise ValueError(f"expected what to reproduce to be one of {', '.join(WHAT)}, got {what!r}")
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
