"""KL(p‖q) of a model in training, measured on held-out prompts with an error bar."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel, Trainer, TrainerCallback

from klkit.api.prompts import read_prompts
from klkit.api.verbs import estimate
from klkit.models.base import LanguageModel
from klkit.models.hf import HuggingFaceModel
from klkit.models.spec import load
from klkit.results import Comparison
from klkit.sequences import Content, Prompts


@dataclass(frozen=True, slots=True)
class Measurement:
    """One measurement.

    Attributes:
        step: optimiser steps taken before it.
        comparison: everything measured; ``comparison.headline`` is the estimate.
    """

    step: int
    comparison: Comparison


class KLMonitorCallback(TrainerCallback):
    """``KL(p‖q) = E_{y∼p} Σ_n D_n`` on held-out prompts every ``every`` steps, in any transformers Trainer.

        trainer.add_callback(KLMonitorCallback(trainer, "klkit:reviews", every=100))

    ``p`` is the model in training. Strings are drawn by klkit's own sampler from streams of their own: training goes
    on exactly as if nothing had been measured. The same strings of random numbers are used every time, so changes
    between measurements are less noisy than each.

    Logged, in nats a response: ``kl_monitor``, its standard error and 95 % interval. On several processes the first
    one measures and the others wait; the model must be whole on each (DDP). Not for FSDP or DeepSpeed ZeRO-3.

    Args:
        trainer: the trainer; its model, tokenizer and log are used.
        prompts: texts or conversations, a file, or ``klkit:NAME``; None for the empty prompt.
        every: steps between measurements; the first comes before any step.
        reference: ``q``: a model, its specification, or None for what the trainer has: the model without its adapter
            (or the adapter named ``"ref"``), or the trainer's ``ref_model``.
        max_tokens: longest response.
        temperature: of both models.
        options: any other option of :func:`klkit.api.verbs.estimate`, such as ``samples``, ``seed`` or ``batch_size``.

    Attributes:
        history: measurements so far.

    Raises:
        ValueError: ``every`` is below 1, there is no reference, or the model is in parts.
    """

    def __init__(
        self,
        trainer: Any,
        prompts: Prompts | Sequence[Content] | str | None,
        *,
        every: int = 100,
        reference: LanguageModel | str | None = None,
        max_tokens: int = 128,
        temperature: float = 1.0,
        **options: Any,
    ) -> None:
        if every < 1:
            raise ValueError(f"expected a positive number of steps between measurements, got every={every}")
        self.trainer, self.every = trainer, every
        self.prompts = read_prompts(prompts) if isinstance(prompts, str) else prompts
        self.options = {"max_tokens": max_tokens, "temperature": temperature, "floor": "none", **options}
        self.history: list[Measurement] = []
        self._reference = load(reference) if isinstance(reference, str) else reference
        if self._reference is None and not _has_adapter(trainer.model) and getattr(trainer, "ref_model", None) is None:
            raise ValueError(
                "expected a reference, or a trainer that has one (an adapter, or a ref_model), got neither; pass "
                "reference=klkit.load(...)"
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure before the first step."""
        if self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled:
            raise ValueError(
                "expected a model that is whole on each process, got one that FSDP or DeepSpeed may have taken apart; "
                "measure its checkpoints with: klkit estimate"
            )
        self._measure(state.global_step, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure if it is time."""
        if state.global_step % self.every == 0:
            self._measure(state.global_step, control)

    def _measure(self, step: int, control: Any) -> None:
        if not self.trainer.is_world_process_zero():
            return
        model, reference = self.trainer.model, getattr(self.trainer, "ref_model", None)
        with unchanged(model), unchanged(reference):
            p, q = self._pair()
            comparison = estimate(p, q, self.prompts, **self.options)
        self.history.append(Measurement(step, comparison))
        headline = comparison.headline
        interval = headline.interval()
        found = {"": headline.value, "/stderr": headline.stderr}
        if math.isfinite(interval.lower + interval.upper):  # there is none from very few prompts
            found |= {"/lower": interval.lower, "/upper": interval.upper}
        due = control.should_log
        # Not the trainer's own method, which in TRL would also write and clear the metrics of unfinished steps.
        Trainer.log(self.trainer, {f"kl_monitor{name}": value for name, value in found.items()})
        control.should_log = due  # a log that was due for the step is not done with this one

    def _pair(self) -> tuple[LanguageModel, LanguageModel]:
        """The model as it is, and the reference."""
        model, tokenizer = self.trainer.model, self.trainer.processing_class
        if not _has_adapter(model):
            policy = HuggingFaceModel(model, tokenizer, name="policy")
            if self._reference is None:
                network = self.trainer.accelerator.unwrap_model(self.trainer.ref_model)
                self._reference = HuggingFaceModel(network, tokenizer, name="reference")
            return policy, self._reference
        trained = model.active_adapter
        policy = HuggingFaceModel(model.get_base_model(), tokenizer, name="policy", activate=_switch(model, trained))
        if self._reference is not None:
            return policy, self._reference
        other = _switch(model, "ref" if "ref" in model.peft_config else None)
        return policy, HuggingFaceModel(model.get_base_model(), tokenizer, name="reference", activate=other)


def _has_adapter(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def _switch(model: Any, adapter: str | None) -> Callable[[], None]:
    """What turns one adapter of ``model`` on, or all of them off."""
    if adapter is None:
        return partial(model.base_model.disable_adapter_layers)

    def activate() -> None:
        model.base_model.enable_adapter_layers()
        model.base_model.set_adapter(adapter)

    return activate


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """Let a model be read as its class does, in evaluation mode, with any adapter, and put it back as it was.

    What trainers put in place of its forward may round (mixed precision, of one model and not of the other).
    """
    if model is None:
        yield
        return
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    forwards = [(m, vars(m).pop("forward")) for m in modules if isinstance(m, PreTrainedModel) and "forward" in vars(m)]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    adapter = model.active_adapter if _has_adapter(model) else None
    try:
        yield
    finally:
        if adapter is not None:
            _switch(model, adapter)()
        for module, mode in modes:
            module.training = mode
        for module, forward in forwards:
            module.forward = forward
        for parameter, needs in trained:
            parameter.requires_grad_(needs)
