"""The divergence from laws of which the likeliest tokens are known and all others were sampled.

Let ``S`` be the known tokens of ``p`` and ``T`` the others, of masses ``P_T`` and ``Q_T``. Of ``q`` everything is
known, so that in

    KL(p‖q) = Σ_S p log(p/q) + P_T log(P_T/Q_T) + P_T E[u],   u = log p(a)/P_T − log q(a)/Q_T,  a ~ p/P_T,

only the last term is left to the draws. Their mean of ``u`` is unbiased, and between close laws hardly anything but
noise: ``u`` has the size of the log-ratios, its mean that of their squares. The ratio ``w = exp(−u)`` is a control
variate. Its mean is 1 wherever ``p`` gives all of ``T`` some probability, and to first order it is ``1 − u``. So a
draw adds

    u + λ (w − 1),   λ = s / (exp(s) − 1),   s = the mean of u² over the *other* draws at the decision,

whose mean is that of ``u``, because the draw itself has no say in its ``λ``. This is the coefficient of least variance
where log-ratios have a normal law: 1 for close laws, when the term is ``u + exp(−u) − 1``, and 0 for distant ones,
where ``w`` is small but for a few draws. Tokens of ``T`` to which ``q`` gives more than ``LOUD`` times what ``p`` can
give to any of them are left out of ``Q_T``, and ``w`` is 0 there: it would be large for certain.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from klkit.divergences.fused import RowStatistics, end_coin
from klkit.divergences.kl import nonnegative_kl
from klkit.divergences.partial import Hybrid, Scalars, require_tokens
from klkit.numerics import FLOOR, excess, log_softmax

LOUD = 4.0


class HybridKL(NamedTuple):
    """Estimates of ``KL(p‖q)`` at each decision, ``(m,)`` each, nats, in double precision.

    Attributes:
        kl: unbiased, with the control variate; infinite where ``q`` is seen to exclude a token of ``p``.
        plain: unbiased, without it: much noisier between close laws, and free of rare large terms between any.
        lost: ``p``-mass on tokens that ``q`` excludes, that of the others from their draws; above 0 exactly where
            ``kl`` is infinite.
        excluded: the most probable such token that is known, or −1.
    """

    kl: Float[Tensor, " m"]
    plain: Float[Tensor, " m"]
    lost: Float[Tensor, " m"]
    excluded: Int[Tensor, " m"]


@torch.no_grad()
def hybrid_kl(law: Hybrid, logq: Float[Tensor, "m v"], rows: slice = slice(None)) -> HybridKL:
    """``Σ p (log p − log q)`` of each decision: exact over the known tokens, and without bias from draws of all others.

    Exact where nothing was left to draw. A single number may be negative. An exclusion by ``q`` shows if it is of a
    known or a drawn token, or if ``p`` gives every token some probability.

    Args:
        law: what is known of ``p``.
        logq: log-probabilities of ``q``, all of them.
        rows: the rows of ``law`` that ``logq`` belongs to.

    Raises:
        ValueError: an id is out of range.

    Example:
        >>> p = torch.tensor([[0.5, 0.3, 0.2]]).log()
        >>> some, drawn = torch.tensor([[0]]), torch.tensor([[1, 2, 1]])
        >>> law = Hybrid(some, p[:, some[0]], torch.tensor([0.5]).log(), drawn, p[:, drawn[0]], torch.tensor([True]))
        >>> found = hybrid_kl(law, torch.tensor([[0.4, 0.4, 0.2]]).log())
        >>> round(float(found.kl), 4), round(float(found.plain), 4)  # of 0.0253
        (0.0247, 0.0157)

    Source: J. Schulman (2020), Approximating KL Divergence, for ``λ = 1`` and a whole law.
    """
    tokens, draws = law.tokens[rows], law.draws[rows]
    size = logq.shape[1] if law.size is None else law.size
    require_tokens(tokens, logq.shape[1])
    require_tokens(draws, logq.shape[1])
    logp, rest, logp_draws = (x[rows].double() for x in (law.logp, law.rest, law.logp_draws))
    known, drawn = logq.gather(1, tokens).double(), logq.gather(1, draws).double()
    there, mass = rest > -torch.inf, rest.exp()

    # Any token of the tail is at most as probable under p as the last known one.
    bound = (logp[:, -1:] + math.log(LOUD)).to(logq.dtype)
    others = logq.scatter(1, tokens, -torch.inf)
    tail, beyond = others[:, :size], others[:, size:].logsumexp(1)
    quiet = tail.masked_fill(tail > bound, -torch.inf).logsumexp(1)
    loud = tail.masked_fill(tail <= bound, -torch.inf).logsumexp(1)
    mute = quiet == -torch.inf  # then any split will do, without a control variate
    quiet, loud = torch.where(mute, loud, quiet), loud.masked_fill(mute, -torch.inf)
    nothing = torch.full_like(rest, -torch.inf)
    first = nonnegative_kl(
        torch.cat([logp, rest[:, None], nothing[:, None], nothing[:, None]], 1),
        torch.cat([known, torch.stack([quiet, loud, beyond], 1).double()], 1),
    )

    out = there[:, None] & (drawn == -torch.inf)
    u = (logp_draws - rest[:, None]) - (drawn - quiet.double()[:, None])
    u = u.masked_fill(out | ~there[:, None], 0.0)
    square = u.square()
    s = (square.sum(1, keepdim=True) - square).clamp(min=0.0) / max(draws.shape[1] - 1, 1)
    weight = torch.where(s > 0, s / torch.expm1(s), 1.0) * (there & law.whole[rows] & ~mute)[:, None]
    # λ (w − 1), by way of exp(−u) − 1 + u, which is accurate for close laws.
    heard = (drawn <= bound) & (weight > 0)
    less = torch.where(heard, weight * excess(-u.where(heard, 0.0)) - weight * u, -weight)

    lost, excluded = _lost(law, rows, known, out, logq[:, :size])
    kl, plain = ((first + mass * term.mean(1)).masked_fill(lost > 0, torch.inf) for term in (u + less, u))
    return HybridKL(kl, plain, lost, excluded)


def _lost(
    law: Hybrid, rows: slice, known: Float[Tensor, "m k"], out: Tensor, logq: Float[Tensor, "m w"]
) -> tuple[Float[Tensor, " m"], Int[Tensor, " m"]]:
    """What ``q`` excludes of ``p``: its mass, as far as that is known, and the most probable token."""
    logp, logp_draws = law.logp[rows].double(), law.logp_draws[rows].double()
    gone = torch.cat([logp.masked_fill(known > -torch.inf, -torch.inf), logp_draws.masked_fill(~out, -torch.inf)], 1)
    mass = gone[:, : logp.shape[1]].exp().sum(1) + law.rest[rows].double().exp() * out.double().mean(1)
    likeliest, least = gone.max(1), logq.min(1)
    seen = likeliest.values > -torch.inf
    certain = law.whole[rows] & (least.values == -torch.inf)
    ids = torch.cat([law.tokens[rows], law.draws[rows]], 1).gather(1, likeliest.indices[:, None])[:, 0]
    token = torch.where(seen, ids, torch.where(certain, least.indices, -1))
    # A mass too small for single precision, or not known, is still not 0: the divergence is infinite.
    return mass.clamp(min=torch.finfo(torch.float32).tiny).where(seen | certain, 0.0), token


@torch.no_grad()
def hybrid_statistics(
    law: Hybrid,
    logits_q: Float[Tensor, "m v"],
    tokens: Int[Tensor, " m"],
    ends: tuple[int, ...],
    *,
    rows: slice = slice(None),
    plain: bool = False,
) -> RowStatistics:
    """What :func:`klkit.divergences.fused.row_statistics` gives, as far as it can be had without the whole ``p``.

    Exact: everything of one law alone, and of ending or not. Unbiased: ``kl``, and ``lost`` as far as ``q`` is seen to
    exclude tokens. NaN: ``reverse_kl``, ``total_variation`` and ``variance_ratio``, which need ``p`` at tokens that
    are not known. In single precision, in which ``p`` was recorded.

    Args:
        law: ``p``, with its scalars.
        logits_q: logits of ``q``, normalised or not, over all of its tokens.
        tokens: the text's token at each row.
        ends: ids that end a response.
        rows: the rows of ``law`` that the others belong to.
        plain: take the estimate without control variate.

    Raises:
        ValueError: the law has no scalars, an id is out of range, or a logit of ``q`` is not finite.

    Example:
        >>> p, q = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
        >>> spread = Scalars(p[:, 1], torch.tensor([1.03]), torch.tensor([0.13]), torch.tensor([[0.2, 0.8]]).log())
        >>> law = Hybrid(
        ...     torch.tensor([[0]]), p[:, :1], torch.tensor([0.5]).log(), torch.tensor([[2, 1]]), p[:, [2, 1]],
        ...     torch.tensor([True]), scalars=spread,
        ... )
        >>> found = hybrid_statistics(law, q, torch.tensor([1]), ends=(2,))
        >>> round(float(found.end_kl), 4), round(float(found.logq.exp()), 4), float(found.reverse_kl)
        (0.1927, 0.25, nan)
    """
    if law.scalars is None:
        raise ValueError("expected laws with what was worked out of them when whole, got none; read them from a cache")
    logq = log_softmax(logits_q)
    found, known = hybrid_kl(law, logq, rows), Scalars(*(x[rows] for x in law.scalars))
    coin_p, coin_q = known.coin.double(), end_coin(logq, ends, logq.new_zeros(len(logq), dtype=torch.float64))
    drawn = logq.gather(1, tokens[:, None])[:, 0]
    # The text's token is known as well, if it is neither likely nor drawn.
    excludes = (drawn == -torch.inf) & (known.logp > -torch.inf) & (found.lost == 0)
    mass = known.logp.double().exp().clamp(min=torch.finfo(torch.float32).tiny)
    likely = law.logp[rows]
    best = law.tokens[rows].masked_fill(likely < likely[:, :1], torch.iinfo(torch.long).max).amin(1)
    kl = (found.plain if plain else found.kl).masked_fill(excludes, torch.inf)
    unknown = torch.full_like(kl, torch.nan).float()
    return RowStatistics(
        logp=known.logp.float(),
        logq=drawn.float(),
        kl=kl.float(),
        reverse_kl=unknown,
        total_variation=unknown,
        entropy_p=known.entropy.float(),
        entropy_q=-(logq.exp() * logq.clamp(min=FLOOR)).sum(1).float().clamp(max=0.0),
        variance_logp=known.variance.float(),
        variance_ratio=unknown,
        end_p=coin_p[:, 0].exp().float(),
        end_q=coin_q[:, 0].exp().float(),
        end_kl=nonnegative_kl(coin_p, coin_q).float(),
        confidence=likely[:, 0].exp().float(),
        top_p=best,
        top_q=logq.argmax(1),
        lost=torch.where(excludes, mass, found.lost).float(),
        excluded=torch.where(excludes, tokens, found.excluded),
    )
