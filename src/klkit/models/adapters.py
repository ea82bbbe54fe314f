"""One copy of a network's weights, and the adapters that come and go on it."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klkit.models.checkpoints import explained, first_line, listing, quiet, read_tokenizer
from klkit.models.hf import HuggingFaceModel
from klkit.models.spec import ADAPTER_FILE, ModelSpec, locate


class SharedNetwork:
    """A network on which adapters are put, switched and removed, so that several models are states of one.

    Args:
        network: the network, without adapters.
        notes: what a reader of the numbers should know about how it was read.
    """

    def __init__(self, network: Any, notes: tuple[str, ...] = ()) -> None:
        self.network = network.eval()
        self.notes = notes
        # No copies: adapters rename what the network shows, and put modules around its own.
        self._own: dict[str, Tensor] = dict(network.state_dict())
        self._modules: dict[str, Any] = dict(network.named_modules(remove_duplicate=False))
        self._wrapped: Any = None
        self._active: list[str | None] = []
        self._numbers = itertools.count()

    def model(self, spec: ModelSpec, name: str, adapter: str | None = None) -> HuggingFaceModel:
        """The model that the network is with ``adapter`` active, or with none."""

        def activate() -> None:
            self.switch(adapter)

        self.switch(adapter)
        with quiet():
            model = HuggingFaceModel(
                self.network,
                read_tokenizer(spec),
                name=name,
                ends=spec.end_ids(),
                activate=activate,
                weights=lambda: self.weights(adapter),
            )
        inert = adapter is not None and self.inert(adapter)
        own = (f"the adapter {spec.peft} changes nothing: its B matrices are zero, as they are initialised",)
        model.notes = (*self.notes, *model.notes, *(own if inert else ()))
        model.inert = inert
        return model

    def takes(self, spec: ModelSpec) -> bool:
        """Whether the adapter of ``spec`` can lie beside those that are attached: it must be of their kind."""
        if self._wrapped is None:
            return True
        kinds = {config.peft_type for config in self._wrapped.peft_config.values()}
        return kinds == {_config(spec).peft_type}

    def attach(self, spec: ModelSpec) -> str:
        """Put the adapter of ``spec`` on the network, and return the name it has there.

        Raises:
            ImportError: peft is not installed.
            ValueError: the adapter works by prompt tokens rather than in the layers, or does not fit.
            OSError: it cannot be found.
        """
        config, source, name = _config(spec), locate(str(spec.peft)), f"adapter{next(self._numbers)}"
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise ValueError(
                f"expected an adapter that works inside the layers (LoRA and its kin), got {config.peft_type} in "
                f"{spec.peft!r}; prompt-based adapters are not supported"
            )
        import peft

        with quiet(), explained(str(spec.peft)):
            try:
                if self._wrapped is None:
                    self._wrapped = peft.PeftModel.from_pretrained(self.network, source, adapter_name=name)
                else:
                    self._wrapped.load_adapter(source, adapter_name=name)
            except (RuntimeError, ValueError) as error:
                raise ValueError(
                    f"expected an adapter that fits {spec.path!r}, got {spec.peft!r}, which does not: "
                    f"{first_line(error)}; name the base model it was trained on"
                ) from None
        self._wrapped.eval()
        self._active = []
        return name

    def detach(self, name: str) -> None:
        """Remove an adapter and free its weights; after the last one the network is as it was read."""
        if set(self._wrapped.peft_config) == {name}:
            # Put back by hand: peft's own way leaves a head that an adapter brought in place of the network's.
            for place, module in self._modules.items():
                parent, _, leaf = place.rpartition(".")
                if place and getattr(self._modules[parent], leaf) is not module:
                    setattr(self._modules[parent], leaf, module)
            vars(self.network).pop("peft_config", None)
            self._wrapped = None
        else:
            with quiet():
                self._wrapped.delete_adapter(name)
        self._active = []

    def switch(self, name: str | None) -> None:
        """Make the adapter ``name`` active, or none."""
        if self._wrapped is None or self._active == [name]:
            return
        tuner = self._wrapped.base_model
        if name is None:
            tuner.disable_adapter_layers()
        else:
            tuner.enable_adapter_layers()
            tuner.set_adapter(name)
        self._active = [name]

    def fingerprint(self) -> Tensor:
        """Logits without adapters on a few tokens: equal, bit for bit, as long as the network's own weights are."""
        network = self.network
        tokens = torch.arange(4, device=network.device)[None] % network.config.get_text_config(decoder=True).vocab_size
        with quiet(), torch.inference_mode():
            self.switch(None)
            logits: Tensor = network(input_ids=tokens).logits
        return logits

    def restore(self, fresh: Any) -> None:
        """Take the weights of ``fresh``, the same network read again, where an adapter had altered them."""
        with torch.no_grad():
            for name, value in fresh.state_dict().items():
                self._own[name].copy_(value)

    def weights(self, adapter: str | None) -> Mapping[str, Any]:
        """The network's own weights, and those of one adapter."""
        own = self.network.state_dict() if self._wrapped is None else self._own
        return own if adapter is None else {**own, **self._adapter(adapter)}

    def inert(self, adapter: str) -> bool:
        """Whether an adapter is a LoRA whose B matrices are all zero, so that it changes nothing."""
        state = self._adapter(adapter)
        ups = {name for name in state if "lora_B" in name or "lora_embedding_B" in name}
        downs = {name for name in state if "lora_A" in name or "lora_embedding_A" in name}
        return bool(ups) and ups | downs == set(state) and not any(bool(state[name].any()) for name in ups)

    def _adapter(self, name: str) -> dict[str, Tensor]:
        from peft import get_peft_model_state_dict

        with quiet():
            state = get_peft_model_state_dict(self._wrapped, adapter_name=name, save_embedding_layers=False)
        return {f"adapter.{key}": value for key, value in state.items()}


def _config(spec: ModelSpec) -> Any:
    """What an adapter's folder says of it."""
    if importlib.util.find_spec("peft") is None:
        raise ImportError(
            "expected the peft library for peft=..., got none; install it with: pip install 'klkit[peft]'"
        )
    import peft

    source = locate(str(spec.peft))
    if Path(source).is_dir() and not (Path(source) / ADAPTER_FILE).is_file():
        raise FileNotFoundError(
            f"expected a folder with {ADAPTER_FILE}, got {spec.peft!r}, which holds {listing(source)}; "
            f"name the folder that peft saved the adapter in"
        )
    with quiet(), explained(str(spec.peft)):
        return peft.PeftConfig.from_pretrained(source)
