"""``klkit train rl``: a policy towards a reward, with a KL term whose gradient is known."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from klkit.api.train import Report, Trained, Training

train_app = typer.Typer(
    help="Train a model; the KL term's gradient is the one it is named after.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

EXAMPLES = """[bold]Examples[/bold]

klkit train rl klkit:reviews --reward klkit:reviews --prompts klkit:reviews --coefficient 0.5 --learning-rate 1e-3

klkit train rl org/model --reward my_rewards:helpful --prompts prompts.jsonl --lora 16 --out run

klkit train rl org/model --reward classifier:org/sentiment#POSITIVE --prompts prompts.jsonl --target-kl 5"""

WHAT, HOW, TERM, WHERE = "What is trained", "How it is trained", "The KL term", "What is kept"


@train_app.command("rl", epilog=EXAMPLES)
def rl_command(
    policy: Annotated[str, typer.Argument(help="Hub id, folder or klkit:NAME of the model.", show_default=False)],
    reward: Annotated[
        str,
        typer.Option(
            help="module:function of (prompts, responses), classifier:MODEL#LABEL, or klkit:reviews.",
            rich_help_panel=WHAT,
            show_default=False,
        ),
    ],
    prompts: Annotated[
        str,
        typer.Option(
            help="File of prompts: txt, jsonl, csv, parquet, or klkit:NAME.", rich_help_panel=WHAT, show_default=False
        ),
    ],
    column: Annotated[str, typer.Option(help="Field that holds the prompts.", rich_help_panel=WHAT)] = "prompt",
    reference: Annotated[
        str | None,
        typer.Option(
            help="Model that the KL term holds to. \\[default: the policy at its start]", rich_help_panel=WHAT
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(help="Prompts to evaluate on. \\[default: a fifth of --prompts]", rich_help_panel=WHAT),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest response.", rich_help_panel=WHAT)] = 64,
    lora: Annotated[int, typer.Option(help="Rank of a LoRA adapter; 0 trains all weights.", rich_help_panel=WHAT)] = 0,
    lora_layers: Annotated[
        str, typer.Option(help="Layers that get one, by name, with commas.", rich_help_panel=WHAT)
    ] = "all-linear",
    steps: Annotated[int, typer.Option(help="Training steps.", rich_help_panel=HOW)] = 200,
    batch: Annotated[int, typer.Option(help="Prompts a step.", rich_help_panel=HOW)] = 16,
    samples: Annotated[int, typer.Option(help="Strings a prompt; each other's baseline.", rich_help_panel=HOW)] = 2,
    learning_rate: Annotated[float, typer.Option(help="AdamW's.", rich_help_panel=HOW)] = 1e-4,
    updates: Annotated[
        int, typer.Option(help="Updates on each batch; off-policy after the first.", rich_help_panel=HOW)
    ] = 1,
    clip: Annotated[
        float, typer.Option(help="Off-policy: how far a string's weight may move.", rich_help_panel=HOW)
    ] = 0.2,
    micro_batch: Annotated[
        int, typer.Option(help="Strings a backward pass; 0 for all of a step.", rich_help_panel=HOW)
    ] = 0,
    seed: Annotated[int, typer.Option(help="Names every random draw.", rich_help_panel=HOW)] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.", rich_help_panel=HOW)] = "cpu",
    penalty: Annotated[
        str,
        typer.Option(
            help="rb, mc, hybrid, rb_full; or what others use: token_local, rb_detached, k1_reward, k2_reward, "
            "k3_reward, k1_loss, k2_loss, k3_loss.",
            rich_help_panel=TERM,
        ),
    ] = "rb",
    coefficient: Annotated[float, typer.Option(help="Price of a nat of KL, in reward.", rich_help_panel=TERM)] = 0.05,
    target_kl: Annotated[
        float | None, typer.Option(help="Steer the coefficient to this KL.", rich_help_panel=TERM)
    ] = None,
    gamma: Annotated[
        float, typer.Option(help="Discount of later divergences; below 1 is biased.", rich_help_panel=TERM)
    ] = 1.0,
    mc_share: Annotated[float, typer.Option(help="Share of mc mixed into rb.", rich_help_panel=TERM)] = 0.0,
    cap: Annotated[
        float | None, typer.Option(help="Largest prefix weight, off-policy. \\[default: none]", rich_help_panel=TERM)
    ] = None,
    max_kl: Annotated[
        float, typer.Option(help="Stop when the KL exceeds so many nats a response.", rich_help_panel=TERM)
    ] = 100.0,
    out: Annotated[Path | None, typer.Option(help="Run folder. \\[default: a new one]", rich_help_panel=WHERE)] = None,
    every: Annotated[int, typer.Option(help="Steps between evaluations, with checkpoint.", rich_help_panel=WHERE)] = 25,
    evaluate: Annotated[int, typer.Option(help="Strings a held-out prompt.", rich_help_panel=WHERE)] = 8,
    keep: Annotated[int, typer.Option(help="Checkpoints to keep; 0 keeps all.", rich_help_panel=WHERE)] = 3,
    track: Annotated[
        str | None, typer.Option(help="Also log to trackio, wandb or tensorboard.", rich_help_panel=WHERE)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.", rich_help_panel=WHERE)] = False,
) -> None:
    """Train POLICY towards a reward by policy gradients, held to its reference by a KL penalty."""
    from klkit.api.train import Training
    from klkit.train.recipe import Recipe

    recipe = Recipe(
        penalty=penalty, coefficient=coefficient, prompts=batch, samples=samples, max_tokens=max_tokens,
        learning_rate=learning_rate, updates=updates, micro_batch=micro_batch, gamma=gamma, mc_share=mc_share,
        cap=cap, clip=clip, target_kl=target_kl, max_kl=max_kl, seed=seed,
    )  # fmt: skip
    layers = tuple(lora_layers.split(","))
    training = Training(
        policy, reward, prompts, reference=reference, column=column, held_out=held_out, steps=steps, every=every,
        samples=evaluate, lora=lora, lora_layers=layers if len(layers) > 1 else layers[0], device=device, keep=keep,
        recipe=recipe,
    )  # fmt: skip
    carry_out(training, out, resume, track)


def carry_out(training: Training, out: Path | None, resume: bool, track: str | None) -> None:
    """Train with a live line, print what came of it, and exit by how it ended."""
    from klkit.api.train import train_rl
    from klkit.cli.estimate import default_folder
    from klkit.cli.progress import Line
    from klkit.cli.training import ended_well, tracking

    if resume and out is None:
        raise ValueError("expected the folder of the run to continue, got --resume alone; add --out FOLDER")
    folder = out if out is not None else default_folder(training.policy, "rl")
    line = Line()
    send, close = tracking(track, training, folder)

    def observe(report: Report) -> None:
        line.show(progress(report))
        send(report)

    with ended_well(folder, line, close):
        trained = train_rl(training, out=folder, resume=resume, observe=observe)
    show_trained(trained, training, folder)


def progress(report: Report) -> str:
    """Where a run is, in a line."""
    from klkit.cli.training import progress_line

    m = report.metrics
    return progress_line(
        report, "" if m is None else f"reward {m.reward:.3g}  KL {m.kl:.3g} nats  length {m.length:.0f}"
    )


def show_trained(trained: Trained, training: Training, folder: Path) -> None:
    """Print what came of a run, within 80 columns."""
    from rich.console import Console
    from rich.table import Table

    from klkit.cli.show import number, show_facts
    from klkit.train.penalties import PENALTIES

    console = Console(highlight=False)
    last, first = trained.evaluations[-1], trained.evaluations[0]
    console.print()
    console.print(
        f"After {trained.state.step} steps: mean reward {number(last['reward'])} ± {number(last['reward_stderr'])} "
        f"(at the start {number(first['reward'])}), KL(p‖q) = {number(last['kl'])} nats per response, 95% interval "
        f"{number(last['kl_lower'])} to {number(last['kl_upper'])} ({last['method']}).",
        style="bold",
    )
    console.print()
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in ("step", "KL, nats", "±", "reward", "±", "tokens", "finished"):
        table.add_column(column, justify="right")
    shown = trained.evaluations
    for row in shown if len(shown) <= 12 else (*shown[:: -(-len(shown) // 11)], shown[-1]):
        keys = ("kl", "kl_stderr", "reward", "reward_stderr", "length")
        table.add_row(f"{row['step']}", *(number(row[key]) for key in keys), f"{row['finished']:.0%}")
    console.print(table)
    console.print()
    penalty, recipe = PENALTIES[training.recipe.penalty], training.recipe
    facts: list[tuple[str, Any]] = [
        ("KL term", f"{recipe.penalty}: {penalty.formula}"),
        ("follows", penalty.objective + ("" if penalty.unbiased else " (biased)")),
        ("price", f"{trained.state.coefficient:.4g} of reward a nat"),
        *(("note", note) for note in trained.notes),
        ("model", f"{trained.checkpoint}"),
        ("saved", f"{folder} (metrics.jsonl, evaluations.jsonl, reward_kl.png)"),
    ]
    show_facts(facts)
