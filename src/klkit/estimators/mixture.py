"""Symmetric divergences: a run of strings from ``p`` and one from ``q``, put together.

Both halves are taken at the level of strings. The Jensen-Shannon divergence of two laws over strings
is not the sum of those of their next-token laws; each next-token law has to be compared with that of
the mixture *given the prefix*, in which the two models count by how likely they make the prefix.
"""

from __future__ import annotations

import numpy as np

from klkit.estimators.tally import Statistics
from klkit.results import Estimate


def jensen_shannon(forward: Statistics, backward: Statistics, *, estimand: str = "S") -> Estimate:
    """``JS(p, q) = ½ KL(P ‖ M) + ½ KL(Q ‖ M)`` of the laws over strings, ``M = ½P + ½Q``, in nats: at most log 2.

    Each half is Rao-Blackwellised: ``Σ_n KL(p(·|y_<n) ‖ m(·|y_<n))`` over strings from ``p``, where
    ``m = w p + (1 − w) q`` and ``w`` is the posterior probability that the prefix is ``p``'s.

    Args:
        forward: statistics of ``(p, q)`` over strings from ``p``, collected with ``mixture=True``.
        backward: statistics of ``(q, p)`` over strings from ``q``, likewise.
        estimand: ``"S"`` per response, or ``"R"``: per token of a response from ``M``.

    Raises:
        ValueError: statistics without the mixture's terms, or halves that do not match (see :func:`combine`).

    Source: J. Lin (1991), Divergence Measures Based on the Shannon Entropy.

    Example:
        >>> from klkit.estimators.statistics import score
        >>> from klkit.models.automaton import coin
        >>> from klkit.sampling.ancestral import sample
        >>> p, q = coin(end=0.5), coin(end=0.25)
        >>> x, y = (sample(a, [a.context(None)] * 50, max_tokens=60, seed=0, prompt=[0] * 50).sequences for a in (p, q))
        >>> js = jensen_shannon(score(p, q, x, mixture=True), score(q, p, y, mixture=True))
        >>> 0 < js.value < 0.6931
        True
    """
    halves = []
    for statistics, direction in ((forward, "KL(p‖m)"), (backward, "KL(q‖m)")):
        strings = statistics.strings()
        if strings.mixture is None:
            raise ValueError(
                "expected statistics with the terms of the mixture for both models' strings, got none; "
                "collect them with mixture=True"
            )
        halves.append(
            Estimate(
                method="rb",
                divergence="kl",
                direction=direction,
                estimand=estimand,
                contributions=strings.mixture.numpy(),
                weights=np.ones(len(strings)) if estimand == "S" else strings.decisions.numpy(),
                cluster=strings.cluster.numpy(),
                truncated=strings.truncated,
                prompts=strings.prompts,
            )
        )
    return combine(*halves, share=0.5, divergence="js", direction="JS(p, q)")


def jeffreys(forward: Estimate, backward: Estimate) -> Estimate:
    """``J(p, q) = KL(p‖q) + KL(q‖p)`` from an estimate of each, in nats; infinite if either is.

    Per token (estimand ``"R"``) the sum is over the mean length of a response from ``½P + ½Q``.

    Raises:
        ValueError: the two estimates do not match (see :func:`combine`).

    Source: H. Jeffreys (1946), An Invariant Form for the Prior Probability in Estimation Problems.

    Example:
        >>> import numpy as np
        >>> half = Estimate("rb", "kl", "KL(p‖q)", "S", np.array([1.0, 3.0]), np.ones(2), np.arange(2))
        >>> jeffreys(half, half).value
        4.0
    """
    return combine(forward, backward, share=1.0, divergence="jeffreys", direction="J(p, q)")


def combine(forward: Estimate, backward: Estimate, *, share: float, divergence: str, direction: str) -> Estimate:
    """``share · (forward + backward)`` of two runs over the same clusters.

    Strings are scaled so that the totals of a cluster hold both runs' part in the sum. A prompt that is
    hard in both directions, or randomness that both runs share, then counts as it should for the standard
    error.

    Raises:
        ValueError: different methods or estimands, or clusters that do not hold the same share of both runs.
    """
    if forward.method != backward.method or forward.estimand != backward.estimand or forward.estimand == "F":
        raise ValueError(
            f"expected two estimates by one method of one estimand, S or R, got {forward.method}/{forward.estimand} "
            f"and {backward.method}/{backward.estimand}; strings given from outside are neither p's nor q's"
        )
    runs, n = (forward, backward), forward.n + backward.n
    (labels, counts), (others, other_counts) = (np.unique(run.cluster, return_counts=True) for run in runs)
    if not (np.array_equal(labels, others) and np.array_equal(counts * backward.n, other_counts * forward.n)):
        raise ValueError(
            f"expected both runs to spread alike over the same clusters, got {forward.n} strings in "
            f"{forward.clusters} clusters and {backward.n} in {backward.clusters}; draw as many strings for each "
            f"prompt from q as from p"
        )
    return Estimate(
        method=forward.method,
        divergence=divergence,
        direction=direction,
        estimand=forward.estimand,
        contributions=np.concatenate([share * n / run.n * run.contributions for run in runs]),
        weights=np.concatenate([0.5 * n / run.n * run.weights for run in runs]),
        cluster=np.concatenate([run.cluster for run in runs]),
        truncated=sum(run.truncated * run.n for run in runs) / n,
        infinite=forward.infinite + backward.infinite,
        notes=tuple(dict.fromkeys(forward.notes + backward.notes)),
        unit=forward.unit,
        spread=max(run.spread for run in runs),
        prompts=forward.prompts,
    )
