"""``klkit plan``: what a wanted precision takes, from a pilot."""

from __future__ import annotations

from typing import Annotated

import typer

from klkit.cli import options as shared
from klkit.cli.estimate import write_json
from klkit.cli.options import WHAT
from klkit.cli.progress import NATS_PER_BIT

EXAMPLES = """[bold]Examples[/bold]

klkit plan klkit:docs klkit:docs-int4 --rtol 0.05 --max-tokens 32

klkit plan org/model ./int4 --halfwidth 0.002 --prompts prompts.jsonl --unit bits

klkit plan org/model ./int4-a ./int4-b --difference 0.01"""


def plan_command(
    p: Annotated[str, typer.Argument(metavar="P", help="The model that generates.", show_default=False)],
    candidates: Annotated[
        list[str],
        typer.Argument(metavar="Q [Q2]", help="One candidate, or two to be told apart.", show_default=False),
    ],
    rtol: Annotated[
        float | None,
        typer.Option(help="Half-width of the 95 % interval as a share of the estimate.", rich_help_panel=WHAT),
    ] = None,
    halfwidth: Annotated[
        float | None, typer.Option(help="The same in --unit per response.", rich_help_panel=WHAT)
    ] = None,
    difference: Annotated[
        float | None,
        typer.Option(
            help="Two candidates: the difference to resolve, in --unit. \\[default: the pilot's]", rich_help_panel=WHAT
        ),
    ] = None,
    prompts: shared.Prompts = None,
    column: shared.Column = None,
    max_tokens: shared.MaxTokens = None,
    temperature: shared.Temperature = None,
    method: shared.Method = None,
    seed: shared.Seed = None,
    dtype: shared.Dtype = None,
    device: shared.Device = None,
    unit: shared.Unit = None,
    json: shared.Json = None,
) -> None:
    """Plan a run: prompts, responses to each and minutes, from a pilot of about 64 responses."""
    from klkit.api.pilot import plan_run

    given = {
        "prompts": prompts, "column": column, "max_tokens": max_tokens, "temperature": temperature, "method": method,
        "seed": seed, "dtype": dtype, "device": device, "unit": unit,
    }  # fmt: skip
    scale = NATS_PER_BIT if unit == "bits" else 1.0
    found = plan_run(
        p,
        candidates,
        rtol=rtol,
        halfwidth=None if halfwidth is None else halfwidth * scale,
        difference=None if difference is None else difference * scale,
        options={name: value for name, value in given.items() if value is not None},
    )
    if json != "-":
        print(found)
        print(found.pilot)
    if json is not None:
        write_json(found.to_dict(), json)
