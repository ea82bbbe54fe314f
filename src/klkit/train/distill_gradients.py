"""From strings to gradients: one pass of the student, and the loss's gradient through the output heads."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from klkit.divergences.differentiable import divergences
from klkit.divergences.partial import Hidden, Logits
from klkit.models.base import head_of
from klkit.numerics import wide_dtype
from klkit.objectives.distill import Student, distillation_loss
from klkit.objectives.distill_rows import Teacher
from klkit.objectives.policy import Surrogate, kl_surrogate
from klkit.objectives.policy_linear import linear_kl_surrogate
from klkit.sequences import Sequences
from klkit.train.distill_recipe import DistillRecipe
from klkit.train.policy import Decisions

if TYPE_CHECKING:
    from klkit.models.hf import HuggingFaceModel

NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over decisions; the loss is the part that was descended. NaN for what is not known.

    Attributes:
        loss: as it was descended, with its normaliser.
        divergence: of the loss.
        kl: KL(teacher‖student).
        reverse_kl: KL(student‖teacher).
        head_weight: of the adaptive KL.
        cross_entropy: of the tokens.
        exactness: what the divergence is to that of the whole laws.
    """

    loss: float = 0.0
    divergence: float = 0.0
    kl: float = 0.0
    reverse_kl: float = 0.0
    head_weight: float = 0.0
    cross_entropy: float = 0.0
    exactness: str = "exact"

    @property
    def numbers(self) -> list[float]:
        """All of them, in order."""
        return [getattr(self, f.name) for f in fields(self) if f.name != "exactness"]

    @classmethod
    def of(cls, numbers: Iterable[float], exactness: str) -> Totals:
        """From numbers in that order."""
        loss, divergence, kl, reverse_kl, head_weight, cross_entropy = numbers
        return cls(loss, divergence, kl, reverse_kl, head_weight, cross_entropy, exactness)

    def __add__(self, other: Totals) -> Totals:
        pairs = zip(self.numbers, other.numbers, strict=True)
        return Totals.of((a + b for a, b in pairs), other.exactness)


def form_gradients(
    model: HuggingFaceModel,
    teacher: Teacher | None,
    x: Sequences,
    recipe: DistillRecipe,
    *,
    size: int | None,
    tokens: float,
    strings: float,
) -> Totals:
    """Add the gradient of these strings' part of the step's loss to that of the student's weights.

    Args:
        model: the student.
        teacher: its laws at every decision of ``x``.
        size: ids below which a token is one that both models have; None for all.
        tokens: decisions of the whole step, in all micro-batches and processes.
        strings: strings of the whole step.

    Raises:
        ValueError: a number is not finite.
    """
    student = student_laws(model, x, size, recipe.precision)
    if recipe.objective == "sequence-rkl":
        assert isinstance(teacher, (Hidden, Logits))
        return _sequence_gradients(student, teacher, x, len(x) / strings, grouped=recipe.strings_a_prompt > 1)
    found = distillation_loss(
        teacher,
        student,
        x.targets().to(_values(student).device),
        recipe.divergence,
        normaliser=strings if recipe.sequence_level else tokens,
        temperature=recipe.temperature,
        cross_entropy=recipe.cross_entropy,
    )
    found.loss.backward()  # type: ignore[no-untyped-call]
    sums = (found.divergence, found.kl, found.reverse_kl, found.head_weight, found.cross_entropy)
    return Totals.of([float(found.loss.detach()), *map(_sum, sums)], found.exactness)


def _sequence_gradients(
    student: Student, teacher: Hidden | Logits, x: Sequences, share: float, *, grouped: bool
) -> Totals:
    """The gradient of KL(student‖teacher) between the laws of whole responses, on the student's own."""
    decisions = Decisions.of(x)
    device = _values(student).device
    mask, tokens = decisions.mask.to(device), decisions.tokens.to(device)
    group = x.cluster.to(device) if grouped else None
    found: Surrogate
    if isinstance(student, Hidden) and isinstance(teacher, Hidden):
        found = linear_kl_surrogate(
            _spread(student.hidden, mask),
            student.head,
            _spread(teacher.hidden, mask),
            teacher.head.detach(),
            tokens,
            mask,
            group=group,
        )
    else:
        rows = divergences(_logits(student), _logits(teacher).detach(), tokens[mask])
        kl, logp, logq = (_spread(value, mask) for value in (rows.kl, rows.logp, rows.logq) if value is not None)
        found = kl_surrogate(kl, logp, logq.detach(), mask, group=group)
    (share * found.loss).backward()  # type: ignore[no-untyped-call]
    reverse, text = _sum(found.kl), -_sum(found.logp)
    return Totals(share * float(found.value.double().mean()), reverse, NAN, reverse, NAN, text)


def student_laws(model: HuggingFaceModel, x: Sequences, size: int | None, precision: str = "float32") -> Student:
    """The student's laws at every decision of ``x``, differentiable unless gradients are off.

    Args:
        size: ids below which a token is one that both models have; None for all.
        precision: in which its layers compute; what comes out of the head is in single precision at least.
    """
    head = head_of(model)
    device = model.model.device
    casting: AbstractContextManager[object] = nullcontext()
    if precision == "bfloat16":
        casting = torch.autocast(device.type, torch.bfloat16)
    with casting:
        hidden = model.trunk(x.tokens[:, : int(x.stop.max()) - 1])
    row, column = (index.to(hidden.device) for index in x.predictors())
    hidden = hidden[row, column]
    if head is None:
        return Logits(hidden.to(wide_dtype(hidden))[:, :size])
    return Hidden(hidden, head if size is None else head.cut(size))


def _values(laws: Teacher) -> Tensor:
    assert isinstance(laws, (Hidden, Logits))
    return laws.hidden if isinstance(laws, Hidden) else laws.logits


def _logits(laws: Hidden | Logits) -> Float[Tensor, "m v"]:
    """Rows of logits with their graph."""
    from klkit.train.gradients import differentiable_logits

    return laws.logits if isinstance(laws, Logits) else differentiable_logits(laws.head, laws.hidden)


def _spread(values: Float[Tensor, "m ..."], mask: Tensor) -> Float[Tensor, "n l ..."]:
    """Flat decisions in the layout of the mask, 0 outside; differentiable."""
    out = values.new_zeros(*mask.shape, *values.shape[1:])
    return out.index_put((*mask.nonzero(as_tuple=True),), values)


def _sum(values: Tensor | None) -> float:
    return NAN if values is None else float(values.double().sum())
