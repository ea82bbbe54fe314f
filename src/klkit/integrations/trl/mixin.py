"""The divergence in TRL's GRPO and RLOO trainers, on top of what they do."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from klkit.integrations.trl.seam import Scores, Seam, attach
from klkit.integrations.trl.term import KLTerm, averaging

if TYPE_CHECKING:
    Trainer = Any
else:
    Trainer = object

HIDDEN, SAMPLER, GROUP = "ref_hidden_states", "old_per_token_logps", "prompt_group"
"""Entries of the trainer's batches; the second is TRL's own where it has it."""

TRUNCATIONS = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Sampling options that change the law of responses beyond the temperature, and the values that do not."""


class RaoBlackwellKL(Trainer):  # type: ignore[misc]
    """``beta`` times a surrogate of ``KL(p‖q) = E_p Σ_n D_n`` in place of a TRL trainer's KL penalty.

    Put it before ``GRPOTrainer`` or ``RLOOTrainer``, or a class derived from them; everything but the penalty is
    theirs. The term is a loss of its own: it is not clipped, not multiplied by advantages or their scale, and not
    restricted to tokens of high entropy. It is averaged as ``loss_type`` averages; in RLOO over responses, whose
    divergences are sums. Policy and reference are both taken at the trainer's ``temperature``.

    The reference is read once a response, and its hidden states, not log-probabilities, travel with the batch.
    Metrics: ``kl`` in nats a token, ``kl/response`` in nats a response, and ``kl/effective_share``, the smallest
    effective share of responses behind a position, where responses are of an older policy.

    Responses are scored as TRL scores them: it passes no positions, so models that learned one vector a position
    (GPT-2) count a prompt's left padding, and their ``kl`` depends on it a little; the monitor's does not.

    Tested on one process, and on two over gloo with DDP. FSDP2 (whose head is gathered in the forward pass), inference
    by vLLM, and vision-language models are written against their documented interfaces and not verified.

    Args:
        args, kwargs: the trainer's own.
        kl: how the gradient is estimated.

    Attributes:
        kl: the same.
        kl_objective: what the term's gradient followed at the last step, in words; None before.

    Raises:
        ValueError: ``beta`` is 0, the head is adapted or no plain head, or an option would silently do nothing.
    """

    beta: float

    def __init__(self, *args: Any, kl: KLTerm | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kl = KLTerm() if kl is None else kl
        self.kl_objective: str | None = None
        check_settings(self)
        self._seam = Seam(copy_head=bool(self.args.sync_ref_model))
        policy = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        attach(self._seam, policy, self.temperature)
        if self.ref_model is not None:
            # Of the same configuration; and where it is sharded already, a probe would need all processes.
            attach(self._seam, self.accelerator.unwrap_model(self.ref_model), self.temperature, verify=False)

    @contextmanager
    def _without_stock_penalty(self) -> Iterator[None]:
        beta, self.beta = self.beta, 0.0
        try:
            yield
        finally:
            self.beta = beta

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        with self._without_stock_penalty(), self._seam.recording() as scored:
            batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
            older = [found.log_probs for found in scored if found.log_probs is not None]
        rows, width = batch["completion_ids"].shape
        misaligned = self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations)
        if misaligned and SAMPLER not in batch:
            # RLOO keeps sums over responses only; its scoring calls came through here.
            batch[SAMPLER] = torch.cat([log_probs[:, -width:] for log_probs in older])
        batch[HIDDEN] = self._read_reference(batch)
        generations = self.num_generations if self.model.training else self.num_generations_eval
        row = torch.arange(rows, device=batch["completion_ids"].device) + rows * self.accelerator.process_index
        batch[GROUP] = row // generations
        return batch

    @torch.no_grad()
    def _read_reference(self, batch: dict[str, Any]) -> Tensor:
        """Hidden states of the reference that predict the completions, ``(b, c, e)``."""
        from trl.models.utils import disable_gradient_checkpointing
        from trl.trainer.utils import use_adapter

        width = batch["completion_ids"].shape[1]
        tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        accepted = inspect.signature(self._get_per_token_logps_and_entropies).parameters
        extras = {name: value for name, value in batch.items() if name in accepted}  # images and their like
        size = self.args.per_device_train_batch_size if self.model.training else self.args.per_device_eval_batch_size

        def read(model: Any) -> None:
            self._get_per_token_logps_and_entropies(model, tokens, attention, width, batch_size=size, **extras)

        quiet = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with quiet, self._seam.keeping(width) as kept:
            if self.ref_model is not None:
                read(self.ref_model)
            else:
                model = self.accelerator.unwrap_model(self.model)
                with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
                    read(self.model)
        return torch.cat(kept)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        with self._without_stock_penalty(), self._seam.recording(inputs[HIDDEN]) as scored:
            loss: Tensor = super()._compute_loss(model, inputs)
            (scores,) = scored
        return loss + self.beta * self._kl_term(scores, inputs)

    def _kl_term(self, scores: Scores, inputs: dict[str, Any]) -> Tensor:
        """The surrogate, averaged as the loss type averages; its metrics are noted."""
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        device, width = self.accelerator.device, mask.shape[1]
        found = (scores.kl, scores.log_probs, scores.reference_log_probs)
        kl, logp, logq = (x[:, -width:].to(device) for x in found if x is not None)
        share, scale = self._averaging(mask, inputs)
        surrogate = self.kl.surrogate(kl, logp, logq, mask, share, self._sampler(logp, inputs), inputs[GROUP])
        self.kl_objective = surrogate.objective
        self._note_kl(kl.detach(), surrogate.value / share, surrogate.effective_samples, mask)
        # The gradient is the surrogate's; the number, for the log, that of the divergence.
        return scale * (surrogate.loss - surrogate.loss.detach() + surrogate.value.mean())

    def _averaging(self, mask: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        training = self.model.training
        window = self.current_gradient_accumulation_steps if training else 1
        items = inputs.get("num_items_in_batch", mask.sum()).clamp(min=1).float() / self.accelerator.num_processes
        if training:
            items = items * window / self.args.steps_per_generation
        kind = getattr(self, "loss_type", "rloo")
        return averaging(kind, mask, max_completion_length=self.max_completion_length, items=items, window=window)

    def _sampler(self, logp: Tensor, inputs: dict[str, Any]) -> Tensor | None:
        """Log-probabilities of the law that responses were drawn from, where it was not the policy."""
        older: Tensor | None = inputs.get(SAMPLER)
        if not self.kl.engine:
            return older
        engine: Tensor | None = inputs.get("sampling_per_token_logps")
        if engine is None:
            raise ValueError(
                "expected the engine's log-probabilities with KLTerm(engine=True), got a batch without; generate with "
                "use_vllm=True in GRPO, or leave engine out"
            )
        # vLLM returns NaN for tokens that it has no number of.
        return torch.where(engine.isnan(), logp.detach() if older is None else older, engine)

    def _note_kl(self, kl: Tensor, per_response: Tensor, effective: Tensor | None, mask: Tensor) -> None:
        mode = "train" if self.model.training else "eval"
        parts = [(kl * mask).sum(), mask.sum(), per_response.sum(), per_response.new_tensor(len(mask))]
        sums = self.accelerator.reduce(torch.stack([x.detach().float() for x in parts]), reduction="sum")
        self._metrics[mode]["kl"].append((sums[0] / sums[1].clamp(min=1)).item())
        self._metrics[mode]["kl/response"].append((sums[2] / sums[3]).item())
        if effective is not None:
            alive = mask.sum(0)
            least = torch.where(alive > 0, effective / alive.clamp(min=1), 1.0).min()
            self._metrics[mode]["kl/effective_share"].append(self.accelerator.gather(least).min().item())


def check_settings(trainer: Any) -> None:
    """Refuse settings that leave nothing to do or would silently do nothing; warn of those that bias.

    Raises:
        ValueError: they make no sense together.
    """
    if trainer.beta == 0 or not math.isfinite(trainer.beta):
        raise ValueError(
            f"expected a coefficient beta other than 0, got {trainer.beta}: there is nothing to regularise, and TRL "
            f"keeps no reference; set beta in the trainer's config, or use the stock trainer"
        )
    if not getattr(trainer.args, "use_bias_correction_kl", True):
        raise ValueError(
            "expected use_bias_correction_kl left at True, got False; it chooses a gradient of the stock penalty, "
            "which is not used here: choose one with kl=KLTerm(estimator=...)"
        )
    generation = {**(trainer.args.generation_kwargs or {})}
    changed = [
        f"{name}={value}"
        for name, neutral in TRUNCATIONS.items()
        if (value := generation.get(name, getattr(trainer, name, neutral))) not in (neutral, None, -1)
    ]
    if changed:
        warnings.warn(
            f"expected responses drawn from the policy itself, got {', '.join(changed)}: the divergence is that of the "
            f"whole laws, at prefixes of the altered one, and its gradient is biased; leave them out",
            stacklevel=3,
        )
    dropout = sorted({m.p for m in trainer.model.modules() if isinstance(m, nn.Dropout) and m.p > 0})
    if dropout:
        warnings.warn(
            f"expected no dropout, got probabilities {dropout}: policy and reference then differ by noise before "
            f"anything is trained; set disable_dropout=True, and lora_dropout=0",
            stacklevel=3,
        )
