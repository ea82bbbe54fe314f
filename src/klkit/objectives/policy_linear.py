"""The losses of :mod:`klkit.objectives.policy` from hidden states and output heads, in one visit to the logits.

What an estimator multiplies a token's gradients with depends on the divergences *after* the token. So rows are ordered
by their place in the string and visited from the last place to the first, those of all strings together: when the
logits of a row exist, everything its weights depend on is known, and its gradients are formed there and then.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from klkit.divergences.differentiable import Divergences
from klkit.divergences.linear import Head
from klkit.divergences.linear_loss import Weights, chunk_rows, linear_loss
from klkit.numerics import wide_dtype
from klkit.objectives.policy import Surrogate, described, require_finite, require_options
from klkit.objectives.policy_weights import policy_weights


def linear_kl_surrogate(
    hidden_p: Float[Tensor, "n l d"],
    head_p: Head,
    hidden_q: Float[Tensor, "n l e"],
    head_q: Head,
    tokens: Int[Tensor, "n l"],
    mask: Bool[Tensor, "n l"],
    *,
    estimator: str = "rb",
    gamma: float = 1.0,
    baseline: Float[Tensor, "n l"] | None = None,
    group: Int[Tensor, " n"] | None = None,
    sampler_logp: Float[Tensor, "n l"] | None = None,
    cap: float | None = None,
    mc_share: float = 0.0,
    coefficient: float = 1.0,
    advantages: Float[Tensor, "n l"] | None = None,
    rows: int | None = None,
    backend: str | None = None,
) -> Surrogate:
    """``β · kl_surrogate − Σ_n A_n log p(y_n)``, mean over strings, without the logits of all decisions.

    The same numbers and gradients as :func:`klkit.objectives.policy.kl_surrogate` on the logits, for both models'
    hidden states, weights and biases, wherever these require a gradient: detach what is not trained. Gradients are
    formed with the loss (see :func:`klkit.divergences.linear_loss.linear_loss`), in one visit to the logits of both
    models. Two cases need a visit without gradients first:

    - with ``sampler_logp``, one to ``p``: the weight of a prefix needs the log-probabilities *before* a token;
    - with ``rb_full``, and with a ``group`` unless the estimator is ``rb``, one to both: there a token's weight needs
      the whole string, or the same place of the group's other strings.

    Shapes: strings ``n``, decisions ``l``; hidden states ``(n, l, d)`` and ``(n, l, e)`` of the position *before* each
    decision, which predicts it. Entries outside the mask may hold anything, and are never multiplied.

    Args:
        hidden_p: what enters the head of ``p``, the policy.
        head_p: a head at a temperature (:meth:`klkit.divergences.linear.Head.cooled`, for both models) gives the
            divergence of the tempered laws.
        hidden_q: what enters the head of ``q``, the reference.
        tokens: the token of each decision.
        mask: decisions of the policy; see :func:`klkit.objectives.policy.kl_surrogate` for it and what follows.
        coefficient: ``β``, what the divergence costs.
        advantages: ``A_n``, constants: the policy gradient of a reward, in the same visit.
        rows: decisions a chunk; by default as many as make the products efficient, within bounded memory.
        backend: as in :func:`klkit.divergences.linear_loss.linear_loss`.

    Raises:
        ValueError: shapes do not fit, options exclude each other, or a number is not finite inside the mask.

    Example:
        >>> import torch
        >>> hidden = torch.ones(1, 2, 1, requires_grad=True)  # one string of two decisions
        >>> p, q = Head(torch.tensor([[0.0], [0.0]])), Head(torch.tensor([[1.0], [0.0]]))
        >>> tokens, mask = torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool)
        >>> found = linear_kl_surrogate(hidden, p, torch.ones(1, 2, 1), q, tokens, mask)
        >>> round(float(found.value), 4), [round(x, 4) for x in found.kl[0].tolist()]
        (0.2402, [0.1201, 0.1201])
        >>> found.loss.backward()

    Source: as :func:`klkit.objectives.policy.kl_surrogate`.
    """
    require_options(estimator, gamma, baseline, group, cap, sampler_logp, mc_share)
    shape = tokens.shape
    _require_shapes(hidden_p, hidden_q, mask, baseline, sampler_logp, advantages, shape=shape)
    mask = mask.bool()
    if sampler_logp is not None:
        sampler_logp = sampler_logp.detach().masked_fill(~mask, 0.0)
    place, string = mask.t().nonzero().unbind(1)
    order = string * shape[1] + place  # flat index of each row, the first decisions of all strings first
    flat_p, flat_q = (x.flatten(0, 1).index_select(0, order) for x in (hidden_p, hidden_q))
    drawn = tokens.flatten()[order]
    dtype = wide_dtype(hidden_p, head_p.weight, hidden_q, head_q.weight)
    seen = torch.zeros(3, *shape, dtype=dtype, device=hidden_p.device)  # kl, logp, logq as far as they are known
    weigh = partial(
        policy_weights,
        mask=mask,
        estimator=estimator,
        gamma=gamma,
        baseline=baseline,
        group=group,
        sampler_logp=sampler_logp,
        cap=cap,
        mc_share=mc_share,
    )

    def note(found: Divergences, at: slice) -> Weights:
        seen.flatten(1)[:, order[at]] = torch.stack([found.kl, found.logp, found.logq])  # type: ignore[list-item]
        return Weights()

    def note_and_weigh(found: Divergences, at: slice) -> Weights:
        note(found, at)
        weights = weigh(*seen)
        score = coefficient * weights.logp
        if advantages is not None:
            score = score - advantages.detach()
        kl, logp = (x.flatten()[order[at]] / shape[0] for x in (coefficient * weights.kl, score))
        return Weights(kl=kl, logp=logp)

    inputs = flat_p, head_p, flat_q, head_q, drawn
    if estimator == "rb_full" or (group is not None and (estimator != "rb" or mc_share != 0)):
        with torch.no_grad():
            linear_loss(*inputs, note, rows=rows, backend=backend)
    elif sampler_logp is not None:
        seen[1].flatten()[order] = _log_probs(flat_p, head_p, drawn, rows).to(dtype)
    loss, _ = linear_loss(*inputs, note_and_weigh, rows=rows, backend=backend)
    require_finite(*seen)
    kl, logp, logq = seen
    return described(loss, weigh(kl, logp, logq), kl, logp, logq, mask, estimator=estimator, gamma=gamma, cap=cap)


@torch.no_grad()
def _log_probs(hidden: Tensor, head: Head, tokens: Tensor, rows: int | None) -> Float[Tensor, " m"]:
    """``log p(y)`` of each row's token, from logits of some rows at a time."""
    size = rows or chunk_rows(len(hidden), head.tokens, wide_dtype(hidden, head.weight), hidden.device, trained=False)
    found = []
    for some, drawn in zip(torch.split(hidden, size), torch.split(tokens, size), strict=True):
        logits = head.logits(some)
        inside = drawn < head.tokens
        chosen = logits.gather(1, drawn.clamp(max=head.tokens - 1)[:, None])[:, 0].masked_fill(~inside, -torch.inf)
        found.append(chosen - logits.logsumexp(1))
    return torch.cat(found)


def _require_shapes(
    hidden_p: Tensor, hidden_q: Tensor, mask: Tensor, *options: Tensor | None, shape: torch.Size
) -> None:
    """Refuse anything that does not have a number, or a vector, for each decision.

    Raises:
        ValueError: something does not.
    """
    names = ("hidden_p", "hidden_q", "mask", "baseline", "sampler_logp", "advantages")
    for name, x in zip(names, (hidden_p, hidden_q, mask, *options), strict=True):
        if x is not None and x.shape[:2] != shape:
            raise ValueError(
                f"expected {name} for the {tuple(shape)} strings and decisions of tokens, got shape {tuple(x.shape)}; "
                f"hidden states are those that predict each token: leave out the one after the last"
            )
