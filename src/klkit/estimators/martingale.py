"""The headline estimator: Rao-Blackwell minus cross-fitted martingale control variates.

The Rao-Blackwell sum ``C = Σ_n D_n`` of a string varies because its prefixes do. Were the expected divergence still to
come, ``V(prefix)``, known, subtracting its innovations ``V(y_≤n) − E[V(y_≤n)|y_<n]`` would leave nothing of that. Here
``V`` is fitted: ``V(y_≤n) ≈ 1[y_n ≠ end] B_nᵀα + Z_nᵀβ``, the first part being what ending the string forgoes and the
second what the token itself says (:mod:`klkit.estimators.variates`).

Three things make few strings enough. The fit is made decision by decision against what came *after* each, not string
by string against the total. The coefficient ``α`` is learnt from the strings that went on, weighted by the chance to
end, rather than from the few that ended there. And returns are fitted net of the variates' own later noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from klkit.estimators.folds import FOLDS, Array, Folds, Moments, deal
from klkit.estimators.statistics import TokenStatistics
from klkit.estimators.strings import StringStatistics
from klkit.estimators.tally import Statistics, Tally

FEWEST_STRINGS = 16
"""Below this many strings (or four clusters) nothing is fitted."""

FEWEST_FOLDS = 4


@dataclass(frozen=True, slots=True)
class Candidate:
    """Which variates to use beside the end token's, and how strongly to hold their coefficients at 0.

    Attributes:
        name: what :class:`Fit` calls it.
        others: how many of the other innovations, as :func:`klkit.estimators.variates.variates` orders them; or all.
        prior: ridge penalty, as the number of strings whose evidence for a coefficient of 0 it weighs.
    """

    name: str
    others: int | None
    prior: float = 0.0

    def penalty(self, c: int, e: int, strings: Array) -> Array:
        """The ridge on each of the first columns, which are those used; none on the end token's ``e``."""
        used = c if self.others is None else min(c, e * (1 + self.others))
        ones = np.concatenate([np.zeros(e), np.ones(used - e)])
        return ones * (self.prior / strings[..., None])


CANDIDATES = (
    Candidate("end", 0),
    Candidate("end, log-ratio", 1, 3.0),
    Candidate("all, ridge 1000", None, 1000.0),
    Candidate("all, ridge 300", None, 300.0),
    Candidate("all, ridge 100", None, 100.0),
)
"""Few and cautious: on natural text, longer or bolder lists lost more by choosing than they offered to choose."""

NONE = "none"
"""Plain Rao-Blackwell, which every candidate has to beat."""


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """Contributions and how they came about.

    Attributes:
        contributions: one a string, nats; their mean is the estimate, ``(n,)``.
        chosen: name of the candidate that each fold used.
        coefficients: those that each fold applied (fitted on the others), ``(folds, c)``.
        ratio_rb: estimated variance within prompts, relative to Rao-Blackwell's; NaN if that is 0 or infinite.
        ratio_mc: the same relative to Monte Carlo's.
        notes: why nothing was fitted, or with fewer variates, if so.
        spread: by how much errors exceed what the spread of the contributions says, see :func:`widening`.
    """

    contributions: Array
    chosen: tuple[str, ...]
    coefficients: Array
    ratio_rb: float
    ratio_mc: float
    notes: tuple[str, ...] = ()
    spread: float = 1.0


def rb_cv(statistics: Statistics, *, per_token: bool = False) -> Array:
    """``Σ_n D_n − Σ_n Z_nᵀθ`` of each string, in nats: Rao-Blackwell less cross-fitted mean-zero terms.

    Unbiased like Rao-Blackwell, because each string's coefficients come from other strings; unlike it, a
    contribution may be negative. See :func:`fit`, which also says what was fitted.

    Shapes: statistics of ``n`` strings to ``(n,)``.
    """
    return fitted(statistics, per_token=per_token).contributions


def fitted(statistics: Statistics, *, per_token: bool = False) -> Fit:
    """:func:`fit` of one batch, or of a run whose strings were dealt into folds as they came."""
    if isinstance(statistics, Tally):
        return fit_folds(statistics.strings(), statistics.folds(), per_token=per_token)
    return fit(statistics, per_token=per_token)


def fit(
    statistics: TokenStatistics,
    *,
    per_token: bool = False,
    folds: int = FOLDS,
    fewest: int = FEWEST_STRINGS,
    seed: int = 0,
) -> Fit:
    """Fit the control variates of ``Σ_n D_n − Σ_n Z_nᵀθ`` by nested cross-fitting.

    Clusters are dealt into ``folds``. The coefficients for a fold are those of the candidate (none, the end token's,
    all of them under one of several ridges) whose coefficients, fitted without a further fold, would most have reduced
    the variance there. No part of this sees the strings to which the coefficients are then applied.

    Args:
        per_token: make the ratio of the contributions to the lengths precise, rather than their mean. The two pull
            apart: a long string's large divergence is noise for the mean and no surprise for the ratio.
        folds: fewer when there are fewer clusters.
        fewest: with fewer strings nothing is fitted.
        seed: decides, with the cluster numbers alone, which cluster is in which fold.

    Source: the martingale form of the decomposition by C. Re et al. (2026), Estimating Great Expectations under
    Autoregressive Language Models with Potentials; control variates along a Markov chain's path as in S. Henderson and
    P. Glynn (2002), Approximating Martingales for Variance Reduction in Markov Process Simulation.

    Example:
        >>> from klkit.estimators.statistics import score
        >>> from klkit.models.automaton import coin
        >>> from klkit.sampling.ancestral import sample
        >>> p, q = coin(end=0.5), coin(end=0.01)
        >>> x = sample(p, [p.context(None)] * 64, max_tokens=80, seed=0, prompt=[0] * 64).sequences
        >>> fit(score(p, q, x)).ratio_rb < 0.1
        True
    """
    strings = statistics.strings()
    fold = deal(strings.cluster.numpy(), folds, seed)
    dealt = Folds.of(statistics, fold, int(fold.max(initial=-1)) + 1)
    return fit_folds(strings, dealt, per_token=per_token, fewest=fewest)


def fit_folds(
    strings: StringStatistics, dealt: Folds | None, *, per_token: bool = False, fewest: int = FEWEST_STRINGS
) -> Fit:
    """The same from sums over the decisions of each string and of each fold; without folds nothing is fitted."""
    plain, mc = strings.rb.numpy(), strings.mc.numpy()
    reason = obstacle(strings, fewest)
    if dealt is None or reason is not None:
        reason = reason or "no control variates (rb_cv is plain rb): the strings were not dealt into folds"
        return Fit(plain, (), np.zeros((0, 0)), 1.0, ratio(strings, plain, mc), (reason,))
    features = dealt.features
    dealt, left_out = dealt.tidy()
    if len(dealt.moments.strings) < FEWEST_FOLDS:
        reason = f"no control variates (rb_cv is plain rb): the strings are in fewer than {FEWEST_FOLDS} folds"
        return Fit(plain, (), np.zeros((0, 0)), 1.0, ratio(strings, plain, mc), (reason,))
    notes = (f"rb_cv goes without {left_out} of its {features} token features: not a finite number at every decision",)
    chosen = choose(dealt.moments, per_token)
    theta = coefficients(dealt.moments.combined(~np.eye(len(chosen), dtype=bool)), chosen, per_token)
    contributions = plain - np.einsum("nc,nc->n", dealt.sums, theta[dealt.fold])
    return Fit(
        contributions,
        tuple(NONE if pick is None else pick.name for pick in chosen),
        theta,
        ratio(strings, contributions, plain),
        ratio(strings, contributions, mc),
        notes if left_out else (),
        spread=widening(strings, contributions, theta, dealt.sums, per_token),
    )


def obstacle(strings: StringStatistics, fewest: int) -> str | None:
    """Why no variates can be fitted, or None."""
    n, clusters = len(strings), len(np.unique(strings.cluster.numpy()))
    if n < fewest or clusters < FEWEST_FOLDS:
        return (
            f"no control variates (rb_cv is plain rb): {n} strings in {clusters} clusters are too few to fit "
            f"them; {fewest} strings in {FEWEST_FOLDS} clusters would do"
        )
    if strings.foreign:
        return "no control variates (rb_cv is plain rb): the strings were drawn by another law than p"
    if not bool((strings.kl.isfinite() & strings.log_ratio.isfinite()).all()):
        return "no control variates (rb_cv is plain rb): a decision's divergence or log-ratio is infinite"
    return None


@dataclass(frozen=True, slots=True, eq=False)
class EndFit:
    """What going on is worth: ``V ≈ 1[y_n ≠ end] B_nᵀα`` for the returns ``Σ_{j>n} (D_j − rate)``.

    Fits to several sets of strings are made side by side, along leading axes.

    Attributes:
        rate: divergence per token, or 0, ``()``.
        alpha: ``(e,)``.
    """

    rate: Array
    alpha: Array

    @classmethod
    def of(cls, moments: Moments, per_token: bool) -> EndFit:
        """Fit ``α`` to the returns, and once more to returns from which its own later noise has been taken out."""
        total, going_on, echo = moments.total, moments.going_on, moments.echo
        rate = total[..., 0] / total[..., 1] if per_token else np.zeros(total.shape[:-1])
        e = echo.shape[-1]
        # One string's evidence for no trend over positions.
        penalty = np.concatenate([np.zeros((*rate.shape, 1)), np.repeat(1 / moments.strings[..., None], e - 1, -1)], -1)
        returns = net(moments.target[..., :e, :], rate)
        alpha = np.zeros((*rate.shape, e))
        for _ in range(2):
            alpha = ridge(going_on[..., :e, :], returns - apply(echo[..., :e, :], alpha), penalty)
        return cls(rate, alpha)

    def left_over(self, moments: Moments) -> Array:
        """``Σ W_n`` times what is left of the return after ``n``: of mean ``E Σ Z_n (V − Z_nᵀα)``, ``(c,)``."""
        return net(moments.target, self.rate) - apply(moments.going_on + moments.echo, self.alpha)

    def correction(self, moments: Moments, gram: Array, candidate: Candidate) -> Array:
        """What ``candidate`` adds to ``α``: its coefficients for what is left, given the lifted gram, ``(c,)``."""
        c, e = moments.echo.shape[-2:]
        penalty = candidate.penalty(c, e, moments.strings)
        used = penalty.shape[-1]
        delta = np.zeros(moments.target.shape[:-1])
        if used > e:
            wanted = self.left_over(moments)[..., :used].copy()
            wanted[..., :e] = 0.0
            delta[..., :used] = ridge(gram[..., :used, :used], wanted, penalty)
        return delta

    def gain(self, moments: Moments, delta: Array) -> Array:
        """Unbiased estimate of the variance that ``Z_nᵀ(α + δ)`` removes from other strings than it was fitted on."""
        e = self.alpha.shape[-1]
        theta = delta.copy()
        theta[..., :e] += self.alpha
        used_up = form(delta, moments.gram)
        for block, surplus in surpluses(moments):
            used_up += form(delta[..., block], surplus)
        explained = 2 * np.sum(theta * self.left_over(moments), axis=-1)
        return np.asarray(explained + form(self.alpha, moments.going_on[..., :e, :]) - used_up)


def net(sums: Array, rate: Array) -> Array:
    """``Σ (D − rate)`` from sums of ``(D, 1)`` along the last axis."""
    return np.asarray(sums[..., 0] - rate[..., None] * sums[..., 1])


def apply(matrix: Array, vector: Array) -> Array:
    """``matrix @ vector``, for each of the matrices along the leading axes."""
    return np.asarray((matrix @ vector[..., None])[..., 0])


def form(vector: Array, matrix: Array) -> Array:
    """``vectorᵀ matrix vector``, likewise."""
    return np.asarray(np.sum(vector * apply(matrix, vector), axis=-1))


def surpluses(moments: Moments) -> Iterator[tuple[slice, Array]]:
    """Where variances are known: the columns, and by how much their known gram exceeds that of the drawn tokens."""
    e = moments.echo.shape[-1]
    for i in range(moments.known.shape[-3]):
        block = slice(i * e, (i + 1) * e)
        yield block, moments.known[..., i, :, :] - moments.gram[..., block, block]


def lifted(moments: Moments) -> Array:
    """``gram`` raised to the known variances wherever the drawn tokens show less of it than there is.

    A rare token with an extreme log-ratio is missing from most small samples, and coefficients that ignore it are
    ruined by the first string that has it. Only raising, never lowering, keeps the matrix positive.
    """
    gram = moments.gram.copy()
    for block, surplus in surpluses(moments):
        known = diagonal(gram[..., block, block]) + np.maximum(diagonal(surplus), 0.0)
        scale = np.sqrt(np.maximum(known, 1e-300))
        unit = scale[..., :, None] * scale[..., None, :]
        values, vectors = np.linalg.eigh(surplus / unit)
        raised = (vectors * np.maximum(values, 0.0)[..., None, :]) @ vectors.swapaxes(-1, -2)
        gram[..., block, block] += raised * unit
    return gram


def ridge(system: Array, target: Array, penalty: Array) -> Array:
    """Solve ``system θ = target`` under a penalty on columns brought to unit scale; empty columns get 0."""
    squares = diagonal(system)
    scale = np.sqrt(np.where(squares > 0, squares, 1.0))
    scaled = system / (scale[..., :, None] * scale[..., None, :])
    index = np.arange(scale.shape[-1])
    scaled[..., index, index] += penalty + np.where(squares > 0, 1e-9, 1.0)
    return np.asarray(np.linalg.solve(scaled, (target / scale)[..., None])[..., 0] / scale)


def diagonal(matrix: Array) -> Array:
    """Diagonals of matrices along the last two axes."""
    return matrix.diagonal(axis1=-2, axis2=-1)


def choose(parts: Moments, per_token: bool) -> list[Candidate | None]:
    """For each fold, the candidate that does best on the others, each fitted without it in turn; None if none helps."""
    folds = len(parts.strings)
    first, second = np.array(list(combinations(range(folds), 2))).T
    # Fitted without both, the coefficients judge one on behalf of the other.
    numbers = np.arange(folds)
    moments = parts.combined((numbers != first[:, None]) & (numbers != second[:, None]))
    end, gram = EndFit.of(moments, per_token), lifted(moments)
    gains = np.zeros((folds, len(CANDIDATES)))
    for n, candidate in enumerate(CANDIDATES):
        delta = end.correction(moments, gram, candidate)
        np.add.at(gains[:, n], first, end.gain(parts[second], delta))
        np.add.at(gains[:, n], second, end.gain(parts[first], delta))
    return [CANDIDATES[int(row.argmax())] if row.max() > 0 else None for row in gains]


def coefficients(moments: Moments, chosen: list[Candidate | None], per_token: bool) -> Array:
    """The coefficients for each fold, those of its candidate fitted to the moments of the others, ``(folds, c)``."""
    theta = np.zeros(moments.target.shape[:-1])
    end, gram = EndFit.of(moments, per_token), lifted(moments)
    for candidate in {pick for pick in chosen if pick is not None}:
        folds = np.array([pick == candidate for pick in chosen])
        theta[folds] = end.correction(moments, gram, candidate)[folds]
        theta[folds, : end.alpha.shape[-1]] += end.alpha[folds]
    return theta


def widening(strings: StringStatistics, contributions: Array, theta: Array, sums: Array, per_token: bool) -> float:
    """``√(1 + s)``: what cross-fitting adds to the error unseen, ``s`` being the share of noise from coefficients.

    Noise in the coefficients adds to the variance of each contribution, which their spread shows. But two strings
    that are in each other's training sets err together, which adds as much again to the variance of the mean (twice
    ``k/n`` rather than once, for ``k`` coefficients of a least-squares fit) and does not show. How noisy the
    coefficients are is told by how much they differ between folds, the choice among candidates included.

    Source: the delete-a-group jackknife, as in J. Shao and D. Tu (1995), The Jackknife and Bootstrap, section 2.3.
    """
    folds = len(theta)
    _, cluster = np.unique(strings.cluster.numpy(), return_inverse=True)
    weights = strings.lengths.double().numpy() if per_token else np.ones(len(contributions))
    residuals = np.bincount(cluster, contributions - contributions.sum() / weights.sum() * weights)
    errors = sums @ (theta - theta.mean(0)).T
    noise = (folds - 1) / folds * sum(float(np.sum(np.bincount(cluster, error) ** 2)) for error in errors.T)
    shown = float(np.sum(residuals**2))
    return math.sqrt(1 + min(1.0, noise / shown)) if shown > 0 else 1.0


def ratio(strings: StringStatistics, a: Array, b: Array) -> float:
    """Variance of ``a`` within prompts relative to that of ``b``; over all strings if no prompt has two."""
    _, prompt = np.unique(strings.prompt.numpy(), return_inverse=True)
    count = np.bincount(prompt)
    if count.max() == 1:
        prompt, count = np.zeros_like(prompt), np.array([len(prompt)])

    def within(values: Array) -> float:
        return float(np.sum((values - (np.bincount(prompt, values) / count)[prompt]) ** 2))

    with np.errstate(invalid="ignore"):
        spread = within(b)
        return within(a) / spread if spread > 0 else float("nan")
