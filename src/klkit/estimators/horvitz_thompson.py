"""The Horvitz-Thompson estimator: every distinct string once, weighted by its chance to be drawn at all."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from klkit.estimators.statistics import weighted
from klkit.estimators.strings import StringStatistics
from klkit.estimators.tally import Statistics
from klkit.numerics import log1mexp


def horvitz_thompson(statistics: Statistics) -> NDArray[np.float64]:
    """``Σ p(y) log(p(y)/q(y)) / (1 − (1 − p(y))^M)`` over the distinct strings of a prompt's ``M`` draws, in nats.

    Unbiased for ``KL(p‖q)`` if the draws of a prompt are independent. Without repeated strings it is Monte
    Carlo; it pays for short or peaked responses. A string cut at the length limit is a string of
    the truncated process like any other. For strings of another law ``μ`` the chance is ``1 − (1 − μ(y))^M``.

    One number a prompt has no error bar, so it is returned as the jackknife pseudo-values
    ``θ + (M − 1)(mean of all θ₍₋ⱼ₎ − θ₍₋ᵢ₎)``: their mean is the estimate ``θ`` itself, and their spread its jackknife
    variance, which does not underestimate on average (B. Efron and C. Stein, 1981).

    Shapes: statistics of ``n`` strings to ``(n,)``.

    Source: D. G. Horvitz and D. J. Thompson (1952), A generalization of sampling without replacement.

    Example:
        >>> from klkit.estimators.statistics import score
        >>> from klkit.models.automaton import coin
        >>> from klkit.sampling.ancestral import sample
        >>> p, q = coin(end=0.5), coin(end=0.25)
        >>> x = sample(p, [p.context(None)] * 4, prompt=[0] * 4, max_tokens=50, seed=0).sequences
        >>> horvitz_thompson(score(p, q, x)).shape
        (4,)
    """
    strings = statistics.strings()
    log_ratio, log_p, log_drawn = strings.log_ratio, strings.logp, strings.log_drawn
    prompt = torch.unique(strings.prompt, return_inverse=True)[1]
    draws = prompt.bincount()[prompt]
    identity = distinct(strings)
    copies = identity.bincount()[identity]
    term = weighted((log_p - log_inclusion(log_drawn, draws)).exp(), log_ratio)
    estimate = sum_by(prompt, term / copies)[prompt]
    # Leaving a draw out removes a string only if it was the only copy of it.
    fewer = weighted((log_p - log_inclusion(log_drawn, (draws - 1).clamp(min=1))).exp(), log_ratio)
    removed = torch.where((copies == 1) & (draws > 1), (draws - 1) * fewer, 0.0)
    spread = removed - (sum_by(prompt, removed)[prompt] / draws)
    return torch.where(estimate.isfinite(), estimate + spread, estimate).numpy()


def log_inclusion(log_p: Float[Tensor, " n"], draws: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """``log(1 − (1 − p)^M)``: the log-probability that a string of probability ``p`` is among ``M`` draws.

    Example:
        >>> import torch
        >>> log_inclusion(torch.tensor([0.5], dtype=torch.float64).log(), torch.tensor([2])).exp().tolist()
        [0.75]
        >>> log_inclusion(torch.tensor([-900.0], dtype=torch.float64), torch.tensor([1])).tolist()
        [-900.0]
    """
    # Below e^-50 the second draw of a string is out of the question, and log p is all that is left to keep.
    rare = log_p < -50
    common = torch.where(rare, -1.0, log_p)
    return torch.where(rare, log_p + draws.double().log(), log1mexp(draws * log1mexp(common)))


def distinct(strings: StringStatistics) -> Int[Tensor, " n"]:
    """A number for each string that equal completions of one prompt share, counted from 0."""
    keys = torch.cat([strings.prompt[:, None], strings.identity], dim=1)
    numbers: Tensor = torch.unique(keys, dim=0, return_inverse=True)[1]
    return numbers


def sum_by(group: Int[Tensor, " n"], values: Float[Tensor, " n"]) -> Float[Tensor, " g"]:
    """Sum ``values`` over the members of each group."""
    return torch.zeros(int(group.max()) + 1, dtype=values.dtype).index_add_(0, group, values)
