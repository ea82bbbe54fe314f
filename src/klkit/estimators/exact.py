"""Exact answers for pairs of automata: the divergence, and the variance of every estimator of it.

Expectations of sums along the chain of state pairs solve ``(I − M) V = f``, with ``M`` the
probabilities of moving between pairs without ending. With a length limit the same recursion is
unrolled in time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from klkit.estimators.product import LinearSystem, Product, couple
from klkit.models.base import LanguageModel
from klkit.models.wrap import as_automaton
from klkit.sequences import Content

SUMS = ("log_ratio", "kl", "decisions", "surprisal", "entropy", "ending")
"""Sums over a string's decisions whose joint moments are computed: ``Σ u_n`` (Monte Carlo), ``Σ D_n``
(Rao-Blackwell), the number of decisions, ``Σ −log p(y_n)``, ``Σ H(p_n)``, and the end-token martingale
``Σ 1[y_n ≠ end] − (1 − p_n(end))``."""


@dataclass(frozen=True, slots=True, eq=False)
class ExactDivergence:
    """``KL(p‖q)`` of two automata and the exact moments of its estimators, one string at a time.

    Attributes:
        mean: expectation of each of ``SUMS``, ``(f,)``.
        covariance: their covariances over strings, ``(f, f)``; NaN beside an infinite divergence.
        truncated: probability that a string is cut at the length limit.
        pairs: pairs of states that strings of ``p`` can reach.
        max_tokens: the length limit of the strings, or None.
    """

    mean: Float[Tensor, " f"]
    covariance: Float[Tensor, "f f"]
    truncated: float
    pairs: int
    max_tokens: int | None

    @property
    def value(self) -> float:
        """``KL(p‖q)`` per string, nats; infinite when ``q`` excludes a string of ``p``."""
        return float(self.mean[SUMS.index("kl")])

    @property
    def decisions(self) -> float:
        """Expected decisions in a string, the end token included."""
        return float(self.mean[SUMS.index("decisions")])

    @property
    def rate(self) -> float:
        """``KL(p‖q)`` per token: the ratio of the two expectations."""
        return self.value / self.decisions

    @property
    def entropy(self) -> float:
        """Entropy of ``p`` over strings, nats."""
        return float(self.mean[SUMS.index("entropy")])

    def moment(self, a: str, b: str) -> float:
        """Covariance over strings of two of ``SUMS``; with ``a == b`` a variance."""
        return float(self.covariance[SUMS.index(a), SUMS.index(b)])

    @property
    def variance_mc(self) -> float:
        """Variance of one Monte Carlo contribution ``Σ u_n``."""
        return self.moment("log_ratio", "log_ratio")

    @property
    def variance_rb(self) -> float:
        """Variance of one Rao-Blackwell contribution ``Σ D_n``."""
        return self.moment("kl", "kl")

    @property
    def alpha(self) -> float:
        """The best ``α`` in ``U − α (U − C)``: 0 is Monte Carlo, 1 is Rao-Blackwell (and the value when both agree)."""
        noise = self.variance_mc - 2 * self.moment("log_ratio", "kl") + self.variance_rb
        return (self.variance_mc - self.moment("log_ratio", "kl")) / noise if noise else 1.0

    @property
    def variance_combined(self) -> float:
        """Variance of one contribution of the best combination: never above either estimator's."""
        a = self.alpha
        pair = self.covariance[:2, :2]
        weights = torch.tensor([1 - a, a], dtype=torch.float64)
        return max(float(weights @ pair @ weights), 0.0) if not math.isnan(a) else math.nan

    def variance_rate(self, numerator: str = "kl") -> float:
        """Variance of one string's share in the ratio ``Σ numerator / Σ decisions``, to first order."""
        i, j = SUMS.index(numerator), SUMS.index("decisions")
        ratio = self.mean[i] / self.mean[j]
        c = self.covariance
        return float((c[i, i] - 2 * ratio * c[i, j] + ratio**2 * c[j, j]) / self.mean[j] ** 2)


@dataclass(frozen=True, slots=True, eq=False)
class PositionOptimum:
    """The best coefficient for each position in ``U − Σ λ_n (u_n − D_n)``.

    Attributes:
        coefficients: ``λ_n``, ``(t,)``; 1 where ``u_n`` and ``D_n`` cannot differ.
        variance: variance of one contribution with these coefficients.
    """

    coefficients: Float[Tensor, " t"]
    variance: float


def exact(
    p: LanguageModel, q: LanguageModel, *, prompt: Content | None = None, max_tokens: int | None = None
) -> ExactDivergence:
    """``KL(p‖q) = Σ_y p(y) (log p(y) − log q(y))`` over all strings, with every estimator's variance.

    Args:
        prompt: what both models continue.
        max_tokens: compare the processes cut at this many decisions instead of whole strings.

    Raises:
        NotTractable: a model is not an automaton (transformed ones are), or the system is too large.
        VocabularyMismatch: the models do not choose from the same tokens.
        ValueError: strings of ``p`` may never end and there is no ``max_tokens``.
        ArithmeticError: strings are so long that the linear system cannot be solved accurately.

    Example:
        >>> from klkit.models.automaton import coin
        >>> answer = exact(coin(end=0.5), coin(end=0.25))
        >>> round(answer.value, 6), round(answer.variance_mc, 4), round(answer.variance_rb, 4)
        (0.287682, 0.3288, 0.0414)
    """
    chain = couple(p, q, prompt=prompt, max_tokens=max_tokens)
    sums = _sums(chain)
    expected = (chain.p[..., None] * sums).sum(1)
    # Both have this expectation; the difference form is the accurate one.
    expected[:, 0] = expected[:, 1] = chain.kl
    m = chain.matrix()
    if max_tokens is None:
        system = LinearSystem(chain)
        value = system.backward(expected)
        covariance = system.backward(_innovations(chain, sums, value, value).flatten(1))[0]
        alive = 0.0
    else:
        value = torch.zeros_like(expected)
        moments = torch.zeros(len(expected), len(SUMS) ** 2, dtype=torch.float64)
        survival = torch.ones(len(expected), 1, dtype=torch.float64)
        for _ in range(max_tokens):
            longer = expected + m @ value
            moments = _innovations(chain, sums, longer, value).flatten(1) + m @ moments
            value, survival = longer, m @ survival
        covariance, alive = moments[0], float(survival[0])
    mean, covariance = value[0].clone(), covariance.reshape(len(SUMS), len(SUMS)).clone()
    if chain.infinite:
        mean[:2] = torch.inf
        covariance[:2] = covariance[:, :2] = torch.nan
    return ExactDivergence(mean, covariance, alive, len(chain.p), max_tokens)


def exact_by_position(
    p: LanguageModel, q: LanguageModel, *, prompt: Content | None = None, max_tokens: int | None = None
) -> PositionOptimum:
    """The best ``λ_n`` for each position, ``Cov(U, m_n) / Var(m_n)`` with ``m_n = u_n − D_n``.

    The ``m_n`` are uncorrelated, so each position has its own optimum. Without ``max_tokens``
    positions go on until a string gets so far with probability below 1e-16.

    Raises:
        NotTractable, VocabularyMismatch, ValueError: as :func:`exact`; ValueError also when
            ``KL(p‖q)`` is infinite.

    Example:
        >>> from klkit.models.automaton import coin
        >>> best = exact_by_position(coin(end=0.5), coin(end=0.25), max_tokens=3)
        >>> [round(x, 4) for x in best.coefficients.tolist()]
        [0.8036, 0.8691, 1.0]
    """
    chain = couple(p, q, prompt=prompt, max_tokens=max_tokens)
    if chain.infinite:
        raise ValueError(
            "expected a finite KL(p‖q), got an infinite one; no combination of its estimators has a variance"
        )
    m = chain.matrix()
    d = chain.kl[:, None]
    values = [torch.zeros_like(d)]
    if max_tokens is None:
        values = [LinearSystem(chain).backward(d)]
    else:
        for _ in range(max_tokens):
            values.append(d + m @ values[-1])
    noise = chain.ratio - d
    mass = torch.zeros_like(d)
    mass[0] = 1.0
    coefficients: list[float] = []
    variance = 0.0
    while float(mass.sum()) > 1e-16 and (max_tokens is None or len(coefficients) < max_tokens):
        now = values.pop() if max_tokens is not None else values[0]
        later = values[-1][:, 0]
        change = chain.ratio + torch.where(chain.moves, later[chain.after], 0.0) - now
        weight = mass * chain.p
        square = float((weight * noise**2).sum())
        best = float((weight * change * noise).sum()) / square if square else 1.0
        variance += float((weight * (change - best * noise) ** 2).sum())
        coefficients.append(best)
        mass = m.t() @ mass
    return PositionOptimum(torch.tensor(coefficients, dtype=torch.float64), variance)


def exact_gradient(p: LanguageModel, q: LanguageModel, *, prompt: Content | None = None) -> Float[Tensor, "s v"]:
    """``∂KL(p‖q)/∂z`` for a table ``z`` of logits, one row a state of ``p``.

    ``Σ_j c(i, j) p_i(a) (log p_i(a)/q_j(a) + V(after) − V(i, j))`` with ``c`` the expected visits
    and ``V`` the expected remaining divergence.

    Raises:
        NotTractable, VocabularyMismatch, ValueError: as :func:`exact_by_position`.

    Example:
        >>> from klkit.models.automaton import coin
        >>> round(float(exact_gradient(coin(end=0.5), coin(end=0.01))[0, 1]), 6)
        0.683097
    """
    chain = couple(p, q, prompt=prompt, max_tokens=None)
    if chain.infinite:
        raise ValueError("expected a finite KL(p‖q), got an infinite one; it has no gradient")
    system = LinearSystem(chain)
    value = system.backward(chain.kl[:, None])
    later = torch.where(chain.moves, value[:, 0][chain.after], 0.0)
    parts = system.visits()[:, None] * chain.p * (chain.ratio + later - value)
    gradient = torch.zeros_like(as_automaton(p).log_probabilities)
    return gradient.index_add_(0, chain.states[:, 0], parts)


def _sums(chain: Product) -> Float[Tensor, "s v f"]:
    """What each token in each pair adds to each of ``SUMS``."""
    entropy = (chain.p * chain.surprisal).sum(-1, keepdim=True)
    ending = chain.moves.double() - (chain.p * chain.moves).sum(-1, keepdim=True)
    columns = (chain.ratio, chain.kl[:, None], torch.ones(1, 1), chain.surprisal, entropy, ending)
    return torch.stack([column.double().expand(chain.p.shape) for column in columns], -1)


def _innovations(chain: Product, sums: Tensor, now: Tensor, later: Tensor) -> Float[Tensor, "s f f"]:
    """Covariance of what one decision reveals about each total.

    By the law of total variance the covariance of the totals is the expected sum of these along the
    string: no difference of large second moments is ever formed.
    """
    news = sums + chain.moves[..., None] * later[chain.after] - now[:, None]
    return torch.einsum("sv,svf,svg->sfg", chain.p, news, news)
