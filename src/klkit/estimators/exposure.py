"""Exposure bias: how much more a model errs on prefixes it wrote itself than on those it was trained for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from klkit.rng import numpy_stream
from klkit.sequences import Sequences
from klkit.stats.intervals import MINIMUM_CLUSTERS, resamples

SHARE = 0.1
"""Positions count as far as this share of the strings of both laws goes on: beyond, a few strings would decide."""


@dataclass(frozen=True, slots=True)
class ExposureBias:
    """Excess accumulated error ``(R − ε) / ε``.

    Attributes:
        value: at the last position; 0 where neither law's prefixes show an error.
        lower: bound of a 95 % percentile-bootstrap interval over clusters; NaN with fewer than 10.
        upper: the other bound.
        reach: positions accumulated.
        own: ``R`` up to each position, ``(t,)``, nats.
        given: ``ε`` up to each position, ``(t,)``, nats.
    """

    value: float
    lower: float
    upper: float
    reach: int
    own: NDArray[np.float64]
    given: NDArray[np.float64]


def exposure_bias(
    own: Float[Tensor, " m"], x_own: Sequences, given: Float[Tensor, " k"], x_given: Sequences, *, seed: int = 0
) -> ExposureBias:
    """``(R − ε) / ε`` with ``R = Σ_t E[D_t]`` over prefixes of ``q``'s own strings and ``ε`` the same over ``p``'s.

    ``D_t`` is ``KL(p‖q)`` of the decision at position ``t``; its mean is taken over the strings that go on so far, so
    that strings of another length are no error by themselves.

    Args:
        own: divergence of each decision of ``x_own``.
        x_own: strings of ``q``, the model that is judged.
        given: divergence of each decision of ``x_given``.
        x_given: strings of ``p``.
        seed: of the resampling.

    Source: K. Arora et al., 2022, arXiv 2204.01171.

    Example:
        >>> import torch
        >>> x = Sequences.pack([torch.tensor([0])], [torch.tensor([1, 0])])
        >>> found = exposure_bias(torch.tensor([0.1, 0.5]), x, torch.tensor([0.1, 0.3]), x)
        >>> round(found.value, 6), found.reach
        (0.5, 2)
    """
    labels = np.unique(np.concatenate([x_own.cluster.numpy(), x_given.cluster.numpy()]))
    mine, theirs = _by_position(own, x_own, labels), _by_position(given, x_given, labels)
    going_on = (table[1].sum(0) >= max(1.0, SHARE * len(x)) for table, x in ((mine, x_own), (theirs, x_given)))
    reach = min(int(position.sum()) for position in going_on)
    mine, theirs = mine[..., :reach], theirs[..., :reach]
    all_once = np.ones((1, len(labels)))
    r, e = _accumulated(all_once, mine), _accumulated(all_once, theirs)
    lower = upper = float("nan")
    if len(labels) >= MINIMUM_CLUSTERS:
        random = numpy_stream(seed, "exposure")
        drawn = [_excess(_accumulated(w, mine), _accumulated(w, theirs)) for w in resamples(len(labels), random)]
        with np.errstate(invalid="ignore"):  # between infinite ones
            lower, upper = (float(bound) for bound in np.nanquantile(np.concatenate(drawn), [0.025, 0.975]))
    return ExposureBias(float(_excess(r, e)[0]), lower, upper, reach, r[0], e[0])


def _by_position(values: Tensor, x: Sequences, labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sums of ``values`` and numbers of decisions, ``(2, c, t)``: of each cluster, at each position."""
    cluster = np.searchsorted(labels, x.cluster.numpy())[x.row().numpy()]
    table = np.zeros((2, len(labels), int(x.lengths.max()) if len(x) else 0))
    place = (cluster, x.position().numpy())
    np.add.at(table[0], place, values.double().numpy())
    np.add.at(table[1], place, 1.0)
    return table


def _accumulated(weights: NDArray[np.float64], table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means at each position of clusters counted ``weights`` times, summed up to it: ``(b, c)`` to ``(b, t)``."""
    with np.errstate(invalid="ignore", divide="ignore"):
        found: NDArray[np.float64] = np.cumsum((weights @ table[0]) / (weights @ table[1]), axis=-1)
    return found


def _excess(r: NDArray[np.float64], e: NDArray[np.float64]) -> NDArray[np.float64]:
    r, e = r[:, -1], e[:, -1]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((r == 0) & (e == 0), 0.0, (r - e) / e)
