"""``klkit estimate``, ``klkit run`` and ``klkit demo``: one verb, three ways to name its options."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from klkit.cli import AUDIT_FAILED, INTERRUPTED
from klkit.cli import options as shared
from klkit.cli.options import HOW, WHAT, require_tracker, with_batch_size
from klkit.cli.progress import NATS_PER_BIT

if TYPE_CHECKING:
    from klkit.api.settings import Settings
    from klkit.results import Comparison

EXAMPLES = """[bold]Examples[/bold]

klkit estimate klkit:docs-tuned klkit:docs --max-tokens 64

klkit estimate org/policy org/reference --prompts prompts.jsonl --samples 4

klkit estimate org/base org/base,peft=./adapter --rtol 0.05

klkit estimate org/model ./model-int4 --text wiki.txt

klkit estimate klkit:docs klkit:reviews --bytes --max-tokens 32

klkit estimate klkit:docs klkit:reviews --approximate --max-tokens 32

torchrun --nproc-per-node 8 -m klkit estimate org/policy org/reference --prompts prompts.jsonl"""

ModelP = Annotated[
    str | None,
    typer.Argument(
        metavar="P",
        help="The model that generates: hub id, folder or klkit:NAME, then ,option=value: dtype, peft, round, …",
        show_default=False,
    ),
]
ModelQ = Annotated[str | None, typer.Argument(metavar="Q", help="The model it is compared with.", show_default=False)]


def estimate_command(
    p: ModelP = None,
    q: ModelQ = None,
    prompts: shared.Prompts = None,
    column: shared.Column = None,
    group_column: shared.GroupColumn = None,
    text: shared.Text = None,
    context: shared.Context = None,
    divergence: shared.Divergence = None,
    samples: shared.Samples = None,
    max_tokens: shared.MaxTokens = None,
    temperature: shared.Temperature = None,
    shared_only: shared.SharedOnly = None,
    over_bytes: Annotated[
        bool | None,
        typer.Option(
            "--bytes",
            help="Compare laws of texts byte by byte: tokenizers may differ, --max-tokens counts bytes.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    approximate: Annotated[
        bool | None,
        typer.Option(
            "--approximate",
            help="Tokenizers differ: a quick number off by two errors, and an upper bound. Keeps nothing but --json.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    beam: Annotated[
        int | None,
        typer.Option(help="Tokenisations that --bytes keeps at each byte. \\[default: 8]", rich_help_panel=HOW),
    ] = None,
    method: shared.Method = None,
    rtol: shared.Rtol = None,
    halfwidth: shared.Halfwidth = None,
    seed: shared.Seed = None,
    dtype: shared.Dtype = None,
    device: shared.Device = None,
    batch_size: shared.BatchSize = None,
    sampler: shared.Sampler = None,
    floor: shared.Floor = None,
    token_js: shared.TokenJs = None,
    config: shared.Config = None,
    unit: shared.Unit = None,
    json: shared.Json = None,
    out: shared.Out = None,
    track: shared.Track = None,
    resume: shared.Resume = False,
) -> None:
    """Estimate the divergence between two models: KL(P‖Q) per response, from P's own samples."""
    given = {
        "p": p, "q": q, "prompts": prompts, "column": column, "group_column": group_column, "text": text,
        "context": context, "divergence": divergence, "samples": samples, "max_tokens": max_tokens,
        "temperature": temperature, "shared_only": shared_only, "bytes": over_bytes, "approximate": approximate,
        "beam": beam, "method": method, "rtol": rtol, "halfwidth": halfwidth, "seed": seed, "dtype": dtype,
        "device": device, "batch_size": batch_size, "sampler": sampler, "floor": floor, "token_js": token_js,
        "unit": unit,
    }  # fmt: skip
    carry_out(settings_of(given, config, "estimate"), out, json, resume, track)


def settings_of(given: Mapping[str, Any], config: Path | None, command: str) -> Settings:
    """The options of a pair of models, from the command line and a config file: flags win.

    Raises:
        ValueError: an option that cannot be used, or no two models.
    """
    from klkit.api.settings import Settings

    options = with_batch_size(with_config(given, config))
    if given.get("halfwidth") is not None and options.get("unit") == "bits":
        options["halfwidth"] = given["halfwidth"] * NATS_PER_BIT
    if "p" not in options or "q" not in options:
        raise ValueError(
            f"expected two models, as in: klkit {command} klkit:docs-tuned klkit:docs; or a --config that names p and q"
        )
    return Settings.from_mapping(options)


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


def with_config(given: Mapping[str, Any], config: Path | None) -> dict[str, Any]:
    """Options of the command line that were given, and those of a config file for the others."""
    options = read_config(config) if config is not None else {}
    return options | {name: value for name, value in given.items() if value is not None}


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


def carry_out(
    settings: Settings, out: Path | None, json_path: str | None, resume: bool, track: str | None = None
) -> None:
    """Run the settings with progress, print the result, and exit by the audit's verdict."""
    if settings.approximate:
        carry_out_approximately(settings, out, json_path, resume, track)
        return

    def tell(result: Comparison, folder: Path) -> None:
        from klkit.cli.show import show_result

        if json_path != "-":
            show_result(result, folder)
        if json_path is not None:
            write_json(result.to_dict(), json_path)
        log(track, result.to_dict(), folder)

    require_tracker(track)
    result, first = execute(settings, out, resume, tell)
    if result.failed:
        if first:
            print("klkit: the self-audit failed: do not use this number (see the audit above)", file=sys.stderr)
        sys.exit(AUDIT_FAILED)


def log(tracker: str | None, result: Mapping[str, Any], folder: Path) -> None:
    """Log a result to a tracker, if one was named."""
    if tracker is not None:
        from klkit.integrations.trackers import log_comparison

        log_comparison(tracker, result, folder.name, folder)


def execute(
    settings: Settings, out: Path | None, resume: bool, tell: Callable[[Comparison, Path], None]
) -> tuple[Comparison, bool]:
    """The result of a run, and whether this process is the one that prints; ``tell`` does, in that one."""
    if resume and out is None:
        raise ValueError("expected the folder of the run to continue, got --resume alone; add --out FOLDER")
    draw = open_sampler(settings)
    from klkit.api.prepare import device_of
    from klkit.cli.progress import Watcher
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
                strings = "finished batches" if watcher.last is None else f"{watcher.last.strings} strings"
                say_interrupted(folder, "klkit run", strings)
            sys.exit(INTERRUPTED)

        def show() -> None:
            watcher.close()
            tell(result, folder)

        processes.by_first(show)
        return result, processes.first


def carry_out_approximately(
    settings: Settings, out: Path | None, json_path: str | None, resume: bool, track: str | None
) -> None:
    """Compare models with different tokenizers by one tokenisation of each text, and print the result."""
    from klkit.api.approximate import approximate_run, require_plain
    from klkit.api.prepare import device_of
    from klkit.cli.show_approximation import show_approximation
    from klkit.train.processes import open_processes

    require_plain(out=out, resume=resume or None, track=track)
    with open_processes(device_of(settings)) as processes:
        result = approximate_run(settings, processes)
    if json_path != "-":
        show_approximation(result)
    if json_path is not None:
        write_json(result.to_dict(), json_path)


def open_sampler(settings: Settings) -> Any:
    """What draws the strings in klkit's stead, if the settings name such a thing: checked before models are loaded."""
    from klkit.api.settings import KLKIT

    if settings.sampler == KLKIT:
        return None
    from klkit.integrations.engine import sampler

    sampled = settings.q if settings.divergence == "reverse_kl" else settings.p
    return sampler(sampled, settings.sampler)


def say_interrupted(folder: Path | None, command: str, kept: str = "finished batches") -> None:
    """Say what is kept of an interrupted run, and how to go on.

    Args:
        command: that reads the options of a run from a file.
    """
    if folder is None or not (folder / "config.yaml").is_file():
        print("\nklkit: interrupted before anything was drawn", file=sys.stderr)
        return
    command = f"{command} {quote(str(folder / 'config.yaml'))} --out {quote(str(folder))} --resume"
    print(f"\nklkit: interrupted; {kept} are kept. Continue with:\n  {command}", file=sys.stderr)


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
