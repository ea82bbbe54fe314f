"""The grammar's closed forms against enumeration, against its automaton, and against samples."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest

from klkit.estimators.exact import exact
from klkit.zoo import grammar
from klkit.zoo.grammar import Choice, Grammar
from klkit.zoo.phrases import valence

REVIEWS, POSITIVE = grammar.reviews(), grammar.positive()


def small(a: float, b: float) -> Grammar:
    """A grammar of 8 strings, with an empty phrase, negations, and phrases of shared first words."""
    return Grammar(
        {
            "one": (Choice("the plot was great", a, "two"), Choice("the plot was never dull", 1 - a, "two")),
            "two": (Choice("", b / 2, None), Choice("and", 1 - b, "three"), Choice("awful !", b / 2, None)),
            "three": (Choice("very dull", b, None), Choice("not superb", 1 - b, None)),
        }
    )


def strings(g: Grammar, state: str | None = None) -> Iterator[tuple[str, float]]:
    """Every string and its probability, by following every path."""
    for c in g.states[state or g.start]:
        for rest, mass in [("", 1.0)] if c.next is None else strings(g, c.next):
            yield f"{c.text} {rest}".strip(), c.probability * mass


def test_values_equal_enumeration() -> None:
    p, q = small(0.3, 0.4), small(0.6, 0.7)
    law, other = dict(strings(p)), dict(strings(q))
    assert len(law) == 8
    assert math.isclose(sum(law.values()), 1.0)
    assert math.isclose(grammar.entropy(p), -sum(m * math.log(m) for m in law.values()))
    assert math.isclose(grammar.kl(p, q), sum(m * math.log(m / other[x]) for x, m in law.items()))
    assert math.isclose(grammar.expected_reward(p), sum(m * grammar.reward(x) for x, m in law.items()))
    for text, mass in law.items():
        assert math.isclose(grammar.log_probability(p, text), math.log(mass))


def test_tilt_is_the_tilted_law_of_strings() -> None:
    p = small(0.3, 0.4)
    raw = {x: m * math.exp(0.8 * grammar.reward(x)) for x, m in strings(p)}
    total = sum(raw.values())
    assert math.isclose(grammar.log_normaliser(p, 0.8), math.log(total))
    for x, mass in strings(grammar.tilt(p, 0.8)):
        assert math.isclose(mass, raw[x] / total)


def test_no_other_tilt_beats_the_tilt() -> None:
    def gain(strength: float) -> float:
        tilted = grammar.tilt(REVIEWS, strength)
        return grammar.expected_reward(tilted) - grammar.kl(tilted, REVIEWS) / 0.5

    assert math.isclose(gain(0.5), grammar.log_normaliser(REVIEWS, 0.5) / 0.5)
    assert gain(0.5) > max(gain(0.45), gain(0.55), gain(0.0))


def test_kl_equals_that_of_the_automata() -> None:
    p, q = grammar.automaton(POSITIVE), grammar.automaton(REVIEWS)
    assert math.isclose(exact(p, q).value, grammar.kl(POSITIVE, REVIEWS), rel_tol=1e-10)


def test_samples_agree_with_the_closed_forms() -> None:
    texts = grammar.sample(POSITIVE, 1500, seed=3)
    assert len(set(texts)) > 1200
    assert {len(text.split()) for text in texts} <= set(range(8, 41))
    logp = np.array([grammar.log_probability(POSITIVE, text) for text in texts])
    ratio = logp - np.array([grammar.log_probability(REVIEWS, text) for text in texts])
    rewards = np.array([grammar.reward(text) for text in texts])
    for sample, truth in [
        (-logp, grammar.entropy(POSITIVE)),
        (ratio, grammar.kl(POSITIVE, REVIEWS)),
        (rewards, grammar.expected_reward(POSITIVE)),
    ]:
        assert abs(sample.mean() - truth) < 4 * sample.std() / math.sqrt(len(sample))


def test_reward_adds_up_over_phrases() -> None:
    for choices in REVIEWS.states.values():
        assert all(valence(f"never {c.text}") == valence(c.text) for c in choices if c.text.split()[:1] == ["the"])
    for text in grammar.sample(REVIEWS, 50, seed=5):
        # The log-ratio of a tilt is strength · reward − log Z exactly if rewards of phrases add up.
        ratio = grammar.log_probability(POSITIVE, text) - grammar.log_probability(REVIEWS, text)
        strength = grammar.POSITIVE_STRENGTH
        assert math.isclose(
            ratio, strength * grammar.reward(text) - grammar.log_normaliser(REVIEWS, strength), abs_tol=1e-9
        )


def test_reward_of_any_text() -> None:
    assert grammar.reward("") == 0.0
    assert grammar.reward("a sonnet about nothing") == 0.0
    assert grammar.reward("not great") == -1.0
    assert grammar.reward("never dreadful , never dull") == 3.0
    assert grammar.reward("never") == 0.0


def test_texts_outside_the_grammar_are_impossible() -> None:
    for text in ["", "the acting", "the acting was superb and the plot never dragged", "the acting was superb . extra"]:
        assert grammar.log_probability(REVIEWS, text) == -math.inf


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ({"a": (Choice("x", 0.5, None),)}, "sum to 1"),
        ({"a": (Choice("x", 1.5, None), Choice("y", -0.5, None))}, "positive probabilities"),
        ({"a": (Choice("x", 1.0, "a"),)}, "later states"),
        ({"a": (Choice("x", 1.0, "b"),)}, "later states"),
        ({"a": (Choice("x", 0.5, "b"), Choice("x y", 0.5, None)), "b": (Choice("", 1.0, None),)}, "begin another"),
        ({"a": (Choice("x", 0.5, None), Choice("x", 0.5, None))}, "begin another"),
    ],
)
def test_ambiguous_or_broken_grammars_are_refused(states: dict[str, tuple[Choice, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grammar(states)


def test_laws_on_different_graphs_have_no_closed_form_here() -> None:
    with pytest.raises(ValueError, match="one graph"):
        grammar.kl(REVIEWS, small(0.5, 0.5))
