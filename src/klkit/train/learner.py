"""A model under training, with all its weights or with a LoRA adapter, whatever it is trained towards."""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from klkit.rng import stream

if TYPE_CHECKING:
    from klkit.models.hf import HuggingFaceModel

ALL_LAYERS = "all-linear"


@dataclass(frozen=True, eq=False, slots=True)
class Learner:
    """A model under training.

    Attributes:
        model: training changes its weights in place.
        adapter: the network with its adapter, as peft wraps it; None where all weights are trained.
    """

    model: HuggingFaceModel
    adapter: Any = None

    @property
    def saved(self) -> Any:
        """What ``save_pretrained`` is called on: the whole network, or its adapter alone."""
        return self.model.model if self.adapter is None else self.adapter

    @property
    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """What is trained, by name, in an order that does not change."""
        found = self.model.model.named_parameters()
        if self.adapter is None:
            return list(found)
        return [(name, weight) for name, weight in found if "lora_" in name]


def full_learner(model: HuggingFaceModel, *, in_place: bool = False, ends: Sequence[int] | None = None) -> Learner:
    """A copy of ``model`` whose weights are all trained.

    Args:
        in_place: train ``model`` itself: half the memory.
        ends: tokens at which its responses end, which are saved with it; by default those of ``model``.

    Raises:
        ValueError: weights are in half precision, or belong to an adapter.
    """
    from klkit.models.hf import HuggingFaceModel

    network: Any = model.model if in_place else copy.deepcopy(model.model)
    names = [name for name, _ in network.named_parameters()]
    if any(".base_layer." in name for name in names):
        raise ValueError(
            f"expected a model without an adapter to train, got {model.name}, whose layers carry one; merge it into "
            f"the weights (merge_and_unload in peft) and train the result"
        )
    if model.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"expected weights in float32 to train all of them, got {model.dtype} in {model.name}: small updates would "
            f"be rounded away; add dtype=float32 to the model, or train an adapter with --lora 16"
        )
    network.requires_grad_(True)
    ends = model.vocabulary.ends if ends is None else ends
    if set(ends) != set(model.vocabulary.ends):
        network.config.eos_token_id = network.generation_config.eos_token_id = list(ends)
    return Learner(HuggingFaceModel(network, model.tokenizer, name=model.name, ends=ends))


def lora_learner(
    model: HuggingFaceModel,
    rank: int,
    *,
    alpha: float | None = None,
    layers: str | Sequence[str] = ALL_LAYERS,
    seed: int = 0,
    in_place: bool = False,
    ends: Sequence[int] | None = None,
) -> tuple[Learner, HuggingFaceModel]:
    """A LoRA adapter of ``rank`` on a copy of ``model``, and the same network with the adapter off.

    There is one set of frozen weights. Both models run the same kernels on them, so their divergence is exactly 0
    before the first step.

    Args:
        alpha: scale of the adapter times its rank; by default twice the rank.
        layers: names of the layers that get one; by default all linear ones but the head.
        seed: names the adapter's random start.
        in_place: put the adapter on ``model`` itself, which is of no other use afterwards: half the memory.
        ends: tokens at which its responses end; by default those of ``model``.

    Raises:
        ImportError: peft is not installed.
        ValueError: the adapter would be on the output head, or fits no layer, or the rank is below 1.

    Source: E. J. Hu et al. (2021), LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685.
    """
    from klkit.models.checkpoints import quiet
    from klkit.models.hf import HuggingFaceModel

    if importlib.util.find_spec("peft") is None:
        raise ImportError("expected the peft library for LoRA, got none; install it with: pip install 'klkit[peft]'")
    import peft

    if rank < 1:
        raise ValueError(f"expected a LoRA rank of at least 1, got {rank}; 16 is common")
    network: Any = model.model if in_place else copy.deepcopy(model.model)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha if alpha is not None else 2 * rank,  # type: ignore[arg-type]
        target_modules=layers if isinstance(layers, str) else list(layers),
        task_type="CAUSAL_LM",
    )
    try:
        # The library starts adapters from the global generator; its draws are put back, and replaced below.
        with quiet(), torch.random.fork_rng(devices=[]):
            wrapped: Any = peft.get_peft_model(network, config)
    except ValueError as error:
        raise ValueError(
            f"expected layers of {model.name} that an adapter fits on, got {layers!r}: {error}; leave --lora-layers "
            f"out for all linear layers but the head"
        ) from None
    head = wrapped.get_base_model().get_output_embeddings()
    if hasattr(head, "base_layer"):
        raise ValueError(
            f"expected LoRA on layers below the output head, got it on the head of {model.name} too: the divergence "
            f"reads that layer as one plain matrix; leave it out of --lora-layers"
        )
    generator = stream(seed, "lora")
    with torch.no_grad():
        for name, weight in sorted(wrapped.named_parameters()):
            if "lora_A" in name:
                bound = 1 / math.sqrt(weight.shape[1])
                weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))
    states: list[bool] = []

    def switch(on: bool) -> None:
        if states != [on]:
            (wrapped.base_model.enable_adapter_layers if on else wrapped.base_model.disable_adapter_layers)()
            states[:] = [on]

    base = wrapped.get_base_model()
    ends = model.vocabulary.ends if ends is None else ends

    def view(on: bool) -> HuggingFaceModel:
        name = model.name if on else f"{model.name} without its adapter"
        return HuggingFaceModel(base, model.tokenizer, name=name, ends=ends, activate=lambda: switch(on))

    without, adapted = view(False), view(True)
    # The adapter stays on between passes, since switching it off also stops its gradients.
    switch(True)
    return Learner(adapted, wrapped), without
