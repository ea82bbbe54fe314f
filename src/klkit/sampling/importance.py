"""Strings from another law ``mu`` than ``p``, an older policy say, and the weights that make up for it.

For any function ``D_n`` of the prefix before decision ``n``, such as the exact next-token divergence,
``E_p[Σ_n D_n] = E_mu[Σ_n w_n D_n]`` with ``w_n = Π_{i<n} p(y_i|y_<i) / mu(y_i|y_<i)``. Only earlier
tokens enter the weight. A function of the whole string needs the ratio of all its decisions instead,
which is larger and noisier.

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
    contexts: Sequence[Int[Tensor, " c"]],
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
        >>> weighted = statistics.per_string(prefix_weights(statistics) * statistics.rows.kl).mean()
        >>> round(float(weighted), 2)  # KL(p‖q) = log(4/3) = 0.288
        0.29
    """
    drawn = sample(mu, contexts, max_tokens=max_tokens, seed=seed, prompt=prompt, replicate=replicate, cluster=cluster)
    return replace(drawn.sequences, sampler_logp=drawn.logp)


def log_ratios(statistics: TokenStatistics) -> Float[Tensor, "n l"]:
    """``log p(y_n|y_<n) − log mu(y_n|y_<n)`` string by string, 0 past a string's end; fp64, nats.

    Raises:
        ValueError: the strings carry no ``sampler_logp``.
    """
    x = statistics.x
    if x.sampler_logp is None:
        raise ValueError(
            f"expected the log-probabilities under which {len(x)} strings were drawn, got sampler_logp None, which "
            f"means they were drawn from p: use them unweighted, or draw with klkit.sampling.importance.from_policy"
        )
    ratios = torch.zeros(len(x), int(x.lengths.max()) if len(x) else 0, dtype=torch.float64)
    ratios[x.row(), x.position()] = statistics.rows.logp.double() - x.sampler_logp.double().to("cpu")
    return ratios


def log_prefix_weights(statistics: TokenStatistics) -> Float[Tensor, " m"]:
    """``log w_n = Σ_{i<n} (log p(y_i|y_<i) − log mu(y_i|y_<i))``; ``-inf`` once ``p`` excludes the prefix.

    Raises:
        ValueError: the strings carry no ``sampler_logp``.
    """
    x = statistics.x
    earlier = torch.nn.functional.pad(log_ratios(statistics), (1, 0)).cumsum(1)
    return earlier[x.row(), x.position()]


def prefix_weights(statistics: TokenStatistics) -> Float[Tensor, " m"]:
    """``w_n = Π_{i<n} p(y_i|y_<i) / mu(y_i|y_<i)``: the weight of each decision's prefix, 1 for the first.

    ``p`` of the statistics is the law of interest, ``mu`` the one that drew the strings.

    Raises:
        ValueError: the strings carry no ``sampler_logp``.
    """
    return log_prefix_weights(statistics).exp()


def string_weights(statistics: TokenStatistics) -> Float[Tensor, " n"]:
    """``W = Π_n p(y_n|y_<n) / mu(y_n|y_<n)`` over all decisions of each string.

    A string cut at the length limit has the weight of what was drawn of it, so the weighted law is
    that of ``p`` cut at the same limit.

    Raises:
        ValueError: the strings carry no ``sampler_logp``.
    """
    return log_ratios(statistics).sum(1).exp()


def effective_sample_size(statistics: TokenStatistics) -> Float[Tensor, " l"]:
    """``(Σ w)² / Σ w²`` of the prefix weights at each position, over the strings that reach it.

    How many strings from ``p`` the weighted ones are worth there (Kong, 1992). It falls with the
    position, and 0 means that ``p`` excludes every prefix that was drawn.

    Raises:
        ValueError: the strings carry no ``sampler_logp``.
    """
    x = statistics.x
    weights = torch.full((len(x), int(x.lengths.max()) if len(x) else 0), -torch.inf, dtype=torch.float64)
    weights[x.row(), x.position()] = log_prefix_weights(statistics)
    total, square = weights.logsumexp(0), (2 * weights).logsumexp(0)
    return torch.where(square > -torch.inf, 2 * total - square, -torch.inf).exp()
