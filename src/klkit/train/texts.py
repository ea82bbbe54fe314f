"""What a student is trained on in a step: given strings, the teacher's, or its own, drawn afresh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from klkit.models.base import LanguageModel
from klkit.models.wrap import restrict
from klkit.rng import derive, numpy_stream, stream
from klkit.sampling.ancestral import sample
from klkit.sequences import Sequences
from klkit.train.distill_recipe import DistillRecipe
from klkit.train.processes import Processes

GENERATION_BATCH = 64


def teacher_text(
    teacher: LanguageModel,
    contexts: Sequence[Int[Tensor, " _c"]],
    recipe: DistillRecipe,
    *,
    size: int | None = None,
    processes: Processes | None = None,
) -> Sequences:
    """``y ~ p(· | context)``, the recipe's samples a context, drawn with klkit's own sampler; ``prompt`` names each's.

    Strings are named by the seed, the context and their number, and not by when or where they were drawn.

    Args:
        contexts: as the teacher reads them.
        size: ids below which a token is one that both models have.
        processes: that share the work; each returns all strings.
    """
    processes = processes or Processes()
    law = within(teacher, size)
    names = [(i, r) for i in range(len(contexts)) for r in range(recipe.strings_a_prompt)]
    own = [names[i] for i in processes.share(len(names))]
    parts = draw_named(law, contexts, own, max_tokens=recipe.max_tokens, seed=derive(recipe.seed, "teacher text"))
    return Sequences.cat([x for process in processes.gather(parts) for x in process])


def draw_named(
    model: LanguageModel,
    contexts: Sequence[Int[Tensor, " _c"]],
    names: Sequence[tuple[int, int]],
    *,
    max_tokens: int,
    seed: int,
    cluster: Sequence[int] | None = None,
) -> list[Sequences]:
    """One string for each name, a context's index and the string's number there, in batches.

    Args:
        cluster: of each string; by default its context.
    """
    parts = []
    for at in range(0, len(names), GENERATION_BATCH):
        some = slice(at, at + GENERATION_BATCH)
        drawn = sample(
            model,
            [contexts[i] for i, _ in names[some]],
            max_tokens=max_tokens,
            seed=seed,
            prompt=[i for i, _ in names[some]],
            replicate=[r for _, r in names[some]],
            cluster=None if cluster is None else cluster[some],
        )
        parts.append(drawn.sequences)
    return parts


def within(model: LanguageModel, size: int | None) -> LanguageModel:
    """``model`` over its first ``size`` tokens."""
    return model if size is None or size >= model.vocabulary.size else restrict(model, range(size))


def step_units(count: int, step: int, units: int, seed: int) -> list[int]:
    """What a step goes through: pass after pass over ``count`` things, each in an order of its own.

    Example:
        >>> step_units(3, 0, 2, seed=0) + step_units(3, 1, 2, seed=0)
        [1, 0, 2, 0]
    """
    places = range(step * units, (step + 1) * units)
    orders = {e: numpy_stream(seed, "examples", e).permutation(count) for e in {i // count for i in places}}
    return [int(orders[i // count][i % count]) for i in places]


def written_by_student(step: int, slots: Sequence[int], recipe: DistillRecipe) -> list[bool]:
    """Whether the student writes the string in each slot of a step: one draw a string, by its name."""
    share = recipe.student_share
    if share in (0.0, 1.0):
        return [share == 1.0] * len(slots)
    return [bool(torch.rand(1, generator=stream(recipe.seed, "on-policy", step, slot)) < share) for slot in slots]


def step_text(
    student: LanguageModel,
    texts: Sequences | None,
    contexts: Sequence[Int[Tensor, " _c"]],
    recipe: DistillRecipe,
    step: int,
    *,
    size: int | None = None,
    processes: Processes | None = None,
) -> tuple[Sequences, list[bool]]:
    """The strings of a step that fall to this process, and which of them the student wrote.

    ``prompt`` of each is the index of its context, and ``cluster`` the group of strings drawn for one prompt.

    Args:
        texts: what there is to read, ``prompt`` the index of each's context; None where the student writes everything.
        contexts: as the student reads them.
        size: ids below which a token is one that both models have.
    """
    processes = processes or Processes()
    many = recipe.strings_a_prompt if recipe.objective == "sequence-rkl" else 1
    groups = processes.share(recipe.batch // many)
    chosen = step_units(len(contexts) if texts is None else len(texts), step, recipe.batch // many, recipe.seed)
    slots = [group * many + r for group in groups for r in range(many)]
    units = [chosen[group] for group in groups for _ in range(many)]
    names = units if texts is None else [int(texts.prompt[unit]) for unit in units]
    own = written_by_student(step, slots, recipe)
    parts = []
    if texts is not None and not all(own):
        parts.append(texts.select([unit for unit, drawn in zip(units, own, strict=True) if not drawn]))
    if any(own):
        mine = [i for i, drawn in enumerate(own) if drawn]
        draw = sample(
            within(student, size),
            [contexts[names[i]] for i in mine],
            max_tokens=recipe.max_tokens,
            seed=derive(recipe.seed, "student text", step),
            prompt=[slots[i] // many for i in mine],
            replicate=[slots[i] % many for i in mine],
        )
        parts.append(draw.sequences)
    if not parts:  # more processes than strings
        return Sequences.pack([], []), []
    order = sorted(range(len(own)), key=lambda i: own[i])  # as they were put together
    back = torch.tensor(order).argsort()
    x = Sequences.cat(parts).select(back)
    group = torch.tensor([slot // many for slot in slots])
    return replace(x, prompt=torch.tensor(names), cluster=group), own
