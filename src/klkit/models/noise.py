"""How much rounding moves a model: its own law again, with noise of rounding size after every layer.

Kernels, batch shapes and precisions differ in the last bits of what every layer returns. What such
differences come to at the output depends on the network, and on the divergence that asks; so the
network is run with differences of that size, drawn at random, and compared with itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from klkit.models.base import LanguageModel
from klkit.models.wrap import Transformed, innermost
from klkit.rng import stream
from klkit.sequences import Sequences


@dataclass(frozen=True, eq=False)
class Noisy(Transformed):
    """A model whose decoder layers are disturbed while it reads given strings; strings are drawn without noise.

    Attributes:
        scale: standard deviation of the relative noise.
        seed: names its draws.
    """

    scale: float = 0.0
    seed: int = 0

    def encode(self, x: Sequences) -> Float[Tensor, "m d"]:
        """The base's trunk vectors, read with noise after every layer: the same for the same strings."""
        with disturbed(decoder_layers(innermost(self.base)), self.scale, self.seed):
            return self.base.encode(x)


def with_rounding_noise(model: LanguageModel, scale: float | None = None, *, seed: int = 0) -> Noisy:
    """``model``, reading strings with ``h ← h · (1 + scale · z)``, ``z`` standard normal, after every decoder layer.

    Args:
        scale: by default a quarter of the precision's epsilon, which is about the root mean square of the error that
            one rounding makes: 2⁻⁹ in bf16, 2⁻²⁵ in fp32.
        seed: names the draws.

    Raises:
        ValueError: ``scale`` is negative or infinite, or the model is no network with a list of layers.

    Example:
        >>> from klkit import load
        >>> p = load("klkit:docs")
        >>> x = Sequences.pack([p.context("The value")], [torch.tensor([5, 6, 7])])
        >>> noisy = with_rounding_noise(p, 2**-9)
        >>> shift = (noisy.encode(x) - p.encode(x)).norm() / p.encode(x).norm()
        >>> 2**-10 < float(shift) < 2**-6, torch.equal(noisy.encode(x), noisy.encode(x))
        (True, True)
    """
    if scale is None:
        scale = torch.finfo(model.dtype).eps / 4
    if not 0 <= scale < float("inf"):
        raise ValueError(f"expected a scale of noise of at least 0, got {scale}; 2**-9 is that of bf16")
    decoder_layers(innermost(model))
    return Noisy(
        base=model,
        rows=lambda logp: logp,
        vocabulary=model.vocabulary,
        name=f"{model.name}|noise={scale:.2g}",
        heads=lambda head: head,
        scale=scale,
        seed=seed,
    )


def decoder_layers(model: LanguageModel) -> nn.ModuleList:
    """The decoder layers of a model: the outermost list of as many modules as its configuration declares.

    Raises:
        ValueError: there is no network, or no such list in it.

    Example:
        >>> from klkit import load
        >>> len(decoder_layers(load("klkit:docs")))
        4
    """
    network: Any = getattr(model, "model", None)
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"expected a network with decoder layers to put noise after, got {type(model).__name__} {model.name!r}, "
            f"which rounds nowhere in between; measure another floor"
        )
    config: Any = network.config
    count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [m for _, m in network.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise ValueError(
            f"expected a list of {count} decoder layers in {model.name}, got none in {type(network).__name__}; "
            f"measure another floor"
        )
    return lists[0]  # modules come outermost first


@contextmanager
def disturbed(layers: nn.ModuleList, scale: float, seed: int) -> Iterator[None]:
    """Multiply what each layer returns by ``1 + scale · z`` while the block runs; its passes number the draws."""
    passes = [0] * len(layers)

    def disturb(number: int, output: Any) -> Any:
        # Layers return hidden states, alone or before other things.
        hidden = output[0] if isinstance(output, tuple) else output
        z = torch.randn(hidden.shape, generator=stream(seed, "rounding noise", number, passes[number]))
        passes[number] += 1
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        noisy = (wide * (1 + scale * z.to(hidden.device))).to(hidden.dtype)
        return (noisy, *output[1:]) if isinstance(output, tuple) else noisy

    handles = [
        layer.register_forward_hook(lambda _, __, output, number=number: disturb(number, output))
        for number, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
