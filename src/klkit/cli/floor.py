"""``klkit floor``: how far a model is from itself, by its own rounding."""

from __future__ import annotations

import textwrap
from typing import Annotated

import typer

EXAMPLES = """[bold]Examples[/bold]

klkit floor klkit:docs --prompts klkit:docs

klkit floor org/model,dtype=bfloat16,device=cuda --prompts prompts.jsonl --samples 32"""


def floor_command(
    p: Annotated[
        str,
        typer.Argument(metavar="P", help="Hub id, folder or klkit:NAME; options follow commas.", show_default=False),
    ],
    prompts: Annotated[
        str | None, typer.Option(help="File of prompts, or klkit:docs. Without it: one empty prompt.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest response.")] = 64,
    samples: Annotated[int, typer.Option(help="Strings in all, spread over the prompts.")] = 16,
    seed: Annotated[int, typer.Option(help="Names every random draw.")] = 0,
    dtype: Annotated[str, typer.Option(help="Precision of the model: auto, float32, bfloat16, float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, mps or auto.")] = "auto",
    json: Annotated[
        str | None, typer.Option("--json", help="Also write the floors as JSON to PATH, or - for standard output.")
    ] = None,
) -> None:
    """Measure a model's numerical floors: its divergence from itself by batch shape, precision and noise."""
    from klkit.api.floor import READING, floors
    from klkit.cli.estimate import write_json
    from klkit.cli.show import number, show_rows

    found = list(floors(p, prompts, max_tokens=max_tokens, samples=samples, seed=seed, dtype=dtype, device=device))
    if json != "-":
        rows = [
            {
                "floor": floor.kind,
                "nats/response": f"{number(floor.value)} ± {number(floor.stderr)}",
                "nats/token": f"{number(floor.per_token)} ± {number(floor.per_token_stderr)}",
                "n": floor.n,
            }
            for floor in found
        ]
        show_rows(rows, ["floor", "nats/response", "nats/token", "n"])
        typer.echo()
        for floor in found:
            typer.echo(f"{floor.kind}: {floor.meaning}")
        typer.echo("\n" + textwrap.fill(READING, 80))
    if json is not None:
        write_json({"model": p, "floors": [floor.to_dict() for floor in found], "reading": READING}, json)
