"""The objective of a step, ``E[reward] − β KL(p‖q)``, as a loss of a few numbers a decision.

Every KL penalty, right or wrong, is here a function of the divergences ``D_n`` and of the log-probabilities of the
drawn tokens; ``u_n = log p(y_n) − log q(y_n)`` and ``s_n = ∇log p(y_n)``. Rewards enter with the mean of the prompt's
other strings as their baseline (W. Kool, H. van Hoof and M. Welling, 2019; A. Ahmadian et al., 2024, arXiv 2402.14740).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from klkit.numerics import excess
from klkit.objectives.policy import GRADIENT_ESTIMATORS, SEQUENCE, Estimator, kl_surrogate

LEFT_OUT = "no KL: what moves in the divergence itself is left out"
BASELINES: dict[str, Estimator] = {
    "rb_detached": Estimator("(Σ_j D_j) Σ_n s_n", f"{LEFT_OUT} (E Σ_n ∇D_n)", False),
    "k1_reward": Estimator("(Σ_j u_j) Σ_n s_n", SEQUENCE, True),
    "k2_reward": Estimator("(Σ_j ½u_j²) Σ_n s_n", f"{LEFT_OUT}, and ½u² is no divergence", False),
    "k3_reward": Estimator("(Σ_j [exp(−u_j) − 1 + u_j]) Σ_n s_n", LEFT_OUT, False),
    "k1_loss": Estimator("Σ_n s_n", "nothing: its mean is 0", False),
    "k2_loss": Estimator("Σ_n u_n s_n", "next-token divergences KL(p‖q) at prefixes held fixed", False),
    "k3_loss": Estimator("Σ_n (1 − exp(−u_n)) s_n", "next-token divergences KL(q‖p) at prefixes held fixed", False),
}
"""What trainers use instead: a value per token, in the reward or differentiated in the loss."""

PENALTIES: dict[str, Estimator] = GRADIENT_ESTIMATORS | BASELINES
"""Every KL penalty by name: the gradient of one string's, and what that follows."""

RETURNS = ("rb", "mc", "hybrid")
"""Those whose score term weighs each token by what comes after it."""

VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda u: u,
    "k2": lambda u: 0.5 * u.square(),
    "k3": lambda u: excess(-u),
}
"""Schulman's values of a token, from its log-ratio ``u``."""


def leave_one_out(values: Float[Tensor, " n"], group: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Each value minus the mean of the *other* values of its group.

    Example:
        >>> leave_one_out(torch.tensor([1.0, 4.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1])).tolist()
        [-3.0, 3.0, 0.0, 0.0]
    """
    index: Tensor = torch.unique(group, return_inverse=True)[1]
    zero = values.new_zeros(int(index.max()) + 1)
    total, count = zero.index_add(0, index, values), zero.index_add(0, index, torch.ones_like(values))
    return values - (total[index] - values) / (count[index] - 1)


def objective_loss(
    kl: Float[Tensor, "n l"],
    logp: Float[Tensor, "n l"],
    logq: Float[Tensor, "n l"],
    mask: Bool[Tensor, "n l"],
    rewards: Float[Tensor, " n"],
    group: Int[Tensor, " n"],
    *,
    penalty: str,
    coefficient: float,
    gamma: float = 1.0,
    kl_baseline: bool = True,
    mc_share: float = 0.0,
    sampler_logp: Float[Tensor, "n l"] | None = None,
    cap: float | None = None,
    clip: float | None = None,
) -> Float[Tensor, ""]:
    """``−(reward − baseline) Σ log p(y_n) + coefficient · KL penalty``, mean over strings: its gradient is descended.

    The gradient of the reward is that of ``E_p[reward]``. Strings of an older policy ``μ`` are weighted by
    ``r = p(y)/μ(y)``, differentiated; where ``clip`` is given, a string stops pushing once ``r`` has moved by so
    much in the direction it pushes (J. Schulman et al., 2017, arXiv 1707.06347, with whole strings as actions).

    Shapes: strings ``n``, decisions ``l``; nats.

    Args:
        kl: next-token divergences ``D_n``, differentiable.
        logp: ``log p(y_n)`` of the drawn tokens, differentiable.
        logq: ``log q(y_n)``.
        rewards: of each string.
        group: its prompt.
        penalty: key of :data:`PENALTIES`; the other options are those of :class:`klkit.train.recipe.Recipe`.
        sampler_logp: ``log μ(y_n)`` of the policy that drew the strings, if it was not this one.

    Example:
        >>> one = torch.ones(2, 1)
        >>> logp = torch.tensor([[-0.5], [-2.0]], requires_grad=True)
        >>> options = {"penalty": "k1_reward", "coefficient": 0.1}
        >>> rewards, group = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
        >>> objective_loss(one, logp, logp.detach(), one.bool(), rewards, group, **options).backward()
        >>> logp.grad.tolist()  # descent raises the better string
        [[-0.5], [0.5]]
    """
    kl, logp, logq = (x.masked_fill(~mask, 0.0) for x in (kl, logp, logq))
    u = (logp - logq).detach()
    score = logp.sum(1)
    ratio = None
    if sampler_logp is not None:
        ratio = (logp - sampler_logp.masked_fill(~mask, 0.0)).sum(1).exp()
    if penalty.endswith("_reward") or penalty in ("rb_detached", "rb_full"):
        value = VALUES[penalty[:2]](u) if penalty.endswith("_reward") else kl.detach()
        cost = coefficient * value.sum(1)
        # A baseline may hold the rewards alone: then the cost enters as it is.
        advantage = leave_one_out(rewards - cost, group) if kl_baseline else leave_one_out(rewards, group) - cost
    else:
        advantage = leave_one_out(rewards, group)
    if ratio is None:
        loss = -(advantage * score).mean()
    elif clip is None:
        loss = -(advantage * ratio).mean()
    else:
        loss = -torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - clip, 1 + clip)).mean()
    if penalty in ("k1_loss", "k2_loss", "k3_loss"):
        return loss + coefficient * VALUES[penalty[:2]](logp - logq).sum(1).mean()
    if penalty == "rb_full":
        whole = 1.0 if ratio is None else ratio.detach()
        return loss + coefficient * (whole * kl.sum(1)).mean()
    if penalty in BASELINES:
        return loss
    surrogate = kl_surrogate(
        kl,
        logp,
        logq,
        mask,
        estimator=penalty,
        gamma=gamma,
        group=group if kl_baseline and penalty in RETURNS else None,
        sampler_logp=sampler_logp,
        cap=None if sampler_logp is None else cap,
        mc_share=mc_share,
    )
    return loss + coefficient * surrogate.loss
