"""``klkit distill`` for Python: a whole run, with its folder, evaluations and exact resumption."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from klkit.api.distill_plan import Distillation, DistillReport, DistillRun
from klkit.api.distill_prepare import Prepared, left_out, prepare, written_by_teacher
from klkit.api.prepare import versions
from klkit.api.train import digest
from klkit.models.align import context_note
from klkit.objectives.distill_labels import Claim
from klkit.report.distillation import write_distillation_report
from klkit.sequences import Sequences
from klkit.train.checkpoints import restore, save_checkpoint, write_model
from klkit.train.distill import DistillMetrics, DistillState, start, step
from klkit.train.distill_evaluate import DistillEvaluation, HeldOut, examine, held_out
from klkit.train.examples import Example
from klkit.train.folder import CHECKPOINTS, EVALUATIONS, FREE_ON_RESUME, METRICS, TrainingFolder
from klkit.train.learner import Learner
from klkit.train.processes import Processes
from klkit.train.teachers import CachedTeacher, OnlineTeacher

TEACHER_TEXT, STUDENT = "teacher_text.jsonl", "student"

Observe = Callable[[DistillReport], None]


def distill(
    plan: Distillation,
    *,
    examples: Sequence[Example] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    announce: Callable[[Claim, tuple[str, ...]], None] | None = None,
    observe: Observe | None = None,
    processes: Processes | None = None,
) -> DistillRun:
    """Descend a divergence between a teacher's and a student's next-token laws, and evaluate it all along the way.

    Args:
        examples: the data itself, where it is in no file; ``plan.data`` is then its name for the record.
        out: folder to write; None keeps nothing on disk.
        resume: go on from the last checkpoint in ``out``, exactly as if the run had not stopped.
        announce: called once, before the first step, with what is optimised, and with notes.
        observe: called after every step and evaluation.
        processes: that share the work (:func:`klkit.train.processes.open_processes`); each calls this function.

    Raises:
        ValueError: a model, an example or an option cannot be used.
        VocabularyMismatch: the two models do not choose from the same tokens.
        StaleCache: the cache is not of this teacher and these examples.
        TrainingStopped: the loss exploded, or a law or a gradient is not finite; the last checkpoint is kept.

    Example:
        >>> from klkit.train.distill_recipe import DistillRecipe
        >>> data = [Example("the plot was", " thin .")] * 20
        >>> recipe = DistillRecipe(batch=4, max_tokens=8)
        >>> plan = Distillation("klkit:reviews", "mine", "klkit:reviews-positive", steps=1, samples=1, recipe=recipe)
        >>> run = distill(plan, examples=data)
        >>> [line["step"] for line in run.evaluations], run.claim.objective
        ([0, 1], 'mean adaptive_kl of next-token laws along the given texts')
    """
    processes, recipe = processes or Processes(device=plan.device), plan.recipe
    made = prepare(plan, examples)
    nothing = Sequences.pack([], [])
    state = start(
        made.learner, made.rows, made.training, recipe, plan.steps,
        texts=nothing if recipe.teacher_writes else made.texts, size=made.size, processes=processes,
    )  # fmt: skip
    held = examined_on(plan, made)
    folder = None if out is None else open_folder(Path(out), plan, made, state, resume)
    if recipe.teacher_writes:
        path = None if folder is None else folder.path / TEACHER_TEXT
        texts = written_by_teacher(made, recipe, state.contexts, processes, path)
        made = replace(made, notes=(*made.notes, *left_out(made, recipe, texts)))
        state = replace(state, texts=texts)
    if folder is not None and folder.checkpoints():
        state = restore(state, folder.checkpoints()[-1])
    notes = tuple(dict.fromkeys((*made.notes, *state.notes, *contexts_differ(state, held))))
    if announce is not None:
        announce(made.claim, notes)
    try:
        state, lines = _train(plan, made, state, held, folder, observe)
    finally:
        if folder is not None and processes.first:
            write_distillation_report(folder.path)
    student = None
    if folder is not None:
        student = folder.path / STUDENT
        processes.by_first(lambda: save_student(state.student, folder.path / STUDENT))
    return DistillRun(state, tuple(lines), made.claim, student, notes)


def examined_on(plan: Distillation, made: Prepared) -> HeldOut | None:
    """What the student is examined on, the teacher's own responses among it; None where it is not."""
    if made.teacher is None or made.foreign or not plan.samples:
        return None
    return held_out(
        made.teacher,
        made.learner.model,
        made.held_out,
        samples=plan.samples,
        max_tokens=plan.recipe.max_tokens,
        seed=plan.recipe.seed,
    )


def contexts_differ(state: DistillState, held: HeldOut | None) -> tuple[str, ...]:
    """A note if the teacher reads other contexts than the student, where it is read from or compared with."""
    if isinstance(state.teacher, OnlineTeacher):
        note = context_note(state.teacher.contexts, state.contexts)
    else:
        note = None if held is None else held.note
    return () if note is None else (note,)


def open_folder(path: Path, plan: Distillation, made: Prepared, state: DistillState, resume: bool) -> TrainingFolder:
    """The run's folder, made or found by the first process."""
    responses = [example.response for example in made.training]
    contexts = [state.student.model.context(example.prompt).tolist() for example in made.held_out]
    digests = {
        "student": state.student.model.digest,
        **({} if made.teacher is None else {"teacher": made.teacher.digest}),
        **({"cache": digest(made.rows.cache.manifest.files)} if isinstance(made.rows, CachedTeacher) else {}),
        "data": digest([[context.tolist() for context in state.contexts], responses]),
        "held-out data": digest([contexts, [example.response for example in made.held_out]]),
    }
    env = {"versions": versions(), "digests": digests, "objective": list(made.claim.lines)}
    # Where the learning rate falls towards the last step, another number of steps is another run.
    free = FREE_ON_RESUME - ({"steps"} if plan.recipe.schedule == "cosine" else frozenset())
    state.processes.by_first(lambda: TrainingFolder.create(path, asdict(plan), env, resume=resume, free=free))
    return TrainingFolder(path)


def save_student(learner: Learner, path: Path) -> None:
    """Write the student, or its adapter, in Hugging Face format: whole or not at all."""
    beside = path.with_name(path.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        write_model(learner, beside)
        shutil.rmtree(path, ignore_errors=True)
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _train(
    plan: Distillation,
    made: Prepared,
    state: DistillState,
    held: HeldOut | None,
    folder: TrainingFolder | None,
    observe: Observe | None,
) -> tuple[DistillState, list[dict[str, Any]]]:
    """Steps and evaluations until the last one; the state after it, and the lines of ``evaluations.jsonl``."""
    processes, began, first = state.processes, time.monotonic(), state.step
    writes = folder is not None and processes.first
    lines: list[dict[str, Any]] = [] if folder is None else processes.by_first(lambda: _rewound(folder, first))

    def tell(metrics: DistillMetrics | None, evaluation: DistillEvaluation | None) -> None:
        if observe is not None:
            seconds = time.monotonic() - began
            observe(DistillReport(state.step, plan.steps, metrics, evaluation, seconds, state.step - first))

    def look() -> None:
        """Every process looks, for itself: none has to wait for another longer than its step takes."""
        found = None
        if held is not None and made.teacher is not None:
            found = examine(made.teacher, state.student.model, held, step=state.step)
            lines.append(found.to_dict())
        if folder is not None and writes:
            if found is not None:
                folder.log(EVALUATIONS, lines[-1])
            if state.step:
                save_checkpoint(state, folder.path / CHECKPOINTS, keep=plan.keep)
        if found is not None:
            tell(None, found)

    if not lines and not state.step:
        look()
    while state.step < plan.steps:
        state, metrics = step(state)
        if folder is not None and writes:
            folder.log(METRICS, metrics.to_dict())
        tell(metrics, None)
        if state.step % plan.every == 0 or state.step == plan.steps:
            look()
    return state, lines


def _rewound(folder: TrainingFolder, done: int) -> list[dict[str, Any]]:
    """The evaluations up to a step, and nothing logged after it."""
    folder.rewind(done or -1)
    return folder.lines(EVALUATIONS)
