"""Where a teacher's laws come from: the model itself, reading what it is given, or a cache; and over which tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from klkit.caches.cache import TeacherCache
from klkit.divergences.linear import Head
from klkit.divergences.partial import Hidden, Hybrid, Logits, Sampled, TopK
from klkit.models.align import differing
from klkit.models.base import Vocabulary, VocabularyMismatch, head_of
from klkit.objectives.distill import Student
from klkit.objectives.distill_losses import CROSS_ENTROPY, token_loss
from klkit.objectives.distill_rows import Teacher
from klkit.sequences import Sequences
from klkit.train.distill_recipe import DistillRecipe
from klkit.train.examples import Example

if TYPE_CHECKING:
    from klkit.models.hf import HuggingFaceModel

TeacherRows = Callable[[Sequences, Sequence[int]], Teacher]
"""Strings and the indices of their examples, to the teacher's laws at every decision, flat, string by string."""


@dataclass(frozen=True, eq=False, slots=True)
class OnlineTeacher:
    """A teacher that reads every string as it comes, behind its own context for the example.

    Attributes:
        model: the teacher.
        contexts: token ids of each example's prompt, as it reads them.
        size: ids below which a token is one that both models have; None for all.
    """

    model: HuggingFaceModel
    contexts: Sequence[Int[Tensor, " _c"]]
    size: int | None = None

    @classmethod
    def of(cls, model: HuggingFaceModel, examples: Sequence[Example], size: int | None = None) -> OnlineTeacher:
        """A teacher of these examples."""
        return cls(model, [model.context(example.prompt) for example in examples], size)

    def __call__(self, x: Sequences, indices: Sequence[int]) -> Teacher:
        """Its laws at every decision of ``x``, which belong to the examples ``indices``.

        Raises:
            ValueError: a law is not finite.
        """
        own = x.after([self.contexts[i] for i in indices])
        with torch.no_grad():
            hidden = self.model.encode(own).clone()  # outside of inference mode, whose tensors autograd refuses
        wrong = ~torch.isfinite(hidden).all(-1)
        if bool(wrong.any()):
            string = int(own.row()[wrong.cpu()][0])
            raise ValueError(
                f"expected finite numbers from the teacher {self.model.name}, got NaN or infinity at "
                f"{int(wrong.sum())} of {len(wrong)} decisions, the first in example {indices[string] + 1}; check its "
                f"weights, or load it with dtype=float32"
            )
        return laws(self.model, hidden, self.size)


@dataclass(frozen=True, eq=False, slots=True)
class CachedTeacher:
    """What a teacher said about given text, from disk.

    Attributes:
        cache: by the index of an example in the whole data.
        numbers: that index for each example of the run.
        size: ids below which a token is one that both models have; None for all.
        device: where the laws are wanted.
    """

    cache: TeacherCache
    numbers: Sequence[int]
    size: int | None = None
    device: str = "cpu"
    _head: list[Head] = field(default_factory=list, init=False, repr=False)

    def __call__(self, x: Sequences, indices: Sequence[int]) -> Teacher:
        """The laws at every decision of ``x``, which belong to the examples ``indices``.

        Raises:
            StaleCache: a string is another one than the cache was built from.
        """
        found = self.cache.rows([self.numbers[i] for i in indices], x, size=self.size)
        if isinstance(found, Hidden):
            if not self._head:  # the same for every string, and as large as a vocabulary: it moves once
                self._head.append(head_on(found.head, self.device))
            return Hidden(found.hidden.to(self.device), self._head[0])
        return moved(found.sampled() if isinstance(found, Hybrid) else found, self.device)


def head_on(head: Head, device: str) -> Head:
    """The same head on a device."""
    return replace(head, weight=head.weight.to(device), bias=None if head.bias is None else head.bias.to(device))


def moved(laws: TopK | Sampled, device: str) -> TopK | Sampled:
    """The same parts of laws on a device."""
    changed: dict[str, Any] = {
        f.name: value.to(device) for f in fields(laws) if isinstance(value := getattr(laws, f.name), Tensor)
    }
    return replace(laws, **changed)


def laws(model: HuggingFaceModel, hidden: Tensor, size: int | None) -> Student:
    """Next-token laws over the first ``size`` tokens, from what enters the model's head (or its logits)."""
    head = head_of(model)
    if head is None:
        return Logits(hidden if size is None else hidden[:, :size])
    return Hidden(hidden, head if size is None else head.cut(size))


def shared_tokens(teacher: HuggingFaceModel, student: HuggingFaceModel) -> tuple[int | None, tuple[str, ...]]:
    """How many ids both models have, None if that is all of them, and notes on what is left out.

    Raises:
        VocabularyMismatch: an id stands for different strings in the two models.
    """
    p, q = teacher.vocabulary, student.vocabulary
    wrong = differing(p.tokens, q.tokens)
    if wrong:
        i, a, b = wrong[0]
        raise VocabularyMismatch(
            f"expected a teacher and a student over the same tokens, got {len(wrong)} ids with different strings, such "
            f"as id {i}: {a!r} in {teacher.name} and {b!r} in {student.name}; divergences of next-token laws need one "
            f"tokenizer: take models of one family, or train on the teacher's text alone with --text teacher --loss "
            f"{CROSS_ENTROPY}"
        )
    if p.size == q.size:
        return None, ()
    size = min(p.size, q.size)
    larger, wide = (teacher, p) if p.size > size else (student, q)
    return size, (_left_out(larger.name, wide, size),)


def _left_out(name: str, vocabulary: Vocabulary, size: int) -> str:
    named = [token for token in vocabulary.tokens[size:] if token is not None]
    what = f"{len(named)} tokens such as {named[0]!r}" if named else "rows that no tokenizer defines"
    return f"{vocabulary.size - size} ids from {size} on are {name}'s only ({what}): left out of both softmaxes"


def require_teacher(teacher: HuggingFaceModel | TeacherRows | None, recipe: DistillRecipe) -> None:
    """Refuse a recipe that needs more of a teacher than there is.

    Raises:
        ValueError: it does.
    """
    model = teacher is not None and hasattr(teacher, "vocabulary")
    if teacher is None and (token_loss(recipe.divergence).key != CROSS_ENTROPY or recipe.sequence_level):
        raise ValueError(
            f"expected a teacher for {recipe.divergence}, got none; name one, or take the loss {CROSS_ENTROPY}"
        )
    if not model and recipe.student_share > 0:
        raise ValueError(
            "expected a teacher that reads what the student writes, got a cache of given text; load the teacher itself "
            "(leave --cache out), or leave --on-policy at 0"
        )
