"""``klkit gate``: a divergence against a limit, as an exit code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klkit.cli import options as shared
from klkit.cli.estimate import ModelP, ModelQ, execute, settings_of, write_json
from klkit.cli.options import WHAT
from klkit.cli.progress import NATS_PER_BIT

if TYPE_CHECKING:
    from klkit.results import Comparison

PASS, FAIL, UNDECIDED = 0, 1, 3

EXAMPLES = """[bold]Examples[/bold]

klkit gate klkit:docs klkit:docs-int8 --max 0.05 --max-tokens 32

klkit gate org/model ./int4 --max 0.02 --per token --prompts prompts.jsonl --until-halfwidth 0.002

klkit gate org/model ./int4 --max 0.02 --text wiki.txt --unit bits"""


def gate_command(
    p: ModelP = None,
    q: ModelQ = None,
    limit: Annotated[
        float | None,
        typer.Option(
            "--max", help="Largest acceptable divergence, in --unit.", show_default=False, rich_help_panel=WHAT
        ),
    ] = None,
    per: Annotated[str, typer.Option(help="What --max is per: response or token.", rich_help_panel=WHAT)] = "response",
    level: Annotated[float, typer.Option(help="Confidence of a pass, and of a failure.", rich_help_panel=WHAT)] = 0.95,
    prompts: shared.Prompts = None,
    column: shared.Column = None,
    text: shared.Text = None,
    context: shared.Context = None,
    divergence: shared.Divergence = None,
    samples: shared.Samples = None,
    max_tokens: shared.MaxTokens = None,
    temperature: shared.Temperature = None,
    shared_only: shared.SharedOnly = None,
    method: shared.Method = None,
    rtol: shared.Rtol = None,
    halfwidth: shared.Halfwidth = None,
    seed: shared.Seed = None,
    dtype: shared.Dtype = None,
    device: shared.Device = None,
    batch_size: shared.BatchSize = None,
    config: shared.Config = None,
    unit: shared.Unit = None,
    json: shared.Json = None,
    out: shared.Out = None,
    resume: shared.Resume = False,
) -> None:
    """Is KL(P‖Q) at most --max? Exit code 0: pass, 1: fail, 3: undecided, 2: bad input."""
    if limit is None or not 0 < limit < float("inf"):
        raise ValueError(
            f"expected a positive finite limit, got --max {limit}; name the largest divergence that is acceptable, as "
            f"in: klkit gate klkit:docs klkit:docs-int8 --max 0.05"
        )
    if per not in ("response", "token") or not 0.5 < level < 1:
        raise ValueError(
            f"expected --per response or token and a --level between 0.5 and 1, got {per!r} and {level}; leave them out"
        )
    given = {
        "p": p, "q": q, "prompts": prompts, "column": column, "text": text, "context": context,
        "divergence": divergence, "samples": samples, "max_tokens": max_tokens, "temperature": temperature,
        "shared_only": shared_only, "method": method, "rtol": rtol, "halfwidth": halfwidth, "seed": seed,
        "dtype": dtype, "device": device, "batch_size": batch_size, "unit": unit,
    }  # fmt: skip
    settings = settings_of(given, config, "gate")
    if per == "token" and (settings.text is not None or settings.divergence in ("js", "jeffreys")):
        why = "a fixed text, where all is" if settings.text is not None else f"{settings.divergence}, which is not"
        raise ValueError(f"expected --per token where it says something, got it with {why} per token; leave --per out")
    nats = limit * (NATS_PER_BIT if settings.unit == "bits" else 1.0)

    def tell(result: Comparison, folder: Path) -> None:
        from klkit.api.gate import gate
        from klkit.cli.show import show_result

        found = gate(result, nats, per=per, level=level)
        if json != "-":
            show_result(result, folder)
            print(found)
        if json is not None:
            write_json(found.to_dict(), json)

    result, _ = execute(settings, out, resume, tell)
    from klkit.api.gate import gate

    verdict = gate(result, nats, per=per, level=level).verdict
    sys.exit({"pass": PASS, "fail": FAIL, "undecided": UNDECIDED}[verdict])
