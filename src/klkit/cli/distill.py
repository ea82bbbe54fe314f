"""``klkit distill``: a student towards a teacher, and words that say what is optimised."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klkit.cli import AUDIT_FAILED

if TYPE_CHECKING:
    from klkit.api.distill_plan import Distillation, DistillReport, DistillRun
    from klkit.objectives.distill_labels import Claim

EXAMPLES = """[bold]Examples[/bold]

klkit distill --teacher klkit:reviews-positive --student klkit:reviews --data klkit:reviews --text teacher

klkit distill --teacher org/large --student org/small --data chats.jsonl --loss adaptive_kl --out run

klkit distill --teacher org/large --student org/small --data chats.jsonl --on-policy 0.5 --lora 16

torchrun --nproc-per-node 8 -m klkit distill --teacher org/large --student org/small --data chats.jsonl --device cuda"""

WHAT, TERM, HOW, WHERE = "What is trained", "What is optimised", "How it is trained", "What is kept"


def distill_command(
    student: Annotated[
        str, typer.Option(help="Hub id, folder or klkit:NAME of the model.", rich_help_panel=WHAT, show_default=False)
    ],
    data: Annotated[
        str,
        typer.Option(
            help="File of examples: jsonl, csv, parquet, txt, or klkit:NAME.", rich_help_panel=WHAT, show_default=False
        ),
    ],
    teacher: Annotated[
        str | None, typer.Option(help="Model to learn from.", rich_help_panel=WHAT, show_default=False)
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Cache of what the teacher says about the data.", rich_help_panel=WHAT)
    ] = None,
    prompt_column: Annotated[str, typer.Option(help="Field that holds the prompts.", rich_help_panel=WHAT)] = "prompt",
    response_column: Annotated[
        str, typer.Option(help="Field that holds the responses.", rich_help_panel=WHAT)
    ] = "response",
    skip_empty: Annotated[
        bool, typer.Option("--skip-empty", help="Leave out examples without a response.", rich_help_panel=WHAT)
    ] = False,
    held_out: Annotated[
        str | None, typer.Option(help="Examples to evaluate on. \\[default: a fifth of --data]", rich_help_panel=WHAT)
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest response.", rich_help_panel=WHAT)] = 256,
    lora: Annotated[int, typer.Option(help="Rank of a LoRA adapter; 0 trains all weights.", rich_help_panel=WHAT)] = 0,
    lora_layers: Annotated[
        str, typer.Option(help="Layers that get one, by name, with commas.", rich_help_panel=WHAT)
    ] = "all-linear",
    loss: Annotated[
        str | None,
        typer.Option(
            help="forward_kl, reverse_kl, sum_kl, jeffreys, adaptive_kl, adaptive_kl_swapped, generalised_js, "
            "normalised_js, skew_kl, skew_reverse_kl, total_variation, alpha_beta, cross_entropy; with options as in "
            "adaptive_kl,mass=0.5. \\[default: by the text]",
            rich_help_panel=TERM,
        ),
    ] = None,
    objective: Annotated[
        str,
        typer.Option(
            help="token, the loss at each token; sequence-fkl, KL(teacher‖student) of whole responses; sequence-rkl, "
            "KL(student‖teacher) of them.",
            rich_help_panel=TERM,
        ),
    ] = "token",
    text: Annotated[
        str, typer.Option(help="data, or teacher for its answers to the prompts.", rich_help_panel=TERM)
    ] = "data",
    on_policy: Annotated[
        float, typer.Option(help="Share of strings that the student writes.", rich_help_panel=TERM)
    ] = 0.0,
    samples: Annotated[
        int | None, typer.Option(help="Strings a model writes for a prompt.", rich_help_panel=TERM)
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Of both laws; the divergence times its square.", rich_help_panel=TERM)
    ] = 1.0,
    cross_entropy: Annotated[
        float, typer.Option(help="Share of the text's cross-entropy.", rich_help_panel=TERM)
    ] = 0.0,
    steps: Annotated[int, typer.Option(help="Training steps.", rich_help_panel=HOW)] = 200,
    batch: Annotated[int, typer.Option(help="Strings a step.", rich_help_panel=HOW)] = 32,
    micro_batch: Annotated[
        int, typer.Option(help="Strings a backward pass; 0 for all of a process.", rich_help_panel=HOW)
    ] = 0,
    learning_rate: Annotated[float, typer.Option(help="AdamW's, at its highest.", rich_help_panel=HOW)] = 1e-4,
    warmup: Annotated[int, typer.Option(help="Steps over which it rises.", rich_help_panel=HOW)] = 20,
    schedule: Annotated[str, typer.Option(help="cosine or constant, after that.", rich_help_panel=HOW)] = "cosine",
    gradient_norm: Annotated[float, typer.Option(help="Longer gradients are shortened.", rich_help_panel=HOW)] = 1.0,
    precision: Annotated[
        str, typer.Option(help="Of the student's layers: float32 or bfloat16.", rich_help_panel=HOW)
    ] = "float32",
    max_loss: Annotated[
        float, typer.Option(help="Stop when a token's divergence exceeds so many nats.", rich_help_panel=HOW)
    ] = 100.0,
    seed: Annotated[int, typer.Option(help="Names every random draw.", rich_help_panel=HOW)] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.", rich_help_panel=HOW)] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Run folder. \\[default: a new one]", rich_help_panel=WHERE)] = None,
    every: Annotated[int, typer.Option(help="Steps between evaluations, with checkpoint.", rich_help_panel=WHERE)] = 50,
    evaluate: Annotated[
        int, typer.Option(help="Responses a held-out prompt; 0 for no evaluation.", rich_help_panel=WHERE)
    ] = 4,
    keep: Annotated[int, typer.Option(help="Checkpoints to keep; 0 keeps all.", rich_help_panel=WHERE)] = 3,
    save: Annotated[
        Path | None, typer.Option(help="Also write the student here, at the end.", rich_help_panel=WHERE)
    ] = None,
    track: Annotated[
        str | None, typer.Option(help="Also log to trackio, wandb or tensorboard.", rich_help_panel=WHERE)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.", rich_help_panel=WHERE)] = False,
    check: Annotated[
        bool,
        typer.Option("--selfcheck", help="Try masks, shifts, padding and sums on this data; train nothing."),
    ] = False,
) -> None:
    """Train STUDENT towards TEACHER, and say which quantity that optimises."""
    from klkit.api.distill_plan import Distillation
    from klkit.train.distill_recipe import DistillRecipe

    recipe = DistillRecipe(
        loss=loss, objective=objective, text=text, on_policy=on_policy, samples=samples, temperature=temperature,
        cross_entropy=cross_entropy, batch=batch, micro_batch=micro_batch, max_tokens=max_tokens,
        learning_rate=learning_rate, warmup=warmup, schedule=schedule, gradient_norm=gradient_norm,
        precision=precision, max_loss=max_loss, seed=seed,
    )  # fmt: skip
    layers = tuple(lora_layers.split(","))
    plan = Distillation(
        student, data, teacher, cache=None if cache is None else str(cache), prompt_column=prompt_column,
        response_column=response_column, skip_empty=skip_empty, held_out=held_out, steps=steps, every=every,
        samples=evaluate, lora=lora, lora_layers=layers if len(layers) > 1 else layers[0], device=device, keep=keep,
        recipe=recipe,
    )  # fmt: skip
    if check:
        carry_out_check(plan)
        return
    if resume and out is None:
        raise ValueError("expected the folder of the run to continue, got --resume alone; add --out FOLDER")
    carry_out(plan, out, save, resume, track)


def carry_out(plan: Distillation, out: Path | None, save: Path | None, resume: bool, track: str | None) -> None:
    """Train with a live line, print what came of it, and exit by how it ended."""
    from klkit.api.distill import distill, save_student
    from klkit.cli.estimate import default_folder
    from klkit.cli.progress import Line
    from klkit.cli.training import ended_well, tracking
    from klkit.train.processes import open_processes

    with open_processes(plan.device) as processes:
        # A name that another process would make up a second later is another name.
        folder = out or processes.by_first(lambda: default_folder(plan.student, "distill"))
        line = Line()
        send, close = tracking(track if processes.first else None, plan, folder)

        def observe(report: DistillReport) -> None:
            line.show(progress(report))
            send(report)

        with ended_well(folder, line, close):
            run = distill(
                plan,
                out=folder,
                resume=resume,
                announce=(lambda claim, notes: announce(plan, claim, notes)) if processes.first else None,
                observe=observe if processes.first else None,
                processes=processes,
            )
            if save is not None:
                processes.by_first(lambda: save_student(run.state.student, save))
    if processes.first:
        show_run(run, folder, save)


def carry_out_check(plan: Distillation) -> None:
    """Try what training relies on, print what was found, and exit by whether all of it holds."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from klkit.api.distill_prepare import answered, prepare
    from klkit.api.selfcheck import selfcheck
    from klkit.cli.show import show_facts
    from klkit.train.teachers import CachedTeacher

    made = prepare(plan)
    rows = made.rows if isinstance(made.rows, CachedTeacher) else None
    teacher = None if made.foreign or rows is not None else made.teacher
    found = selfcheck(teacher, made.learner, answered(made, plan.recipe), plan.recipe, rows=rows)
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("check", "found", "allowed", "outcome"):
        table.add_column(name, justify="right" if name in ("found", "allowed") else "left")
    for row in found.rows():
        table.add_row(*map(escape, row.values()))
    console.print(table)
    console.print()
    show_facts([("note", note) for note in (*found.notes(), *made.notes)])
    failed = sum(check.outcome == "failed" for check in found.checks)
    words = f"{failed} of {len(found.checks)} checks failed" if failed else f"All {len(found.checks)} checks hold"
    console.print(f"{words}.", style="bold")
    if failed:
        sys.exit(AUDIT_FAILED)


def announce(plan: Distillation, claim: Claim, notes: tuple[str, ...]) -> None:
    """Print what is optimised before anything is, within 80 columns."""
    from klkit.cli.show import show_facts
    from klkit.objectives.distill_losses import token_loss

    recipe, facts = plan.recipe, []
    if recipe.objective == "token":
        loss = token_loss(recipe.divergence)
        facts.append(("loss", f"{loss.key}: {loss.formula}, p the teacher, q the student"))
    if recipe.temperature != 1:
        square = f"{recipe.temperature**2:g}"
        facts.append(("temperature", f"{recipe.temperature:g}, and the divergence times its square, {square}"))
    facts.append(("optimises", claim.objective))
    facts.append(("gradient", "that quantity's, unbiased" if claim.gradient else "NOT that quantity's"))
    facts += [("note", note) for note in (*claim.notes, *notes)]
    show_facts(facts)


def progress(report: DistillReport) -> str:
    """Where a run is, in a line."""
    from klkit.cli.training import progress_line

    m = report.metrics
    return progress_line(report, "" if m is None else f"loss {m.loss:.3g}  {m.tokens} tokens")


def show_run(run: DistillRun, folder: Path, save: Path | None) -> None:
    """Print what came of a run, within 80 columns."""
    from rich.console import Console
    from rich.table import Table

    from klkit.cli.show import number, show_facts

    console = Console(highlight=False)
    console.print()
    if run.evaluations:
        last, first = run.evaluations[-1], run.evaluations[0]
        console.print(
            f"After {run.state.step} steps: KL(teacher‖student) = {number(last['kl'])} nats per response, 95% interval "
            f"{number(last['kl_lower'])} to {number(last['kl_upper'])} (rb_cv; at the start {number(first['kl'])}), "
            f"KL(student‖teacher) = {number(last['reverse_kl'])}, {number(last['reverse_kl_lower'])} to "
            f"{number(last['reverse_kl_upper'])} (at the start {number(first['reverse_kl'])}).",
            style="bold",
        )
        console.print()
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        columns = {
            "KL(t‖s)": "kl", "KL(s‖t)": "reverse_kl", "a token": "text_kl", "reverse": "text_reverse_kl",
            "top-1": "text_same_top", "Rouge-L": "rouge_l",
        }  # fmt: skip
        shown = {title: key for title, key in columns.items() if key in last}
        for column in ("step", *shown):
            table.add_column(column, justify="right")
        rows = run.evaluations
        for row in rows if len(rows) <= 12 else (*rows[:: -(-len(rows) // 11)], rows[-1]):
            table.add_row(f"{row['step']}", *(number(row[key]) for key in shown.values()))
        console.print(table)
        console.print()
    else:
        console.print(f"After {run.state.step} steps.", style="bold")
    saved = "metrics.jsonl" + (", evaluations.jsonl, report.html" if run.evaluations else "")
    show_facts([("student", run.student if save is None else save), ("saved", f"{folder} ({saved})")])
