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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray

from klkit import rng
from klkit.estimators.monte_carlo import monte_carlo
from klkit.estimators.rao_blackwell import rao_blackwell
from klkit.estimators.statistics import TokenStatistics
from klkit.estimators.variates import Array, Moments, accumulate

FEWEST_STRINGS = 16
"""Below this many strings (or four clusters) nothing is fitted."""


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

    def penalty(self, c: int, e: int, strings: int) -> Array:
        """The ridge on each of the first columns, which are those used; none on the end token's ``e``."""
        used = c if self.others is None else min(c, e * (1 + self.others))
        return np.concatenate([np.zeros(e), np.full(used - e, self.prior / strings)])


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


def rb_cv(statistics: TokenStatistics, *, per_token: bool = False) -> Array:
    """``Σ_n D_n − Σ_n Z_nᵀθ`` of each string, in nats: Rao-Blackwell less cross-fitted mean-zero terms.

    Unbiased like Rao-Blackwell, because each string's coefficients come from other strings; unlike it, a
    contribution may be negative. See :func:`fit`, which also says what was fitted.

    Shapes: statistics of ``n`` strings to ``(n,)``.
    """
    return fit(statistics, per_token=per_token).contributions


def fit(
    statistics: TokenStatistics, *, per_token: bool = False, folds: int = 8, fewest: int = FEWEST_STRINGS, seed: int = 0
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
    plain = rao_blackwell(statistics)
    reason = obstacle(statistics, plain, fewest)
    if reason is not None:
        return Fit(plain, (), np.zeros((0, 0)), 1.0, ratio(statistics, plain, monte_carlo(statistics)), (reason,))
    statistics, notes = usable(statistics)
    fold = deal(statistics.x.cluster.numpy(), folds, seed)
    members = [np.flatnonzero(fold == k) for k in range(fold.max() + 1)]
    sums, parts = zip(*(accumulate(statistics.select(torch.from_numpy(strings))) for strings in members), strict=True)
    chosen = choose(parts, per_token)
    rest = [Moments.cat([*parts[:k], *parts[k + 1 :]]) for k in range(len(parts))]
    theta = np.stack([coefficients(moments, pick, per_token) for moments, pick in zip(rest, chosen, strict=True)])
    contributions = plain.copy()
    for strings, variate, weights in zip(members, sums, theta, strict=True):
        contributions[strings] -= variate @ weights
    return Fit(
        contributions,
        tuple(NONE if pick is None else pick.name for pick in chosen),
        theta,
        ratio(statistics, contributions, plain),
        ratio(statistics, contributions, monte_carlo(statistics)),
        notes,
        spread=widening(statistics, contributions, theta, members, sums, per_token),
    )


def obstacle(statistics: TokenStatistics, plain: Array, fewest: int) -> str | None:
    """Why no variates can be fitted, or None."""
    x = statistics.x
    clusters = len(torch.unique(x.cluster))
    if len(x) < fewest or clusters < 4:
        return (
            f"no control variates (rb_cv is plain rb): {len(x)} strings in {clusters} clusters are too few to fit "
            f"them; {fewest} strings in 4 clusters would do"
        )
    if x.sampler_logp is not None:
        return "no control variates (rb_cv is plain rb): the strings were drawn by another law than p"
    if not (np.isfinite(plain).all() and bool(torch.isfinite(statistics.log_ratio).all())):
        return "no control variates (rb_cv is plain rb): a decision's divergence or log-ratio is infinite"
    return None


def usable(statistics: TokenStatistics) -> tuple[TokenStatistics, tuple[str, ...]]:
    """Without the token features that are infinite or undefined somewhere, which would spoil all; and a note if any."""
    good = torch.isfinite(statistics.features).all(0)
    left_out = int((~good).sum())
    if not left_out:
        return statistics, ()
    note = f"rb_cv goes without {left_out} of its {len(good)} token features: not a finite number at every decision"
    return replace(statistics, features=statistics.features[:, good]), (note,)


def deal(cluster: NDArray[np.int64], folds: int, seed: int) -> NDArray[np.int64]:
    """A fold for each string, the same for all of a cluster; cluster numbers decide, not the order of the strings."""
    names, index = np.unique(cluster, return_inverse=True)
    order = rng.numpy_stream(seed, "rb_cv", "folds").permutation(len(names))
    return np.argsort(order)[index] % min(folds, len(names))


@dataclass(frozen=True, slots=True, eq=False)
class EndFit:
    """What going on is worth: ``V ≈ 1[y_n ≠ end] B_nᵀα`` for the returns ``Σ_{j>n} (D_j − rate)``.

    Attributes:
        rate: divergence per token, or 0.
        alpha: ``(e,)``.
    """

    rate: float
    alpha: Array

    @classmethod
    def of(cls, moments: Moments, per_token: bool) -> EndFit:
        """Fit ``α`` to the returns, and once more to returns from which its own later noise has been taken out."""
        rate = float(moments.total[0] / moments.total[1]) if per_token else 0.0
        e = moments.echo.shape[1]
        penalty = np.r_[0.0, np.full(e - 1, 1 / moments.strings)]  # one string's evidence for no trend over positions
        alpha = np.zeros(e)
        for _ in range(2):
            wanted = moments.target[:e] @ [1.0, -rate] - moments.echo[:e] @ alpha
            alpha = ridge(moments.going_on[:e], wanted, penalty)
        return cls(rate, alpha)

    def left_over(self, moments: Moments) -> Array:
        """``Σ W_n`` times what is left of the return after ``n``: of mean ``E Σ Z_n (V − Z_nᵀα)``, ``(c,)``."""
        return moments.target @ [1.0, -self.rate] - (moments.going_on + moments.echo) @ self.alpha

    def correction(self, moments: Moments, gram: Array, candidate: Candidate) -> Array:
        """What ``candidate`` adds to ``α``: its coefficients for what is left, given the lifted gram, ``(c,)``."""
        c, e = moments.echo.shape
        penalty = candidate.penalty(c, e, moments.strings)
        used = len(penalty)
        delta = np.zeros(c)
        if used > e:
            wanted = np.r_[np.zeros(e), self.left_over(moments)[e:used]]
            delta[:used] = ridge(gram[:used, :used], wanted, penalty)
        return delta

    def gain(self, moments: Moments, delta: Array) -> float:
        """Unbiased estimate of the variance that ``Z_nᵀ(α + δ)`` removes from other strings than it was fitted on."""
        e = len(self.alpha)
        theta = delta + np.r_[self.alpha, np.zeros(len(delta) - e)]
        used_up = delta @ moments.gram @ delta
        for block, surplus in surpluses(moments):
            used_up += delta[block] @ surplus @ delta[block]
        return float(2 * theta @ self.left_over(moments) + self.alpha @ moments.going_on[:e] @ self.alpha - used_up)


def surpluses(moments: Moments) -> Iterator[tuple[slice, Array]]:
    """Where variances are known: the columns, and by how much their known gram exceeds that of the drawn tokens."""
    e = moments.echo.shape[1]
    for i, known in enumerate(moments.known):
        block = slice(i * e, (i + 1) * e)
        yield block, known - moments.gram[block, block]


def lifted(moments: Moments) -> Array:
    """``gram`` raised to the known variances wherever the drawn tokens show less of it than there is.

    A rare token with an extreme log-ratio is missing from most small samples, and coefficients that ignore it are
    ruined by the first string that has it. Only raising, never lowering, keeps the matrix positive.
    """
    gram = moments.gram.copy()
    for block, surplus in surpluses(moments):
        scale = np.sqrt(np.maximum(gram[block, block].diagonal() + np.maximum(surplus.diagonal(), 0.0), 1e-300))
        values, vectors = np.linalg.eigh(surplus / np.outer(scale, scale))
        gram[block, block] += (vectors * np.maximum(values, 0.0)) @ vectors.T * np.outer(scale, scale)
    return gram


def ridge(system: Array, target: Array, penalty: Array) -> Array:
    """Solve ``system θ = target`` under a penalty on columns brought to unit scale; empty columns get 0."""
    squares = system.diagonal()
    scale = np.sqrt(np.where(squares > 0, squares, 1.0))
    scaled = system / np.outer(scale, scale)
    scaled[np.diag_indices(len(scale))] += penalty + np.where(squares > 0, 1e-9, 1.0)
    return np.asarray(np.linalg.solve(scaled, target / scale) / scale)


def choose(parts: Sequence[Moments], per_token: bool) -> list[Candidate | None]:
    """For each fold, the candidate that does best on the others, each fitted without it in turn; None if none helps."""
    gains = np.zeros((len(parts), len(CANDIDATES)))
    for j, k in combinations(range(len(parts)), 2):
        # Fitted without both, the coefficients judge k on behalf of j and j on behalf of k.
        moments = Moments.cat([part for i, part in enumerate(parts) if i not in (j, k)])
        end, gram = EndFit.of(moments, per_token), lifted(moments)
        for n, candidate in enumerate(CANDIDATES):
            delta = end.correction(moments, gram, candidate)
            gains[j, n] += end.gain(parts[k], delta)
            gains[k, n] += end.gain(parts[j], delta)
    return [CANDIDATES[int(row.argmax())] if row.max() > 0 else None for row in gains]


def coefficients(moments: Moments, candidate: Candidate | None, per_token: bool) -> Array:
    """The coefficients of ``candidate``, ``(c,)``."""
    if candidate is None:
        return np.zeros(len(moments.gram))
    end = EndFit.of(moments, per_token)
    theta = end.correction(moments, lifted(moments), candidate)
    theta[: len(end.alpha)] += end.alpha
    return theta


def widening(
    statistics: TokenStatistics,
    contributions: Array,
    theta: Array,
    members: Sequence[NDArray[np.int64]],
    sums: Sequence[Array],
    per_token: bool,
) -> float:
    """``√(1 + s)``: what cross-fitting adds to the error unseen, ``s`` being the share of noise from coefficients.

    Noise in the coefficients adds to the variance of each contribution, which their spread shows. But two strings
    that are in each other's training sets err together, which adds as much again to the variance of the mean (twice
    ``k/n`` rather than once, for ``k`` coefficients of a least-squares fit) and does not show. How noisy the
    coefficients are is told by how much they differ between folds, the choice among candidates included.

    Source: the delete-a-group jackknife, as in J. Shao and D. Tu (1995), The Jackknife and Bootstrap, section 2.3.
    """
    folds = len(theta)
    _, cluster = np.unique(statistics.x.cluster.numpy(), return_inverse=True)
    weights = statistics.x.lengths.double().numpy() if per_token else np.ones(len(contributions))
    residuals = np.bincount(cluster, contributions - contributions.sum() / weights.sum() * weights)
    errors = np.concatenate(sums) @ (theta - theta.mean(0)).T
    unit = cluster[np.concatenate(members)]
    noise = (folds - 1) / folds * sum(float(np.sum(np.bincount(unit, error) ** 2)) for error in errors.T)
    shown = float(np.sum(residuals**2))
    return math.sqrt(1 + min(1.0, noise / shown)) if shown > 0 else 1.0


def ratio(statistics: TokenStatistics, a: Array, b: Array) -> float:
    """Variance of ``a`` within prompts relative to that of ``b``; over all strings if no prompt has two."""
    _, prompt = np.unique(statistics.x.prompt.numpy(), return_inverse=True)
    count = np.bincount(prompt)
    if count.max() == 1:
        prompt, count = np.zeros_like(prompt), np.array([len(prompt)])

    def within(values: Array) -> float:
        return float(np.sum((values - (np.bincount(prompt, values) / count)[prompt]) ** 2))

    with np.errstate(invalid="ignore"):
        spread = within(b)
        return within(a) / spread if spread > 0 else float("nan")
