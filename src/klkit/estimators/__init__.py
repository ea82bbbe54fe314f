"""Estimators of a divergence between two laws over strings, each a fold over the same per-decision scalars.

None of them samples: they are given strings that were scored by both models
(:class:`klkit.estimators.statistics.TokenStatistics`), so all of them can be compared on the same strings.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from klkit.estimators.control_variate import cv_string, k3_string
from klkit.estimators.horvitz_thompson import horvitz_thompson
from klkit.estimators.martingale import fitted, rb_cv
from klkit.estimators.monte_carlo import k3_token, monte_carlo
from klkit.estimators.rao_blackwell import rao_blackwell
from klkit.estimators.strings import StringStatistics
from klkit.estimators.tally import Statistics
from klkit.results import ESTIMANDS, Estimate

ESTIMATORS: dict[str, Callable[[Statistics], NDArray[np.float64]]] = {
    "mc": monte_carlo,
    "k3_string": k3_string,
    "cv_string": cv_string,
    "k3_token": k3_token,
    "ht": horvitz_thompson,
    "rb": rao_blackwell,
    "rb_cv": rb_cv,
}
"""Every estimator by its key: statistics of ``n`` strings to one contribution a string, nats."""


def summarise(
    method: str,
    statistics: Statistics,
    *,
    estimand: str = "S",
    divergence: str = "kl",
    direction: str = "KL(p‖q)",
    notes: tuple[str, ...] = (),
) -> Estimate:
    """Fold strings into an estimate of ``KL(p‖q) = Σ p (log p − log q)`` with its error bar.

    Args:
        method: a key of :data:`ESTIMATORS`.
        statistics: of one batch of strings, or of all batches of a run (:class:`klkit.estimators.tally.Tally`).
        estimand: ``"S"``, per response; ``"R"``, per token of the model's own responses (a ratio of two means,
            the same number whatever the method); ``"F"``, per token of a given text, which ``"rb"`` alone measures.
        divergence: name for the record. Statistics are of ``(p, q)`` over ``p``'s strings; for the reverse
            divergence collect those of ``(q, p)`` over ``q``'s and say ``"reverse_kl"`` and ``"KL(q‖p)"`` here.
        direction: the same in words.
        notes: carried along, before those that arise here.

    Raises:
        ValueError: an unknown method or estimand, or estimand ``"F"`` by another method than ``"rb"``.

    Example:
        >>> from klkit.estimators.statistics import score
        >>> from klkit.models.automaton import coin
        >>> from klkit.sampling.ancestral import sample
        >>> p, q = coin(end=0.5), coin(end=0.25)
        >>> x = sample(p, [p.context(None)] * 50, max_tokens=60, seed=0).sequences
        >>> round(summarise("rb", score(p, q, x), estimand="R").value, 6)
        0.143841
    """
    if method not in ESTIMATORS or estimand not in ESTIMANDS:
        raise ValueError(
            f"expected a method among {', '.join(ESTIMATORS)} and an estimand among {', '.join(ESTIMANDS)}, "
            f"got {method!r} and {estimand!r}; see docs/how-to-choose.md"
        )
    strings, given = statistics.strings(), estimand == "F"
    if given and method != "rb":
        raise ValueError(
            f"expected method 'rb' for estimand 'F', got {method!r}: on text that p did not write, the log-ratios of "
            f"its tokens say nothing about the mean over p's choices; use 'rb'"
        )
    infinite, spread = int((strings.infinite if given else strings.reached).sum()), 1.0
    if given:
        contributions, weights = strings.kl.numpy(), strings.lengths.double().numpy()
    else:
        if method == "rb_cv":  # what makes a mean precise does not make a ratio precise, and a reader wants its notes
            best = fitted(statistics, per_token=estimand == "R")
            contributions, notes, spread = best.contributions, (*notes, *best.notes), best.spread
        else:
            contributions = ESTIMATORS[method](statistics)
        weights = np.ones(len(strings)) if estimand == "S" else strings.decisions.numpy()
    return Estimate(
        method=method,
        divergence=divergence,
        direction=direction,
        estimand=estimand,
        contributions=contributions,
        weights=weights,
        cluster=strings.cluster.numpy(),
        spread=spread,
        prompts=strings.prompts,
        truncated=0.0 if given else strings.truncated,
        infinite=infinite,
        notes=(*notes, *remarks(strings, contributions, given=given, infinite=infinite)),
    )


def remarks(strings: StringStatistics, contributions: NDArray[np.float64], *, given: bool, infinite: int) -> list[str]:
    """What a reader must be told beside a number: infinities it hides, and strings that are not ``p``'s own."""
    found = []
    if infinite and np.isfinite(contributions).all():
        found.append(
            f"the divergence is infinite (at {infinite} decisions p allows tokens that q excludes); this number is "
            f"finite only because no such token was drawn"
        )
    if bool(strings.reverse_kl.isnan().any() & ~strings.kl.isnan().any()):
        found.append(
            "p's laws are known in part: the divergence of a decision is an unbiased estimate, whose noise is in the "
            "error bars, and there is no reverse divergence or total variation"
        )
    if given:
        found.append("contexts are a given text, not p's own responses: no statement about the laws over strings")
    elif strings.foreign:
        weight = strings.weight
        effective = float(weight.sum() ** 2 / (weight @ weight)) if bool((weight > 0).any()) else 0.0
        found.append(
            f"strings were drawn by another law than p and weighted; they are worth {effective:.1f} of {len(weight)} "
            f"strings from p"
        )
    return found
