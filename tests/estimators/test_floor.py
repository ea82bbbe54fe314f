"""The numerical floor: zero for exact models, the size of rounding for neural ones."""

import pytest

import tiny
from klkit.estimators import summarise
from klkit.estimators.floor import floor
from klkit.estimators.statistics import collect
from klkit.models.automaton import coin
from klkit.models.spec import load
from klkit.sampling.ancestral import sample


def test_an_exact_model_has_none():
    p = coin(end=0.2)
    drawn = sample(p, [p.context(None)] * 40, max_tokens=30, seed=0)
    measured = floor(p, drawn.hidden, drawn.sequences, batch_size=7)
    assert (measured["value"], measured["stderr"], measured["n"]) == (0.0, 0.0, 40)


def test_a_neural_model_has_that_of_its_precision():
    p = load(str(tiny.folder("gpt2")))
    drawn = sample(p, [p.context(None)] * 30, max_tokens=24, seed=0)
    x = drawn.sequences
    measured = floor(p, drawn.hidden, x, batch_size=7)
    assert 0 < measured["value"] < 1e-8
    # One batch for all gives the same, whatever the batches of the second pass.
    whole = summarise("rb", collect(p, drawn.hidden, p, p.encode(x), x)).value
    assert measured["value"] == pytest.approx(whole, rel=0.9)
    half = load(str(tiny.folder("gpt2")), dtype="bfloat16")
    coarse = sample(half, [half.context(None)] * 30, max_tokens=24, seed=0)
    assert floor(half, coarse.hidden, coarse.sequences)["value"] > 1e3 * measured["value"]


def test_vectors_of_another_draw_are_refused():
    p = coin(end=0.2)
    drawn = sample(p, [p.context(None)] * 4, max_tokens=30, seed=0)
    with pytest.raises(ValueError, match="expected one trunk vector for each"):
        floor(p, drawn.hidden[1:], drawn.sequences)
