"""Every per-decision quantity from one visit to rows of raw logits, without gradients.

The work is a backend's (:mod:`klkit.divergences.backends`), which goes through the rows in pieces that
stay in cache; nothing of the size of all the logits is ever allocated. The same with gradients is
:mod:`klkit.divergences.differentiable`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from klkit.divergences import backends
from klkit.divergences.kl import nonnegative_kl
from klkit.divergences.mixtures import log_mixture
from klkit.divergences.sums import RowSums, RowValues, norms_of, values
from klkit.numerics import FLOOR, log1mexp, wide_dtype, widen


@dataclass(frozen=True, slots=True)
class RowStatistics:
    """Scalars of each row of ``p``- and ``q``-logits; every field is ``(m,)``, in nats.

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
        confidence: ``p``'s largest probability.
        js: ``½ KL(p‖m) + ½ KL(q‖m)``, ``m = ½p + ½q``: Jensen-Shannon divergence of the two next-token laws, if it was
            asked for.
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
    confidence: Float[Tensor, " m"]
    js: Float[Tensor, " m"] | None = None

    @property
    def same_top(self) -> Bool[Tensor, " m"]:
        """Whether both models agree on the most probable token."""
        return self.top_p == self.top_q

    def each(self, change: Callable[[Tensor], Tensor]) -> RowStatistics:
        """What ``change`` makes of every field that is there."""
        columns: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(RowStatistics)}
        columns = {name: None if x is None else change(x) for name, x in columns.items()}
        return RowStatistics(**columns)

    def select(self, rows: Int[Tensor, " k"]) -> RowStatistics:
        """Those of the rows ``rows``, in that order."""
        return self.each(lambda column: column[rows])

    def kept(self) -> RowStatistics:
        """The same in main memory, token ids in half of what they are computed in, which is enough."""
        return self.each(lambda column: (column if column.is_floating_point() else column.int()).cpu())

    @staticmethod
    def cat(parts: Sequence[RowStatistics]) -> RowStatistics:
        """Those of several tables of rows, one after the other."""
        columns: dict[str, Any] = {f.name: [getattr(part, f.name) for part in parts] for f in fields(RowStatistics)}
        columns = {name: None if column[0] is None else torch.cat(column) for name, column in columns.items()}
        return RowStatistics(**columns)


@torch.no_grad()
def row_statistics(
    logits_p: Float[Tensor, "m v"],
    logits_q: Float[Tensor, "m _"],
    tokens: Int[Tensor, " m"],
    ends: tuple[int, ...],
    *,
    overwrite: bool = False,
    js: bool = False,
    backend: str | None = None,
) -> RowStatistics:
    """Reduce rows of logits to the scalars that estimators, audit and report need.

    The divergences agree with ``klkit.divergences``: never negative, accurate far below 1e-7 nats, infinite
    where the other law excludes a token, without contribution from a token that both exclude. Log-probabilities
    are logits too: rows need not be normalised.

    Args:
        logits_p: logits of ``p``; half precision is widened as it is read, double is kept.
        logits_q: logits of ``q``.
        tokens: the token drawn at each row.
        ends: ids that end a response.
        overwrite: leave the probabilities of ``p`` in ``logits_p``, where they cost nothing more.
        js: also compute the Jensen-Shannon divergence, which takes a third to a half as long again.
        backend: by default the one that :func:`klkit.divergences.backends.choose` names for this much work.

    Raises:
        ValueError: a logit is NaN or ``+inf``, a row excludes every token, or the shapes differ.

    Example:
        >>> import torch
        >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> rows = row_statistics(p, q, torch.tensor([1]), ends=(0,))
        >>> round(float(rows.kl), 6), round(float(rows.end_kl), 6), round(float(rows.total_variation), 6)
        (0.143841, 0.143841, 0.25)
    """
    require_same_shape(logits_p, logits_q)
    dtype = wide_dtype(logits_p, logits_q)
    name = backend or backends.choose(logits_p.numel(), logits_p.device, dtype)
    kernels = backends.get(name, logits_p, logits_q)
    sums = RowSums(*kernels.row_sums(logits_p, logits_q).unbind(1))
    found = values(sums)
    norms = norms_of(sums, found)
    lost_mass, excluded = _excluded(logits_p, logits_q, sums, found)
    log_norm_q = found.log_mass_q + sums.greatest
    coin_p = end_coin(logits_p, ends, sums.reference + found.log_mass_p)
    coin_q = end_coin(logits_q, ends, log_norm_q)
    drawn = tokens[:, None]
    logp = logits_p.gather(1, drawn)[:, 0].double() - sums.reference - found.log_mass_p
    logq = logits_q.gather(1, drawn)[:, 0].double() - log_norm_q
    swept = kernels.second_sweep(logits_p, logits_q, norms, mixture=js, overwrite=overwrite)
    return RowStatistics(
        logp=logp.to(dtype),
        logq=logq.to(dtype),
        kl=found.kl.to(dtype),
        reverse_kl=found.reverse_kl.to(dtype),
        total_variation=swept[:, 2].to(dtype),
        entropy_p=found.entropy_p.to(dtype),
        entropy_q=found.entropy_q.to(dtype),
        variance_logp=found.variance_logp.to(dtype),
        variance_ratio=found.variance_ratio.to(dtype),
        end_p=coin_p[:, 0].exp().to(dtype),
        end_q=coin_q[:, 0].exp().to(dtype),
        end_kl=nonnegative_kl(coin_p, coin_q).to(dtype),
        top_p=sums.top_p.long(),
        top_q=sums.top_q.long(),
        lost=lost_mass.to(dtype),
        excluded=excluded,
        confidence=(-found.log_mass_p).exp().to(dtype),
        js=swept[:, 0].to(dtype) if js else None,
    )


def require_same_shape(logits_p: Tensor, logits_q: Tensor) -> None:
    """Refuse logits over different vocabularies, or none.

    Raises:
        ValueError: the shapes differ, or rows are empty.
    """
    if logits_p.shape != logits_q.shape or logits_p.ndim == 0 or logits_p.shape[-1] == 0:
        raise ValueError(
            f"expected logits of one shape, at least one entry a row, got {tuple(logits_p.shape)} and "
            f"{tuple(logits_q.shape)}; align the vocabularies of the two models first"
        )


def _excluded(a: Tensor, b: Tensor, sums: RowSums, found: RowValues) -> tuple[Tensor, Tensor]:
    """Mass and most probable one of the tokens that only ``q`` excludes, looked for in infinite rows only."""
    mass = torch.zeros_like(sums.reference)
    token = torch.full(mass.shape, -1, dtype=torch.long, device=mass.device)
    rows = (found.kl == torch.inf).nonzero()[:, 0]
    if len(rows):
        log_p = widen(a[rows]).double() - (sums.reference + found.log_mass_p)[rows, None]
        gone = log_p.masked_fill(widen(b[rows]) > FLOOR / 2, -torch.inf)
        # A mass too small for single precision is still not 0: the divergence is infinite.
        mass[rows] = gone.exp().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        token[rows] = gone.argmax(-1)
    return mass, token


def end_coin(a: Tensor, ends: tuple[int, ...], log_norm: Float[Tensor, " m"]) -> Float[Tensor, "m 2"]:
    """Log-probabilities of ending here and of going on.

    Where ending is the likelier, going on is summed from its own tokens: one minus the other would have no
    digits left near 1.
    """
    end = torch.tensor(sorted(set(ends)), dtype=torch.long, device=a.device)
    log_end = (a[:, end].double() - log_norm[:, None]).logsumexp(-1).clamp(max=0.0)
    log_rest = log1mexp(log_end)
    rows = (log_end > -0.7).nonzero()[:, 0]
    if len(rows):
        others = widen(a[rows]).double().index_fill_(1, end, -torch.inf)
        log_rest[rows] = (others - log_norm[rows, None]).logsumexp(-1).clamp(max=0.0)
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
