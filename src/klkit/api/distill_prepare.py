"""What a distillation run needs before its first step: examples, models or a cache, and the teacher's own text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klkit.api.distill_plan import Distillation
from klkit.api.train import FEWEST_HELD_OUT, HELD_OUT_SHARE, MOST_HELD_OUT, name_base
from klkit.caches.cache import TeacherCache
from klkit.divergences.partial import Hybrid, Sampled, TopK
from klkit.files import write_text
from klkit.models.base import VocabularyMismatch
from klkit.models.hf import HuggingFaceModel
from klkit.models.spec import ModelSpec, load_network
from klkit.objectives.distill import exactness
from klkit.objectives.distill_labels import Claim, claim
from klkit.objectives.distill_losses import CROSS_ENTROPY, token_loss
from klkit.rng import numpy_stream
from klkit.sequences import Sequences
from klkit.train.distill_recipe import DistillRecipe
from klkit.train.examples import Example, encode_examples, read_examples, without_empty
from klkit.train.learner import Learner, full_learner, lora_learner
from klkit.train.processes import Processes
from klkit.train.rewards import response_texts
from klkit.train.teachers import CachedTeacher, TeacherRows, shared_tokens
from klkit.train.texts import teacher_text


@dataclass(frozen=True, eq=False, slots=True)
class Prepared:
    """Everything that is loaded and checked before a run writes anything.

    Attributes:
        learner: the student.
        teacher: the model; None where only its cache is there, or nothing asks it.
        rows: what the loss reads of a teacher; None for the cross-entropy.
        training: examples to train on.
        held_out: examples to evaluate on.
        texts: the responses to train on, as the student reads them; None where others are written.
        size: ids below which a token is one that both models have; None for all.
        foreign: whether the teacher has another tokenizer, so that only its text can be learnt from.
        claim: what is optimised.
        notes: what a reader of the numbers should know.
    """

    learner: Learner
    teacher: HuggingFaceModel | None
    rows: HuggingFaceModel | TeacherRows | None
    training: list[Example]
    held_out: list[Example]
    texts: Sequences | None
    size: int | None
    foreign: bool
    claim: Claim
    notes: tuple[str, ...]


def prepare(plan: Distillation, examples: Sequence[Example] | None = None) -> Prepared:
    """Read, load and check everything.

    Args:
        examples: the data itself, where it is in no file.

    Raises:
        ValueError: a model, an example, the cache or an option cannot be used.
        VocabularyMismatch: the two models do not choose from the same tokens.
    """
    recipe = plan.recipe
    columns = {"prompt": plan.prompt_column, "response": plan.response_column}
    given = list(read_examples(plan.data, **columns) if examples is None else examples)
    notes: list[str] = []
    if plan.skip_empty:
        given, empty = without_empty(given)
        notes += [f"{empty} examples without a response are left out"] if empty else []
    if not given:
        raise ValueError(f"expected at least one example in {plan.data}, got none with a response; check the file")
    if all(example.prompt is None for example in given):
        notes.append("no example has a prompt: every response follows the empty context")
    if plan.held_out is None:
        chosen, note = split(len(given), plan)
        notes += [note] if note else []
        held_out = [given[i] for i in sorted(chosen)] or given
    else:
        chosen, held_out = set(), read_examples(plan.held_out, **columns)
    numbers = [i for i in range(len(given)) if i not in chosen]
    training = [given[i] for i in numbers]
    teacher = None if plan.teacher is None else load_network(plan.teacher, **_place(plan))
    model = load_student(plan)
    size, foreign = (None, False) if teacher is None else _compare(teacher, model, recipe, notes)
    ends = None
    if teacher is not None and not foreign and set(teacher.vocabulary.ends) != set(model.vocabulary.ends):
        ends = teacher.vocabulary.ends
        notes.append(f"responses end where the teacher's do, at {list(ends)}; the student's own end tokens were others")
        if plan.lora:
            named = "+".join(map(str, ends))
            notes.append(f"an adapter does not carry its end tokens: load it with ends={named}")
    learner = make_learner(plan, model, ends)
    rows: HuggingFaceModel | TeacherRows | None = None if foreign else teacher
    kind = "exact"
    if plan.cache is not None:
        rows, size, kind = open_cache(plan, teacher, learner.model, given, numbers)
        if teacher is None:
            notes.append("not evaluated: the cache says nothing about other text; name the teacher, too")
    texts = None
    if not recipe.teacher_writes and recipe.student_share < 1:
        windows = [m.window for m in (learner.model, teacher) if m is not None and m.window is not None]
        texts = encode_examples(learner.model, training, recipe.max_tokens, window=min(windows, default=None))
        cut = len(texts) - int(texts.finished.sum())
        if cut:
            notes.append(f"{cut} of {len(texts)} responses are longer than {recipe.max_tokens} tokens, and end there")
    return Prepared(learner, teacher, rows, training, held_out, texts, size, foreign, label(recipe, kind), tuple(notes))


def label(recipe: DistillRecipe, kind: str = "exact") -> Claim:
    """What the recipe optimises, where the teacher's laws are of that exactness."""
    score = recipe.objective == "sequence-rkl"
    text = "student" if recipe.student_share == 1 else "teacher" if recipe.teacher_writes else "data"
    return claim(
        token_loss("reverse_kl" if score else recipe.divergence),
        text,
        score=score,
        on_policy=0.0 if score else recipe.on_policy,
        temperature=recipe.temperature,
        cross_entropy=recipe.cross_entropy,
        exactness=kind,
        per_token=not recipe.sequence_level,
    )


def split(count: int, plan: Distillation) -> tuple[set[int], str]:
    """Which of the examples are kept for evaluation, and what there is to say about it."""
    if not plan.samples or plan.teacher is None:
        return set(), ""
    kept = min(MOST_HELD_OUT, max(FEWEST_HELD_OUT, round(HELD_OUT_SHARE * count)))
    if kept > count // 2:
        return set(), f"evaluated on the training examples themselves: {count} are too few to keep some apart"
    chosen = numpy_stream(plan.recipe.seed, "held-out").permutation(count)[:kept].tolist()
    return set(chosen), f"evaluated on {kept} of the {count} examples, which are not trained on"


def load_student(plan: Distillation) -> HuggingFaceModel:
    """The student as it is: in single precision, where all weights are trained and nothing else was asked for."""
    wide = not plan.lora and ModelSpec.parse(plan.student).dtype is None
    return load_network(plan.student, **_place(plan), **({"dtype": "float32"} if wide else {}))


def make_learner(plan: Distillation, model: HuggingFaceModel, ends: Sequence[int] | None = None) -> Learner:
    """The student under training, which takes ``model`` over."""
    if not plan.lora:
        return full_learner(model, in_place=True, ends=ends)
    options: dict[str, Any] = {"layers": plan.lora_layers, "seed": plan.recipe.seed, "in_place": True, "ends": ends}
    learner, _ = lora_learner(model, plan.lora, **options)
    name_base(learner, plan.student)
    return learner


def open_cache(
    plan: Distillation,
    teacher: HuggingFaceModel | None,
    student: HuggingFaceModel,
    given: Sequence[Example],
    numbers: Sequence[int],
) -> tuple[CachedTeacher, int | None, str]:
    """The cache as a teacher, the ids that both have, and what its divergences are to those of the whole laws.

    Raises:
        StaleCache: it is not of this teacher, these examples, or this temperature.
        ValueError: it holds parts of laws, and the loss needs more than that.
    """
    assert plan.cache is not None
    recipe, cache = plan.recipe, TeacherCache.open(plan.cache)
    loss = token_loss(recipe.divergence)
    cache.require(
        strings=encode_examples(teacher or student, given, recipe.max_tokens),
        teacher=teacher,
        vocabulary=student.vocabulary,
        max_tokens=recipe.max_tokens,
        temperature=recipe.temperature,
    )
    kind = type(cache.rows([0]))
    if kind is Hybrid:  # trained from as weighted draws
        kind = Sampled
    if kind is Sampled and not loss.linear_in_p:
        raise ValueError(
            f"expected forward_kl with a {cache.kind} cache, got {loss.spec}: draws give without bias only what is "
            f"linear in the teacher's law; train with --loss forward_kl, or build the cache with --kind top-k or hidden"
        )
    if kind is TopK and not loss.merging_lowers and loss.head is None:
        raise ValueError(
            f"expected an f-divergence or the adaptive KL with a top-k cache, got {loss.spec}: nothing is known of it "
            f"when tokens are merged; choose another --loss, or build the cache with --kind hidden"
        )
    own, other = cache.manifest.size, student.vocabulary.size
    size = None if own == other else min(own, other)
    return CachedTeacher(cache, numbers, size, plan.device), size, exactness(kind, loss)


def written_by_teacher(
    made: Prepared, recipe: DistillRecipe, contexts: Sequence[Tensor], processes: Processes, path: Path | None = None
) -> Sequences:
    """The teacher's own responses to the training prompts, as the student reads them; kept in ``path`` if given.

    Args:
        contexts: each training prompt as the student reads it.
        path: read where it is complete, else written.

    Raises:
        ValueError: a teacher with another tokenizer gave empty responses only.
    """
    assert made.teacher is not None
    count = len(made.training) * recipe.strings_a_prompt
    lines = processes.by_first(lambda: _read_lines(path, count))
    if lines is None:
        asked = [made.teacher.context(example.prompt) for example in made.training]
        x = teacher_text(made.teacher, asked, recipe, size=made.size, processes=processes)
        texts = response_texts(made.teacher, x)
        asked_for = [example.prompt for example in made.training]
        lines = [
            {
                "example": k,
                "prompt": x.context(i).tolist() if isinstance(asked_for[k], Tensor) else asked_for[k],
                "response": texts[i],
                "finished": done,
                "tokens": x.completion(i).tolist(),
            }
            for i, (k, done) in enumerate(zip(x.prompt.tolist(), x.finished.tolist(), strict=True))
        ]
        if path is not None:
            body = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            processes.by_first(lambda: write_text(path, body))
    prompt = [int(line["example"]) for line in lines]
    if made.foreign:
        return _read_anew(made, recipe, [line for line in lines if line["response"].strip()])
    return Sequences.pack(
        [contexts[k] for k in prompt],
        [torch.tensor(line["tokens"]) for line in lines],
        prompt=prompt,
        finished=[bool(line["finished"]) for line in lines],
    )


def _read_anew(made: Prepared, recipe: DistillRecipe, lines: Sequence[dict[str, Any]]) -> Sequences:
    """A foreign teacher's responses in the student's tokens, with an end token where the teacher came to an end."""
    if not lines:
        raise ValueError(
            f"expected responses of the teacher to train on, got {len(made.training) * recipe.strings_a_prompt} that "
            f"are empty; look at what {made.teacher and made.teacher.name} answers to these prompts"
        )
    prompt = [int(line["example"]) for line in lines]
    own = [Example(made.training[k].prompt, line["response"]) for k, line in zip(prompt, lines, strict=True)]
    x = encode_examples(made.learner.model, own, recipe.max_tokens)
    finished = [bool(line["finished"]) and fits for line, fits in zip(lines, x.finished.tolist(), strict=True)]
    # Encoding ended every response that fits; one that the teacher was cut off in has no end to teach.
    ended = [fits and not done for fits, done in zip(x.finished.tolist(), finished, strict=True)]
    completions = [x.completion(i)[: -1 if ended[i] else None] for i in range(len(x))]
    contexts = [x.context(i) for i in range(len(x))]
    return Sequences.pack(contexts, completions, prompt=prompt, finished=finished)


def left_out(made: Prepared, recipe: DistillRecipe, texts: Sequences) -> tuple[str, ...]:
    """A note if some of the teacher's responses are not among the texts to train on, being empty."""
    asked = len(made.training) * recipe.strings_a_prompt
    if len(texts) == asked:
        return ()
    return (f"{asked - len(texts)} of the teacher's {asked} responses are empty, and left out",)


def answered(made: Prepared, recipe: DistillRecipe, count: int = 8) -> list[Example]:
    """Some of the training examples as the run will read them: with the teacher's answers, where models write the text.

    Where only the student writes, the teacher's answers stand for its own.
    """
    given = made.training
    if made.teacher is None or not (recipe.teacher_writes or all(example.empty for example in given)):
        return given
    some = replace(made, training=given[:count])
    asked = [made.learner.model.context(example.prompt) for example in some.training]
    plain = replace(recipe, objective="token", loss=None, cross_entropy=0.0, samples=None)
    x = written_by_teacher(some, plain, asked, Processes())
    texts = response_texts(made.learner.model, x)
    answers = [Example(given[k].prompt, text) for k, text in zip(x.prompt.tolist(), texts, strict=True)]
    return [example for example in answers if not example.empty] or given


def _read_lines(path: Path | None, count: int) -> list[dict[str, Any]] | None:
    if path is None or not path.is_file():
        return None
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return lines if len(lines) == count else None


def _compare(
    teacher: HuggingFaceModel, student: HuggingFaceModel, recipe: DistillRecipe, notes: list[str]
) -> tuple[int | None, bool]:
    """Ids that both models have, and whether they have different tokenizers."""
    try:
        size, said = shared_tokens(teacher, student)
    except VocabularyMismatch:
        if not (recipe.teacher_writes and token_loss(recipe.divergence).key == CROSS_ENTROPY):
            raise
        notes.append("not evaluated: the teacher has another tokenizer, and only its text is learnt from")
        return None, True
    notes += said
    return size, False


def _place(plan: Distillation) -> dict[str, str]:
    return {} if plan.device == "cpu" else {"device": plan.device}
