"""``klkit models`` and ``klkit zoo build``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

zoo_app = typer.Typer(help="The packaged tiny checkpoints.", no_args_is_help=True, pretty_exceptions_enable=False)


def models_command() -> None:
    """List the packaged models: they load as klkit:NAME."""
    from klkit.cli.show import show_rows
    from klkit.zoo.catalogue import CATALOGUE

    rows = [{"model": f"klkit:{name}", "what it is": entry.description} for name, entry in CATALOGUE.items()]
    show_rows(rows, ["model", "what it is"])


@zoo_app.command("build")
def build_command(
    out: Annotated[Path, typer.Argument(help="Folder for the checkpoints.", show_default=False)],
    name: Annotated[list[str] | None, typer.Option(help="Only this model (repeatable). \\[default: all]")] = None,
    seed: Annotated[int, typer.Option(help="Seed of corpora, initial weights and batches.")] = 0,
) -> None:
    """Train the packaged checkpoints again, from seeds (some minutes on one core)."""
    from klkit.zoo.build import build, write_prompts

    for path in build(out, names=name, seed=seed):
        typer.echo(str(path))
    if name is None:
        write_prompts(out / "prompts", seed=seed)
        typer.echo(str(out / "prompts"))
