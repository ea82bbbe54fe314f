"""A distillation run in numbers: what it is given, what it tells of itself, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from klkit.objectives.distill_labels import Claim
from klkit.objectives.distill_losses import CROSS_ENTROPY, token_loss
from klkit.train.distill import DistillMetrics, DistillState
from klkit.train.distill_evaluate import DistillEvaluation
from klkit.train.distill_recipe import DistillRecipe
from klkit.train.learner import ALL_LAYERS


@dataclass(frozen=True, slots=True)
class Distillation:
    """Everything that a distillation run needs; what is not free on resumption has to stay the same.

    Attributes:
        student: specification of the model to train.
        data: file of examples, or ``klkit:NAME`` for packaged prompts.
        teacher: specification of the model to learn from; may be None with a cache, then nothing is evaluated.
        cache: folder of a cache of what the teacher says about the data; None asks the teacher itself.
        prompt_column: field that holds the prompts.
        response_column: field that holds the responses.
        skip_empty: leave out examples without a response, and say how many; else they are an error.
        held_out: file of examples to evaluate on; None keeps a fifth of the data for that.
        steps: training steps in all.
        every: steps between evaluations, each with a checkpoint.
        samples: responses a held-out prompt that each model writes for an evaluation; 0 for no evaluation.
        lora: rank of an adapter; 0 trains all weights.
        lora_layers: names of the layers that get one.
        device: where everything runs.
        keep: checkpoints to keep; 0 keeps all.
        recipe: how the student is trained.

    Raises:
        ValueError: a number is out of range, or options exclude each other.
    """

    student: str
    data: str
    teacher: str | None = None
    cache: str | None = None
    prompt_column: str = "prompt"
    response_column: str = "response"
    skip_empty: bool = False
    held_out: str | None = None
    steps: int = 200
    every: int = 50
    samples: int = 4
    lora: int = 0
    lora_layers: str | tuple[str, ...] = ALL_LAYERS
    device: str = "cpu"
    keep: int = 3
    recipe: DistillRecipe = field(default_factory=DistillRecipe)

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("every", 1), ("samples", 0), ("lora", 0), ("keep", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"expected {name} of at least {least}, got {getattr(self, name)}; raise it")
        recipe = self.recipe
        if self.teacher is None and self.cache is None and token_loss(recipe.divergence).key != CROSS_ENTROPY:
            raise ValueError("expected a teacher, got none; name one with --teacher, or a cache of one with --cache")
        if self.teacher is None and recipe.teacher_writes:
            raise ValueError("expected a teacher that writes the text, got none; name one with --teacher")
        if self.cache is not None and (recipe.student_share > 0 or recipe.teacher_writes):
            who = "the teacher" if recipe.teacher_writes else "the student"
            raise ValueError(
                f"expected a teacher that reads what {who} writes, got a cache of given text; leave --cache out, or "
                f"train on the data alone"
            )


@dataclass(frozen=True, slots=True)
class DistillReport:
    """What happened, for whoever watches: a step, or an evaluation.

    Attributes:
        step: steps done, of ``steps``.
        metrics: of the step; None otherwise.
        evaluation: None for a step.
        seconds: since the run began, or was resumed, ``fresh`` steps ago.
    """

    step: int
    steps: int
    metrics: DistillMetrics | None
    evaluation: DistillEvaluation | None
    seconds: float
    fresh: int


@dataclass(frozen=True, slots=True)
class DistillRun:
    """A finished run.

    Attributes:
        state: after the last step; ``state.student.model`` is a klkit model.
        evaluations: as in ``evaluations.jsonl``, the first before any step.
        claim: which quantity was descended, and whether along its gradient.
        student: folder of the student in Hugging Face format; None without a run folder.
        notes: what a reader of the numbers should know.
    """

    state: DistillState
    evaluations: tuple[dict[str, Any], ...]
    claim: Claim
    student: Path | None
    notes: tuple[str, ...]
