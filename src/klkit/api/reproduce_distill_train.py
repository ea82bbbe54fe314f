"""Students of the distillation experiment: what they read, and the steps they take.

The loop is small on purpose: the teacher's hidden states are computed once for all students, every student of a seed
starts from one warmed-up network and meets the same batches, and nothing but the loss differs. Runs on other models
and data are :mod:`klkit.train.distill`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from klkit.divergences.differentiable import divergences
from klkit.divergences.partial import Logits
from klkit.files import write_atomically
from klkit.models.base import head_of
from klkit.models.hf import HuggingFaceModel
from klkit.objectives.distill import distillation_loss
from klkit.objectives.distill_losses import CROSS_ENTROPY
from klkit.objectives.policy import kl_surrogate
from klkit.rng import derive, stream
from klkit.sampling.ancestral import sample
from klkit.sequences import Sequences
from klkit.train.gradients import differentiable_logits, spread
from klkit.train.policy import Decisions

SEQUENCE_REVERSE_KL = "sequence_reverse_kl"
"""KL(student‖teacher) between laws of responses, by its Rao-Blackwellised gradient with the score of later tokens."""


@dataclass(frozen=True, eq=False, slots=True)
class Texts:
    """Strings, and the teacher's hidden state at each of their decisions.

    Attributes:
        x: the strings.
        hidden: ``(m, d)``, flat in the order of the strings.
    """

    x: Sequences
    hidden: Float[Tensor, "m d"]

    @classmethod
    def read(cls, teacher: HuggingFaceModel, x: Sequences) -> Texts:
        """The strings as ``teacher`` sees them."""
        hidden = [teacher.encode(x.select(part)) for part in torch.split(torch.arange(len(x)), 256)]
        return cls(x, torch.cat(hidden).clone())

    def select(self, strings: Int[Tensor, " k"]) -> Texts:
        """Some of the strings, in that order."""
        lengths = self.x.lengths
        last = lengths.cumsum(0)
        rows = [torch.arange(int(last[i] - lengths[i]), int(last[i])) for i in strings]
        return Texts(self.x.select(strings), self.hidden[torch.cat(rows)])

    def save(self, file: Path) -> None:
        """Write strings and hidden states."""
        x = self.x
        parts = {"tokens": x.tokens, "start": x.start, "stop": x.stop, "prompt": x.prompt, "hidden": self.hidden}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, partial(save_file, {name: part.contiguous() for name, part in parts.items()}))

    @classmethod
    def load(cls, file: Path) -> Texts:
        """What :meth:`save` wrote."""
        parts = load_file(file)
        ended = torch.ones(len(parts["start"]), dtype=torch.bool)
        hidden = parts.pop("hidden")
        return cls(Sequences(**parts, cluster=parts["prompt"], finished=ended), hidden)


@dataclass(frozen=True, slots=True)
class Training:
    """How students are trained.

    Attributes:
        steps: of distillation, after the warm-up.
        warm: steps on the tokens of the text before, the same for every loss.
        batch: strings a step.
        learning_rate: AdamW's; it climbs over 20 steps, and falls as a cosine to zero during distillation.
        longest: tokens of a response that the student writes itself.
    """

    steps: int = 600
    warm: int = 100
    batch: int = 32
    learning_rate: float = 3e-3
    longest: int = 40


def warm_up(student: HuggingFaceModel, text: Texts, plan: Training, seed: int) -> None:
    """A short start on the tokens of the text, so that no loss meets a random network."""

    def objective(step: int) -> Tensor:
        return _loss(text.select(_batch(text, plan.batch, seed, "warm", step)), student)

    _fit(student, plan.warm, plan, lambda step: 1.0, objective)


def distil(
    teacher: HuggingFaceModel,
    student: HuggingFaceModel,
    text: Texts,
    loss: str,
    plan: Training,
    seed: int,
    *,
    own: str | None = None,
    check: Callable[[int], None] = lambda step: None,
) -> None:
    """Train ``student`` towards ``teacher`` at the prefixes of ``text``.

    Args:
        loss: as :func:`klkit.objectives.distill_losses.token_loss` reads it.
        seed: names batches and what the student writes; two students of one seed meet the same.
        own: loss in the second half of the steps, at prefixes that the student itself writes: a name as before, or
            :data:`SEQUENCE_REVERSE_KL`. It answers half as many prompts, each twice.
        check: called with the number of steps done, before the first and after each.
    """

    def objective(step: int) -> Tensor:
        if own is None or step < plan.steps // 2:
            return _loss(text.select(_batch(text, plan.batch, seed, "distil", step)), student, teacher, loss)
        chosen = _batch(text, plan.batch // 2, seed, "distil", step)
        contexts = [text.x.context(i) for i in chosen.tolist() for _ in range(2)]
        prompt = torch.arange(len(chosen)).repeat_interleave(2)
        drawn = sample(
            student, contexts, max_tokens=plan.longest, seed=derive(seed, "own", step), prompt=prompt.tolist(),
            settle=False,
        ).sequences  # fmt: skip
        # What inference left behind cannot take part in a graph; a copy can.
        return _loss(Texts(drawn, teacher.encode(drawn).clone()), student, teacher, own)

    def cosine(step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * step / plan.steps))

    check(0)
    _fit(student, plan.steps, plan, cosine, objective, check)


def _fit(
    student: HuggingFaceModel,
    steps: int,
    plan: Training,
    shape: Callable[[int], float],
    objective: Callable[[int], Tensor],
    check: Callable[[int], None] = lambda step: None,
) -> None:
    weights = [w for w in student.model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * min((step + 1) / 20, shape(step))
        optimizer.zero_grad()
        objective(step).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        check(step + 1)


def _batch(text: Texts, size: int, seed: int, name: str, step: int) -> Int[Tensor, " k"]:
    return torch.randint(len(text.x), (size,), generator=stream(seed, name, step))


def student_logits(student: HuggingFaceModel, x: Sequences) -> Float[Tensor, "m v"]:
    """Logits at every decision, with a graph."""
    head = head_of(student)
    assert head is not None
    return differentiable_logits(head, student.trunk(x.tokens[:, :-1])[x.predictors()])


def _loss(
    text: Texts, student: HuggingFaceModel, teacher: HuggingFaceModel | None = None, loss: str = CROSS_ENTROPY
) -> Float[Tensor, ""]:
    """Mean over decisions; without a teacher that of the text's tokens."""
    x, logits = text.x, student_logits(student, text.x)
    if teacher is None or loss == CROSS_ENTROPY:
        return distillation_loss(None, Logits(logits), x.targets(), CROSS_ENTROPY).loss
    head = head_of(teacher)
    assert head is not None
    truth = head.detach().logits(text.hidden)
    if loss != SEQUENCE_REVERSE_KL:
        return distillation_loss(Logits(truth), Logits(logits), None, loss).loss
    block, rows = Decisions.of(x), divergences(logits, truth, x.targets())
    kl, logp, logq = (spread(values, block.mask) for values in (rows.kl, rows.logp, rows.logq))
    # Each answer's later divergences are held against those of the same prompt's other answer. The mean is over
    # decisions, like that of the other losses, so that clipping means the same.
    return kl_surrogate(kl, logp, logq, block.mask, group=x.prompt).loss * (len(x) / x.decisions)
