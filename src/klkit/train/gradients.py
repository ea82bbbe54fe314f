"""From strings to gradients: one pass of the policy, and the objective's gradient through the output heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from klkit.divergences.differentiable import Divergences, divergences
from klkit.divergences.linear import Head
from klkit.divergences.linear_loss import Weights, linear_loss
from klkit.models.base import head_of
from klkit.numerics import wide_dtype
from klkit.objectives.policy_linear import linear_kl_surrogate
from klkit.sequences import Sequences
from klkit.train.penalties import RETURNS, leave_one_out, objective_loss
from klkit.train.policy import Decisions, Policy
from klkit.train.recipe import Recipe

DIRECT_BYTES = 32 << 20
"""Logits of both models up to this size are formed at once, which is faster; larger ones a chunk at a time."""


@dataclass(frozen=True, eq=False, slots=True)
class Part:
    """Strings whose gradients are formed together, where the models are.

    Attributes:
        decisions: their layout.
        tokens: ``(n, l)``.
        mask: ``(n, l)``.
        hidden_q: what enters the reference's head at each decision, ``(n, l, e)``.
        sampler_logp: ``log μ(y_n)`` as they were drawn, ``(n, l)``.
        rewards: of each, ``(n,)``.
        group: the prompt of each, ``(n,)``.
    """

    decisions: Decisions
    tokens: Int[Tensor, "n l"]
    mask: Bool[Tensor, "n l"]
    hidden_q: Float[Tensor, "n l e"]
    sampler_logp: Float[Tensor, "n l"]
    rewards: Float[Tensor, " n"]
    group: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.rewards)


@dataclass(frozen=True, eq=False, slots=True)
class Sums:
    """Sums over the decisions of each string, detached, ``(n,)``, nats.

    Attributes:
        kl: ``Σ D_n``.
        log_ratio: ``Σ u_n = log p(y) − log q(y)``.
        logp: ``log p(y)``.
    """

    kl: Float[Tensor, " n"]
    log_ratio: Float[Tensor, " n"]
    logp: Float[Tensor, " n"]

    @classmethod
    def of(cls, kl: Tensor, logp: Tensor, logq: Tensor) -> Sums:
        """Sum numbers of decisions, ``(n, l)``, that are 0 outside the mask."""
        kl, logp, logq = (x.detach().cpu().double() for x in (kl, logp, logq))
        return cls(kl.sum(1), (logp - logq).sum(1), logp.sum(1))

    @classmethod
    def cat(cls, parts: Sequence[Sums]) -> Sums:
        """Those of successive parts."""
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))


def read_part(policy: Policy, x: Sequences, rewards: Float[Tensor, " n"]) -> Part:
    """Lay out strings that carry their ``sampler_logp``, and read them with the reference."""
    decisions = Decisions.of(x)
    # Not inference mode, whose tensors autograd refuses. Before the policy's pass: see `lora_policy`.
    with torch.no_grad():
        hidden_q = decisions.hidden(policy.reference)
    device = hidden_q.device
    assert x.sampler_logp is not None
    return Part(
        decisions,
        decisions.tokens.to(device),
        decisions.mask.to(device),
        hidden_q,
        decisions.spread(x.sampler_logp).to(device),
        rewards.to(device, wide_dtype(hidden_q)),
        x.prompt.to(device),
    )


def form_gradients(
    policy: Policy, part: Part, recipe: Recipe, coefficient: float, *, share: float = 1.0, off_policy: bool = False
) -> Sums:
    """Add ``share`` times the gradient of :func:`klkit.train.penalties.objective_loss` to that of the policy's weights.

    Args:
        off_policy: whether the policy is not any more the one that drew the strings.
    """
    hidden_p = part.decisions.hidden(policy.model)
    head_p, head_q = head_of(policy.model), head_of(policy.reference)
    mu = part.sampler_logp if off_policy else None

    def objective(kl: Tensor, logp: Tensor, logq: Tensor) -> Tensor:
        return share * objective_loss(
            kl, logp, logq, part.mask, part.rewards, part.group,
            penalty=recipe.penalty, coefficient=coefficient, gamma=recipe.gamma, kl_baseline=recipe.kl_baseline,
            mc_share=recipe.mc_share, sampler_logp=mu, cap=recipe.cap, clip=recipe.clip,
        )  # fmt: skip

    drawn, mask = part.tokens[part.mask], part.mask
    flat_p, flat_q = hidden_p[mask], part.hidden_q[mask]
    if head_p is None or head_q is None:  # a model without one gives its logits instead of what enters it
        return _directly(divergences(flat_p, flat_q, drawn), mask, objective)
    head_q = head_q.detach()
    dtype = wide_dtype(flat_p, head_p.weight)
    if 2 * len(flat_p) * head_p.tokens * dtype.itemsize <= DIRECT_BYTES:
        logits = differentiable_logits(head_p, flat_p), differentiable_logits(head_q, flat_q)
        return _directly(divergences(*logits, drawn, overwrite=True), mask, objective)
    if recipe.penalty in (*RETURNS, "token_local") and not off_policy:
        found = linear_kl_surrogate(
            hidden_p,
            head_p,
            part.hidden_q,
            head_q,
            part.tokens,
            mask,
            estimator=recipe.penalty,
            gamma=recipe.gamma,
            group=part.group if recipe.kl_baseline and recipe.penalty in RETURNS else None,
            mc_share=recipe.mc_share,
            coefficient=share * coefficient,
            advantages=(share * leave_one_out(part.rewards, part.group))[:, None].expand(mask.shape),
        )
        found.loss.backward()  # type: ignore[no-untyped-call]
        return Sums.of(found.kl, found.logp, found.logq)
    # Numbers first: the objective's derivatives in them are the weights with which gradients then form.
    with torch.no_grad():
        _, rows = linear_loss(flat_p, head_p, flat_q, head_q, drawn, Weights())
    kl, logp, logq = (spread(x, mask) for x in (rows.kl, rows.logp, rows.logq))
    inputs = kl.requires_grad_(), logp.requires_grad_()
    slopes = torch.autograd.grad(objective(*inputs, logq), inputs, allow_unused=True, materialize_grads=True)
    weights = Weights(kl=slopes[0][mask], logp=slopes[1][mask])
    linear_loss(flat_p, head_p, flat_q, head_q, drawn, weights)[0].backward()  # type: ignore[no-untyped-call]
    return Sums.of(kl, logp, logq)


def _directly(rows: Divergences, mask: Tensor, objective: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Sums:
    """Gradients by autograd through rows of logits."""
    kl, logp, logq = (spread(x, mask) for x in (rows.kl, rows.logp, rows.logq))
    objective(kl, logp, logq.detach()).backward()  # type: ignore[no-untyped-call]
    return Sums.of(kl, logp, logq)


def spread(values: Float[Tensor, " m"] | None, mask: Bool[Tensor, "n l"]) -> Float[Tensor, "n l"]:
    """Numbers of the mask's entries in its layout, 0 elsewhere; differentiable."""
    assert values is not None
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def differentiable_logits(head: Head, hidden: Float[Tensor, "m d"]) -> Float[Tensor, "m v"]:
    """Logits of all rows at once, in at least single precision, with a graph."""
    dtype = wide_dtype(hidden, head.weight)
    bias = None if head.bias is None else head.bias[: head.tokens].to(dtype)
    logits = torch.nn.functional.linear(hidden.to(dtype), head.weight[: head.tokens].to(dtype), bias)
    if head.factor != 1.0:
        logits = logits * head.factor
    return logits if head.cap is None else head.cap * torch.tanh(logits / head.cap)
