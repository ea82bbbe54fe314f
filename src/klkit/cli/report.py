"""``klkit report`` and ``klkit schema``: a finished run as a page, a table, a model card or a badge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

FORMATS = ("html", "md", "json", "card", "badge")
EXAMPLES = """[bold]Examples[/bold]

klkit report klkit-runs/mine

klkit report klkit-runs/mine --format md

klkit report klkit-runs/compare --format card --candidate klkit:docs-int4"""


def report_command(
    run: Annotated[Path, typer.Argument(help="Folder of the run.", show_default=False)],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="html writes report.html; md (a Markdown table), json, card (a model card block) and badge "
            "(shields.io) are printed.",
        ),
    ] = "html",
    candidate: Annotated[
        str | None,
        typer.Option(help="Only this candidate of a comparison. \\[default: all]", show_default=False),
    ] = None,
    lm_eval: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL=FILE",
            help="With --format md: results of lm-evaluation-harness beside the divergence, of p and of each "
            "candidate (repeatable).",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write report.html of a finished run again, or print the run in another form."""
    from klkit.report.distillation import EVALUATIONS, write_distillation_report

    if form not in FORMATS:
        raise ValueError(f"expected --format to be one of {', '.join(FORMATS)}, got {form!r}; choose one of them")
    if lm_eval and form != "md":
        raise ValueError(f"expected --lm-eval with --format md, got it with {form}; it makes a table in Markdown")
    if (run / EVALUATIONS).is_file():
        if form != "html" or candidate is not None:
            what = f"--format {form}" if form != "html" else "--candidate"
            raise ValueError(
                f"expected a run of estimate or compare for {what}, got the distillation {run}; leave it out"
            )
        typer.echo(str(write_distillation_report(run)))
    elif form == "html":
        typer.echo(str(write_page(run, candidate)))
    else:
        typer.echo(printed(run, form, candidate, pairs_of(lm_eval or [])), nl=False)


def schema_command(
    name: Annotated[str, typer.Argument(metavar="result|ranking", help="Of which result.json.", show_default=False)],
) -> None:
    """Print the JSON Schema of result.json: of one pair (result), or of a comparison of many models (ranking)."""
    from klkit.report.schema import schema

    typer.echo(json.dumps(schema(name), indent=2, ensure_ascii=False))


def write_page(run: Path, candidate: str | None) -> Path:
    """Write the page of a run, of a comparison, or of one of its candidates again."""
    from klkit.api.candidates import folder_of
    from klkit.api.runs import is_ranking, read_run
    from klkit.report.html import write_report
    from klkit.report.ranking import write_ranking
    from klkit.report.record import REPORT

    folder = read_run(run, candidate)
    result = folder.result()
    if not is_ranking(result):
        return write_report(folder)
    paths = {entry["name"]: folder_of(run, entry["name"]) for entry in result["candidates"]}
    write_ranking(run, result, {name: path if (path / REPORT).is_file() else None for name, path in paths.items()})
    return run / REPORT


def printed(run: Path, form: str, candidate: str | None, beside: Mapping[str, Path]) -> str:
    """A finished run in one of the forms that are printed."""
    from klkit.api.runs import entry_of, is_ranking, read_run
    from klkit.integrations import lm_eval
    from klkit.report import badge, card, markdown, ranking

    result = read_run(run).result()
    many = is_ranking(result)
    if many and candidate is None and form in ("card", "badge"):
        names = ", ".join(entry["name"] for entry in result["candidates"])
        raise ValueError(
            f"expected --candidate with --format {form}, since {run} compares many models; choose one of {names}"
        )
    whole = result
    if candidate is not None:
        result, many = entry_of(result, candidate, run)["result"], False
    if form == "card":
        return card.ranking_card(whole, candidate) if candidate is not None else card.model_card(result)
    if form == "badge":
        return dumped(badge.badge(result))
    if form == "json":
        return dumped(result)
    text = ranking.markdown(result) if many else markdown.markdown(result)
    return text + ("\n" + lm_eval.beside(result, beside).markdown() if beside else "")


def dumped(value: Mapping[str, Any]) -> str:
    """``value`` as the JSON that run folders hold."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def pairs_of(given: list[str]) -> dict[str, Path]:
    """``MODEL=FILE`` as files by model; a model's name may hold equals signs, a file's may not.

    Raises:
        ValueError: there is no equals sign, or a model comes twice.
    """
    found: dict[str, Path] = {}
    for text in given:
        name, equals, file = text.rpartition("=")
        if not equals or not name or not file or name in found:
            raise ValueError(
                f"expected --lm-eval MODEL=FILE, each model once, got {text!r}; as in: --lm-eval p=base.json"
            )
        found[name] = Path(file)
    return found
