"""The loss whose gradient is that of the other direction, KL(q‖p): what the reference says and the policy must cover.

The reference is not trained, and so the law of the prefixes does not move: the pathwise part is the whole gradient,

    ∇KL(q‖p) = E_q Σ_n ∇KL(q_n‖p_n),

on strings *of the reference*. The same loss on the policy's own strings follows no divergence between laws of strings.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from klkit.objectives.policy import Surrogate, require_cap, require_finite
from klkit.objectives.policy_weights import effective_samples, prefix_weights

FORWARD = "KL(q‖p) between the laws of whole responses"


def forward_kl_surrogate(
    reverse_kl: Float[Tensor, "n l"],
    logp: Float[Tensor, "n l"],
    logq: Float[Tensor, "n l"],
    mask: Bool[Tensor, "n l"],
    *,
    sampler_logp: Float[Tensor, "n l"] | None = None,
    cap: float | None = None,
) -> Surrogate:
    """A scalar whose gradient estimates that of ``KL(q‖p) = E_q Σ_n KL(q_n‖p_n)``, from strings of the reference.

    From strings of any other ``μ``, the policy too, each divergence is weighted by its prefix,
    ``w_n = Π_{i<n} q(y_i)/μ(y_i)``: unbiased, but these weights spread fast where the two laws are far apart.

    From hidden states and heads, :func:`klkit.divergences.linear_loss.linear_loss` forms the same gradient with
    ``Weights(reverse_kl=...)``, of ``1/n`` a decision (times ``w_n``).

    Shapes: strings ``n``, decisions ``l``; nats. Entries outside the mask may hold anything.

    Args:
        reverse_kl: next-token divergences ``KL(q_n‖p_n)``, differentiable in the policy
            (:func:`klkit.divergences.differentiable.divergences`).
        logp: ``log p(y_n)`` of the strings' tokens; handed back, and in no weight.
        logq: ``log q(y_n)`` of the strings' tokens.
        mask: decisions up to and including the end token.
        sampler_logp: ``log μ(y_n)`` of the law that drew the strings, if that was not ``q``.
        cap: largest prefix weight. What is cut off biases the gradient.

    Raises:
        ValueError: a cap without weights, or values that are not finite inside the mask.

    Example:
        >>> import torch
        >>> from klkit.divergences.differentiable import divergences
        >>> logits = torch.zeros(1, 2, 3, requires_grad=True)  # one string of two decisions
        >>> q = torch.tensor([[[1.0, 0.0, 0.0], [2.0, 0.0, 0.0]]])
        >>> rows = divergences(logits, q, torch.tensor([[0, 1]]))
        >>> found = forward_kl_surrogate(rows.reverse_kl, rows.logp, rows.logq, torch.ones(1, 2, dtype=torch.bool))
        >>> round(float(found.value), 4), found.objective
        (0.5563, 'KL(q‖p) between the laws of whole responses')
        >>> found.loss.backward()
    """
    require_cap(cap, sampler_logp)
    reverse_kl, logp, logq = (x.masked_fill(~mask, 0.0) for x in (reverse_kl, logp, logq))
    require_finite(reverse_kl, logp, logq)
    before, _, cut = prefix_weights(logq.detach(), mask, sampler_logp, cap)
    per_string = (before * reverse_kl).sum(1)
    biased = bool(cut)
    return Surrogate(
        loss=per_string.mean(),
        value=per_string.detach(),
        estimator="pathwise",
        objective=FORWARD + (f", prefix weights capped at {cap:g}" if biased else ""),
        unbiased=not biased,
        kl=reverse_kl.detach(),
        logp=logp.detach(),
        logq=logq.detach(),
        effective_samples=None if sampler_logp is None else effective_samples(before, mask),
    )
