"""The best that reward and divergence allow after a given opening of a review: exact.

After an opening ``x`` the law ``p*(y|x) ∝ p(y|x) exp(strength · reward(xy))`` has the largest expected reward among all
laws of its divergence from ``p(·|x)``. All it takes are sums over the paths of the grammar that go on from the opening.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from klkit.zoo.grammar import Choice, Grammar, reward, spelling


def optimum(p: Grammar, prompt: str, strength: float) -> tuple[float, float]:
    """``E_{p*} reward(xy)`` and ``KL(p*(·|x) ‖ p(·|x))`` in nats after the opening ``x``, by whole words.

    Raises:
        ValueError: the grammar cannot write the opening.

    Example:
        >>> from klkit.zoo.grammar import expected_reward, kl, reviews, tilt
        >>> best = tilt(reviews(), 0.5)
        >>> found = optimum(reviews(), "", 0.5)
        >>> abs(found[0] - expected_reward(best)) < 1e-9, abs(found[1] - kl(best, reviews())) < 1e-9
        (True, True)
        >>> optimum(reviews(), "the plot was dreadful and the", 0.0)[1]
        0.0
    """
    return _best(*follow(p, prompt), strength, *_ahead(p, strength))


def optimal_frontier(p: Grammar, prompts: Sequence[str], strengths: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means over prompts of :func:`optimum`: rewards and divergences, one a strength.

    Every point maximises ``mean reward − mean KL / strength`` over all policies, so no policy lies above the curve.

    Raises:
        ValueError: as :func:`optimum`.
    """
    places = [follow(p, prompt) for prompt in prompts]
    rewards, divergences = [], []
    for strength in strengths:
        ahead = _ahead(p, strength)
        found = [_best(*place, strength, *ahead) for place in places]
        rewards.append(math.fsum(gain for gain, _ in found) / len(found))
        divergences.append(math.fsum(kl for _, kl in found) / len(found))
    return rewards, divergences


def follow(p: Grammar, prompt: str) -> tuple[float, tuple[Choice, ...]]:
    """The reward of the phrases that ``prompt`` completes, and the choices that may go on from there.

    Raises:
        ValueError: the grammar cannot write the opening.
    """
    words, state, written = tuple(prompt.split()), p.start, 0.0
    while True:
        ways = tuple(c for c in p.states[state] if spelling(c)[: len(words)] == words)
        if ways:
            return written, ways
        done = next((c for c in p.states[state] if words[: len(spelling(c))] == spelling(c)), None)
        if done is None or done.next is None:
            raise ValueError(
                f"expected the opening of a review, as the grammar {p.name!r} writes it, got "
                f"{prompt!r}; openings are whole words, as in klkit:reviews"
            )
        written, words, state = written + reward(done.text), words[len(spelling(done)) :], done.next


def _best(
    written: float,
    ways: tuple[Choice, ...],
    strength: float,
    log_weight: Mapping[str | None, float],
    gain: Mapping[str | None, float],
) -> tuple[float, float]:
    """The optimum after an opening that has earned ``written`` and may go on in some ways."""
    possible = math.fsum(c.probability for c in ways)
    terms = [math.log(c.probability / possible) + strength * reward(c.text) + log_weight[c.next] for c in ways]
    log_z = _log_sum(terms)
    ahead = math.fsum(
        math.exp(term - log_z) * (reward(c.text) + gain[c.next]) for term, c in zip(terms, ways, strict=True)
    )
    return written + ahead, max(0.0, strength * ahead - log_z)  # rounding alone could go below


def _ahead(p: Grammar, strength: float) -> tuple[dict[str | None, float], dict[str | None, float]]:
    """``log E exp(strength · reward)`` and the tilted law's expected reward of what comes after each state."""
    log_weight: dict[str | None, float] = {None: 0.0}
    gain: dict[str | None, float] = {None: 0.0}
    for state, choices in reversed(list(p.states.items())):
        terms = [math.log(c.probability) + strength * reward(c.text) + log_weight[c.next] for c in choices]
        log_weight[state] = _log_sum(terms)
        gain[state] = math.fsum(
            math.exp(term - log_weight[state]) * (reward(c.text) + gain[c.next])
            for term, c in zip(terms, choices, strict=True)
        )
    return log_weight, gain


def _log_sum(terms: Sequence[float]) -> float:
    top = max(terms)
    return top + math.log(math.fsum(math.exp(term - top) for term in terms))
