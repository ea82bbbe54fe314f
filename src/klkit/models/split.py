"""A network of transformers cut in two where it is narrowest: in front of its output head.

What enters the head is caught during a real forward pass in which the head is given no rows to work
on, so logits of a whole batch never exist; the head then runs on a few rows at a time. Architectures
treat logits in their own ways after the head (a cap, a scale), so the cut is *verified* on a short
probe: if the head's result is not what the network itself returns, nothing is cut, and the logits
are passed on whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from klkit.divergences.linear import Head

# Factors and divisors that architectures apply to the output of the head, by configuration key.
LOGIT_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
LOGIT_DIVISORS = ("logits_scaling",)


class SplitNetwork:
    """The two halves of a causal language model: ``trunk`` and ``logits``.

    Args:
        network: the network; it is put in evaluation mode.
        probe: a row of ordinary token ids to verify the cut on.
        name: what messages call the network.
        activate: called before every pass, for networks that share weights (adapters).

    Attributes:
        size: logits in a row.
        width: values in a trunk vector; ``size`` if nothing is cut.
        whole: whether trunk vectors are the logits themselves.

    Raises:
        ValueError: the network returns NaN on the probe, or looks at later tokens.
    """

    def __init__(
        self, network: PreTrainedModel, probe: Int[Tensor, "1 l"], name: str, activate: Callable[[], None] | None = None
    ):
        self.network = cast(Any, network)
        self.network.eval()
        self._activate = activate
        accepts = inspect.signature(network.forward).parameters
        self._takes_positions = "position_ids" in accepts
        self._cache_name = "past_key_values" if "past_key_values" in accepts else "cache_params"
        self._head: nn.Module | None = self.network.get_output_embeddings()
        self._factor = 1.0
        self._cap: float | None = None
        self.size, self.width = self._verify(probe, name)

    @property
    def whole(self) -> bool:
        """Whether trunk vectors are the logits themselves."""
        return self._head is None

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        device: torch.device = self.network.device
        # Weights that are fetched when they are needed say nothing; accelerate knows where the arithmetic is done.
        return device if device.type != "meta" else torch.device(self.network._hf_hook.execution_device)

    def trunk(
        self, tokens: Int[Tensor, "b l"], mask: Int[Tensor, "b w"], *, cache: Any = None, use_cache: bool = False
    ) -> tuple[Float[Tensor, "b l d"], Any]:
        """What enters the head at every column of ``tokens``, and the cache after them.

        Args:
            mask: 1 for each token read so far, 0 for padding; its width is that of cache and tokens together.
        """
        if self._activate is not None:
            self._activate()
        inputs: dict[str, Any] = {"input_ids": tokens.to(self.device), "use_cache": use_cache}
        # State-space models take the mask with the padding only; afterwards their state has absorbed it.
        if cache is None or self._cache_name == "past_key_values":
            inputs["attention_mask"] = mask.to(self.device)
        if self._takes_positions:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :].to(self.device)
        if cache is not None:
            inputs[self._cache_name] = cache
        caught: list[Tensor] = []

        def catch(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            caught.append(args[0])
            return (args[0][:, :0], *args[1:])

        handle = None if self._head is None else self._head.register_forward_pre_hook(catch)
        try:
            output = self.network(**inputs)
        finally:
            if handle is not None:
                handle.remove()
        (hidden,) = [output.logits] if self._head is None else caught
        return hidden, getattr(output, self._cache_name, None)

    def logits(self, h: Float[Tensor, "m d"]) -> Float[Tensor, "m v"]:
        """Logits of trunk vectors, never rounded below single precision: head, then the cap or scale."""
        if self._head is None:
            return h
        if (head := self.head()) is not None:
            return head.logits(h)
        if self._activate is not None:
            self._activate()
        logits = self._head(h)
        return _after_head(logits if logits.dtype == torch.float64 else logits.float(), self._factor, self._cap)

    def head(self) -> Head | None:
        """The way from trunk vectors to logits, where all of it is one linear layer that nothing alters."""
        if self._head is None or not _plain(self._head):
            return None
        weight, bias = cast(Tensor, self._head.weight), cast(Tensor | None, self._head.bias)
        return Head(weight, bias, self._factor, self._cap, min(self.size, len(weight)))

    def _verify(self, tokens: Int[Tensor, "1 l"], name: str) -> tuple[int, int]:
        """Settle how logits follow from trunk vectors, or that nothing is cut; return (v, d)."""
        head, self._head = self._head, None
        mask = torch.ones_like(tokens)
        with torch.inference_mode():
            logits = self.trunk(tokens, mask)[0]
            if bool(torch.isnan(logits).any()):
                raise ValueError(
                    f"expected finite logits from {name} on a short probe, got NaN; the weights are damaged, or "
                    f"overflow in {logits.dtype}: load the model with dtype=float32"
                )
            if not close(self.trunk(tokens[:, :-1], mask[:, :-1])[0], logits[:, :-1], 512):
                raise ValueError(
                    f"expected a causal language model, got {type(self.network).__name__}, whose prediction of a token "
                    f"changes with what comes after it; load a model that was trained to predict the next token"
                )
            self.size = int(logits.shape[-1])
            declared = declared_after_head(self.network.config.get_text_config(decoder=True))
            for self._factor, self._cap in dict.fromkeys([declared, (1.0, None)]):
                self._head = head
                try:
                    hidden = self.trunk(tokens, mask)[0]
                    if head is not None and close(self.logits(hidden[0]), logits[0], 128 if _full(logits) else 8):
                        return self.size, int(hidden.shape[-1])
                except (ValueError, TypeError, RuntimeError, IndexError):
                    continue  # the head is not called once with (b, l, d): not a cut this class knows
        self._head = None
        return self.size, self.size


def close(a: Tensor, b: Tensor, roundings: int) -> bool:
    """Whether tensors agree to so many roundings of the coarser format, relative to the largest entry.

    Infinite entries must be in the same places. Double precision counts as single, because parts of
    many architectures work in fp32 whatever their weights are.
    """
    a = a.to(b.device)
    finite = torch.isfinite(b)
    if not bool((torch.isfinite(a) == finite).all()) or not bool(finite.any()):
        return False
    eps = max(torch.finfo(t.dtype).eps for t in (a, b, torch.empty(0)))
    a, b = a[finite].double(), b[finite].double()
    return float((a - b).abs().max()) <= min(0.1, roundings * eps) * float(b.abs().max().clamp(min=1e-30))


def _plain(module: nn.Module) -> bool:
    """Whether a module is a linear layer and nothing else: no adapter, no hook, no weights elsewhere."""
    if type(module) is not nn.Linear or module.weight.is_meta or not module.weight.is_floating_point():
        return False
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _full(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.float64)


def declared_after_head(config: Any) -> tuple[float, float | None]:
    """Factor and soft cap that a configuration declares for logits."""
    factor = 1.0
    for key in LOGIT_FACTORS:
        value = getattr(config, key, None)
        factor *= value if isinstance(value, (int, float)) else 1.0
    for key in LOGIT_DIVISORS:
        value = getattr(config, key, None)
        factor /= value if isinstance(value, (int, float)) else 1.0
    cap = getattr(config, "final_logit_softcapping", None)
    return float(factor), None if cap is None else float(cap)


def _after_head(z: Float[Tensor, "m v"], factor: float, cap: float | None) -> Float[Tensor, "m v"]:
    """``cap · tanh(factor · z / cap)``, or ``factor · z`` without a cap."""
    z = z if factor == 1.0 else z * factor
    return z if cap is None else cap * torch.tanh(z / cap)
