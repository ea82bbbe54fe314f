"""Claims about a loss, each tried on a few strings: the functions that train, against the same thing done plainly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from klkit.api.selfcheck_result import NOT_APPLICABLE, Check, outcome
from klkit.divergences.partial import Hidden, Logits, Sampled, sampled_cross_entropy
from klkit.numerics import log_softmax
from klkit.objectives import distill as losses
from klkit.objectives.distill_losses import CROSS_ENTROPY, token_loss
from klkit.objectives.distill_rows import Teacher
from klkit.sequences import Sequences
from klkit.train import distill_gradients as training
from klkit.train.distill_recipe import DistillRecipe
from klkit.train.gradients import differentiable_logits
from klkit.train.teachers import TeacherRows

if TYPE_CHECKING:
    from klkit.models.hf import HuggingFaceModel

EXTRA_COLUMNS = 5
FULL, HALF = 64, 2
"""Roundings of the largest logit by which a decision's loss may differ on average, in full and in half precision."""


@dataclass(frozen=True, eq=False)
class Trial:
    """Models and strings, and each claim as a method.

    Attributes:
        model: the student.
        teacher: the model; None behind a cache, or where there is none.
        contexts: token ids that the teacher reads before each string.
        rows: the teacher's laws; None where the loss has none.
        x: the strings, ``prompt`` the index of each's example.
        recipe: with the token objective.
        size: ids below which a token is one that both models have; None for all.
        weights: what is trained.
    """

    model: HuggingFaceModel
    teacher: HuggingFaceModel | None
    contexts: Sequence[Tensor] | None
    rows: TeacherRows | None
    x: Sequences
    recipe: DistillRecipe
    size: int | None
    weights: list[Tensor]

    def checks(self) -> Iterator[Check]:
        """All of them."""
        contexts = [self.x.context(i) for i in range(len(self.x))]
        yield self.shift("shift", self.model, contexts, self.student(self.x))
        yield self.shift("teacher's shift", self.teacher, self.contexts, self.theirs)
        yield self.mask()
        yield self.same("padding content", "what stands after a string's end changes nothing", self.scribbled())
        yield self.same("padding width", "a longer string beside it changes nothing", self.widened())
        yield self.padding_side()
        yield self.same("batch", "a string's loss is the same alone as with others", self.alone())
        yield self.accumulation()
        yield from self.representations()
        yield self.acts()
        yield self.equal()

    def student(self, x: Sequences) -> Hidden | Logits:
        """The student's laws, as in training, without a graph."""
        with torch.no_grad():
            return training.student_laws(self.model, x, self.size)

    def laws(self, x: Sequences) -> Teacher | None:
        """The teacher's, as in training."""
        return None if self.rows is None else self.rows(x, x.prompt.tolist())

    @cached_property
    def theirs(self) -> Teacher | None:
        """The teacher's laws at every decision."""
        return self.laws(self.x)

    @cached_property
    def reference(self) -> Float[Tensor, " m"]:
        """What each decision adds to the loss, all strings in a batch."""
        return self.added(self.x)

    @cached_property
    def eps(self) -> float:
        """Rounding of the coarser model, relative."""
        formats = {m.dtype for m in (self.model, self.teacher) if m is not None}
        return max(torch.finfo(dtype).eps for dtype in formats | {torch.float32})

    @cached_property
    def floor(self) -> float:
        """What rounding does to a decision's loss on average, in nats, at most: the largest logit sets its size."""
        largest = float(_logits(self.student(self.x)).abs().max()) if self.x.decisions else 0.0
        roundings = FULL if self.eps < 1e-5 else HALF
        return roundings * self.eps * max(1.0, largest) * max(1.0, self.recipe.temperature**2)

    def loss(
        self, theirs: Teacher | None, student: Hidden | Logits, x: Sequences, rows: int | None = None
    ) -> losses.Distilled:
        """As in training, but for a sum in place of a mean."""
        recipe = self.recipe
        return losses.distillation_loss(
            theirs,
            student,
            x.targets().to(_values(student).device),
            recipe.divergence,
            normaliser=1.0,
            temperature=recipe.temperature,
            cross_entropy=recipe.cross_entropy,
            rows=rows,
        )

    def added(self, x: Sequences) -> Float[Tensor, " m"]:
        """What each decision of ``x`` adds."""
        return self.parts(self.laws(x), self.student(x), x)

    def parts(self, theirs: Teacher | None, student: Hidden | Logits, x: Sequences) -> Float[Tensor, " m"]:
        """What each decision adds: its divergence and its cross-entropy, with their shares."""
        with torch.no_grad():
            found = self.loss(theirs, student, x)
        key = token_loss(self.recipe.divergence).key
        share = 1.0 if key == CROSS_ENTROPY else self.recipe.cross_entropy
        value = torch.zeros_like(found.divergence)
        if isinstance(theirs, Sampled):  # whose divergence lacks a term without the student in it
            value = sampled_cross_entropy(theirs, log_softmax(_logits(student)))
        elif share < 1:
            value = (1 - share) * self.recipe.temperature**2 * found.divergence
        if share and found.cross_entropy is not None:
            value = value + share * found.cross_entropy
        return value.double().cpu()

    def verdict(self, name: str, claim: str, found: float, tolerance: float) -> Check:
        """Passed where no more was found than is allowed."""
        return Check(name, claim, found, tolerance, outcome(found <= tolerance))

    def same(self, name: str, claim: str, other: Float[Tensor, " _m"]) -> Check:
        """Whether every decision adds what it adds in the batch."""
        found = float("inf")
        if len(other) == len(self.reference):
            found = float((other - self.reference).abs().mean()) if len(other) else 0.0
        return self.verdict(name, claim, found, self.floor)

    def shift(
        self, name: str, model: HuggingFaceModel | None, contexts: Sequence[Tensor] | None, laws: Teacher | None
    ) -> Check:
        """Log-probabilities of tokens, against those after reading what precedes each token, and nothing else."""
        claim = "the law of a token is that after the tokens before it, and no other"
        if model is None or contexts is None or not isinstance(laws, (Hidden, Logits)):
            why = "only a part of each law is at hand" if model is not None else "the teacher itself is not at hand"
            return Check(name, claim, None, None, NOT_APPLICABLE, "the loss has no teacher" if laws is None else why)
        batch, differences, start = log_softmax(_logits(laws)), [], 0
        for i in range(len(self.x)):
            completion = self.x.completion(i)
            # Rows are counted here anew, since the layout of strings is what is tried.
            for t in sorted({0, len(completion) // 2, len(completion) - 1}) if len(completion) else ():
                before, token = torch.cat([contexts[i], completion[:t]]), int(completion[t])
                with torch.no_grad():
                    alone = self.readout(model, model.trunk(before[None])[0, -1:])
                differences.append(abs(float(alone[0, token]) - float(batch[start + t, token])))
            start += len(completion)
        found = sum(differences) / max(1, len(differences))
        return self.verdict(name, claim, found, self.floor)

    def readout(self, model: HuggingFaceModel, hidden: Float[Tensor, "c d"]) -> Float[Tensor, "c v"]:
        """The model's own log-probabilities, over the tokens that both models have."""
        return log_softmax(model.readout(hidden)[:, : self.size])

    def mask(self) -> Check:
        """The loss of a step, against a plain sum over the tokens of each response, one string at a time."""
        claim = "a step's loss is the mean over response tokens and end tokens, and nothing else"
        total, count = 0.0, 0
        for i in range(len(self.x)):
            context, completion = self.x.context(i), self.x.completion(i)
            if not len(completion):
                continue
            one = self.x.select([i])
            with torch.no_grad():
                hidden = self.model.trunk(torch.cat([context, completion])[None])[0]
                own = hidden[len(context) - 1 : len(context) + len(completion) - 1]
                student = Logits(self.readout(self.model, own))
                total += float(self.parts(self.laws(one), student, one).sum())
            count += len(completion)
        found = abs(self.gradient([range(len(self.x))])[0] - total / max(1, count))
        return self.verdict("mask", claim, found, self.floor)

    def scribbled(self) -> Float[Tensor, " m"]:
        """Losses with other ids behind every string's end."""
        column = torch.arange(self.x.tokens.shape[1])
        ids = min(self.model.vocabulary.size, self.size or self.model.vocabulary.size)
        tokens = self.x.tokens.where(column < self.x.stop[:, None], (self.x.tokens + 17 + column) % ids)
        return self.added(replace(self.x, tokens=tokens))

    def widened(self) -> Float[Tensor, " m"]:
        """Losses of strings that lie beside a longer one."""
        longest, window = int(self.x.stop.max()), self.model.window
        wide = longest + EXTRA_COLUMNS if window is None else min(longest + EXTRA_COLUMNS, window)
        token = self.x.tokens[0, :1]
        both = Sequences.cat([self.x, Sequences.pack([token], [token.expand(wide - 1)])])
        laws, own = self.student(both), slice(0, len(self.reference))
        ours = Hidden(laws.hidden[own], laws.head) if isinstance(laws, Hidden) else Logits(laws.logits[own])
        return self.parts(self.theirs, ours, self.x)

    def padding_side(self) -> Check:
        """The first token's law from contexts that are padded on the left, as in sampling."""
        claim = "sampling, padded on the left, has the laws of scoring (total variation)"
        some = (self.x.lengths > 0).nonzero()[:, 0].tolist()
        if not some:
            return Check("padding side", claim, None, None, NOT_APPLICABLE)
        left = self.readout(self.model, self.model.begin([self.x.context(i) for i in some])[1])
        right = log_softmax(_logits(self.student(self.x)))[self.x.position() == 0]
        found = float((left.exp() - right.exp()).abs().sum(-1).mean()) / 2
        return self.verdict("padding side", claim, found, self.floor)

    def alone(self) -> Float[Tensor, " _m"]:
        """Losses of each string by itself."""
        return torch.cat([self.added(self.x.select([i])) for i in range(len(self.x)) if int(self.x.lengths[i])])

    def gradient(self, parts: Sequence[Sequence[int]]) -> tuple[float, list[Tensor]]:
        """Loss and gradient of a step whose strings come in micro-batches."""
        before = [w.grad for w in self.weights]
        for w in self.weights:
            w.grad = None
        total = 0.0
        try:
            for rows in parts:
                part = self.x.select(list(rows))
                if part.decisions:
                    total += training.form_gradients(
                        self.model,
                        self.laws(part),
                        part,
                        replace(self.recipe, precision="float32"),
                        size=self.size,
                        tokens=float(self.x.decisions),
                        strings=float(len(self.x)),
                    ).loss
            found = [torch.zeros_like(w) if w.grad is None else w.grad for w in self.weights]
        finally:
            for w, grad in zip(self.weights, before, strict=True):
                w.grad = grad
        return total, found

    def accumulation(self) -> Check:
        """Gradients of one batch, and of the same strings in micro-batches."""
        claim = "micro-batches of any size add up to the gradient of the whole batch (relative)"
        if not self.weights:
            return Check("accumulation", claim, None, None, NOT_APPLICABLE, "no weight of the student can be trained")
        count = len(self.x)
        _, whole = self.gradient([range(count)])
        length = _norm(whole)
        found = 0.0
        for size in sorted({1, 2, max(1, count // 2)} - {count}):
            _, parts = self.gradient([range(i, min(i + size, count)) for i in range(0, count, size)])
            found = max(found, _norm([a - b for a, b in zip(parts, whole, strict=True)]) / max(length, 1e-30))
        # Where the loss is at its minimum, the gradient is rounding and nothing else.
        at_rest = length <= self.floor
        check = self.verdict("accumulation", claim, found, 1000 * self.eps if self.eps < 1e-5 else 4 * self.eps)
        return replace(check, outcome=NOT_APPLICABLE, note="the gradient is 0 already") if at_rest else check

    def representations(self) -> Iterator[Check]:
        """The loss and its gradient in hidden states, in chunks of several sizes and from whole logits."""
        names = {
            "chunks": "chunks of any size give one loss and gradient (relative)",
            "dense": "whole logits give the loss and gradient of hidden states in chunks (relative)",
        }
        student = self.student(self.x)
        if isinstance(student, Logits):
            for name, claim in names.items():
                yield Check(name, claim, None, None, NOT_APPLICABLE, "this model's logits are no linear map")
            return
        head, tolerance = student.head.detach(), 64 * torch.finfo(torch.float32).eps

        def measure(rows: int | None, dense: bool = False) -> tuple[float, Tensor]:
            hidden = student.hidden.detach().float().requires_grad_()
            laws: Hidden | Logits = Hidden(hidden, head)
            if dense:
                laws = Logits(differentiable_logits(head, hidden))
            loss = self.loss(self.theirs, laws, self.x, rows).loss
            loss.backward()  # type: ignore[no-untyped-call]
            assert hidden.grad is not None
            return float(loss.detach()), hidden.grad

        value, slope = measure(None)
        scale, length = max(abs(value), self.floor), max(_norm([slope]), self.floor)
        for name, others in (("chunks", [measure(1), measure(7)]), ("dense", [measure(None, dense=True)])):
            found = max(max(abs(v - value) / scale, _norm([s - slope]) / length) for v, s in others)
            yield self.verdict(name, names[name], found, tolerance)

    def acts(self) -> Check:
        """What the loss is to a teacher whose laws are in other places."""
        claim, theirs = "another teacher gives another loss (mean change, nats)", self.theirs
        if not isinstance(theirs, (Hidden, Logits)) or self.x.decisions < 2:
            why = "the loss has no teacher" if theirs is None else "only a part of each law is at hand"
            return Check("teacher acts", claim, None, None, NOT_APPLICABLE, why)
        values = _values(theirs).roll(1, 0)
        other = Hidden(values, theirs.head) if isinstance(theirs, Hidden) else Logits(values)
        found = float((self.parts(other, self.student(self.x), self.x) - self.reference).abs().mean())
        note = "" if found > self.floor else "the loss does not depend on the teacher: is --cross-entropy all but 1?"
        return Check("teacher acts", claim, found, self.floor, outcome(found > self.floor), note)

    def equal(self) -> Check:
        """The divergence of the student from itself."""
        claim = "a student that is its teacher has a divergence of 0 at every decision"
        if self.rows is None:
            return Check("equal models", claim, None, None, NOT_APPLICABLE, "the loss has no teacher")
        student = self.student(self.x)
        with torch.no_grad():
            divergence = self.loss(student, student, self.x).divergence
        return self.verdict(
            "equal models", claim, float(divergence.abs().max()) if len(divergence) else 0.0, self.floor
        )


def _values(laws: Hidden | Logits) -> Tensor:
    return laws.hidden if isinstance(laws, Hidden) else laws.logits


def _logits(laws: Hidden | Logits) -> Float[Tensor, "m v"]:
    return laws.rows(slice(0, len(laws)))


def _norm(parts: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts))
