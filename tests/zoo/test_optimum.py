import math
from itertools import pairwise

import pytest

from klkit.zoo import grammar
from klkit.zoo.grammar import Choice, Grammar, reward
from klkit.zoo.optimum import follow, optimal_frontier, optimum

SMALL = Grammar(
    {
        "start": (Choice("the plot", 0.7, "judge"), Choice("the end", 0.3, "verb")),
        "judge": (
            Choice("was great", 0.4, "end"),
            Choice("was dull", 0.35, "end"),
            Choice("never dragged", 0.25, "end"),
        ),
        "verb": (Choice("dragged", 0.5, "end"), Choice("came", 0.5, None)),
        "end": (Choice(".", 0.6, None), Choice("and awful", 0.4, None)),
    }
)
OPENINGS = ["", "the", "the plot", "the plot was", "the plot never", "the plot was dull", "the plot was dull and"]


def strings(p, state, text="", mass=1.0):
    for c in p.states[state]:
        longer = f"{text} {c.text}".strip()
        if c.next is None:
            yield longer, mass * c.probability
        else:
            yield from strings(p, c.next, longer, mass * c.probability)


@pytest.mark.parametrize(
    "prompt", ["", "the", "the plot", "the plot was", "the plot was dull", "the plot was dull and"]
)
@pytest.mark.parametrize("strength", [0.0, 0.3, 2.0])
def test_the_optimum_is_that_of_all_strings_enumerated(prompt, strength):
    law = {y: m for y, m in strings(SMALL, "start") if (y + " ").startswith(prompt + " ") or not prompt}
    total = math.fsum(law.values())
    tilted = {y: m * math.exp(strength * reward(y)) for y, m in law.items()}
    z = math.fsum(tilted.values())
    wanted = math.fsum(m / z * reward(y) for y, m in tilted.items())
    divergence = math.fsum(m / z * math.log(m / z / (law[y] / total)) for y, m in tilted.items())
    found = optimum(SMALL, prompt, strength)
    assert found == pytest.approx((wanted, divergence), abs=1e-12)


def test_the_frontier_of_packaged_prompts_is_concave_and_starts_at_no_divergence():
    prompts = ["the final scene kept me guessing and", "i thought", "for me the direction felt clumsy"]
    rewards, divergences = optimal_frontier(grammar.reviews(), prompts, [0.0, 0.25, 0.5, 1.0, 2.0])
    assert divergences[0] == 0.0
    pairs = pairwise(zip(divergences, rewards, strict=True))
    slopes = [(b - a) / (d - c) for (c, a), (d, b) in pairs]
    assert all(x > y > 0 for x, y in pairwise(slopes))
    assert slopes[1] == pytest.approx(1 / 0.37, rel=0.15)  # the slope at a strength is its inverse


def test_a_negation_that_ends_an_opening_still_turns_the_word_after_it():
    written, ways = follow(grammar.reviews(), "the plot never")
    assert written == 0.0
    assert {c.text for c in ways} == {"never dragged", "never disappoints"}


@pytest.mark.parametrize("prompt", ["a plot", "the plot wa", "the plot was dull . so"])
def test_openings_that_cannot_be_continued_are_refused(prompt):
    with pytest.raises(ValueError, match="expected the opening of a review"):
        follow(SMALL, prompt)
