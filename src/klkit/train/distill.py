"""Distillation as two functions: :func:`start` makes a state, :func:`step` the next one.

A step takes strings (given, the teacher's or the student's own), and descends a divergence between the two models'
next-token laws on them. Nothing is written anywhere, and every random number is named by the seed and the step's
number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from klkit.objectives.distill_losses import CROSS_ENTROPY, token_loss
from klkit.sequences import Sequences
from klkit.train.distill_gradients import Totals, form_gradients
from klkit.train.distill_recipe import DistillRecipe
from klkit.train.examples import Example, encode_examples, require_room
from klkit.train.learner import Learner, full_learner
from klkit.train.processes import Processes
from klkit.train.rl import TrainingStopped
from klkit.train.teachers import OnlineTeacher, TeacherRows, require_teacher, shared_tokens
from klkit.train.texts import step_text, teacher_text

if TYPE_CHECKING:
    from klkit.models.hf import HuggingFaceModel


@dataclass(frozen=True, eq=False, slots=True)
class DistillState:
    """A run between two steps.

    Attributes:
        student: the model under training; a step changes the weights in place.
        optimizer: its state changes in place, too.
        recipe: how it is trained.
        teacher: its laws; None where the loss has none.
        texts: what there is to read, ``prompt`` the index of each's context; None where the student writes everything.
        contexts: token ids of each example's prompt, as the student reads them.
        size: ids below which a token is one that both models have; None for all.
        steps: steps in all, which the learning rate depends on.
        processes: that share the work.
        notes: what a reader of the numbers should know.
        step: steps done.
    """

    PROGRESS: ClassVar[tuple[str, ...]] = ("step",)

    student: Learner
    optimizer: torch.optim.Optimizer
    recipe: DistillRecipe
    teacher: TeacherRows | None
    texts: Sequences | None
    contexts: Sequence[Int[Tensor, " _c"]]
    size: int | None
    steps: int
    processes: Processes
    notes: tuple[str, ...] = ()
    step: int = 0

    @property
    def learner(self) -> Learner:
        """What a checkpoint holds."""
        return self.student


@dataclass(frozen=True, slots=True)
class DistillMetrics:
    """What a step measured on its strings, before it changed the weights; means over the decisions of all processes.

    Attributes:
        step: its number, from 1.
        loss: what was descended.
        divergence: the loss's divergence, at the temperature, without its square; nats a token.
        kl: KL(teacher‖student), nats a token; None where it is not known.
        reverse_kl: KL(student‖teacher), likewise.
        head_weight: share of Σ|p − q| in the teacher's head, by which an adaptive KL weighs; None for other losses.
        cross_entropy: of the strings' own tokens.
        tokens: decisions.
        strings: strings.
        on_policy: share of strings that the student wrote.
        finished: share of strings that ended by themselves.
        learning_rate: of the step.
        gradient_norm: length of the gradient before it was shortened.
        exactness: what the divergence is to that of the whole laws.
        seconds: time the step took.
        sampling_seconds: of which drawing strings took.
    """

    step: int
    loss: float
    divergence: float | None
    kl: float | None
    reverse_kl: float | None
    head_weight: float | None
    cross_entropy: float | None
    tokens: int
    strings: int
    on_policy: float
    finished: float
    learning_rate: float
    gradient_norm: float
    exactness: str
    seconds: float
    sampling_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The numbers by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def start(
    student: Learner | HuggingFaceModel,
    teacher: HuggingFaceModel | TeacherRows | None,
    examples: Sequence[Example],
    recipe: DistillRecipe | None = None,
    steps: int = 200,
    *,
    texts: Sequences | None = None,
    size: int | None = None,
    processes: Processes | None = None,
) -> DistillState:
    """The state before the first step.

    Args:
        student: what is trained; a model stands for a copy of it, all weights trained, which stays as it is.
        teacher: a model, or a function from strings and the indices of their examples to its laws, such as a cache;
            None for the cross-entropy alone.
        examples: prompts, and responses where the recipe reads them.
        recipe: by default that of :class:`DistillRecipe`.
        steps: in all; the learning rate falls towards the last.
        texts: strings to read instead of the responses, ``prompt`` the index of each's example: the teacher's, drawn
            before. Without them they are drawn here, where the recipe wants them.
        size: where the teacher is a function, ids below which a token is one that both models have.
        processes: that share the work; by default this one alone.

    Raises:
        VocabularyMismatch: the two models do not choose from the same tokens.
        ValueError: an example is empty or too long, or the recipe needs what there is not.
    """
    from klkit.models.hf import HuggingFaceModel

    recipe, processes = recipe or DistillRecipe(), processes or Processes()
    if not examples:
        raise ValueError("expected at least one example, got none; name a file with --data")
    model = teacher if isinstance(teacher, HuggingFaceModel) else None
    if not isinstance(student, Learner):
        student = full_learner(student, ends=None if model is None else model.vocabulary.ends)
    notes: tuple[str, ...] = ()
    if model is not None:
        size, notes = shared_tokens(model, student.model)
    require_teacher(teacher, recipe)
    contexts = [student.model.context(example.prompt) for example in examples]
    windows = [x.window for x in (student.model, model) if x is not None and x.window is not None]
    window = min(windows, default=None)
    if recipe.student_share > 0 or recipe.teacher_writes:
        blank = [torch.zeros(recipe.max_tokens, dtype=torch.long)] * len(contexts)
        require_room(Sequences.pack(contexts, blank), window, student.model.name)
    if texts is None and recipe.student_share < 1:
        if recipe.teacher_writes:
            assert model is not None
            own = [model.context(example.prompt) for example in examples]
            texts = teacher_text(model, own, recipe, size=size, processes=processes)
            texts = texts.after([contexts[i] for i in texts.prompt.tolist()])
        else:
            texts = encode_examples(student.model, examples, recipe.max_tokens, window=window)
    if texts is not None and size is not None and texts.decisions and int(texts.targets().max()) >= size:
        wide = texts.prompt[texts.row()[texts.targets() >= size]]
        raise ValueError(
            f"expected responses of the {size} tokens that both models have, got others in {len(set(wide.tolist()))} "
            f"examples, the first of them example {int(wide[0]) + 1}; leave these examples out"
        )
    rows: TeacherRows | None = None
    if token_loss(recipe.divergence).key != CROSS_ENTROPY or recipe.sequence_level:
        rows = OnlineTeacher.of(model, examples, size) if model is not None else teacher  # type: ignore[assignment]
    weights = [weight for _, weight in student.parameters]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, betas=(0.9, 0.999), weight_decay=0.0)
    return DistillState(student, optimizer, recipe, rows, texts, contexts, size, steps, processes, notes)


def step(state: DistillState) -> tuple[DistillState, DistillMetrics]:
    """Read or draw, compare, update: the state after one step, and what it measured.

    A step whose strings have no decision at all changes nothing, and says so by its count of tokens.

    Raises:
        TrainingStopped: the loss exploded, or a law or a gradient is not finite.
    """
    began, recipe, processes = time.monotonic(), state.recipe, state.processes
    x, own = step_text(
        state.student.model, state.texts, state.contexts, recipe, state.step, size=state.size, processes=processes
    )
    drawn = time.monotonic()
    tokens, strings, written, finished = processes.sum([x.decisions, len(x), sum(own), float(x.finished.sum())])
    weights = [weight for _, weight in state.student.parameters]
    state.optimizer.zero_grad()
    totals, problem = Totals(), None
    for some in torch.split(torch.arange(len(x)), recipe.micro_batch or max(1, len(x))):
        part = x.select(some)
        if part.decisions:
            try:
                # The teacher before the student, whose graph is then not in memory beside the teacher's layers.
                theirs = None if state.teacher is None else state.teacher(part, part.prompt.tolist())
                totals += form_gradients(
                    state.student.model, theirs, part, recipe, size=state.size, tokens=tokens, strings=strings
                )
            except ValueError as error:  # a logit or a divergence that is not finite
                problem = str(error)
                break
    # Every process comes this far, whatever happened in one of them.
    wrong, *numbers = processes.sum([problem is not None, *totals.numbers])
    if wrong:
        problems = [found for found in processes.gather(problem) if found is not None]
        raise TrainingStopped(f"step {state.step + 1} was not taken: {problems[0]}")
    totals = Totals.of(numbers, totals.exactness)
    processes.sum_gradients(weights)
    norm = float(torch.nn.utils.clip_grad_norm_(weights, recipe.gradient_norm))
    _require_sound(state, totals, tokens, norm)
    rate = recipe.rate(state.step, state.steps)
    if tokens:
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.step()
    metrics = DistillMetrics(
        step=state.step + 1,
        loss=totals.loss,
        divergence=_mean(totals.divergence, tokens),
        kl=_mean(totals.kl, tokens),
        reverse_kl=_mean(totals.reverse_kl, tokens),
        head_weight=_mean(totals.head_weight, tokens),
        cross_entropy=_mean(totals.cross_entropy, tokens),
        tokens=int(tokens),
        strings=int(strings),
        on_policy=written / max(1.0, strings),
        finished=finished / max(1.0, strings),
        learning_rate=rate,
        gradient_norm=norm,
        exactness=totals.exactness,
        seconds=time.monotonic() - began,
        sampling_seconds=drawn - began if written else 0.0,
    )
    return replace(state, step=state.step + 1), metrics


def _mean(total: float, tokens: float) -> float | None:
    """A mean over decisions; None where there are none, or the number is not known."""
    return None if not tokens or math.isnan(total) else total / tokens


def _require_sound(state: DistillState, totals: Totals, tokens: float, norm: float) -> None:
    """Stop before a step whose gradient is no number, or after a divergence that is beyond all bounds."""
    recipe, number = state.recipe, state.step + 1
    if not (math.isfinite(totals.loss) and math.isfinite(norm)):
        raise TrainingStopped(
            f"expected a finite loss and gradient, got {totals.loss:g} and length {norm:g} in step {number}; the "
            f"teacher may exclude tokens that the student does not (then a reverse KL is infinite), or the learning "
            f"rate ({recipe.learning_rate:g}) is too high"
        )
    mean = _mean(totals.divergence, tokens)
    if mean is not None and mean > recipe.max_loss:
        raise TrainingStopped(
            f"expected a mean divergence of at most {recipe.max_loss:g} nats a token, got {mean:.4g} in step {number}: "
            f"the student has come apart from its teacher; lower the learning rate ({recipe.learning_rate:g}), or "
            f"raise the bound if this is meant"
        )
