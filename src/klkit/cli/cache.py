"""``klkit cache build`` and ``klkit cache inspect``: a teacher asked once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klkit.cli import AUDIT_FAILED, INTERRUPTED

if TYPE_CHECKING:
    from klkit.api.cache import Inspection
    from klkit.caches.sizes import CacheSize

cache_app = typer.Typer(
    help="What a teacher says about fixed examples, asked once and kept.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

EXAMPLES = """[bold]Examples[/bold]

klkit cache build --teacher org/large --data train.jsonl --out cache

klkit cache build --teacher org/large --data train.jsonl --kind top-k --k 128 --max-size 20GB --out cache

klkit cache build --teacher org/large --data train.jsonl --kind hybrid --k 256 --draws 16 --out cache"""


@cache_app.command("build", epilog=EXAMPLES)
def build_command(
    teacher: Annotated[str, typer.Option(help="Hub id, folder or klkit:NAME of the model.", show_default=False)],
    data: Annotated[
        str, typer.Option(help="File of examples: jsonl, csv, parquet with prompt and response.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder of the cache; an unfinished one is continued.", show_default=False)],
    kind: Annotated[
        str,
        typer.Option(help="hidden (exact), top-k (lower bounds), sampled (forward KL only), hybrid (KL without bias)."),
    ] = "hidden",
    k: Annotated[int, typer.Option(help="top-k, hybrid: likeliest tokens that are kept of a law.")] = 64,
    temperature: Annotated[float, typer.Option(help="top-k: at which the law is taken.")] = 1.0,
    draws: Annotated[int, typer.Option(help="sampled, hybrid: draws from a law, or from its other tokens.")] = 64,
    seed: Annotated[int, typer.Option(help="sampled, hybrid: names the draws.")] = 0,
    max_tokens: Annotated[int, typer.Option(help="Longest response, as in the run that reads the cache.")] = 256,
    prompt_column: Annotated[str, typer.Option(help="Field that holds the prompts.")] = "prompt",
    response_column: Annotated[str, typer.Option(help="Field that holds the responses.")] = "response",
    skip_empty: Annotated[bool, typer.Option("--skip-empty", help="Leave out examples without a response.")] = False,
    batch: Annotated[int, typer.Option(help="Examples the teacher reads at a time.")] = 16,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    max_size: Annotated[
        str | None, typer.Option(help="Refuse to write more, such as 20GB. \\[default: what fits on the disk]")
    ] = None,
) -> None:
    """Ask TEACHER once about every example of DATA, and keep what it says."""
    from klkit.api.cache import CacheOrder, build_cache
    from klkit.caches.recording import Recording
    from klkit.caches.sizes import parse_size
    from klkit.cli.progress import Line

    order = CacheOrder(
        teacher, data, Recording(kind, k=k, draws=draws, temperature=temperature, seed=seed), max_tokens=max_tokens,
        prompt_column=prompt_column, response_column=response_column, skip_empty=skip_empty, batch=batch,
        device=device, most_bytes=None if max_size is None else parse_size(max_size),
    )  # fmt: skip
    line = Line()
    try:
        built = build_cache(
            order,
            out,
            announce=lambda size: typer.echo(size_line(size)),
            observe=lambda done, total: line.show(f"{done:,} of {total:,} tokens"),
        )
    except KeyboardInterrupt:
        line.close()
        print("\nklkit: interrupted; repeat the command to go on from the last whole shard", file=sys.stderr)
        sys.exit(INTERRUPTED)
    finally:
        line.close()
    for path in built.damaged:
        typer.echo(f"set aside, and made again: {path}")
    from klkit.api.cache import Inspection

    show_cache(Inspection(built.cache, None, None))


@cache_app.command("inspect")
def inspect_command(
    path: Annotated[Path, typer.Argument(help="Folder of the cache.", show_default=False)],
    teacher: Annotated[
        str | None, typer.Option(help="Ask this model about some examples again.", show_default=False)
    ] = None,
    data: Annotated[str | None, typer.Option(help="Compare with this file of examples.", show_default=False)] = None,
    examples: Annotated[int, typer.Option(help="Examples to ask again.")] = 8,
    prompt_column: Annotated[str, typer.Option(help="Field that holds the prompts.")] = "prompt",
    response_column: Annotated[str, typer.Option(help="Field that holds the responses.")] = "response",
    skip_empty: Annotated[bool, typer.Option("--skip-empty", help="Leave out examples without a response.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
) -> None:
    """Say what a cache holds, and with its teacher at hand whether it is still true."""
    from klkit.api.cache import inspect_cache

    found = inspect_cache(
        path, teacher=teacher, data=data, examples=examples, prompt_column=prompt_column,
        response_column=response_column, skip_empty=skip_empty, device=device,
    )  # fmt: skip
    show_cache(found)
    if not found.sound:
        sys.exit(AUDIT_FAILED)


def size_line(size: CacheSize) -> str:
    """The room a cache takes, in a line.

    Example:
        >>> from klkit.caches.sizes import CacheSize
        >>> print(size_line(CacheSize(decision=4096, laws=4096000, head=0, strings=8000, logits=256000000)))
        The cache will take about 4.1 MB (4,096 bytes a token);
        all logits in half precision would take 256 MB.
    """
    from klkit.caches.sizes import readable

    head = f" and {readable(size.head)} of output head" if size.head else ""
    return (
        f"The cache will take about {readable(size.total)} ({size.decision:,} bytes a token{head});\n"
        f"all logits in half precision would take {readable(size.logits)}."
    )


def show_cache(found: Inspection) -> None:
    """Print what a cache is, within 80 columns."""
    from klkit.caches.sizes import readable
    from klkit.cli.show import show_facts

    manifest = found.cache.manifest
    teacher, data = manifest.teacher, manifest.data
    options = ", ".join(f"{name} {value}" for name, value in manifest.recording.options().items() if name != "kind")
    facts = [
        ("teacher", f"{teacher.name} ({teacher.dtype}, weights {teacher.weights})"),
        ("kind", manifest.recording.kind + (f" ({options})" if options else "")),
        ("data", f"{data.examples:,} examples, {data.decisions:,} response tokens, responses {data.responses}"),
        ("longest", f"{data.max_tokens or 'any number of'} tokens a response"),
        ("tokenizer", f"{teacher.tokens}, {manifest.size:,} tokens, ends {', '.join(map(str, teacher.ends))}"),
        ("template", teacher.template or "none"),
        ("size", f"{readable(manifest.bytes)}, shards: {len(manifest.parts)}, by {manifest.writer}"),
        *((name.replace("_", " "), f"{value:.4g}") for name, value in manifest.coverage.items()),
    ]
    if found.agreement is not None:
        again = found.agreement
        what = "mean share of other draws" if manifest.recording.kind == "sampled" else "largest total variation"
        verdict = "agrees" if again.holds else "FAILED"
        facts.append(
            (
                "asked again",
                f"{verdict}: {what} {again.largest:.2g}, at most {again.tolerance:g} by rounding "
                f"({again.decisions:,} tokens of {again.examples} examples)",
            )
        )
    if found.problem is not None:
        facts.append(("STALE", found.problem))
    print()
    show_facts(facts, red={name for name, text in facts if name == "STALE" or text.startswith("FAILED")})
