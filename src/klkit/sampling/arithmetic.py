"""Arithmetic sampling: sets of strings that spread over the law, each of them an exact draw from it.

Every string is the arithmetic decoding of a number in ``[0, 1)``, its *code* (Vilnis et al., 2022,
arXiv 2210.15458). A set has the codes ``(U + j/s) mod 1`` for ``j < s`` and one uniform ``U``: each
code is uniform, so each string has law ``p``, but they are evenly spaced, so the strings differ where
the law has mass to differ. The strings of a set depend on each other; sets do not. A set is therefore
one cluster, and an interval needs several of them.

Codes never run out of bits. Choosing the interval ``[F, F + w)`` that holds the code leaves
``(code − F) / w``, uniform again given the choice. In floating point it lies on a grid of spacing
``2⁻⁵³/w``, as the bits above are spent; fresh bits from the string's own stream fill the grid at once.
Every decision so has its probability up to rounding (a few ``2⁻⁵³``), however long the string: nothing
accumulates. A set shares the 53 bits of ``U`` and no more, which is plenty: its strings have parted
after about ``log2 s`` bits, and later bits hardly relate them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from klkit import rng
from klkit.models.base import LanguageModel
from klkit.sampling.ancestral import Draw, name_strings, roll_out
from klkit.sampling.draw import SLAB, block_masses, block_rows, block_shape

GRID = 2.0**-53
"""Spacing of the codes, and of the uniform numbers ``torch.rand`` makes in fp64."""


def sample_sets(
    model: LanguageModel,
    contexts: Sequence[Int[Tensor, " _c"]],
    *,
    size: int,
    max_tokens: int,
    seed: int,
    prompt: Sequence[int] | None = None,
    replicate: Sequence[int] | None = None,
    cluster: Sequence[int] | None = None,
) -> Draw:
    """Draw, for each context, one set of ``size`` strings ``y ~ p(· | context)`` from evenly spaced codes.

    Set ``i`` is named by ``(prompt[i], replicate[i])``, and its randomness comes from that name and the
    seed only; its strings are numbers ``i·size … (i+1)·size − 1`` of the result. Unlike those of
    ancestral sampling, strings of a neural model can change with the shape of the batch, though their
    law does not: a code magnifies the last bits of the probabilities with every decision.

    Args:
        size: strings in a set. One is ordinary sampling.
        prompt: names of the prompts; by default each context is a prompt of its own.
        replicate: tells the sets of one prompt apart; by default they are counted from 0.
        cluster: independent units, one entry a set; by default the prompts if there are several, else
            the sets.

    Raises:
        ValueError: ``size`` below 1, or as for :func:`klkit.sampling.ancestral.sample`.

    Example:
        >>> from klkit.models.automaton import coin
        >>> p = coin(end=0.5)
        >>> x = sample_sets(p, [p.context(None)], size=8, max_tokens=10, seed=0).sequences
        >>> int((x.lengths == 1).sum())  # half the mass is on the empty string, so half the codes are
        4
    """
    if size < 1:
        raise ValueError(
            f"expected sets of at least one string, got size {size}; ask for the strings each set should hold"
        )
    prompt, replicate, cluster = name_strings(len(contexts), prompt, replicate, cluster)
    names = list(zip(prompt, replicate, strict=True))
    shifts = [torch.rand((), generator=rng.stream(seed, "set", *name), dtype=torch.float64).item() for name in names]
    spaced = torch.arange(size, dtype=torch.float64) / size
    code = ((torch.tensor(shifts, dtype=torch.float64)[:, None] + spaced) % 1).flatten()
    generators = [rng.stream(seed, "code", *name, j) for name in names for j in range(size)]
    fresh = torch.empty(len(code), SLAB, 2, dtype=torch.float64)

    def choose(step: int, rows: Tensor, logp: Tensor, tokens: Tensor) -> Tensor:
        if step % SLAB == 0:
            for i in rows.tolist():
                fresh[i] = torch.rand(SLAB, 2, dtype=torch.float64, generator=generators[i])
        chosen, inner = decode(logp, code[rows].to(logp.device), fresh[rows, step % SLAB].to(logp.device))
        code[rows] = inner.cpu()
        return chosen

    return roll_out(
        model,
        [context for context in contexts for _ in range(size)],
        choose,
        max_tokens=max_tokens,
        prompt=[k for k in prompt for _ in range(size)],
        cluster=[c for c in cluster for _ in range(size)],
    )


def decode(
    logp: Float[Tensor, "b v"], code: Float[Tensor, " b"], fresh: Float[Tensor, "b 2"]
) -> tuple[Int[Tensor, " b"], Float[Tensor, " b"]]:
    """The token whose interval holds each code, and the code's place within that interval.

    Decoded in two stages, as in :func:`klkit.sampling.draw.draw`: the block of tokens, then the token.
    """
    block, code = narrow(block_masses(logp).double(), code, fresh[:, 0])
    inside, code = narrow(block_rows(logp, block).double().exp(), code, fresh[:, 1])
    return block * block_shape(logp.shape[1])[1] + inside, code


def narrow(
    mass: Float[Tensor, "b k"], code: Float[Tensor, " b"], fresh: Float[Tensor, " b"]
) -> tuple[Int[Tensor, " b"], Float[Tensor, " b"]]:
    """The interval of ``mass`` (of any total) that holds each code, and a full code within it.

    Example:
        >>> import torch
        >>> row = lambda *x: torch.tensor(x, dtype=torch.float64)
        >>> index, code = narrow(row(0.25, 0.0, 0.75)[None], row(0.625), row(0.0))
        >>> index.item(), code.item()
        (2, 0.5)
    """
    edges = torch.nn.functional.pad(mass.cumsum(1), (1, 0))
    total = edges[:, -1]
    target = code * total  # below the total even when rounded, as no code exceeds 1 − 2⁻⁵³
    index = torch.searchsorted(edges[:, 1:].contiguous(), target[:, None], right=True)[:, 0]
    low, high = edges.gather(1, index[:, None])[:, 0], edges.gather(1, index[:, None] + 1)[:, 0]
    inner = (target - low + fresh * GRID * total) / (high - low)
    return index, inner.clamp(max=1 - GRID)
