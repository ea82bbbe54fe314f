"""Every per-decision quantity from one visit to a chunk of rows, without gradients.

Callers pass a cache-sized chunk (``klkit.numerics.rows_per_chunk``), so the temporaries below stay
in cache and nothing of the size of all the logits is ever allocated. Nothing below selects by a mask
of the vocabulary's size: on a CPU that costs more than all the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.linalg import vecdot

from klkit.divergences.kl import nonnegative_kl
from klkit.divergences.mixtures import log_mixture
from klkit.numerics import FLOOR, LN2, excess_series, floored, lost, require_mass, split, widen


@dataclass(frozen=True, slots=True)
class RowStatistics:
    """Scalars of each row of ``p``- and ``q``-log-probabilities; every field is ``(m,)``, in nats.

    Attributes:
        logp: ``log p(y)`` of the drawn token.
        logq: ``log q(y)`` of the drawn token.
        kl: ``Σ p (log p − log q)``.
        reverse_kl: ``Σ q (log q − log p)`` at the same prefix.
        total_variation: ``½ Σ |p − q|``.
        entropy_p: ``−Σ p log p``.
        entropy_q: ``−Σ q log q``.
        variance_logp: variance of ``log p(a)`` for ``a`` drawn from ``p``.
        variance_ratio: variance of ``log p(a) − log q(a)`` for ``a`` drawn from ``p``; infinite with ``kl``.
        end_p: probability of ending here under ``p`` (all end tokens together).
        end_q: the same under ``q``.
        end_kl: the part of ``kl`` due to ending or not: KL between the two coin flips.
        top_p: ``p``'s most probable token.
        top_q: ``q``'s most probable token.
        lost: ``p``-mass on tokens that ``q`` excludes; above 0 exactly when ``kl`` is infinite.
        excluded: the most probable such token, or −1.
    """

    logp: Float[Tensor, " m"]
    logq: Float[Tensor, " m"]
    kl: Float[Tensor, " m"]
    reverse_kl: Float[Tensor, " m"]
    total_variation: Float[Tensor, " m"]
    entropy_p: Float[Tensor, " m"]
    entropy_q: Float[Tensor, " m"]
    variance_logp: Float[Tensor, " m"]
    variance_ratio: Float[Tensor, " m"]
    end_p: Float[Tensor, " m"]
    end_q: Float[Tensor, " m"]
    end_kl: Float[Tensor, " m"]
    top_p: Int[Tensor, " m"]
    top_q: Int[Tensor, " m"]
    lost: Float[Tensor, " m"]
    excluded: Int[Tensor, " m"]

    @property
    def same_top(self) -> Bool[Tensor, " m"]:
        """Whether both models agree on the most probable token."""
        return self.top_p == self.top_q


@torch.no_grad()
def row_statistics(
    logp: Float[Tensor, "m v"], logq: Float[Tensor, "m v"], tokens: Int[Tensor, " m"], ends: tuple[int, ...]
) -> RowStatistics:
    """Reduce rows of log-probabilities to the scalars that estimators, audit and report need.

    The divergences agree with ``klkit.divergences``: non-negative forms, infinite where the other law
    excludes a token, no contribution from a token that both exclude.

    Args:
        logp: log-probabilities under ``p``; half precision is widened, double is kept.
        logq: log-probabilities under ``q``.
        tokens: the token drawn at each row.
        ends: ids that end a response.

    Raises:
        ValueError: a row is not normalised.

    Example:
        >>> import torch
        >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> rows = row_statistics(p, q, torch.tensor([1]), ends=(0,))
        >>> round(float(rows.kl), 6), round(float(rows.end_kl), 6), float(rows.total_variation)
        (0.143841, 0.143841, 0.25)
    """
    dtype = torch.promote_types(widen(logp).dtype, widen(logq).dtype)
    a, b = floored(logp.to(dtype)), floored(logq.to(dtype))
    p, q, d = _exp(a), _exp(b), b - a
    kl, reverse_kl, total_variation = _divergences(p, q, d)
    entropy_p, entropy_q = -vecdot(p, a), -vecdot(q, b)
    variance_logp, variance_ratio = _variance(p, a, -entropy_p), _variance(p, d, -kl)
    infinite, reverse_infinite = lost(d), d.amax(-1) > -FLOOR / 2
    lost_mass, excluded = _excluded(a, b, infinite)
    coin_p, coin_q = _coin(a, p, ends, "p"), _coin(b, q, ends, "q")
    drawn = tokens[:, None]
    return RowStatistics(
        logp=logp.gather(1, drawn)[:, 0].to(dtype),
        logq=logq.gather(1, drawn)[:, 0].to(dtype),
        kl=kl.masked_fill(infinite, torch.inf),
        reverse_kl=reverse_kl.masked_fill(reverse_infinite, torch.inf),
        total_variation=total_variation,
        entropy_p=entropy_p,
        entropy_q=entropy_q,
        variance_logp=variance_logp,
        variance_ratio=variance_ratio.masked_fill(infinite, torch.inf),
        end_p=coin_p[:, 0].exp(),
        end_q=coin_q[:, 0].exp(),
        end_kl=nonnegative_kl(coin_p, coin_q),
        top_p=_argmax(a),
        top_q=_argmax(b),
        lost=lost_mass,
        excluded=excluded,
    )


def _exp(x: Float[Tensor, "m v"]) -> Float[Tensor, "m v"]:
    """``exp(x)`` within ``|x|`` units of rounding; ``torch.exp`` takes four times as long on some CPUs."""
    return (x * (1 / LN2)).exp2_()


def _argmax(x: Float[Tensor, "m v"], width: int = 256) -> Int[Tensor, " m"]:
    """``x.argmax(-1)``, the first among equals; long rows by block maxima, at a fifth of the time on a CPU."""
    if x.shape[1] < 16 * width:
        return x.argmax(-1)
    whole = x.shape[1] // width * width
    blocks, tail = x[:, :whole].view(len(x), -1, width), x[:, whole:]
    best, block = blocks.amax(-1).max(-1)
    index: Tensor = block * width + blocks[torch.arange(len(x), device=x.device), block].argmax(-1)
    if whole < x.shape[1]:
        value, place = tail.max(-1)
        index = torch.where(value > best, whole + place, index)
    return index


def _divergences(
    p: Float[Tensor, "m v"], q: Float[Tensor, "m v"], d: Float[Tensor, "m v"]
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"], Float[Tensor, " m"]]:
    """``Σ (q − p − p d)``, ``Σ (p − q + q d)`` and ``½ Σ |p − q|`` for ``d = log q − log p``, floored.

    The summands are those of ``klkit.numerics.divergence_terms``; here both directions share one series,
    and the sums are inner products.
    """
    near, far = split(d)
    even, odd = excess_series(near)
    odd -= far
    gap = (q - p).abs_()
    total_variation = 0.5 * gap.sum(-1)
    apart = vecdot(gap, far.sign_())  # Σ (q − p) over the far tokens: there q − p has the sign of d
    kl = vecdot(p, even + odd) + apart
    reverse_kl = vecdot(q, even - odd) - apart
    kl, reverse_kl = kl.clamp(min=0.0), reverse_kl.clamp(min=0.0)
    return kl, reverse_kl, total_variation


def _variance(p: Float[Tensor, "m v"], x: Float[Tensor, "m v"], mean: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """``Σ p (x − mean)²``, centred first: two large second moments are never subtracted."""
    centred = x - mean[:, None]
    return (p * centred).mul_(centred).sum(-1)


def _excluded(
    a: Float[Tensor, "m v"], b: Float[Tensor, "m v"], infinite: Bool[Tensor, " m"]
) -> tuple[Float[Tensor, " m"], Int[Tensor, " m"]]:
    """Mass and most probable one of the tokens that only ``q`` excludes, looked for in infinite rows only."""
    mass = a.new_zeros(len(a))
    token = torch.full((len(a),), -1, dtype=torch.long, device=a.device)
    rows = infinite.nonzero()[:, 0]
    if len(rows):
        gone = a[rows].masked_fill(b[rows] > FLOOR / 2, -torch.inf)
        # A mass too small for its format is still not 0: the divergence is infinite.
        mass[rows] = gone.exp().sum(-1).clamp(min=torch.finfo(mass.dtype).tiny)
        token[rows] = gone.argmax(-1)
    return mass, token


def _coin(a: Float[Tensor, "m v"], p: Float[Tensor, "m v"], ends: tuple[int, ...], name: str) -> Float[Tensor, "m 2"]:
    """Log-probabilities of ending here and of going on; overwrites ``p``.

    Both are summed from their own tokens: one minus the other would have no digits left near 0.
    """
    end = torch.tensor(sorted(set(ends)), dtype=torch.long, device=a.device)
    log_end = a[:, end].logsumexp(-1).clamp(max=0.0)
    rest = p.index_fill_(1, end, 0.0).sum(-1)
    log_rest = rest.log()
    rows = (rest < torch.finfo(rest.dtype).tiny).nonzero()[:, 0]
    if len(rows):  # the sum has underflowed: collect it in log space
        log_rest[rows] = a[rows].index_fill(1, end, FLOOR).logsumexp(-1)
    require_mass(log_end.exp() + rest, name)
    return torch.stack([log_end, log_rest], -1)


@torch.no_grad()
def mixture_kl(
    logp: Float[Tensor, "m v"], logq: Float[Tensor, "m v"], log_odds: Float[Tensor, " m"]
) -> Float[Tensor, " m"]:
    """``Σ p (log p − log m)`` for ``m = w p + (1 − w) q``, ``w = sigmoid(log_odds)``, in nats.

    With ``log_odds`` the log-ratio of the prefix under the two string laws, ``m`` is the next-token
    law of their equal mixture, so summed over strings from ``p`` this is ``KL(P ‖ ½P + ½Q)``. Odds may
    be infinite: a prefix that only ``P`` can produce costs nothing more.

    Example:
        >>> import torch
        >>> p, q = torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.5, 0.5]]).log()
        >>> [round(float(mixture_kl(p, q, torch.tensor([odds]))), 6) for odds in (0.0, float("inf"))]
        [0.287682, 0.0]
    """
    logp, logq = widen(logp), widen(logq)
    return nonnegative_kl(logp, log_mixture(logp, logq, log_odds[:, None]))
