"""TRL's distillation trainers with any of klkit's divergences, the same number as everywhere else in klkit.

TRL's on-policy trainer ends in one call that takes hidden states of both models, their heads and a mask; its trainer
for given texts (GKD) in one that takes logits and labels. Only these calls are replaced: data, generation, adapters,
wrapping for several processes and logging remain TRL's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from klkit.divergences.linear import Head
from klkit.divergences.partial import Hidden, Logits
from klkit.objectives.distill import Distilled, distillation_loss
from klkit.objectives.distill_labels import Claim, claim
from klkit.objectives.distill_losses import CROSS_ENTROPY, token_loss

if TYPE_CHECKING:
    Trainer = Any
else:
    Trainer = object

MODULE, CALL = "trl.trainer.distillation_trainer", "_chunked_divergence_loss"
"""Where the on-policy trainer's last call is."""

TAKES = (
    "student_hidden_states",
    "teacher_hidden_states",
    "student_lm_head_weight",
    "teacher_lm_head_weight",
    "completion_mask",
    "beta",
    "num_items_in_batch",
    "student_lm_head_bias",
    "teacher_lm_head_bias",
    "student_logit_scale",
    "teacher_logit_scale",
    "student_final_logit_softcapping",
    "teacher_final_logit_softcapping",
    "temperature",
)
"""What that call takes in the versions this was written for."""

GKD_TAKES = ("student_logits", "teacher_logits", "labels", "beta", "num_items_in_batch")
"""What GKD hands its loss, by name."""

IGNORED = -100
SAMPLING = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
"""Options that change the law of the student's texts beyond the temperature, and the values that do not."""


class Distillation(Trainer):  # type: ignore[misc]
    """What both trainers share: the loss by its name, what it optimises in words, and what is logged.

    Args:
        args, kwargs: the trainer's own.
        loss: a divergence with its options, see :func:`klkit.objectives.distill_losses.token_loss`.
        divergence_temperature: of both laws in the divergence; values are multiplied by its square.

    Attributes:
        loss: the divergence.
        objective: what the run optimises, and whether its gradient is that quantity's.

    Raises:
        ValueError: there is no such loss, or ``beta`` is set, which would do nothing.
    """

    objective: Claim

    def __init__(
        self, *args: Any, loss: str = "adaptive_kl", divergence_temperature: float | None = None, **kwargs: Any
    ) -> None:
        self.loss = token_loss(loss)
        if self.loss.key == CROSS_ENTROPY:
            raise ValueError(f"expected a divergence of two models, got {loss!r}; train on texts with TRL's SFTTrainer")
        super().__init__(*args, **kwargs)
        chosen = self._own_temperature() if divergence_temperature is None else divergence_temperature
        self.divergence_temperature = float(chosen)
        self._sums: dict[str, Tensor] = {}
        require_default_beta(self.args, self.loss.spec)

    def _own_temperature(self) -> float:
        return 1.0

    def _note(self, found: Distilled) -> None:
        """Keep sums over the decisions of a batch for the log."""
        named = {"divergence": found.divergence, "kl": found.kl, "reverse_kl": found.reverse_kl}
        named |= {"head_weight": found.head_weight, "cross_entropy": found.cross_entropy}
        self._sums = {name: values.double().sum() for name, values in named.items() if values is not None}
        self._sums["count"] = found.divergence.new_tensor(len(found.divergence), dtype=torch.float64)

    def _log_means(self) -> None:
        """Means over the decisions of all processes, in nats a token, to the trainer's log."""
        mode = "train" if self.model.training else "eval"
        names = list(self._sums)
        sums = torch.stack([self._sums[name] for name in names])
        total = dict(zip(names, self.accelerator.gather(sums[None]).sum(0).tolist(), strict=True))
        count = total.pop("count")
        if count:  # of an empty batch there is nothing to say
            for name, value in total.items():
                self._metrics[mode][name].append(value / count)


class OnPolicyDistillation(Distillation):
    """``Σ D(p, q) / tokens`` on the student's own responses, with ``p`` the teacher and ``q`` the student.

    Put it before ``trl.DistillationTrainer``. Hidden states meet the heads a few rows at a time, so logits of a batch
    never exist. Tokens of all processes and accumulated batches weigh the same, as in the stock trainer.

    Logged, in nats a token: ``divergence`` (the loss without the square of the temperature), ``kl`` (teacher to
    student), ``reverse_kl``, ``cross_entropy`` (of the student on its own tokens), and ``head_weight`` of an adaptive
    KL; in place of the stock trainer's ``entropy``.

    Args:
        args, kwargs: the trainer's own.
        loss: see :class:`Distillation`.
        divergence_temperature: by default the configuration's ``temperature``, at which responses are drawn.

    Raises:
        ValueError: ``beta`` is set, or a head is in parts.
        ImportError: this version of TRL makes its last call otherwise.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        require_same_call()
        super().__init__(*args, **kwargs)
        self.objective = sampled_claim(self)

    def _own_temperature(self) -> float:
        return float(self.args.temperature)

    def _compute_loss(self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
        calls: list[Distilled] = []

        def last_call(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
            given = inspect.signature(stock).bind(*args, **kwargs)
            given.apply_defaults()
            found = self._distil(given.arguments, inputs["completion_ids"])
            calls.append(found)
            count = found.divergence.new_tensor(len(found.divergence), dtype=torch.long)
            return found.loss, found.loss.new_zeros(()), count

        stock = getattr(import_module(MODULE), CALL)
        with replaced(import_module(MODULE), CALL, last_call):
            result = super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)
        if len(calls) != 1:
            raise changed_trl(f"{len(calls)} calls of {CALL} a batch")
        self._note(calls[0])
        return result

    def _distil(self, given: dict[str, Any], completions: Tensor) -> Distilled:
        """The loss from what the stock trainer hands over."""
        mask = given["completion_mask"] != 0
        sides = []
        for name in ("teacher", "student"):
            weight, bias = (whole(given[f"{name}_lm_head_{part}"]) for part in ("weight", "bias"))
            scale, cap = given[f"{name}_logit_scale"], given[f"{name}_final_logit_softcapping"]
            sides.append(Hidden(given[f"{name}_hidden_states"][mask], Head(cast(Tensor, weight), bias, scale, cap)))
        teacher, student = sides
        items = given["num_items_in_batch"]
        with torch.autocast(student.hidden.device.type, enabled=False):
            return distillation_loss(
                Hidden(teacher.hidden, teacher.head.detach()),
                student,
                completions.to(mask.device)[mask],
                self.loss,
                normaliser=None if items is None else float(items),
                temperature=self.divergence_temperature,
            )

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's, and what was measured on the way."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # After the forward pass of a wrapped model, inside of which processes must not wait for each other.
        self._metrics["train" if self.model.training else "eval"].pop("entropy")  # which was not computed
        self._log_means()
        return result


class GivenTextDistillation(Distillation):
    """``Σ [(1 − c) T² D(p, q) − c log q(y)] / tokens`` on given texts, teacher's texts (``seq_kd``), or both mixed.

    Put it before ``trl.experimental.gkd.GKDTrainer``. With ``lmbda=0`` all texts are given ones, and tokens of all
    processes and accumulated batches weigh the same. Where the student or the teacher writes instead, TRL divides by
    the number of tokens of the texts that were replaced; its on-policy trainer does better.

    Logged as by :class:`OnPolicyDistillation`.

    Args:
        args, kwargs: the trainer's own.
        loss: see :class:`Distillation`.
        divergence_temperature: 1 by default; the configuration's ``temperature`` is that of generation alone.
        cross_entropy: ``c``, from 0 to 1.

    Raises:
        ValueError: ``beta`` is set, or ``cross_entropy`` is no share.
        ImportError: this version of TRL hands its loss something else.
    """

    def __init__(self, *args: Any, cross_entropy: float = 0.0, **kwargs: Any) -> None:
        if not 0 <= cross_entropy < 1:
            raise ValueError(f"expected a share of cross-entropy from 0 to below 1, got {cross_entropy}")
        self.cross_entropy = cross_entropy
        require_gkd_call()
        super().__init__(*args, **kwargs)
        self.objective = mixed_claim(self)

    def generalized_jsd_loss(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        beta: float = 0.5,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """The loss on logits that predict ``labels``, those of -100 left out."""
        mask = labels != IGNORED
        items = None if num_items_in_batch is None else float(num_items_in_batch)
        if items is not None and self.args.average_tokens_across_devices:
            items /= self.accelerator.num_processes  # whose gradients are averaged
        found = distillation_loss(
            Logits(teacher_logits[mask]),
            Logits(student_logits[mask]),
            labels[mask],
            self.loss,
            normaliser=items,
            temperature=self.divergence_temperature,
            cross_entropy=self.cross_entropy,
        )
        self._note(found)
        return found.loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's, and what was measured on the way."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._log_means()
        return result


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Let ``module.name`` be ``value`` for a while."""
    stock = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, stock)


def sampled_claim(trainer: Any) -> Claim:
    """What training on the student's responses optimises, drawn as the trainer's configuration says."""
    options = {**{name: getattr(trainer.args, name, x) for name, x in SAMPLING.items()}}
    options |= trainer.args.generation_kwargs or {}
    changed = [f"{n}={v}" for n, v in options.items() if n in SAMPLING and v not in (SAMPLING[n], None, -1)]
    if trainer.args.temperature != trainer.divergence_temperature:
        changed.append(f"temperature={trainer.args.temperature:g}")
    found = claim(trainer.loss, "student", temperature=trainer.divergence_temperature, per_token=not changed)
    if not changed:
        return found
    objective = along(trainer, "student", ", ".join(changed))
    return replace(found, objective=objective, notes=(*found.notes, "these texts are not drawn from the student's law"))


def mixed_claim(trainer: Any) -> Claim:
    """What training on given texts, the teacher's, the student's, or a mixture of them optimises.

    Texts are drawn at the configuration's temperature: at another than 1 the law of whole responses is no model's.
    """
    args, share = trainer.args, float(trainer.args.lmbda)
    text = "student" if share == 1 else "teacher" if args.seq_kd else "data"
    temperature = trainer.divergence_temperature
    changed = args.temperature != 1 and (text != "data" or share > 0)
    found = claim(
        trainer.loss,
        text,
        on_policy=share,
        temperature=temperature,
        cross_entropy=trainer.cross_entropy,
        per_token=not changed,
    )
    if not changed:
        return found
    how, rest = f"temperature={args.temperature:g}", trainer.cross_entropy
    plain = claim(trainer.loss, text, temperature=temperature)
    objective = plain.objective if text == "data" else along(trainer, text, how)
    if 0 < share < 1:
        objective = f"{1 - share:.4g} × [{objective}] + {share:.4g} × [{along(trainer, 'student', how)}]"
    if rest:
        texts = "the given texts" if text == "data" else f"texts of the {text} drawn with {how}"
        likelihood = f"negative log-likelihood of {texts}"
        objective = f"{(1 - rest) * temperature**2:.4g} × [{objective}] + {rest:.4g} × [{likelihood}]"
    # What is said of the likelihood of texts from a model's own law does not hold of others.
    own = {*claim(token_loss(CROSS_ENTROPY), text).notes, *claim(token_loss("forward_kl"), "teacher").notes}
    notes = [note for note in found.notes if note not in own]
    return replace(found, objective=objective, notes=(*notes, f"texts drawn with {how} are not from a model's own law"))


def along(trainer: Any, writer: str, how: str) -> str:
    """The objective on texts of a model that are drawn otherwise than from its law."""
    temperature = trainer.divergence_temperature
    laws = "next-token laws" if temperature == 1 else f"next-token laws at temperature {temperature:g}"
    return f"mean {trainer.loss.key} of {laws} along texts of the {writer} drawn with {how}"


def require_default_beta(args: Any, spec: str) -> None:
    """Refuse a ``beta`` other than the default, which chooses a divergence of the stock trainer.

    Raises:
        ValueError: it is set.
    """
    default = type(args).__dataclass_fields__["beta"].default
    if args.beta != default:
        raise ValueError(
            f"expected beta left at its default of {default}, got {args.beta}: it chooses among TRL's divergences, and "
            f"{spec} is used here; for TRL's own write loss='forward_kl' (its 0), 'reverse_kl' (its 1) or "
            f"'generalised_js,p_weight={args.beta}'"
        )


def require_same_call() -> None:
    """Check that TRL's on-policy trainer ends in the call that is replaced.

    Raises:
        ImportError: it does not.
    """
    stock = getattr(import_module(MODULE), CALL, None)
    takes = () if stock is None else tuple(inspect.signature(stock).parameters)
    if takes != TAKES:
        raise changed_trl(f"{CALL}({', '.join(takes)})" if takes else f"no {CALL}")


def require_gkd_call() -> None:
    """Check that TRL's GKD trainer has the loss that is replaced.

    Raises:
        ImportError: it has not.
    """
    stock = getattr(import_module("trl.experimental.gkd").GKDTrainer, "generalized_jsd_loss", None)
    takes = set() if stock is None else set(inspect.signature(stock).parameters)
    if not takes >= set(GKD_TAKES):
        raise changed_trl(f"GKDTrainer.generalized_jsd_loss({', '.join(sorted(takes))})" if takes else "no such loss")


def changed_trl(found: str) -> ImportError:
    """What to say where TRL is not as it was."""
    from importlib.metadata import version

    return ImportError(
        f"expected a TRL whose distillation trainer ends as that of 1.16 does, got {version('trl')} with {found}; "
        f"install trl==1.16.*, or train with klkit distill"
    )


def whole(parameter: Any) -> Tensor | None:
    """A head's weight or bias, gathered if FSDP2 has it in parts.

    Raises:
        ValueError: DeepSpeed has it in parts.
    """
    if parameter is None:
        return None
    if hasattr(parameter, "ds_id"):
        raise ValueError(
            "expected weights that are whole in the forward pass, got DeepSpeed ZeRO stage 3, which takes the head "
            "apart before the backward pass; use stage 2 or FSDP2"
        )
    found: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return found
