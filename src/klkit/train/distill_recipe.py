"""The numbers of a distillation run, checked where they are written down."""

from __future__ import annotations

import math
from dataclasses import dataclass

from klkit.objectives.distill_losses import CROSS_ENTROPY, token_loss

OBJECTIVES = ("token", "sequence-fkl", "sequence-rkl")
TEXTS = ("data", "teacher")
SCHEDULES = ("cosine", "constant")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class DistillRecipe:
    """How a student is trained: everything that changes its numbers, but models and data.

    Attributes:
        loss: divergence of the next-token laws, see :func:`klkit.objectives.distill_losses.token_loss`. None chooses
            by the text: the adaptive KL on given text, the forward KL on the teacher's, the reverse KL where most is
            the student's own.
        objective: ``token``, the loss at every decision; ``sequence-fkl``, KL(teacher‖student) between the laws of
            whole responses; ``sequence-rkl``, KL(student‖teacher) between them, with its score term.
        text: ``data``, the given responses; ``teacher``, what the teacher answers to the given prompts.
        on_policy: share of strings that the student writes itself, afresh in every step.
        samples: strings a prompt, of the teacher's or, with ``sequence-rkl``, of the student's, where they are each
            other's baseline. None for one, or two with ``sequence-rkl``.
        temperature: of both laws in the divergence, whose value is multiplied by its square.
        cross_entropy: share of the cross-entropy on the text's own tokens; the rest is the divergence.
        batch: strings a step, of all processes together.
        micro_batch: strings whose gradients are formed together; 0 for all of a process.
        max_tokens: longest response.
        learning_rate: AdamW's, at its highest.
        warmup: steps over which it rises.
        schedule: ``cosine`` falls to 0 at the last step; ``constant`` stays.
        gradient_norm: longest gradient; longer ones are shortened.
        precision: in which the student's layers compute in training; weights and losses stay in theirs. No layer
            drops anything out: the same strings give the same gradient.
        max_loss: mean divergence of a batch, in nats a token, above which the run has come apart.
        seed: names every random draw.

    Raises:
        ValueError: a number is out of range, or options exclude each other.

    Example:
        >>> DistillRecipe().divergence, DistillRecipe(text="teacher").divergence
        ('adaptive_kl', 'forward_kl')
    """

    loss: str | None = None
    objective: str = "token"
    text: str = "data"
    on_policy: float = 0.0
    samples: int | None = None
    temperature: float = 1.0
    cross_entropy: float = 0.0
    batch: int = 32
    micro_batch: int = 0
    max_tokens: int = 256
    learning_rate: float = 1e-4
    warmup: int = 20
    schedule: str = "cosine"
    gradient_norm: float = 1.0
    precision: str = "float32"
    max_loss: float = 100.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (
            ("objective", OBJECTIVES),
            ("text", TEXTS),
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"expected {name} among {', '.join(choices)}, got {getattr(self, name)!r}; choose one of them"
                )
        if self.loss is not None:
            token_loss(self.loss)
        for name, least in (("batch", 1), ("max_tokens", 1), ("samples", 1), ("micro_batch", 0), ("warmup", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"expected {name} of at least {least}, got {value}; raise it")
        for name in ("temperature", "learning_rate", "gradient_norm", "max_loss"):
            value = getattr(self, name)
            if not (value > 0 and (math.isfinite(value) or name in ("gradient_norm", "max_loss"))):
                raise ValueError(f"expected a positive {name}, got {value:g}; choose one above 0")
        for name in ("on_policy", "cross_entropy"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"expected {name} from 0 to 1, got {getattr(self, name):g}; it is a share")
        self._check_objective()

    def _check_objective(self) -> None:
        """Refuse what an objective over whole responses would have to ignore."""
        key = None if self.loss is None else token_loss(self.loss).key
        wrong = []
        if self.objective == "sequence-fkl":
            wrong += [f"loss={self.loss}"] if key not in (None, "forward_kl") else []
            wrong += [f"on_policy={self.on_policy:g}"] if self.on_policy else []
            why = "its gradient is that of the token forward KL on the teacher's own text"
        elif self.objective == "sequence-rkl":
            wrong += [f"loss={self.loss}"] if key not in (None, "reverse_kl") else []
            wrong += [f"on_policy={self.on_policy:g}"] if self.on_policy not in (0.0, 1.0) else []
            wrong += ["text=teacher"] if self.text == "teacher" else []
            wrong += [f"cross_entropy={self.cross_entropy:g}"] if self.cross_entropy else []
            why = "its gradient is that of the token reverse KL on the student's own text, and a score term"
        if self.objective != "token" and self.temperature != 1:
            wrong.append(f"temperature={self.temperature:g}")
            why = "text comes from the models as they are"
        if wrong:
            raise ValueError(
                f"expected only options that go with {self.objective}, got {', '.join(wrong)}, but {why}; leave "
                f"{'it' if len(wrong) == 1 else 'them'} out, or take objective=token"
            )
        if key == CROSS_ENTROPY and (self.on_policy or self.temperature != 1):
            idle = f"on_policy={self.on_policy:g}" if self.on_policy else f"temperature={self.temperature:g}"
            raise ValueError(
                f"expected only options that have an effect on learning, got {idle} with {CROSS_ENTROPY}, which has no "
                f"teacher's law in it; leave it out, or choose a divergence"
            )
        if self.cross_entropy == 1 and key != CROSS_ENTROPY:
            raise ValueError(
                f"expected a cross_entropy below 1 with {self.divergence}, got 1, which leaves nothing of it and is "
                f"plain fine-tuning on the text; take loss={CROSS_ENTROPY}, or lower the share"
            )
        if self.objective == "token" and self.text == "teacher" and self.on_policy == 1:
            idle = "text=teacher" if self.samples is None else f"text=teacher, samples={self.samples}"
            raise ValueError(
                f"expected only text that is read, got {idle} with on_policy=1, where the student writes every string; "
                f"leave {'it' if self.samples is None else 'them'} out, or lower on_policy"
            )
        if self.samples is not None and not self.teacher_writes and self.objective != "sequence-rkl":
            raise ValueError(
                f"expected samples with text=teacher or objective=sequence-rkl, where strings of one prompt are drawn "
                f"together, got samples={self.samples} without; leave it out"
            )
        if self.objective == "sequence-rkl":
            for name in ("batch", "micro_batch"):
                if getattr(self, name) % self.strings_a_prompt:
                    raise ValueError(
                        f"expected a {name} of whole prompts, a multiple of {self.strings_a_prompt} samples, got "
                        f"{getattr(self, name)}; the strings of a prompt are each other's baseline"
                    )

    @property
    def divergence(self) -> str:
        """The loss, chosen where it was left open."""
        if self.loss is not None:
            return self.loss
        if self.student_share > 0.5:
            return "reverse_kl"
        return "forward_kl" if self.teacher_writes else "adaptive_kl"

    @property
    def teacher_writes(self) -> bool:
        """Whether the text, as far as it is not the student's, is the teacher's."""
        return self.text == "teacher" or self.objective == "sequence-fkl"

    @property
    def student_share(self) -> float:
        """Share of strings that the student writes."""
        return 1.0 if self.objective == "sequence-rkl" else self.on_policy

    @property
    def strings_a_prompt(self) -> int:
        """Strings that are drawn for a prompt."""
        if self.samples is not None:
            return self.samples
        return 2 if self.objective == "sequence-rkl" else 1

    @property
    def sequence_level(self) -> bool:
        """Whether the loss is a mean over strings instead of tokens."""
        return self.objective != "token"

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of the step after ``step`` of ``steps``.

        Example:
            >>> recipe = DistillRecipe(learning_rate=1.0, warmup=2)
            >>> [round(recipe.rate(step, 6), 3) for step in range(6)]
            [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
        """
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        progress = (step - self.warmup) / max(1, steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
