"""Strings from another law ``mu`` than ``p``, an older policy say, and what they are worth.

For any function ``D_n`` of the prefix before decision ``n``, such as the exact next-token divergence,
``E_p[Σ_n D_n] = E_mu[Σ_n w_n D_n]`` with ``w_n = Π_{i<n} p(y_i|y_<i) / mu(y_i|y_<i)``. Only earlier
tokens enter the weight. A function of the whole string needs the ratio of all its decisions instead,
which is noisier. :class:`klkit.estimators.statistics.TokenStatistics` has these weights
(``prefix_weight``, ``string_weight``) once the strings carry ``sampler_logp``.

The identities need ``mu`` to give mass to whatever ``p`` does. Top-k or top-p sampling does not, and
neither do weights show it: what ``mu`` never draws is missing from every estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from klkit.estimators.statistics import TokenStatistics
from klkit.models.base import LanguageModel
from klkit.sampling.ancestral import sample
from klkit.sequences import Sequences


def from_policy(
    mu: LanguageModel,
    contexts: Sequence[Int[Tensor, " _c"]],
    *,
    max_tokens: int,
    seed: int,
    prompt: Sequence[int] | None = None,
    replicate: Sequence[int] | None = None,
    cluster: Sequence[int] | None = None,
) -> Sequences:
    """Draw strings ``y ~ mu`` and record ``log mu`` of every decision as ``sampler_logp``.

    The arguments are those of :func:`klkit.sampling.ancestral.sample`. Trunk vectors are not returned:
    they belong to ``mu``, and ``p`` has to read the strings anyway.

    Example:
        >>> from klkit.estimators.statistics import score
        >>> from klkit.models.automaton import coin
        >>> p, q, mu = coin(end=0.5), coin(end=0.25), coin(end=0.4)
        >>> x = from_policy(mu, [mu.context(None)] * 500, max_tokens=60, seed=0)
        >>> statistics = score(p, q, x)
        >>> weighted = statistics.per_string(statistics.prefix_weight() * statistics.rows.kl).mean()
        >>> round(float(weighted), 2)  # KL(p‖q) = log(4/3) = 0.288
        0.29
    """
    drawn = sample(mu, contexts, max_tokens=max_tokens, seed=seed, prompt=prompt, replicate=replicate, cluster=cluster)
    return replace(drawn.sequences, sampler_logp=drawn.logp)


def effective_sample_size(statistics: TokenStatistics) -> Float[Tensor, " l"]:
    """``(Σ w_n)² / Σ w_n²`` at each position ``n``, over the strings that have a decision there.

    How many strings from ``p`` the weighted ones are worth at that position (Kong, 1992, A note on
    importance sampling using standardized weights). It tends to fall along the string; 0 means that
    ``p`` excludes every prefix that was drawn.

    Example:
        >>> from klkit.estimators.statistics import score
        >>> from klkit.models.automaton import coin
        >>> p = coin(end=0.5)
        >>> x = from_policy(p, [p.context(None)] * 8, max_tokens=1, seed=0)
        >>> effective_sample_size(score(p, p, x)).round().tolist()
        [8.0]
    """
    x = statistics.x
    weights = torch.full((len(x), int(x.lengths.max()) if len(x) else 0), -torch.inf, dtype=torch.float64)
    weights[x.row(), x.position()] = statistics.before(statistics.importance_ratio())
    # In logarithms: the ratio is moderate even where the weights themselves would overflow.
    total, square = weights.logsumexp(0), (2 * weights).logsumexp(0)
    return torch.where(square > -torch.inf, 2 * total - square, -torch.inf).exp()
