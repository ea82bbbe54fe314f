"""Losses whose gradient is that of the KL divergence between string laws, and the ones people use instead.

The gradient of ``KL(p‖q) = E_p Σ_n D_n``, with ``D_n`` the next-token divergence at the prefix before decision
``n``, has two parts. Each ``D_n`` moves with the policy at its fixed prefix (the *pathwise* part), and the policy
decides which prefixes are met (the *score* part): a token answers for the divergences that come after it,

    ∇KL(p‖q) = E Σ_n [ ∇D_n + ∇log p(y_n) Σ_{j>n} D_j ].

:func:`kl_surrogate` turns numbers of each decision into a scalar whose automatic gradient is this, or a named other
estimator of it. What a scalar is worth as a *number* is another matter: read ``value``, not ``loss``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from klkit.objectives.policy_weights import PolicyWeights, effective_samples, policy_weights


@dataclass(frozen=True, slots=True)
class Estimator:
    """What the gradient of a surrogate follows.

    Attributes:
        formula: the gradient's estimator for one string, ``s_n = ∇log p(y_n)``.
        objective: what it is the gradient of, in expectation over strings of the policy.
        unbiased: whether that objective is the divergence between the string laws.
    """

    formula: str
    objective: str
    unbiased: bool


SEQUENCE = "KL(p‖q) between the laws of whole responses"

GRADIENT_ESTIMATORS: dict[str, Estimator] = {
    "rb": Estimator("Σ_n [∇D_n + s_n Σ_{j>n} D_j]", SEQUENCE, True),
    "mc": Estimator("Σ_n s_n Σ_{j≥n} u_j", SEQUENCE, True),
    "hybrid": Estimator("Σ_n s_n [u_n + Σ_{j>n} D_j]", SEQUENCE, True),
    "rb_full": Estimator("Σ_n ∇D_n + (Σ_j D_j) Σ_n s_n", SEQUENCE, True),
    "token_local": Estimator(
        "Σ_n ∇D_n", "the sum of next-token divergences at prefixes held fixed: no sequence-level objective", False
    ),
}
"""The gradient estimators of :func:`kl_surrogate`, by name; ``u_n = log p(y_n) − log q(y_n)``."""


@dataclass(frozen=True, slots=True, eq=False)
class Surrogate:
    """A loss and what may be said about it.

    Attributes:
        loss: scalar, mean over strings; differentiate it, do not report it.
        value: ``Σ_n w_n D_n`` of each string, detached: their mean estimates KL(p‖q) without bias, ``(n,)``, nats.
        estimator: key of :data:`GRADIENT_ESTIMATORS`.
        objective: what the gradient of the divergence's part of ``loss`` follows, with everything that biases it.
        unbiased: whether that is the divergence between the laws of whole responses.
        kl: ``D_n``, detached and 0 outside the mask, ``(n, l)``, nats.
        logp: ``log p(y_n)``, detached and 0 outside the mask, ``(n, l)``.
        logq: ``log q(y_n)``, detached and 0 outside the mask, ``(n, l)``.
        effective_samples: ``(Σ w)² / Σ w²`` of the prefix weights at each position, ``(l,)``; None on-policy.
    """

    loss: Float[Tensor, ""]
    value: Float[Tensor, " n"]
    estimator: str
    objective: str
    unbiased: bool
    kl: Float[Tensor, "n l"]
    logp: Float[Tensor, "n l"]
    logq: Float[Tensor, "n l"]
    effective_samples: Float[Tensor, " l"] | None = None


def kl_surrogate(
    kl: Float[Tensor, "n l"],
    logp: Float[Tensor, "n l"],
    logq: Float[Tensor, "n l"],
    mask: Bool[Tensor, "n l"],
    *,
    estimator: str = "rb",
    gamma: float = 1.0,
    baseline: Float[Tensor, "n l"] | None = None,
    group: Int[Tensor, " n"] | None = None,
    sampler_logp: Float[Tensor, "n l"] | None = None,
    cap: float | None = None,
    mc_share: float = 0.0,
) -> Surrogate:
    """A scalar whose gradient estimates that of ``KL(p‖q) = E_p Σ_n D_n``, by the named estimator.

    ``D_n`` and ``log p(y_n)`` come, differentiable in the policy, from rows of logits
    (:func:`klkit.divergences.differentiable.divergences`). From hidden states and heads, without the logits of all
    rows, there is :func:`klkit.objectives.policy_linear.linear_kl_surrogate`. For laws at a temperature, divide the
    logits of both models by it first: the divergence is then that of the tempered laws, from whose policy the
    strings must come.

    Off-policy, strings of ``μ`` are re-weighted by their prefixes, ``w_n = Π_{i<n} p(y_i)/μ(y_i)``: with every
    weight kept, the gradient is unbiased for the current policy.

    Shapes: strings ``n``, decisions ``l``, right- or left-padded or with holes; nats. Entries outside the mask may
    hold anything.

    Args:
        kl: next-token divergences ``D_n ≥ 0``, differentiable.
        logp: ``log p(y_n)`` of the drawn tokens, differentiable.
        logq: ``log q(y_n)``; needed by ``mc`` and ``hybrid``, and by ``mc_share``.
        mask: decisions that the policy made. Tokens of tools or of the environment are left out: they have no
            divergence and no score, and stay in the prefixes that the models read.
        estimator: key of :data:`GRADIENT_ESTIMATORS`.
        gamma: discount of later divergences per decision; below 1 the gradient is biased towards ``token_local``.
        baseline: what to subtract from each token's later divergences: any function of the prefix before it, such
            as a critic's prediction.
        group: prompt of each string: subtract the mean over the *other* strings of that prompt, at the same decision.
        sampler_logp: ``log μ(y_n)`` of the policy that drew the strings, if it was not this one.
        cap: largest prefix weight. What is cut off biases the gradient, towards older prefixes.
        mc_share: how much of ``mc`` to mix into ``rb``: ``(1 − c) rb + c mc`` is unbiased for every fixed ``c``;
            :func:`best_share` finds a good one.

    Raises:
        ValueError: an unknown estimator, options that exclude each other, or values that are not finite inside
            the mask.

    Example:
        >>> import torch
        >>> from klkit.divergences.differentiable import divergences
        >>> logits = torch.zeros(1, 2, 3, requires_grad=True)  # one string of two decisions
        >>> q = torch.tensor([[[1.0, 0.0, 0.0], [2.0, 0.0, 0.0]]])
        >>> rows = divergences(logits, q, torch.tensor([[0, 1]]))
        >>> found = kl_surrogate(rows.kl, rows.logp, rows.logq, torch.ones(1, 2, dtype=torch.bool))
        >>> round(float(found.value), 4), found.objective
        (0.5938, 'KL(p‖q) between the laws of whole responses')
        >>> found.loss.backward()

    Source: A. Amini, T. Vieira and R. Cotterell (2025), Better Estimation of the Kullback-Leibler Divergence Between
    Language Models, arXiv 2504.10637, theorem 4; the pitfalls it avoids are those of Y. Tang and R. Munos (2025),
    arXiv 2506.09477.
    """
    require_options(estimator, gamma, baseline, group, cap, sampler_logp, mc_share)
    mask = mask.bool()
    kl, logp, logq = (x.masked_fill(~mask, 0.0) for x in (kl, logp, logq))
    require_finite(kl, logp, logq)
    found = policy_weights(
        kl.detach(),
        logp.detach(),
        logq.detach(),
        mask,
        estimator=estimator,
        gamma=gamma,
        baseline=baseline,
        group=group,
        sampler_logp=sampler_logp,
        cap=cap,
        mc_share=mc_share,
    )
    loss = (found.kl * kl + found.logp * logp).sum(1).mean()
    return described(loss, found, kl, logp, logq, mask, estimator=estimator, gamma=gamma, cap=cap)


def described(
    loss: Tensor,
    found: PolicyWeights,
    kl: Tensor,
    logp: Tensor,
    logq: Tensor,
    mask: Tensor,
    *,
    estimator: str,
    gamma: float,
    cap: float | None,
) -> Surrogate:
    """The loss with what its gradient follows, and with the numbers that it was made of."""
    known = GRADIENT_ESTIMATORS[estimator]
    biases = []
    if gamma != 1 and estimator != "token_local":
        biases.append(f"later divergences discounted by {gamma:g} a decision")
    if cap is not None and bool(found.cut):
        biases.append(f"prefix weights capped at {cap:g}")
    weighted = kl.detach() if found.prefix is None else found.prefix * kl.detach()
    return Surrogate(
        loss=loss,
        value=weighted.sum(1),
        estimator=estimator,
        objective=", ".join([known.objective, *biases]),
        unbiased=known.unbiased and not biases,
        kl=kl.detach(),
        logp=logp.detach(),
        logq=logq.detach(),
        effective_samples=None if found.prefix is None else effective_samples(found.prefix, mask),
    )


def best_share(
    gradients_rb: Float[Tensor, "n d"], gradients_mc: Float[Tensor, "n d"], fold: Int[Tensor, " n"]
) -> Float[Tensor, " k"]:
    """``tr Cov(g_rb, g_rb − g_mc) / tr Var(g_rb − g_mc)``: the share of ``mc`` with the least total variance.

    One coefficient for each fold, from the strings of the *other* folds: applied to its own fold it is a constant,
    so the combination stays unbiased; and with the best constant it is worse than neither.

    Shapes: one gradient a string, ``(n, d)``, as vectors of any length (of some layers, or a random projection).

    Raises:
        ValueError: fewer than two folds.

    Example:
        >>> import torch
        >>> g = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
        >>> best_share(g + 1, 2 * g + 1, torch.arange(64) % 2).round(decimals=4)  # rb is better: a share below 0
        tensor([-1., -1.], dtype=torch.float64)
    """
    folds = int(fold.max()) + 1 if len(fold) else 0
    if folds < 2:
        raise ValueError(
            f"expected strings in at least two folds, got {folds}; a coefficient fitted on the strings it is applied "
            f"to biases the gradient"
        )
    shares = []
    for k in range(folds):
        rest = fold != k
        rb, gap = gradients_rb[rest].double(), (gradients_rb[rest] - gradients_mc[rest]).double()
        rb, gap = rb - rb.mean(0), gap - gap.mean(0)
        spread = gap.square().sum()
        shares.append(torch.where(spread > 0, (rb * gap).sum() / spread, 0.0))
    return torch.stack(shares)


def require_options(
    estimator: str,
    gamma: float,
    baseline: Tensor | None,
    group: Tensor | None,
    cap: float | None,
    sampler_logp: Tensor | None,
    mc_share: float,
) -> None:
    """Refuse options of :func:`kl_surrogate` that are out of range or exclude each other.

    Raises:
        ValueError: they do.
    """
    if estimator not in GRADIENT_ESTIMATORS:
        raise ValueError(f"expected an estimator among {', '.join(GRADIENT_ESTIMATORS)}, got {estimator!r}")
    if not 0 <= gamma <= 1:
        raise ValueError(f"expected a discount gamma from 0 to 1, got {gamma:g}")
    returns = estimator in ("rb", "mc", "hybrid")
    if not returns and (gamma != 1 or baseline is not None or group is not None):
        raise ValueError(
            f"expected no gamma, baseline or group with {estimator}, whose gradient has no return of single tokens; "
            f"use rb, mc or hybrid"
        )
    if baseline is not None and group is not None:
        raise ValueError("expected a baseline or a group to take it from, got both; leave one out")
    require_cap(cap, sampler_logp)
    if mc_share and estimator != "rb":
        raise ValueError(f"expected mc_share with rb only, got it with {estimator}")


def require_cap(cap: float | None, sampler_logp: Tensor | None) -> None:
    """Refuse a cap of prefix weights where there are none, or one that leaves none.

    Raises:
        ValueError: that is so.
    """
    if cap is not None and (sampler_logp is None or cap <= 0):
        raise ValueError(f"expected a positive cap with sampler_logp, got cap={cap:g} and sampler_logp {sampler_logp}")


def require_finite(kl: Tensor, logp: Tensor, logq: Tensor) -> None:
    """Refuse divergences without a gradient.

    Raises:
        ValueError: a number is infinite or NaN.
    """
    for name, x in (("kl", kl), ("logp", logp), ("logq", logq)):
        if not bool(x.isfinite().all()):
            raise ValueError(
                f"expected finite {name} at every decision of the mask, got {int((~x.isfinite()).sum())} that are not; "
                f"where q excludes a token of p the divergence is infinite and has no gradient: widen q's support"
            )
