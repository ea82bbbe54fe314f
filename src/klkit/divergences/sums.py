"""What one visit to a row of logits collects, and everything that follows from it.

A backend (:mod:`klkit.divergences.backends`) turns rows of raw logits ``a`` of ``p`` and ``b`` of
``q`` into a few sums. From these the normalisers, both divergences, the entropies and the variances
follow in double precision, here, once for all backends.

The sums are taken relative to *references*: ``x = a − A`` with ``A`` the largest logit of ``p``, and
``d = (b − R) − x`` with ``R`` the logit of ``q`` at that same token. So ``d`` is ``log q − log p`` up
to one constant ``c`` a row, and 0 at ``p``'s top token. Where the two rows are close, ``d`` and ``c``
are small *together*, and rounding enters every divergence multiplied by their size: that is why five
digits of a divergence of 1e-9 nats survive single precision, in one pass, before any normaliser is
known. With ``F = E_p f(d)``, ``f(t) = exp(t) − 1 − t``, and ``T = E_p d``,

    Σ q = 1  gives  exp(c) = 1 + F + T  and  KL(p‖q) = c − T = F + (log1p(y) − y),  y = F + T,

in which no large numbers are subtracted; the reverse divergence is the same with the laws exchanged.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from klkit.numerics import FLOOR


class RowSums(NamedTuple):
    """Sums over each row of logits, each ``(m,)`` in double precision.

    Attributes:
        top_p: the token with the largest logit of ``p``, the first of equals.
        top_q: the same for ``q``.
        reference: ``A``, the largest logit of ``p``.
        paired: ``R``, the logit of ``q`` at ``top_p``; the largest one if that is excluded.
        greatest: ``B``, the largest logit of ``q``.
        mass_p: ``Σ exp(x)``.
        mass_q: ``Σ exp(b − B)``.
        drift_p: ``Σ exp(x) d``.
        drift_q: ``Σ exp(b − B) d``.
        level_p: ``Σ exp(x) x``.
        level_q: ``Σ exp(b − B) (b − B)``.
        excess_p: ``Σ exp(x) f(d)``, in which ``exp(x + d)`` may be capped, see ``FARTHEST``.
        excess_q: ``Σ exp(b − B) f(−d)``.
        square_level: ``Σ exp(x) x²``.
        square_drift: ``Σ exp(x) d²``.
        least: smallest ``d``; about ``FLOOR`` where only ``q`` excludes a token.
        most: largest ``d``; about ``−FLOOR`` where only ``p`` excludes a token.
    """

    top_p: Tensor
    top_q: Tensor
    reference: Tensor
    paired: Tensor
    greatest: Tensor
    mass_p: Tensor
    mass_q: Tensor
    drift_p: Tensor
    drift_q: Tensor
    level_p: Tensor
    level_q: Tensor
    excess_p: Tensor
    excess_q: Tensor
    square_level: Tensor
    square_drift: Tensor
    least: Tensor
    most: Tensor


COLUMNS = len(RowSums._fields)
"""Width of the table that a backend fills."""

FARTHEST = 60.0
"""Backends may cap ``B − R`` here when they form ``exp(b − R)``: the joint form is not used so far out."""


NEAREST = 30.0
"""Where ``B − R`` exceeds this, norms are given relative to ``B``."""


class RowValues(NamedTuple):
    """What follows from :class:`RowSums`, each ``(m,)`` in double precision and nats.

    Attributes:
        log_mass_p: ``log Σ exp(a)`` less ``A``; so ``log p = x − log_mass_p``.
        log_mass_q: ``log Σ exp(b)`` less ``B``.
        shift: ``c``, so ``log q − log p = d − c``.
        kl: ``Σ p (log p − log q)``; infinite where ``q`` excludes a token of ``p``.
        reverse_kl: ``Σ q (log q − log p)``.
        entropy_p: ``−Σ p log p``.
        entropy_q: ``−Σ q log q``.
        variance_logp: variance of ``log p(a)``, ``a ~ p``.
        variance_ratio: variance of ``log p(a) − log q(a)``, ``a ~ p``; infinite with ``kl``.
    """

    log_mass_p: Tensor
    log_mass_q: Tensor
    shift: Tensor
    kl: Tensor
    reverse_kl: Tensor
    entropy_p: Tensor
    entropy_q: Tensor
    variance_logp: Tensor
    variance_ratio: Tensor


def values(sums: RowSums) -> RowValues:
    """Normalisers, divergences, entropies and variances of the rows behind ``sums``.

    Raises:
        ValueError: a logit is NaN or ``+inf``, or a row excludes every token.
    """
    require_finite(sums)
    log_mass_p, log_mass_q = sums.mass_p.log(), sums.mass_q.log()
    drift_p, drift_q = sums.drift_p / sums.mass_p, sums.drift_q / sums.mass_q
    excess_p, excess_q = sums.excess_p / sums.mass_p, sums.excess_q / sums.mass_q
    # The constant of the row: from E_p exp(d) = exp(c) where that is accurate, else from the normalisers.
    y, z = excess_p + drift_p, excess_q - drift_q
    plain = (sums.greatest - sums.paired) + log_mass_q - log_mass_p
    infinite, reverse_infinite = sums.least < FLOOR / 2, sums.most > -FLOOR / 2
    joint = (y > -0.5) & ~infinite & (sums.greatest - sums.paired < FARTHEST)
    shift = torch.where(joint, y.clamp(min=-0.5).log1p(), plain)
    kl = torch.where(joint & (y < 0.5), excess_p + _log1p_less(y), shift - drift_p)
    reverse_kl = torch.where(z.abs() < 0.5, excess_q + _log1p_less(z), drift_q - shift)
    level = sums.level_p / sums.mass_p
    return RowValues(
        log_mass_p=log_mass_p,
        log_mass_q=log_mass_q,
        shift=shift,
        # Rounding may leave equal rows at -1e-20.
        kl=kl.clamp(min=0.0).masked_fill(infinite, torch.inf),
        reverse_kl=reverse_kl.clamp(min=0.0).masked_fill(reverse_infinite, torch.inf),
        entropy_p=(log_mass_p - level).clamp(min=0.0),
        entropy_q=(log_mass_q - sums.level_q / sums.mass_q).clamp(min=0.0),
        variance_logp=(sums.square_level / sums.mass_p - level.square()).clamp(min=0.0),
        variance_ratio=(sums.square_drift / sums.mass_p - drift_p.square())
        .clamp(min=0.0)
        .masked_fill(infinite, torch.inf),
    )


def _log1p_less(y: Tensor) -> Tensor:
    """``log(1 + y) − y``, for ``|y| < ½``."""
    y = y.clamp(-0.5, 0.5)
    return y.log1p() - y


def require_finite(sums: RowSums) -> None:
    """Refuse rows that stand for no law.

    Raises:
        ValueError: a logit is NaN or ``+inf``, or a row excludes every token.
    """
    for name, top, level in (("p", sums.reference, sums.level_p), ("q", sums.greatest, sums.level_q)):
        wrong = ~(level.isfinite() & (top > FLOOR / 2))
        if bool(wrong.any()):
            raise ValueError(
                f"expected logits that are finite or -inf, with one finite entry in each row; row "
                f"{int(wrong.nonzero()[0])} of {len(wrong)} of {name} is not ({int(wrong.sum())} such rows). "
                f"A NaN usually means an overflow in half precision: load the model with dtype=float32."
            )


class Norms(NamedTuple):
    """What makes laws of logits: ``log p = (a − reference) − log_mass``, ``log q = (b − paired) − log_mass − shift``.

    Their difference ``log q − log p = (b − paired) − (a − reference) − shift`` is formed in this order, which is exact
    where it matters. Each ``(m,)`` in double precision; see :class:`RowSums` and :class:`RowValues`.
    """

    reference: Tensor
    paired: Tensor
    log_mass: Tensor
    shift: Tensor


class Slopes(NamedTuple):
    """Coefficients of the gradients of any sum of row quantities, each ``(m,)`` in double precision.

    With ``d = log q − log p``, ``m = ½p + ½q`` and ``y`` the drawn token, the gradient in the logits of ``p`` is

        p (constant_p + level_p log p + drift_p d) + gap_p (q − p) + mixed_p p log(p/m) + drawn_p 1[y],

    and in the logits of ``q``

        q (constant_q + level_q log q + drift_q d) + gap_q (q − p) + mixed_q q log(q/m) + drawn_q 1[y].
    """

    constant_p: Tensor
    level_p: Tensor
    drift_p: Tensor
    gap_p: Tensor
    mixed_p: Tensor
    drawn_p: Tensor
    constant_q: Tensor
    level_q: Tensor
    drift_q: Tensor
    gap_q: Tensor
    mixed_q: Tensor
    drawn_q: Tensor


def norms_of(sums: RowSums, found: RowValues) -> Float[Tensor, "m 4"]:
    """:class:`Norms` of the rows, as a table; no ``b − paired`` exceeds ``NEAREST``, so its exponential is finite."""
    gap = sums.greatest - sums.paired
    far = gap > NEAREST
    paired, shift = torch.where(far, sums.greatest, sums.paired), torch.where(far, found.shift - gap, found.shift)
    return torch.stack(Norms(sums.reference, paired, found.log_mass_p, shift), 1)
