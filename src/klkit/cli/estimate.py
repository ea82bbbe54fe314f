"""``klkit estimate``, ``klkit run`` and ``klkit demo``: one verb, three ways to name its options."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from klkit.cli import AUDIT_FAILED, INTERRUPTED

if TYPE_CHECKING:
    from klkit.api.settings import Settings
    from klkit.cli.progress import Watcher

EXAMPLES = """[bold]Examples[/bold]

klkit estimate klkit:docs-tuned klkit:docs --max-tokens 64

klkit estimate org/policy org/reference --prompts prompts.jsonl --samples 4

klkit estimate org/base org/base,peft=./adapter --rtol 0.05

klkit estimate org/model ./model-int4 --text wiki.txt

klkit estimate klkit:docs klkit:reviews --bytes --max-tokens 32

torchrun --nproc-per-node 8 -m klkit estimate org/policy org/reference --prompts prompts.jsonl"""

WHAT, HOW, WHERE = "What is measured", "How it is computed", "What is printed and kept"
ModelSpec = Annotated[
    str,
    typer.Argument(
        help="Hub id, folder or klkit:NAME; options follow commas: "
        "org/name@revision,dtype=bfloat16,device=cuda,peft=FOLDER,round=int4,temperature=0.9,attn=sdpa",
        show_default=False,
    ),
]


def estimate_command(
    p: Annotated[
        str | None,
        typer.Argument(
            metavar="P",
            help="The model that generates: hub id, folder or klkit:NAME, then ,option=value: dtype, peft, round, …",
            show_default=False,
        ),
    ] = None,
    q: Annotated[
        str | None, typer.Argument(metavar="Q", help="The model it is compared with.", show_default=False)
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="File of prompts: txt, jsonl, csv, parquet, or klkit:docs. Without it: one empty prompt.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(
            help="Field that holds the prompts (or the text). \\[default: prompt, or text]", rich_help_panel=WHAT
        ),
    ] = None,
    group_column: Annotated[
        str | None,
        typer.Option(
            help="Field that names each prompt's group. \\[default: group, if there is one]", rich_help_panel=WHAT
        ),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Score this fixed text instead of sampling: estimand F.", rich_help_panel=WHAT)
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            help="Window for long documents of --text; second halves are scored. \\[default: 512]", rich_help_panel=WHAT
        ),
    ] = None,
    divergence: Annotated[
        str | None,
        typer.Option(
            help="kl, reverse_kl, js or jeffreys, each properly sampled. \\[default: kl]", rich_help_panel=WHAT
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Strings per prompt. \\[default: enough for 256 in all]", rich_help_panel=WHAT)
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest response. \\[default: 128]", rich_help_panel=WHAT)
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Softmax temperature of both models. \\[default: 1]", rich_help_panel=WHAT)
    ] = None,
    shared_only: Annotated[
        bool | None,
        typer.Option(
            "--shared-only", help="Compare conditionally on the tokens both vocabularies have.", rich_help_panel=WHAT
        ),
    ] = None,
    over_bytes: Annotated[
        bool | None,
        typer.Option(
            "--bytes",
            help="Compare laws of texts byte by byte: tokenizers may differ, --max-tokens counts bytes.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    beam: Annotated[
        int | None,
        typer.Option(help="Tokenisations that --bytes keeps at each byte. \\[default: 8]", rich_help_panel=HOW),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Headline estimator: rb_cv, rb, mc, k3_string, cv_string, k3_token, ht. \\[default: rb_cv]",
            rich_help_panel=HOW,
        ),
    ] = None,
    rtol: Annotated[
        float | None,
        typer.Option(help="Stop when the 95 % interval is within this share of the estimate.", rich_help_panel=HOW),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Names every random draw. \\[default: 0]", rich_help_panel=HOW)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Precision of both models: auto, float32, bfloat16, float16. \\[default: auto]", rich_help_panel=HOW
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, mps or auto. \\[default: auto]", rich_help_panel=HOW)
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(help="Strings a batch, or auto; changes no result. \\[default: auto]", rich_help_panel=HOW),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="What draws the strings: klkit, or vllm with options of its engine, as in "
            "vllm,gpu_memory_utilization=0.4. \\[default: klkit]",
            rich_help_panel=HOW,
        ),
    ] = None,
    floor: Annotated[
        str | None,
        typer.Option(
            help="Numerical floor: batch (p against itself), dtype (against fp32), noise (after every layer), none. "
            "\\[default: batch]",
            rich_help_panel=HOW,
        ),
    ] = None,
    token_js: Annotated[
        bool | None,
        typer.Option(
            "--token-js",
            help="Also the Jensen-Shannon divergence of the next-token laws; reading out takes half as long again.",
            rich_help_panel=HOW,
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of these options; flags win over it.", rich_help_panel=HOW)
    ] = None,
    unit: Annotated[str | None, typer.Option(help="nats or bits. \\[default: nats]", rich_help_panel=WHERE)] = None,
    json: Annotated[
        str | None,
        typer.Option(
            "--json", help="Also write the result as JSON to PATH, or - for standard output.", rich_help_panel=WHERE
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder. \\[default: klkit-runs/<time>-<p>-<q>]", rich_help_panel=WHERE)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.", rich_help_panel=WHERE)] = False,
) -> None:
    """Estimate the divergence between two models: KL(P‖Q) per response, from P's own samples."""
    from klkit.api.settings import Settings

    given = {
        "p": p, "q": q, "prompts": prompts, "column": column,
        "group_column": group_column, "text": text, "context": context,
        "divergence": divergence, "samples": samples, "max_tokens": max_tokens, "temperature": temperature,
        "shared_only": shared_only, "bytes": over_bytes, "beam": beam, "method": method, "rtol": rtol,
        "seed": seed, "dtype": dtype, "device": device, "batch_size": batch_size, "sampler": sampler,
        "floor": floor, "token_js": token_js, "unit": unit,
    }  # fmt: skip
    options = read_config(config) if config is not None else {}
    options |= {name: value for name, value in given.items() if value is not None}
    size = options.get("batch_size")
    if isinstance(size, str) and size != "auto":
        if not size.isdigit():
            raise ValueError(f"expected 'auto' or a whole number for --batch-size, got {size!r}; leave it out for auto")
        options["batch_size"] = int(size)
    if "p" not in options or "q" not in options:
        raise ValueError(
            "expected two models, as in: klkit estimate klkit:docs-tuned klkit:docs; or a --config that names p and q"
        )
    carry_out(Settings.from_mapping(options), out, json, resume)


def run_command(
    config: Annotated[
        Path, typer.Argument(help="config.yaml of an earlier run, or one of your own.", show_default=False)
    ],
    json: Annotated[
        str | None, typer.Option("--json", help="Also write the result as JSON to PATH, or - for standard output.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. \\[default: a new one]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
) -> None:
    """Repeat a run from its config.yaml, to the last digit."""
    from klkit.api.settings import Settings

    carry_out(Settings.from_mapping(read_config(config)), out, json, resume)


def demo_command(
    out: Annotated[Path | None, typer.Option(help="Run folder. \\[default: a new one]")] = None,
    json: Annotated[
        str | None, typer.Option("--json", help="Also write the result as JSON to PATH, or - for standard output.")
    ] = None,
) -> None:
    """Run the main job on two packaged models: no network, under a minute."""
    from klkit.api.settings import Settings

    carry_out(Settings(p="klkit:docs-tuned", q="klkit:docs", max_tokens=64, samples=512), out, json, False)


def read_config(path: Path) -> dict[str, Any]:
    """Options from a YAML file.

    Raises:
        ValueError: the file is missing, is not YAML, or does not hold options by name.
    """
    import yaml

    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"expected a YAML file of options at {path}, got: {error}; check the path and the file"
        ) from error
    if not isinstance(options, Mapping):
        raise ValueError(
            f"expected options by name in {path}, got {type(options).__name__}; write lines such as 'seed: 1'"
        )
    return dict(options)


def default_folder(p: str, q: str) -> Path:
    """A new folder name under ``klkit-runs``, from the time and the models' names."""

    def short(spec: str) -> str:
        name = spec.split(",")[0].rstrip("/").split("/")[-1].replace("klkit:", "")
        return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)[:40]

    return Path("klkit-runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{short(p)}-{short(q)}"


def carry_out(settings: Settings, out: Path | None, json_path: str | None, resume: bool) -> None:
    """Run the settings with progress, print the result, and exit by the audit's verdict."""
    if resume and out is None:
        raise ValueError("expected the folder of the run to continue, got --resume alone; add --out FOLDER")
    draw = open_sampler(settings)
    from klkit.api.prepare import device_of
    from klkit.cli.progress import Watcher
    from klkit.cli.show import show_result
    from klkit.train.processes import open_processes

    with (
        open_processes(device_of(settings)) as processes,
        Watcher(settings.unit, "byte" if settings.bytes else "token") as watcher,
    ):
        # A name that another process would make up a second later is another name.
        folder = out or processes.by_first(lambda: default_folder(settings.p, settings.q))
        try:
            from klkit.api.run import run

            # A million objects of imported libraries that never die: the collector need not look at them again.
            gc.freeze()
            observe = watcher.observe if processes.first else None
            result = run(settings, out=folder, resume=resume, observe=observe, sampler=draw, processes=processes)
        except KeyboardInterrupt:
            watcher.close()
            if processes.first:
                say_interrupted(folder, watcher)
            sys.exit(INTERRUPTED)

        def tell() -> None:
            watcher.close()
            if json_path != "-":
                show_result(result, folder)
            if json_path is not None:
                write_json(result.to_dict(), json_path)

        processes.by_first(tell)
    if result.failed:
        if processes.first:
            print("klkit: the self-audit failed: do not use this number (see the audit above)", file=sys.stderr)
        sys.exit(AUDIT_FAILED)


def open_sampler(settings: Settings) -> Any:
    """What draws the strings in klkit's stead, if the settings name such a thing: checked before models are loaded."""
    from klkit.api.settings import KLKIT

    if settings.sampler == KLKIT:
        return None
    from klkit.integrations.engine import sampler

    sampled = settings.q if settings.divergence == "reverse_kl" else settings.p
    return sampler(sampled, settings.sampler)


def say_interrupted(folder: Path, watcher: Watcher) -> None:
    """Say what is kept of an interrupted run, and how to go on."""
    if not (folder / "config.yaml").is_file():
        print("\nklkit: interrupted before anything was drawn", file=sys.stderr)
        return
    command = f"klkit run {quote(str(folder / 'config.yaml'))} --out {quote(str(folder))} --resume"
    kept = f"{watcher.last.strings} strings are kept" if watcher.last else "finished batches are kept"
    print(f"\nklkit: interrupted; {kept}. Continue with:\n  {command}", file=sys.stderr)


def write_json(result: Mapping[str, Any], target: str) -> None:
    """Write the result to a file, whole or not at all, or to standard output."""
    import json

    # Plain ASCII: token texts may hold characters that a terminal would obey.
    text = json.dumps(result, indent=2, allow_nan=False)
    if target == "-":
        print(text)
    else:
        from klkit.files import write_text

        try:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            write_text(Path(target), text + "\n")
        except OSError as error:
            raise ValueError(
                f"expected to write JSON to {target}, got: {error}; the run itself is complete, and the same JSON is "
                f"the result.json of its folder"
            ) from error
