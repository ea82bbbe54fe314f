"""Drawing one token a row so that a string does not depend on the batch it was drawn in.

A token is drawn by the Gumbel-max trick (Gumbel, 1954; Maddison et al., 2014, arXiv 1411.0030): with
independent standard Gumbel noise ``g``, ``argmax_a log p(a) + g_a`` has law ``p``. It is done twice,
first over about ``√v`` blocks of adjacent tokens (by their masses), then over the tokens of the
chosen block. That is still an exact draw, from ``2 √v`` random numbers instead of ``v``.

Why not the inverse of the distribution function, which needs one random number? Because logits
differ in their last bits between batch shapes, and a long vocabulary has a boundary near every
uniform number: the string would flip. Gumbel-max shows how safe its choice is. The *margin*, the gap
between the best and the second-best perturbed value, can change by at most twice the largest change
``δ`` of a log-probability. A choice whose margin exceeds ``2 δ`` is therefore the same in every batch
shape; the others, a fraction of at most ``2 δ`` a stage, are made again by the caller from the
prefix alone (see :func:`klkit.sampling.ancestral.sample`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from klkit.numerics import LN2, rows_per_chunk

TOLERANCE: dict[torch.dtype, float] = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Margins below this are settled: twice what log-probabilities of a model of this precision may
differ between batch shapes. Half formats are missing: their differences are too large to settle."""

SLAB = 16
"""Decisions for which a string's random numbers are made in one call."""

TINIEST = 2.0**-54
"""Replaces a uniform number of exactly 0, whose Gumbel value would be infinite."""


def block_shape(size: int) -> tuple[int, int]:
    """How many blocks a vocabulary is cut into, and how many tokens each but the last one holds.

    Example:
        >>> block_shape(50257), block_shape(2)
        ((224, 225), (1, 2))
    """
    width = math.isqrt(size - 1) + 1
    return -(-size // width), width


def block_masses(logp: Float[Tensor, "b v"]) -> Float[Tensor, "b k"]:
    """``Σ p(a)`` over each block of adjacent tokens.

    A mass too small for the format becomes 0. No draw notices: the heaviest block weighs at least
    ``1/k``, and Gumbel values span no more than 42 nats.
    """
    size = logp.shape[1]
    count, width = block_shape(size)
    whole = size // width
    masses = []
    for chunk in torch.split(logp, rows_per_chunk(size, bytes_per_value=logp.element_size())):
        p = (chunk * (1 / LN2)).exp2_()  # on some CPUs a quarter of the time of exp
        full = p[:, : whole * width].reshape(len(p), whole, width).sum(-1)
        masses.append(full if whole == count else torch.cat([full, p[:, whole * width :].sum(-1, keepdim=True)], 1))
    return torch.cat(masses)


def block_rows(logp: Float[Tensor, "b v"], block: Int[Tensor, " b"]) -> Float[Tensor, "b w"]:
    """Log-probabilities of the tokens of one block in each row; ``-inf`` past the vocabulary's end."""
    size = logp.shape[1]
    width = block_shape(size)[1]
    column = block[:, None] * width + torch.arange(width, device=logp.device)
    return logp.gather(1, column.clamp(max=size - 1)).masked_fill(column >= size, -torch.inf)


def gumbel_argmax(
    weights: Float[Tensor, "b k"], gumbel: Float[Tensor, "b k"]
) -> tuple[Int[Tensor, " b"], Float[Tensor, " b"]]:
    """``argmax_i (weights_i + gumbel_i)`` and its margin over the runner-up (``inf`` without one)."""
    perturbed = weights.double() + gumbel
    if perturbed.shape[1] == 1:
        return torch.zeros_like(perturbed[:, 0], dtype=torch.long), torch.full_like(perturbed[:, 0], torch.inf)
    best = perturbed.topk(2, dim=1)
    return best.indices[:, 0], best.values[:, 0] - best.values[:, 1]


def draw(logp: Float[Tensor, "b v"], gumbel: Float[Tensor, "b k"]) -> tuple[Int[Tensor, " b"], Float[Tensor, " b"]]:
    """One token ``y ~ p`` a row, and the smaller of its two margins.

    Args:
        logp: normalised log-probabilities, in nats; tokens at ``-inf`` are never drawn.
        gumbel: standard Gumbel noise, ``sum(block_shape(v))`` values a row, see :class:`Noise`.

    Shapes: ``(b, v)`` and ``(b, k + w)`` to tokens ``(b,)`` and margins ``(b,)``.

    Example:
        >>> import torch
        >>> from klkit.rng import stream
        >>> logp = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).log().expand(1000, 4)
        >>> noise = Noise([stream(0, "demo", i) for i in range(1000)], 4)
        >>> tokens, margin = draw(logp, noise.take(torch.arange(1000), 0))
        >>> sorted(set(tokens.tolist())), bool((margin > 0).all())
        ([0, 2, 3], True)
    """
    count, width = block_shape(logp.shape[1])
    block, safe = gumbel_argmax(block_masses(logp).log(), gumbel[:, :count])
    inside, also = gumbel_argmax(block_rows(logp, block), gumbel[:, count:])
    return block * width + inside, torch.minimum(safe, also)


class Noise:
    """Standard Gumbel noise of several strings, each from its own generator.

    What a string receives at a step depends on its generator and on the step only. Numbers are made
    ``SLAB`` steps at a time, for the strings that are still there.
    """

    def __init__(self, generators: Sequence[torch.Generator], size: int, device: torch.device | str = "cpu") -> None:
        self.generators = generators
        self.slab = torch.empty(len(generators), SLAB, sum(block_shape(size)), dtype=torch.float64, device=device)

    def take(self, rows: Int[Tensor, " b"], step: int) -> Float[Tensor, "b k"]:
        """The noise of the strings ``rows`` at ``step``; steps are asked for in order."""
        if step % SLAB == 0:
            shape = self.slab.shape[1:]
            fresh = [torch.rand(shape, dtype=torch.float64, generator=self.generators[i]) for i in rows.tolist()]
            # -log(-log(1 - u)): small u give the large values, where fp64 resolves u finest.
            uniform = torch.stack(fresh).clamp_min_(TINIEST)
            self.slab[rows] = uniform.neg_().log1p_().neg_().log_().neg_().to(self.slab.device)
        return self.slab[rows, step % SLAB]
