"""Which gradient does a loss have? Found out by summing over all strings of a small model.

A KL penalty can be right as a number and wrong as a gradient, and no training curve tells. Here the expected
gradient of anybody's loss is computed exactly, with its variance, and compared with the exact gradients of what
the loss may have been meant to be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from klkit.objectives.toy import Loss, Toy

TARGETS = {
    "kl": "KL(p‖q) between the laws of whole responses",
    "forward_kl": "KL(q‖p) between the laws of whole responses",
    "token_local": "next-token KL(p‖q) at prefixes held fixed: what a token does to later divergences is missing",
    "token_local_forward": "next-token KL(q‖p) at prefixes held fixed: the other direction, and later effects missing",
}
"""What a loss may follow, in words; ``p`` is the policy, ``q`` the reference."""

EXACT = 1e-6
"""Relative error below which a gradient *is* a target's: sums in double precision leave about 1e-15."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How an expected gradient compares with a target's.

    Attributes:
        relative_error: ``‖g − t‖ / ‖t‖``.
        cosine: of the angle between the two; 0 if either vanishes.
    """

    relative_error: float
    cosine: float


@dataclass(frozen=True, slots=True, eq=False)
class GradientReport:
    """What the gradient of a loss is, in numbers and in words.

    Attributes:
        agreement: with each of :data:`TARGETS`.
        variance: total variance of the gradient of one batch, ``tr Var``.
        vanishes: whether the expected gradient is zero.
        off_policy: whether the strings came from an older policy.
        kl: the divergence of the toy, nats.
    """

    agreement: dict[str, Agreement]
    variance: float
    vanishes: bool
    off_policy: bool
    kl: float

    @property
    def target(self) -> str | None:
        """Key of the target whose gradient this is, or None."""
        return next((name for name, found in self.agreement.items() if found.relative_error < EXACT), None)

    @property
    def correct(self) -> bool:
        """Whether it is the gradient of KL(p‖q) between the laws of whole responses."""
        return self.target == "kl"

    @property
    def verdict(self) -> str:
        """What the loss optimises, in one sentence."""
        where = "on strings of an older policy" if self.off_policy else "on the policy's own strings"
        if self.vanishes:
            return f"{where}: nothing; the expected gradient is zero, so this loss regularises nothing"
        if self.target is not None:
            return f"{where}: {TARGETS[self.target]}"
        found = self.agreement["kl"]
        nearest = max(self.agreement, key=lambda name: self.agreement[name].cosine)
        against = " (it points away from it)" if found.cosine < 0 else ""
        return (
            f"{where}: no divergence known here; against KL(p‖q) relative error {found.relative_error:.2f}, "
            f"cosine {found.cosine:.2f}{against}; nearest in direction to {TARGETS[nearest]}"
        )

    def __str__(self) -> str:
        rows = [f"{name:20s} {a.relative_error:10.2g} {a.cosine:8.2f}" for name, a in self.agreement.items()]
        head = f"{'gradient of':20s} {'rel. error':>10s} {'cosine':>8s}"
        return "\n".join([self.verdict, head, *rows, f"variance of one batch's gradient: {self.variance:.3g}"])


def check_gradient(loss: Loss, *, off_policy: bool = False, strings: int = 1, toy: Toy | None = None) -> GradientReport:
    """Compare the expected gradient of ``loss`` with those of the divergences it may be meant to regularise.

    All batches of a small model are enumerated: ``E ∇loss = Σ_batch μ(batch) ∇loss(batch)``, with ``μ`` the policy, or
    an older one. Nothing is sampled, so an error is an error, and the whole takes a second or two.

    Args:
        loss: from a :class:`klkit.objectives.toy.Batch` to a scalar, as it is in a trainer (to be *minimised*).
        off_policy: whether strings come from an older policy.
        strings: strings a batch; 2 for losses that compare strings of one prompt (leave-one-out baselines). A batch
            of one string hides nothing else: expectations are linear.
        toy: the model; by default five symbols and up to four tokens, or three and three for batches of several.

    Raises:
        ValueError: the loss is not a finite scalar.

    Example:
        >>> def k1(batch):
        ...     return ((batch.logp - batch.logq) * batch.mask).sum(1).mean()
        >>> print(check_gradient(k1).verdict)
        on the policy's own strings: nothing; the expected gradient is zero, so this loss regularises nothing

    Source: the yardstick of A. Amini, T. Vieira and R. Cotterell (2025), arXiv 2504.10637, theorem 4, and of Y. Tang
    and R. Munos (2025), arXiv 2506.09477.
    """
    toy = toy or (Toy.make() if strings == 1 else Toy.make(3, 3))
    rows = toy.policy.detach().log_softmax(-1)
    drawn = toy.law(toy.old if off_policy else rows)
    total, square = torch.zeros_like(toy.policy), 0.0
    for chosen in product(range(len(drawn)), repeat=strings):
        index = torch.tensor(chosen)
        weight = float(drawn[index].prod())
        value = loss(toy.batch(index, off_policy=off_policy))
        if value.dim() or not bool(value.isfinite()):
            raise ValueError(
                f"expected a finite scalar from the loss, got {_shown(value)} for a batch of {strings} strings; "
                f"return the mean over the batch"
            )
        found = toy.gradient(value)
        total += weight * found
        square += weight * float(found.square().sum())
    targets = toy.targets(off_policy=off_policy)
    p, q = toy.law(rows), toy.law(toy.reference)
    size = float(total.norm())
    return GradientReport(
        agreement={name: _agreement(total, target) for name, target in targets.items()},
        variance=square - size * size,
        vanishes=size < EXACT * float(targets["kl"].norm()),
        off_policy=off_policy,
        kl=float((p * (p.log() - q.log())).sum()),
    )


def _agreement(found: Tensor, target: Tensor) -> Agreement:
    norms = float(found.norm() * target.norm())
    cosine = float((found * target).sum()) / norms if norms > 0 else math.nan
    error = float((found - target).norm() / target.norm())
    return Agreement(error, 0.0 if math.isnan(cosine) or float(found.norm()) < EXACT * float(target.norm()) else cosine)


def _shown(value: Tensor) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if value.dim() else str(float(value.detach()))
