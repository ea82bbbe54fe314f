"""``klkit import-llamacpp``: a file of llama.cpp's base logits as the reference."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from klkit.cli import AUDIT_FAILED, INTERRUPTED

EXAMPLES = """[bold]Examples[/bold]

llama-perplexity -m base-F16.gguf -f wiki.txt --kl-divergence-base base.dat

klkit import-llamacpp base.dat org/base,dtype=bfloat16

klkit import-llamacpp base.dat ./my-int4 --unit bits --json -"""


def import_llamacpp_command(
    file: Annotated[
        Path,
        typer.Argument(help="Written by llama-perplexity --kl-divergence-base: the laws of p.", show_default=False),
    ],
    q: Annotated[
        str,
        typer.Argument(metavar="Q", help="The model it is compared with, of the same tokenizer.", show_default=False),
    ],
    first: Annotated[
        str,
        typer.Option(
            help="Id read in place of the first token of every window, none, or auto: the one that begins texts, if "
            "the file begins with it."
        ),
    ] = "auto",
    batch_size: Annotated[int, typer.Option(help="Windows Q reads at a time; changes no result.")] = 8,
    unit: Annotated[str, typer.Option(help="nats or bits.")] = "nats",
    json: Annotated[
        str | None, typer.Option("--json", help="Also write the result as JSON to PATH, or - for standard output.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A new run folder, with a report. \\[default: none]")] = None,
) -> None:
    """Compare Q with the laws in FILE, on the text in FILE: KL(P‖Q) per token, from below."""
    if first not in ("auto", "none") and not first.isdigit():
        raise ValueError(f"expected auto, none or an id for --first, got {first!r}; leave it out for auto")
    from klkit.api.llamacpp import measure_llamacpp
    from klkit.cli.estimate import write_json
    from klkit.cli.progress import Line
    from klkit.cli.show import show_result

    line = Line()
    try:
        result = measure_llamacpp(
            file, q, first="auto" if first == "auto" else None if first == "none" else int(first), unit=unit,
            batch_size=batch_size, out=out, observe=lambda done, total: line.show(f"{done:,} of {total:,} windows"),
        )  # fmt: skip
    except KeyboardInterrupt:
        line.close()
        print("\nklkit: interrupted; nothing is kept: repeat the command", file=sys.stderr)
        sys.exit(INTERRUPTED)
    finally:
        line.close()
    if json != "-":
        show_result(result, out)
    if json is not None:
        write_json(result.to_dict(), json)
    if result.failed:
        print("klkit: the self-audit failed: do not use this number (see the audit above)", file=sys.stderr)
        sys.exit(AUDIT_FAILED)
