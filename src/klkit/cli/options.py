"""Options that several commands share, each declared once; None where the user said nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

WHAT, HOW, WHERE = "What is measured", "How it is computed", "What is printed and kept"

Prompts = Annotated[
    str | None,
    typer.Option(
        help="File of prompts: txt, jsonl, csv, parquet, or klkit:docs. Without it: one empty prompt.",
        rich_help_panel=WHAT,
    ),
]
Column = Annotated[
    str | None,
    typer.Option(help="Field that holds the prompts (or the text). \\[default: prompt, or text]", rich_help_panel=WHAT),
]
GroupColumn = Annotated[
    str | None,
    typer.Option(
        help="Field that names each prompt's group. \\[default: group, if there is one]", rich_help_panel=WHAT
    ),
]
Text = Annotated[
    str | None, typer.Option(help="Score this fixed text instead of sampling: estimand F.", rich_help_panel=WHAT)
]
Context = Annotated[
    int | None,
    typer.Option(
        help="Window for long documents of --text; second halves are scored. \\[default: 512]", rich_help_panel=WHAT
    ),
]
Divergence = Annotated[
    str | None,
    typer.Option(help="kl, reverse_kl, js or jeffreys, each properly sampled. \\[default: kl]", rich_help_panel=WHAT),
]
Samples = Annotated[
    int | None, typer.Option(help="Strings per prompt. \\[default: enough for 256 in all]", rich_help_panel=WHAT)
]
MaxTokens = Annotated[int | None, typer.Option(help="Longest response. \\[default: 128]", rich_help_panel=WHAT)]
Temperature = Annotated[
    float | None, typer.Option(help="Softmax temperature of all models. \\[default: 1]", rich_help_panel=WHAT)
]
SharedOnly = Annotated[
    bool | None,
    typer.Option(
        "--shared-only", help="Compare conditionally on the tokens both vocabularies have.", rich_help_panel=WHAT
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        help="Headline estimator: rb_cv, rb, mc, k3_string, cv_string, k3_token, ht. \\[default: rb_cv]",
        rich_help_panel=HOW,
    ),
]
Rtol = Annotated[
    float | None,
    typer.Option(help="Stop when the 95 % interval is within this share of the estimate.", rich_help_panel=HOW),
]
Halfwidth = Annotated[
    float | None,
    typer.Option("--until-halfwidth", help="Stop when the 95 % interval is ± this many --unit.", rich_help_panel=HOW),
]
Seed = Annotated[int | None, typer.Option(help="Names every random draw. \\[default: 0]", rich_help_panel=HOW)]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Precision of the models: auto, float32, bfloat16, float16. \\[default: auto]", rich_help_panel=HOW
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps or auto. \\[default: auto]", rich_help_panel=HOW)]
BatchSize = Annotated[
    str | None,
    typer.Option(help="Strings a batch, or auto; changes no result. \\[default: auto]", rich_help_panel=HOW),
]
Floor = Annotated[
    str | None,
    typer.Option(
        help="Numerical floor: batch (p against itself), dtype (against fp32), noise (after every layer), none. "
        "\\[default: batch]",
        rich_help_panel=HOW,
    ),
]
Sampler = Annotated[
    str | None,
    typer.Option(
        help="What draws the strings: klkit, or vllm with options of its engine, as in "
        "vllm,gpu_memory_utilization=0.4. \\[default: klkit]",
        rich_help_panel=HOW,
    ),
]
TokenJs = Annotated[
    bool | None,
    typer.Option(
        "--token-js",
        help="Also the Jensen-Shannon divergence of the next-token laws; reading out takes half as long again.",
        rich_help_panel=HOW,
    ),
]
Config = Annotated[
    Path | None, typer.Option(help="YAML file of these options; flags win over it.", rich_help_panel=HOW)
]
Unit = Annotated[str | None, typer.Option(help="nats or bits. \\[default: nats]", rich_help_panel=WHERE)]
Json = Annotated[
    str | None,
    typer.Option(
        "--json", help="Also write the result as JSON to PATH, or - for standard output.", rich_help_panel=WHERE
    ),
]
Out = Annotated[
    Path | None, typer.Option(help="Run folder. \\[default: klkit-runs/<time>-<p>-<q>]", rich_help_panel=WHERE)
]
Track = Annotated[
    str | None, typer.Option(help="Also log the result to trackio, wandb or tensorboard.", rich_help_panel=WHERE)
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out.", rich_help_panel=WHERE)]


def with_batch_size(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the batch size as a number, unless it is ``auto``.

    Raises:
        ValueError: it is neither.
    """
    size = options.get("batch_size")
    if isinstance(size, str) and size != "auto":
        if not size.isdigit():
            raise ValueError(f"expected 'auto' or a whole number for --batch-size, got {size!r}; leave it out for auto")
        return {**options, "batch_size": int(size)}
    return dict(options)


def require_tracker(name: str | None) -> None:
    """Refuse a tracker that there is not, or that is not installed, before anything is computed.

    Raises:
        ValueError: it is none.
    """
    if name is not None:
        from klkit.integrations.trackers import module_of

        module_of(name)
