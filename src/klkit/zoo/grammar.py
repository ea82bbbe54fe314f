"""A film-review grammar whose string law, entropy, divergences and expected reward are exact.

The grammar is a finite graph: in each state one of a few weighted phrases is written, and leads to
the next state. No phrase of a state begins another, so a review tells the path that wrote it, and
everything that adds up along a path has an exact expectation: visits to states times what happens
there. The reward adds up, too, so the law that a reward with a KL penalty asks for,
``p*(x) ∝ p(x) exp(strength · reward(x))``, is again a grammar of the same phrases (:func:`tilt`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from klkit.rng import numpy_stream
from klkit.zoo.phrases import rules, valence

if TYPE_CHECKING:
    from klkit.models.automaton import Automaton


END = "<end>"
"""Stands for the end of a string among its words."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A phrase, its probability in its state, and the state after it; None ends the string."""

    text: str
    probability: float
    next: str | None


@dataclass(frozen=True)
class Grammar:
    """States, each before all that follow it, with the phrases that may be written there."""

    states: Mapping[str, tuple[Choice, ...]]
    name: str = "grammar"

    def __post_init__(self) -> None:
        order = {state: i for i, state in enumerate(self.states)}
        for state, choices in self.states.items():
            total = math.fsum(c.probability for c in choices)
            if not math.isclose(total, 1.0, rel_tol=1e-12) or min(c.probability for c in choices) <= 0:
                raise ValueError(
                    f"expected positive probabilities that sum to 1, got a sum of {total!r} in state {state!r}; "
                    f"normalise the weights and leave impossible phrases out"
                )
            for c in choices:
                if c.next is not None and order.get(c.next, -1) <= order[state]:
                    raise ValueError(
                        f"expected phrases to lead to later states, got {c.text!r} from {state!r} to {c.next!r}; "
                        f"list every state before those that follow it"
                    )
            spelt = sorted(" ".join(spelling(c)) + " " for c in choices)
            for a, b in pairwise(spelt):
                if b.startswith(a):
                    raise ValueError(
                        f"expected no phrase of state {state!r} to begin another, got {a!r} and "
                        f"{b!r}; move the common words to a state of their own"
                    )

    @property
    def start(self) -> str:
        """The first state."""
        return next(iter(self.states))

    def visits(self) -> dict[str, float]:
        """Probability of passing through each state (no state is passed twice)."""
        mass = dict.fromkeys(self.states, 0.0)
        mass[self.start] = 1.0
        for state, choices in self.states.items():
            for c in choices:
                if c.next is not None:
                    mass[c.next] += mass[state] * c.probability
        return mass

    def expectation(self, value: Callable[[str, Choice], float]) -> float:
        """``E Σ value(state, choice)`` along the path of a string: exact."""
        mass = self.visits()
        return math.fsum(mass[s] * c.probability * value(s, c) for s, choices in self.states.items() for c in choices)


def reviews() -> Grammar:
    """The law behind the checkpoint ``reviews``."""
    weights = rules()
    return Grammar(
        {
            state: tuple(Choice(text, w / math.fsum(w for _, w, _ in options), after) for text, w, after in options)
            for state, options in weights.items()
        },
        name="reviews",
    )


POSITIVE_STRENGTH = 0.5
"""How strongly the law behind ``reviews-positive`` is tilted towards reward."""


def positive() -> Grammar:
    """The law behind ``reviews-positive``: reviews re-weighted by ``exp(0.5 · reward)``."""
    return tilt(reviews(), POSITIVE_STRENGTH, name="reviews-positive")


def entropy(p: Grammar) -> float:
    """``−Σ p(x) log p(x)`` over all strings, nats per string: exact."""
    return p.expectation(lambda _, c: -math.log(c.probability))


def kl(p: Grammar, q: Grammar) -> float:
    """``Σ p(x) (log p(x) − log q(x))`` over all strings of two laws on one graph, nats: exact.

    Raises:
        ValueError: the two grammars do not write the same phrases in the same states.

    Example:
        >>> kl(reviews(), reviews())
        0.0
        >>> 0.1 < kl(positive(), reviews()) < 2
        True
    """
    other = {(s, c.text, c.next): c.probability for s, choices in q.states.items() for c in choices}
    same = {(s, c.text, c.next) for s, choices in p.states.items() for c in choices}
    if same != set(other):
        raise ValueError(
            f"expected two weightings of one graph, got {len(same ^ set(other))} phrases that only one of "
            f"{p.name!r} and {q.name!r} has; compare their automata with klkit.estimators.exact instead"
        )
    return p.expectation(lambda s, c: math.log(c.probability / other[s, c.text, c.next]))


def reward(text: str) -> float:
    """Sentiment of a text: the sum of its words' valences, reversed after "never" or "not".

    Defined on every text, in the grammar or not, and additive over the phrases of the grammar.

    Example:
        >>> reward("the acting was superb and the plot never dragged .")
        3.0
    """
    return float(valence(text))


def expected_reward(p: Grammar) -> float:
    """``Σ p(x) reward(x)``: exact."""
    return p.expectation(lambda _, c: reward(c.text))


def tilt(p: Grammar, strength: float, *, name: str = "tilted") -> Grammar:
    """``p*(x) = p(x) exp(strength · reward(x)) / Z``: the best law under reward minus KL / strength.

    Among all laws ``π`` it maximises ``E_π reward − KL(π ‖ p) / strength``, and the maximum is
    ``log Z / strength``; its divergence is ``KL(p* ‖ p) = strength · E_{p*} reward − log Z``.

    Example:
        >>> base, best = reviews(), tilt(reviews(), 0.5)
        >>> gain = 0.5 * expected_reward(best) - log_normaliser(base, 0.5)
        >>> abs(kl(best, base) - gain) < 1e-12
        True
    """
    weight = _continuations(p, strength)
    return Grammar(
        {
            s: tuple(
                Choice(c.text, c.probability * math.exp(strength * reward(c.text)) * weight[c.next] / weight[s], c.next)
                for c in choices
            )
            for s, choices in p.states.items()
        },
        name=name,
    )


def log_normaliser(p: Grammar, strength: float) -> float:
    """``log Z = log Σ p(x) exp(strength · reward(x))``: exact."""
    return math.log(_continuations(p, strength)[p.start])


def log_probability(p: Grammar, text: str) -> float:
    """``log p(text)`` in nats; ``−inf`` when the grammar cannot write the text.

    Example:
        >>> log_probability(reviews(), "the films was")
        -inf
    """
    words, state, total = (*text.split(), END), p.start, 0.0
    while True:
        found = next((c for c in p.states[state] if words[: len(spelling(c))] == spelling(c)), None)
        if found is None:
            return -math.inf
        total, words = total + math.log(found.probability), words[len(spelling(found)) :]
        if found.next is None:
            return total
        state = found.next


def sample(p: Grammar, n: int, *, seed: int) -> list[str]:
    """``n`` independent strings.

    Example:
        >>> sample(reviews(), 2, seed=0) == sample(reviews(), 3, seed=0)[:2]
        True
    """
    random = numpy_stream(seed, "grammar", p.name)
    cumulative = {s: np.cumsum([c.probability for c in choices]) for s, choices in p.states.items()}
    strings = []
    for _ in range(n):
        state: str | None = p.start
        phrases = []
        while state is not None:
            i = int(np.searchsorted(cumulative[state], random.random(), side="right"))
            chosen = p.states[state][min(i, len(p.states[state]) - 1)]
            phrases.append(chosen.text)
            state = chosen.next
        strings.append(" ".join(phrase for phrase in phrases if phrase))
    return strings


def automaton(p: Grammar) -> Automaton:
    """The same law as a klkit model that chooses word by word, for exact comparison token by token."""
    import torch

    from klkit.models.automaton import automaton as build

    # A node is a state of the grammar and the words of it that are written already.
    nodes: dict[tuple[str, tuple[str, ...]], int] = {(s, ()): i for i, s in enumerate(p.states)}
    edges: dict[tuple[int, str], tuple[float, int]] = {}
    for state, choices in p.states.items():
        for c in choices:
            spelt = spelling(c)
            for k, word in enumerate(spelt):
                here = nodes[state, spelt[:k]]
                last = k + 1 == len(spelt)
                after = (c.next or p.start, ()) if last else (state, spelt[: k + 1])
                there = nodes.setdefault(after, len(nodes))
                mass = edges.get((here, word), (0.0, there))[0]
                edges[here, word] = mass + c.probability, there
    words = sorted({word for _, word in edges} - {END})
    column = {word: i for i, word in enumerate(words)}
    probabilities = torch.zeros(len(nodes) + 1, len(words) + 1, dtype=torch.float64)
    # Where a text leaves the grammar it can only end.
    successors = torch.full((len(nodes) + 1, len(words)), len(nodes))
    probabilities[-1, -1] = 1.0
    for (here, word), (mass, there) in edges.items():
        probabilities[here, -1 if word == END else column[word]] = mass
        if word != END:
            successors[here, column[word]] = there
    return build(probabilities / probabilities.sum(-1, keepdim=True), successors, symbols=words, name=p.name)


def spelling(c: Choice) -> tuple[str, ...]:
    """The words of a choice, and the end where the string ends with it."""
    return (*c.text.split(), END) if c.next is None else tuple(c.text.split())


def _continuations(p: Grammar, strength: float) -> dict[str | None, float]:
    """``E exp(strength · reward)`` of what is still to come in each state."""
    weight: dict[str | None, float] = {None: 1.0}
    for state, choices in reversed(list(p.states.items())):
        weight[state] = math.fsum(c.probability * math.exp(strength * reward(c.text)) * weight[c.next] for c in choices)
    return weight
