"""Divergences between next-token laws: log-probabilities in, one number of nats a row out."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from klkit.divergences.f import alpha_divergence, squared_hellinger, total_variation
from klkit.divergences.kl import jeffreys, kl, reverse_kl
from klkit.divergences.mixtures import generalised_jensen_shannon, jensen_shannon, skew_kl, skew_reverse_kl

DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": kl,
    "reverse_kl": reverse_kl,
    "jeffreys": jeffreys,
    "js": jensen_shannon,
    "generalised_js": generalised_jensen_shannon,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
    "squared_hellinger": squared_hellinger,
    "alpha_divergence": alpha_divergence,
}
"""Every divergence by its key: ``(logp, logq)``, each ``(*b, v)``, to ``(*b)``, and 0 for equal rows."""
