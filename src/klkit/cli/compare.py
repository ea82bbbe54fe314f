"""``klkit compare``: one reference, many candidates, an honest ranking."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klkit.cli import AUDIT_FAILED, INTERRUPTED, OK
from klkit.cli import options as shared
from klkit.cli.options import HOW, WHAT, WHERE, require_tracker, with_batch_size

if TYPE_CHECKING:
    from klkit.api.compare_settings import CompareSettings
    from klkit.api.material import Stage
    from klkit.ranking import Ranking

EXAMPLES = """[bold]Examples[/bold]

klkit compare klkit:docs klkit:docs-int8 klkit:docs-int4 klkit:docs-tuned

klkit compare org/model ./int8 ./int4 temperature=0.9 peft=./adapter --prompts prompts.jsonl

klkit compare org/model ./int8 ./int4 --text wiki.txt --out run

klkit compare org/model ./int8 ./int4 ./int3 --text wiki.txt --out run --resume"""


def compare_command(
    p: Annotated[
        str | None,
        typer.Argument(
            metavar="P", help="The reference: hub id, folder or klkit:NAME, then ,option=value.", show_default=False
        ),
    ] = None,
    candidates: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="Q...",
            help="The candidates: models, or what is done to P: temperature=0.9, round=int4, peft=FOLDER.",
            show_default=False,
        ),
    ] = None,
    prompts: shared.Prompts = None,
    column: shared.Column = None,
    group_column: shared.GroupColumn = None,
    text: shared.Text = None,
    context: shared.Context = None,
    samples: shared.Samples = None,
    max_tokens: shared.MaxTokens = None,
    temperature: shared.Temperature = None,
    both: Annotated[
        bool | None,
        typer.Option("--both", help="Also KL(Q‖P), from strings of every candidate.", rich_help_panel=WHAT),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            help="What is kept of P's laws: hidden (exact), or hybrid (256 tokens and 16 draws: unbiased, small for "
            "wide models). \\[default: hidden]",
            rich_help_panel=HOW,
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(help="Folder in which what P says is kept, and found again.", rich_help_panel=HOW),
    ] = None,
    cache_limit: Annotated[
        str | None,
        typer.Option(
            help="What --cache may hold; the least recently used goes first. \\[default: 20GB]", rich_help_panel=HOW
        ),
    ] = None,
    method: shared.Method = None,
    seed: shared.Seed = None,
    dtype: shared.Dtype = None,
    device: shared.Device = None,
    batch_size: shared.BatchSize = None,
    floor: shared.Floor = None,
    config: shared.Config = None,
    unit: shared.Unit = None,
    json: shared.Json = None,
    out: shared.Out = None,
    track: shared.Track = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the run in --out; further candidates join it.", rich_help_panel=WHERE),
    ] = False,
) -> None:
    """Compare many models with one: which are closer to P, and which cannot be told apart."""
    from klkit.api.compare_settings import CompareSettings
    from klkit.cli.estimate import log, with_config, write_json

    given = {
        "p": p, "candidates": candidates or None, "prompts": prompts, "column": column, "group_column": group_column,
        "text": text, "context": context, "samples": samples, "max_tokens": max_tokens, "temperature": temperature,
        "both": both, "method": method, "seed": seed, "dtype": dtype, "device": device,
        "batch_size": batch_size, "floor": floor, "unit": unit, "keep": keep, "cache": cache,
        "cache_limit": cache_limit,
    }  # fmt: skip
    options = with_config(given, config)
    if not isinstance(options.get("p"), str) or not options.get("candidates"):
        raise ValueError(
            "expected a reference and at least one candidate, as in: klkit compare klkit:docs klkit:docs-int8 "
            "klkit:docs-int4; or a --config that names p and candidates"
        )
    if resume and out is None:
        raise ValueError("expected the folder of the run to continue, got --resume alone; add --out FOLDER")
    settings = CompareSettings.from_mapping(with_batch_size(options))
    require_tracker(track)
    ranking, folder = carry_out(settings, out, resume)
    if json != "-":
        from klkit.cli.show_ranking import show_ranking

        show_ranking(ranking, folder)
    if json is not None:
        write_json(ranking.to_dict(), json)
    log(track, ranking.to_dict(), folder)
    if ranking.failed:
        print("klkit: a self-audit failed: do not use these numbers (see the audits above)", file=sys.stderr)
        sys.exit(AUDIT_FAILED)


def carry_out(settings: CompareSettings, out: Path | None, resume: bool) -> tuple[Ranking, Path]:
    """Run the settings with progress; an interruption says how to go on. Of several processes the first returns."""
    from klkit.api.compare_run import run_compare
    from klkit.api.prepare import device_of
    from klkit.cli.estimate import default_folder, say_interrupted
    from klkit.cli.progress import Line
    from klkit.report.text import clock
    from klkit.train.processes import open_processes

    line = Line()

    def observe(stage: Stage) -> None:
        rate = stage.done / stage.seconds if stage.seconds > 0 else 0.0
        left = clock((stage.total - stage.done) / rate) if rate > 0 else "?"
        line.show(f"{stage.name}: {stage.done} of {stage.total} strings, {left} left")

    def announce(text: str) -> None:
        line.close()
        print(text, file=sys.stderr)

    folder, first = out, True
    try:
        with open_processes(device_of(settings.common)) as processes:
            named = f"and-{len(settings.candidates)}"
            folder, first = out or processes.by_first(lambda: default_folder(settings.common.p, named)), processes.first
            found = run_compare(
                settings, out=folder, resume=resume, processes=processes, announce=announce, observe=observe
            )
        if not first:
            sys.exit(AUDIT_FAILED if found.failed else OK)
        return found, folder
    except KeyboardInterrupt:
        line.close()
        if not first:
            sys.exit(INTERRUPTED)
        say_interrupted(folder, "klkit compare --config")
        sys.exit(INTERRUPTED)
    finally:
        line.close()
