"""The table of commands."""

from __future__ import annotations

import typer

from klkit.cli import (
    cache,
    compare,
    distill,
    estimate,
    explain,
    floor,
    gate,
    llamacpp,
    plan,
    report,
    reproduce,
    train,
    zoo,
)

app = typer.Typer(
    name="klkit",
    help="How far apart are two language models? A true number, with an honest interval.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: klkit demo",
)

MEASURE, LOOK, MAKE = "Measure", "Look", "Make"
app.command("estimate", rich_help_panel=MEASURE, epilog=estimate.EXAMPLES)(estimate.estimate_command)
app.command("compare", rich_help_panel=MEASURE, epilog=compare.EXAMPLES)(compare.compare_command)
app.command("gate", rich_help_panel=MEASURE, epilog=gate.EXAMPLES)(gate.gate_command)
app.command("plan", rich_help_panel=MEASURE, epilog=plan.EXAMPLES)(plan.plan_command)
app.command("run", rich_help_panel=MEASURE)(estimate.run_command)
app.command("floor", rich_help_panel=MEASURE, epilog=floor.EXAMPLES)(floor.floor_command)
app.command("demo", rich_help_panel=MEASURE)(estimate.demo_command)
app.command("import-llamacpp", rich_help_panel=MEASURE, epilog=llamacpp.EXAMPLES)(llamacpp.import_llamacpp_command)
app.command("explain", rich_help_panel=LOOK, epilog=explain.EXAMPLES)(explain.explain_command)
app.command("report", rich_help_panel=LOOK, epilog=report.EXAMPLES)(report.report_command)
app.command("schema", rich_help_panel=LOOK)(report.schema_command)
app.command("models", rich_help_panel=LOOK)(zoo.models_command)
app.command("distill", rich_help_panel=MAKE, epilog=distill.EXAMPLES)(distill.distill_command)
app.add_typer(cache.cache_app, name="cache", rich_help_panel=MAKE)
app.add_typer(reproduce.reproduce_app, name="reproduce", rich_help_panel=MAKE)
app.add_typer(train.train_app, name="train", rich_help_panel=MAKE)
app.add_typer(zoo.zoo_app, name="zoo", rich_help_panel=MAKE)


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    """How far apart are two language models? A true number, with an honest interval."""
    if version:
        from klkit import __version__

        typer.echo(f"klkit {__version__}")
        raise typer.Exit
