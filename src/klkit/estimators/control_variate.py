"""Whole-string control variates: the log-ratio plus a multiple of ``g = q(y)/p(y) − 1``.

``g`` has mean zero under ``p`` when ``p`` can write every string that ``q`` can; else the mean is
``q(supp p) − 1``, and so is the bias per unit of the coefficient. Its variance is ``χ²(q‖p)``, astronomical for
strings of any length: typical strings have ``g ≈ −1`` and a few that are hardly ever drawn make up for
them. These estimators are here because they are in use; beyond short strings prefer Rao-Blackwell.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from klkit.estimators.folds import deal
from klkit.estimators.statistics import weighted
from klkit.estimators.tally import Statistics
from klkit.numerics import excess

FOLDS = 5


def k3_string(statistics: Statistics) -> NDArray[np.float64]:
    """``U + exp(−U) − 1`` with ``U = log p(y) − log q(y)``: non-negative string by string, in nats.

    A string that ``q`` prefers by more than 709 nats overflows to infinity in double precision, as the
    quantity all but does. For strings of another law ``μ`` the term is weighted by ``p(y)/μ(y)``.

    Shapes: statistics of ``n`` strings to ``(n,)``.

    Source: J. Schulman, Approximating KL Divergence (2020), http://joschu.net/blog/kl-approx.html.

    Example:
        >>> from klkit.estimators.statistics import score
        >>> from klkit.models.automaton import coin
        >>> from klkit.sampling.ancestral import sample
        >>> p, q = coin(end=0.5), coin(end=0.25)
        >>> x = sample(p, [p.context(None)] * 4, max_tokens=50, seed=0).sequences
        >>> bool((k3_string(score(p, q, x)) >= 0).all())
        True
    """
    strings = statistics.strings()
    return weighted(strings.weight, excess(-strings.log_ratio)).numpy()


def cv_string(statistics: Statistics) -> NDArray[np.float64]:
    """``U + α g`` with ``U = log p(y) − log q(y)``, ``g = exp(−U) − 1`` and α fitted on other strings, in nats.

    The coefficient of least variance is ``α = −Cov(U, g)/Var(g)``. Fitted on the strings it is applied to it
    would bias the estimate; fitted on the other folds of clusters it cannot. With nothing to fit it on (a
    single cluster, or a variate that does not vary or overflows) α is 0, plain Monte Carlo.

    Shapes: statistics of ``n`` strings to ``(n,)``.

    Example:
        >>> from klkit.estimators.statistics import score
        >>> from klkit.models.automaton import coin
        >>> from klkit.sampling.ancestral import sample
        >>> p, q = coin(end=0.5), coin(end=0.25)
        >>> x = sample(p, [p.context(None)] * 4, max_tokens=50, seed=0).sequences
        >>> cv_string(score(p, q, x)).shape
        (4,)
    """
    strings = statistics.strings()
    value, variate = (weighted(strings.weight, x) for x in (strings.log_ratio, torch.expm1(-strings.log_ratio)))
    fold = torch.from_numpy(deal(strings.cluster.numpy(), FOLDS, seed=0))
    adjusted = value.clone()
    for i in range(FOLDS):
        alpha = least_variance(value[fold != i], variate[fold != i])
        if alpha != 0:
            adjusted[fold == i] += alpha * variate[fold == i]
    return adjusted.numpy()


def least_variance(value: Float[Tensor, " n"], variate: Float[Tensor, " n"]) -> float:
    """``−Cov(value, variate)/Var(variate)``, or 0 where that is undefined.

    Example:
        >>> import torch
        >>> least_variance(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 2.0, 0.0]))
        0.5
    """
    finite = value.isfinite()
    value, variate = value[finite], variate[finite]
    if len(value) < 2 or not variate.isfinite().all() or variate.max() == variate.min():
        return 0.0
    # In units of its largest entry, or its square would overflow long before itself.
    unit = variate.abs().max()
    centred = variate / unit - (variate / unit).mean()
    return float(-(value @ centred) / (centred @ centred) / unit)
