"""The automaton as a language model: its law, its prompts, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bank
from enumeration import per_string, scores, strings
from klkit import rng
from klkit.models.automaton import Automaton, automaton, coin, default_symbols, finite, memoryless, random_automaton
from klkit.models.base import LanguageModel, Vocabulary
from klkit.sequences import Sequences


def test_satisfies_the_protocol() -> None:
    assert isinstance(coin(end=0.5), LanguageModel)


def test_a_finite_law_gives_each_string_its_probability() -> None:
    law = {"ab": 0.1, "": 0.2, "b": 0.3, "abb": 0.25, "bbbb": 0.15, "aa": 0.0}
    p = finite(law, symbols="abc")
    found = strings(p, 6)
    assert bool(found.x.finished.all())
    read = {"".join(p.pieces(found.x.completion(i).tolist()[:-1])): float(found.probability[i]) for i in range(5)}
    assert read == pytest.approx({text: mass for text, mass in law.items() if mass})
    assert len(found.x) == 5


def test_prefixes_of_no_string_still_have_a_row() -> None:
    p = bank.A.p
    x = Sequences.pack([p.context(None)], [torch.tensor([3, 3, 0, 4])])
    logp, rows = scores(p, x)
    assert logp[0] == -math.inf
    torch.testing.assert_close(rows.exp().sum(-1), torch.ones(4, dtype=torch.float64))


@settings(max_examples=25, deadline=None)
@given(states=st.integers(1, 5), symbols=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_the_law_over_cut_strings_sums_to_one(states: int, symbols: int, seed: int) -> None:
    p = random_automaton(states, symbols, generator=rng.stream(seed, "law"))
    found = strings(p, 4)
    assert float(found.probability.sum()) == pytest.approx(1.0, abs=1e-12)
    # Stepping and teacher forcing give the same strings the same probabilities.
    torch.testing.assert_close(per_string(found.x, scores(p, found.x)[0]), found.logp, rtol=0, atol=1e-12)


def test_prompts() -> None:
    p, _ = bank.random_pair(0)
    assert p.context(None).tolist() == p.context("").tolist() == [2]
    assert p.context("ab").tolist() == [2, 0, 1]
    assert p.context(torch.tensor([0, 1])).tolist() == [0, 1]
    assert p.context(torch.tensor([], dtype=torch.long)).tolist() == [2]
    wordy = memoryless([1 / 30] * 30, end=0.5)
    assert default_symbols(30)[28] == "s28"
    assert wordy.context("s3 s28").tolist() == [30, 3, 28]
    # An end token inside a context is a new beginning, and ids mean the same with or without it.
    _, fresh = p.begin([torch.tensor([2, 1])])
    _, again = p.begin([torch.tensor([0, 0, 1, 2, 1])])
    _, bare = p.begin([torch.tensor([1])])
    assert fresh.tolist() == again.tolist() == bare.tolist()


def test_padding_may_hold_anything() -> None:
    p, _ = bank.random_pair(1)
    x = Sequences.pack([p.context(None)] * 2, [torch.tensor([0, 1, 0, 2]), torch.tensor([2])])
    for noise in (-100, 10**9):
        noisy = x.tokens.clone()
        noisy[1, 2:] = noise
        y = Sequences(noisy, x.start, x.stop, x.prompt, x.cluster, x.finished)
        assert torch.equal(p.encode(x), p.encode(y))


def test_several_end_tokens() -> None:
    table = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    p = Automaton(table, torch.zeros(1, 3, dtype=torch.long), Vocabulary(("a", "<eos>", "<eot>"), (1, 2)))
    found = strings(p, 3)
    assert float(found.probability[found.x.finished].sum()) == pytest.approx(1 - 0.5**3)


ONE = torch.zeros(1, 2, dtype=torch.long)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: automaton(torch.tensor([[0.5, 0.6]]).double(), ONE[:, :1]), "sum to 1, got 1.1"),
        (lambda: automaton(torch.tensor([[math.nan, 0.5]]).double(), ONE[:, :1]), "sum to 1, got nan"),
        (lambda: automaton(torch.tensor([[1.0, 0.0]]).double(), ONE[:, :1]), "end with probability one"),
        (lambda: automaton(torch.tensor([[0.5, 0.5]]).double(), ONE[:, :1] + 1), "states numbered 0..0"),
        (lambda: automaton(torch.tensor([[0.5, 0.5]]).double(), ONE[:, :1], symbols=["a", "b"]), "1 different symbols"),
        (lambda: automaton(torch.tensor([[0.2, 0.3, 0.5]]).double(), ONE, symbols=["a", "a"]), "2 different symbols"),
        (lambda: Automaton(torch.zeros(1, 2).double(), ONE, Vocabulary(("a", "b"), ())), "sum to 1"),
        (lambda: Automaton(torch.full((1, 2), 0.5).double().log(), ONE, Vocabulary(("a", "b"), ())), "one end token"),
        (lambda: Automaton(torch.full((1, 2), 0.5).log(), ONE, Vocabulary(("a", "<end>"), (1,))), "expected fp64"),
        (lambda: Automaton(torch.full((1, 2), 0.5).double().log(), ONE, Vocabulary(("a",), (0,))), "of shape"),
        (lambda: coin(end=0.0), "probability of ending"),
        (lambda: finite({"a": 0.5}, symbols="a"), "sum to 1"),
        (lambda: finite({"a": 1.5, "": -0.5}, symbols="a"), "non-negative"),
        (lambda: finite({"ab": 1.0}, symbols="a"), "declare"),
        (lambda: coin(end=0.5).context("ax"), "symbols among"),
        (lambda: coin(end=0.5).context(torch.tensor([7])), "token ids in 0..1"),
        (lambda: coin(end=0.5).context([{"role": "user", "content": "hi"}]), "chat template"),
    ],
)
def test_refusals(build, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        build()


def test_endless_automata_are_possible_when_asked_for() -> None:
    rows = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    p = Automaton(rows, ONE, Vocabulary(("a", "<end>"), (1,)), tight=False)
    assert strings(p, 3).x.finished.tolist() == [False]
