"""Estimators that read nothing but the log-ratios of the tokens that were drawn."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from klkit.estimators.tally import Statistics


def monte_carlo(statistics: Statistics) -> NDArray[np.float64]:
    """``U = log p(y) − log q(y)`` of each string, in nats: unbiased for ``KL(p‖q)``, of either sign.

    For strings of another law ``μ`` it is ``Σ_n w_{≤n} u_n`` with ``w_{≤n} = Π_{i≤n} p(y_i)/μ(y_i)``: a log-ratio
    needs the weight of the string as far as its own token only.

    Shapes: statistics of ``n`` strings to ``(n,)``. The mean is finite as long as no token that ``q`` excludes
    was drawn, even where the divergence is infinite.

    Example:
        >>> from klkit.estimators.statistics import score
        >>> from klkit.models.automaton import coin
        >>> from klkit.sampling.ancestral import sample
        >>> p, q = coin(end=0.5), coin(end=0.25)
        >>> x = sample(p, [p.context(None)] * 4, max_tokens=50, seed=0).sequences
        >>> monte_carlo(score(p, q, x)).shape
        (4,)
    """
    return statistics.strings().mc.numpy()


def k3_token(statistics: Statistics) -> NDArray[np.float64]:
    """``Σ_n (u_n + exp(−u_n) − 1)``, ``u_n = log p(y_n) − log q(y_n)``: what RLHF trainers log as "k3", in nats.

    Every term is non-negative, and its mean given the prefix is the divergence of that decision if ``p`` can
    do whatever ``q`` can. Else it falls short by ``q``'s mass on the tokens that ``p`` excludes.
    Strings of another law are weighted as in :func:`monte_carlo`.

    Shapes: statistics of ``n`` strings to ``(n,)``.

    Source: J. Schulman, Approximating KL Divergence (2020), http://joschu.net/blog/kl-approx.html, applied to
    each token.

    Example:
        >>> from klkit.estimators.statistics import score
        >>> from klkit.models.automaton import coin
        >>> from klkit.sampling.ancestral import sample
        >>> p, q = coin(end=0.5), coin(end=0.25)
        >>> x = sample(p, [p.context(None)] * 4, max_tokens=50, seed=0).sequences
        >>> bool((k3_token(score(p, q, x)) >= 0).all())
        True
    """
    return statistics.strings().k3.numpy()
