"""What each decision's ``∇D_n`` and ``∇log p(y_n)`` count for in the estimators of a policy's KL gradient.

Every estimator is ``Σ_n [a_n ∇D_n + b_n ∇log p(y_n)]`` with constants ``a`` and ``b``: they are worked out here, from
numbers alone, wherever the gradients then come from.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class PolicyWeights(NamedTuple):
    """What a gradient estimator multiplies ``∇D_n`` and ``∇log p(y_n)`` with: constants.

    Attributes:
        kl: weight of each decision's divergence, ``(n, l)``.
        logp: weight of each decision's log-probability, ``(n, l)``.
        prefix: importance weights of the prefixes, ``(n, l)``; None on-policy.
        cut: whether a cap changed any of them, ``()``.
    """

    kl: Float[Tensor, "n l"]
    logp: Float[Tensor, "n l"]
    prefix: Float[Tensor, "n l"] | None
    cut: Bool[Tensor, ""]


@torch.no_grad()
def policy_weights(
    kl: Float[Tensor, "n l"],
    logp: Float[Tensor, "n l"],
    logq: Float[Tensor, "n l"],
    mask: Bool[Tensor, "n l"],
    *,
    estimator: str,
    gamma: float = 1.0,
    baseline: Float[Tensor, "n l"] | None = None,
    group: Int[Tensor, " n"] | None = None,
    sampler_logp: Float[Tensor, "n l"] | None = None,
    cap: float | None = None,
    mc_share: float = 0.0,
) -> PolicyWeights:
    """The weights of :func:`kl_surrogate`, from numbers that are finite, and 0 outside the mask.

    The weights of a decision depend on later decisions and on itself only, but for three things: ``rb_full`` needs
    whole strings, prefix weights need the ``logp`` of earlier decisions, and the mean over a group's other strings
    needs the decision at the same place of these, with estimators whose returns begin at the token itself.
    """
    ones = mask.to(kl.dtype)
    before, through, cut = prefix_weights(logp, mask, sampler_logp, cap)
    d = before * kl  # w_n D_n
    u = through * (logp - logq)  # w_{n+1} u_n
    if estimator == "token_local":
        pathwise, score = before, torch.zeros_like(kl)
    elif estimator == "rb_full":
        # One return for the whole string, so only the weight of the whole string will do.
        pathwise = through[:, -1:].expand_as(kl)
        score = (pathwise * kl).sum(1, keepdim=True).expand_as(kl)
    else:
        returns = {"rb": _later(d, gamma), "mc": u + _later(u, gamma), "hybrid": u + _later(d, gamma)}
        baseline_n = through * _forecast(returns[estimator], mask, baseline, group)
        score = returns[estimator] + mc_share * (returns["mc"] - returns[estimator]) - baseline_n
        pathwise = (1 - mc_share) * before if estimator == "rb" else torch.zeros_like(kl)
    return PolicyWeights(pathwise * ones, score * ones, None if sampler_logp is None else before, cut)


def _later(x: Tensor, gamma: float) -> Tensor:
    """``Σ_{j>n} γ^{j−n} x_j`` at every ``n``."""
    if gamma == 1:
        return x.flip(1).cumsum(1).flip(1) - x
    total, reach = x.clone(), 1
    while reach < x.shape[1]:  # every entry holds the sum over `reach` of them, so twice as many after each step
        total[:, :-reach] = total[:, :-reach] + gamma**reach * total[:, reach:]
        reach *= 2
    return torch.nn.functional.pad(gamma * total[:, 1:], (0, 1))


def prefix_weights(
    logp: Tensor, mask: Tensor, sampler_logp: Tensor | None, cap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of the prefix before each decision, and of that with the decision's own token; whether any is cut."""
    none = torch.zeros((), dtype=torch.bool, device=logp.device)
    if sampler_logp is None:
        return torch.ones_like(logp), torch.ones_like(logp), none
    step = (logp - sampler_logp).masked_fill(~mask, 0.0)
    through = step.cumsum(1)
    before, through = (through - step).exp(), through.exp()
    if cap is None:
        return before, through, none
    return before.clamp(max=cap), through.clamp(max=cap), (((before > cap) | (through > cap)) & mask).any()


def _forecast(returns: Tensor, mask: Tensor, baseline: Tensor | None, group: Tensor | None) -> Tensor:
    """What to subtract from each return: nothing, a given baseline, or the mean over the prompt's other strings."""
    if group is None:
        return torch.zeros_like(returns) if baseline is None else baseline.detach().masked_fill(~mask, 0.0)
    index: Tensor = torch.unique(group, return_inverse=True)[1]
    alive = mask.to(returns.dtype)
    shape = (int(index.max()) + 1, returns.shape[1])
    total = returns.new_zeros(shape).index_add_(0, index, returns * alive)[index] - returns * alive
    others = returns.new_zeros(shape).index_add_(0, index, alive)[index] - alive
    return torch.where(others > 0, total / others.clamp(min=1), 0.0)


def effective_samples(before: Tensor, mask: Tensor) -> Tensor:
    """Effective number of strings behind each position, of those that reach it."""
    w = before.detach() * mask
    return w.sum(0).square() / w.square().sum(0).clamp(min=torch.finfo(w.dtype).tiny)
