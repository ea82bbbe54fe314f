"""The Rao-Blackwell estimator: each log-ratio replaced by its exact mean given the prefix.

The strings are still sampled, but no token's own luck is left in them. That lowers the variance of
every decision. It does not always lower that of the sum: see ``docs/how-to-choose.md`` for models
on which Monte Carlo wins, and ``klkit.estimators.martingale`` for the estimator that loses to neither.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from klkit.estimators.tally import Statistics


def rao_blackwell(statistics: Statistics) -> NDArray[np.float64]:
    """``Σ_n w_{<n} Σ_a p(a|y_<n) log(p(a|y_<n)/q(a|y_<n))`` of each string, in nats: unbiased and non-negative.

    The sum runs over all decisions, the one to end included. ``w_{<n} = Π_{i<n} p(y_i)/μ(y_i)`` is 1 if the strings
    are ``p``'s own; for strings of another law ``μ`` it weighs the prefix alone, since the token drawn after it does
    not enter. Infinite as soon as one prefix lets ``p`` choose what ``q`` excludes, drawn or not.

    Shapes: statistics of ``n`` strings to ``(n,)``.

    Source: A. Amini, T. Vieira and R. Cotterell (2025), Better Estimation of the KL Divergence Between Language
    Models, arXiv 2504.10637.

    Example:
        >>> from klkit.estimators.statistics import score
        >>> from klkit.models.automaton import coin
        >>> from klkit.sampling.ancestral import sample
        >>> p, q = coin(end=0.5), coin(end=0.25)
        >>> x = sample(p, [p.context(None)] * 4, max_tokens=50, seed=0).sequences
        >>> (rao_blackwell(score(p, q, x)) / x.lengths.numpy()).round(4).tolist()
        [0.1438, 0.1438, 0.1438, 0.1438]
    """
    return statistics.strings().rb.numpy()
