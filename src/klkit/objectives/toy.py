"""A policy, a reference and an older policy so small that expectations over all their strings are plain sums.

Every prefix has a table of logits of its own, so the gradient has no structure that a wrong one could hide in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from klkit import rng


class Batch(NamedTuple):
    """What a KL loss is given, as trainers hold it: strings ``n``, decisions ``l``, right-padded; vocabulary ``v``.

    Attributes:
        logp: ``log p(y_n)`` of the drawn tokens under the policy, differentiable.
        logq: the same under the reference.
        old: the same under the policy that drew the strings; ``logp`` without its gradient when that is this one.
        mask: decisions up to and including the end token.
        rows_p: all next-token log-probabilities of the policy at each prefix, differentiable.
        rows_q: the same of the reference.
        rows_old: the same of the policy that drew the strings.
    """

    logp: Float[Tensor, "n l"]
    logq: Float[Tensor, "n l"]
    old: Float[Tensor, "n l"]
    mask: Bool[Tensor, "n l"]
    rows_p: Float[Tensor, "n l v"]
    rows_q: Float[Tensor, "n l v"]
    rows_old: Float[Tensor, "n l v"]


Loss = Callable[[Batch], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Toy:
    """All strings of at most ``length`` tokens over ``size`` symbols of which 0 ends, and three laws of them.

    Attributes:
        prefix: index of the prefix before each decision, ``(n, l)``.
        token: the drawn tokens, ``(n, l)``.
        mask: the decisions there are, ``(n, l)``.
        policy: logits of the policy at each prefix, ``(k, v)``; a leaf that collects gradients.
        reference: next-token log-probabilities of the reference, ``(k, v)``.
        old: those of the older policy, ``(k, v)``.
    """

    prefix: Int[Tensor, "n l"]
    token: Int[Tensor, "n l"]
    mask: Bool[Tensor, "n l"]
    policy: Float[Tensor, "k v"]
    reference: Float[Tensor, "k v"]
    old: Float[Tensor, "k v"]

    @staticmethod
    def make(size: int = 5, length: int = 4, *, distance: float = 1.0, drift: float = 0.5, seed: int = 0) -> Toy:
        """Random tables; the reference is ``distance`` and the older policy ``drift`` away from the policy, per logit.

        Example:
            >>> Toy.make(3, 2).token.shape  # the end alone, and 2 x 3 strings of two tokens
            torch.Size([7, 2])
        """
        index: dict[tuple[int, ...], int] = {}
        strings: list[tuple[int, ...]] = []
        level: list[tuple[int, ...]] = [()]
        while level:
            index |= {context: len(index) + i for i, context in enumerate(level)}
            grown = [(*context, symbol) for context in level for symbol in range(size)]
            strings += [y for y in grown if y[-1] == 0 or len(y) == length]
            level = [y for y in grown if y[-1] != 0 and len(y) < length]
        prefix, token = (torch.zeros(len(strings), length, dtype=torch.long) for _ in range(2))
        mask = torch.zeros(len(strings), length, dtype=torch.bool)
        for i, y in enumerate(strings):
            for n in range(len(y)):
                prefix[i, n], token[i, n], mask[i, n] = index[y[:n]], y[n], True
        noise = torch.randn(3, len(index), size, dtype=torch.float64, generator=rng.stream(seed, "toy"))
        reference = (noise[0] + distance * noise[1]).log_softmax(-1)
        old = (noise[0] + drift * noise[2]).log_softmax(-1)
        return Toy(prefix, token, mask, noise[0].clone().requires_grad_(), reference, old)

    def batch(self, strings: Int[Tensor, " b"], *, off_policy: bool = False) -> Batch:
        """The chosen strings as a loss sees them, with a graph back to ``policy``."""
        at, token, mask = self.prefix[strings], self.token[strings], self.mask[strings]
        rows_p = self.policy.log_softmax(-1)[at]
        rows_q = self.reference[at]
        rows_old = self.old[at] if off_policy else rows_p.detach()
        rows = rows_p, rows_q, rows_old
        logp, logq, old = (x.gather(-1, token[..., None])[..., 0].masked_fill(~mask, 0.0) for x in rows)
        return Batch(logp, logq, old, mask, *rows)

    def law(self, rows: Float[Tensor, "k v"]) -> Float[Tensor, " n"]:
        """Probability of every string under the next-token log-probabilities ``rows``."""
        steps = rows[self.prefix].gather(-1, self.token[..., None])[..., 0]
        return steps.masked_fill(~self.mask, 0.0).sum(1).exp()

    def gradient(self, value: Tensor) -> Float[Tensor, "k v"]:
        """Gradient of ``value`` in the policy's logits; 0 if it does not depend on them."""
        if not value.requires_grad:
            return torch.zeros_like(self.policy)
        (found,) = torch.autograd.grad(value, self.policy, retain_graph=True, allow_unused=True)
        return torch.zeros_like(self.policy) if found is None else found

    def targets(self, *, off_policy: bool = False) -> dict[str, Float[Tensor, "k v"]]:
        """Exact gradients that a loss may follow, by name; see :data:`klkit.objectives.gradient_check.TARGETS`."""
        rows = self.policy.log_softmax(-1)
        p, q = self.law(rows), self.law(self.reference)
        local = (rows.exp() * (rows - self.reference)).sum(-1)
        local_reverse = (self.reference.exp() * (self.reference - rows)).sum(-1)
        met = self.law(self.old if off_policy else rows).detach()
        visits = torch.zeros(len(self.policy), dtype=met.dtype)
        visits.index_add_(0, self.prefix[self.mask], met[:, None].expand_as(self.prefix)[self.mask])
        return {
            "kl": self.gradient((p * (p.log() - q.log())).sum()),
            "forward_kl": self.gradient((q * (q.log() - p.log())).sum()),
            "token_local": self.gradient((visits * local).sum()),
            "token_local_forward": self.gradient((visits * local_reverse).sum()),
        }
