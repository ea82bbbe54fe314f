"""Transformations of models against their definitions, row by row and composed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import folder
from torch import Tensor

import bank
from enumeration import scores, strings
from klkit.estimators.exact import exact
from klkit.models.automaton import Automaton, automaton, coin, memoryless
from klkit.models.base import LanguageModel, NotTractable, head_of
from klkit.models.laws import check_laws
from klkit.models.spec import load
from klkit.models.wrap import Transformed, as_automaton, extend, restrict, temperature, top_k, top_p
from klkit.sequences import Sequences

P, Q = bank.random_pair(0, states=4, symbols=4)


def first_row(model: LanguageModel) -> Tensor:
    return model.readout(model.begin([model.context(None)])[1])[0].exp()


def one(law: list[float]) -> Automaton:
    """A model whose every decision has this law, the end token last."""
    return automaton(torch.tensor([law], dtype=torch.float64), torch.zeros(1, len(law) - 1, dtype=torch.long))


def assert_row(model: LanguageModel, law: list[float]) -> None:
    torch.testing.assert_close(first_row(model), torch.tensor(law, dtype=torch.float64), rtol=0, atol=1e-14)


def test_temperature_is_a_power() -> None:
    law = first_row(P)
    for t in (0.3, 1.0, 4.0):
        torch.testing.assert_close(first_row(temperature(P, t)), law ** (1 / t) / (law ** (1 / t)).sum())
    torch.testing.assert_close(first_row(temperature(temperature(P, 0.5), 2.0)), law)
    assert_row(temperature(one([0.0, 0.5, 0.5]), 0.1), [0.0, 0.5, 0.5])  # impossible stays impossible


def test_top_k_keeps_exactly_k_and_low_ids_among_equals() -> None:
    assert_row(top_k(one([0.1, 0.4, 0.2, 0.3]), 2), [0, 4 / 7, 0, 3 / 7])
    assert_row(top_k(one([0.25, 0.25, 0.25, 0.25]), 3), [1 / 3, 1 / 3, 1 / 3, 0])
    assert_row(top_k(one([0.2, 0.4, 0.2, 0.2]), 2), [1 / 3, 2 / 3, 0, 0])
    assert_row(top_k(one([0.2, 0.4, 0.2, 0.2]), 1), [0, 1, 0, 0])
    assert_row(top_k(one([0.2, 0.4, 0.2, 0.2]), 9), [0.2, 0.4, 0.2, 0.2])
    assert_row(top_k(one([0.5, 0.0, 0.0, 0.0, 0.5]), 4), [0.5, 0, 0, 0, 0.5])  # fewer than k are possible


def test_top_p_keeps_the_smallest_set_of_enough_mass() -> None:
    law = [0.1, 0.4, 0.2, 0.3]
    assert_row(top_p(one(law), 0.35), [0, 1, 0, 0])
    assert_row(top_p(one(law), 0.45), [0, 4 / 7, 0, 3 / 7])
    assert_row(top_p(one(law), 0.95), law)
    assert_row(top_p(one(law), 1.0), law)
    assert_row(top_p(one(law), 1e-9), [0, 1, 0, 0])
    assert_row(top_p(one([0.25, 0.25, 0.25, 0.25]), 0.5), [0.5, 0.5, 0, 0])
    assert_row(top_p(one([w / 14 for w in (1, 3, 3, 3, 4)]), 0.5), [0, 3 / 7, 0, 0, 4 / 7])


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.integers(0, 4), min_size=2, max_size=7), k=st.integers(1, 8), p=st.floats(0.01, 1.0))
def test_truncations_match_sorting_in_python(weights: list[int], k: int, p: float) -> None:
    weights[-1] = max(weights[-1], 1)
    law = [w / sum(weights) for w in weights]
    order = sorted(range(len(law)), key=lambda i: (-weights[i], i))

    def renormalised(keep: list[int]) -> list[float]:
        mass = sum(law[i] for i in keep)
        return [law[i] / mass if i in keep else 0.0 for i in range(len(law))]

    assert_row(top_k(one(law), k), renormalised(order[:k]))
    kept: list[int] = []
    for i in order:
        if sum(weights[j] for j in kept) / sum(weights) < p - 1e-12:
            kept.append(i)
    assert_row(top_p(one(law), p), renormalised(kept))


def test_restrict() -> None:
    assert_row(restrict(one([0.1, 0.4, 0.2, 0.3]), [3, 0, 3]), [0.25, 0, 0, 0.75])
    assert restrict(P, [0, 4]).name == "random.p|restrict=2"


def test_names_tell_the_whole_story() -> None:
    assert top_p(temperature(coin(end=0.5), 0.7), 0.9).name == "coin(0.5)|temperature=0.7|top_p=0.9"
    assert top_k(extend(coin(end=0.5), 4), 2).name == "coin(0.5)|extend=4|top_k=2"


def test_order_of_composition_matters() -> None:
    hot_first = first_row(top_p(temperature(one([0.1, 0.6, 0.3]), 3.0), 0.55))
    cut_first = first_row(temperature(top_p(one([0.1, 0.6, 0.3]), 0.55), 3.0))
    assert int((hot_first > 0).sum()) == 2
    assert int((cut_first > 0).sum()) == 1


def test_the_law_of_strings_is_the_product_of_transformed_rows() -> None:
    model = top_k(temperature(P, 0.6), 3)
    found = strings(model, 4)
    assert float(found.probability.sum()) == pytest.approx(1.0)
    plain = scores(P, found.x)[1]
    cold = (plain / 0.6).softmax(-1)
    kept = cold.masked_fill(cold < cold.topk(3).values[:, -1:], 0.0)
    rows = (kept / kept.sum(-1, keepdim=True)).log()
    torch.testing.assert_close(scores(model, found.x)[1], rows)


def test_extended_vocabulary() -> None:
    model = extend(P, 8, ["new"])
    assert model.vocabulary.size == 8
    assert model.vocabulary.tokens[5:] == ("new", None, None)
    assert model.pieces([0, 4, 5, 6]) == ["a", "<end>", "new", ""]
    table = model.embedding()
    assert table is not None
    assert table.shape == (8, 5)
    assert bool((table[5:] == 0).all())
    # A string with an added token has probability zero, and the rows after it still normalise.
    x = Sequences.pack([model.context("ab")], [torch.tensor([0, 5, 1, 4])])
    logp, rows = scores(model, x)
    assert logp.isneginf().tolist() == [False, True, False, False]
    torch.testing.assert_close(rows.exp().sum(-1), torch.ones(4, dtype=torch.float64))
    assert torch.equal(rows, as_automaton(model).readout(as_automaton(model).encode(x)))
    for contexts in ([torch.tensor([4, 6])],):
        with pytest.raises(ValueError, match="leave added tokens out"):
            model.begin(contexts)
        with pytest.raises(ValueError, match="leave added tokens out"):
            model.encode(Sequences.pack(contexts, [torch.tensor([0])]))


@pytest.mark.parametrize(
    "model", [temperature(P, 0.5), top_p(P, 0.7), extend(top_k(temperature(P, 2.0), 3), 7)], ids=lambda m: m.name
)
def test_tabulated_automaton_is_the_same_model(model: Transformed) -> None:
    table = as_automaton(model)
    assert table.name == model.name
    assert table.vocabulary == model.vocabulary
    ours, theirs = strings(model, 4), strings(table, 4)
    assert torch.equal(ours.x.tokens, theirs.x.tokens)
    torch.testing.assert_close(ours.logp, theirs.logp, rtol=0, atol=1e-12)


def test_exact_divergence_of_what_a_decoder_samples_from() -> None:
    """Independent symbols tempered: the closed form of memoryless models, on rows worked out by hand."""
    law, t = [0.5 * 0.8, 0.3 * 0.8, 0.2 * 0.8, 0.2], 0.5
    cold = [a ** (1 / t) for a in law]
    cold = [a / sum(cold) for a in cold]
    k = sum(c * math.log(c / a) for c, a in zip(cold, law, strict=True))
    p = memoryless([0.5, 0.3, 0.2], end=0.2)
    assert exact(temperature(p, t), p).value == pytest.approx(k / cold[-1], rel=1e-12)
    # Truncation only renormalises: the divergence of a decision is −log of the mass that was kept.
    assert exact(top_k(p, 3), p).value == pytest.approx(-math.log(1 - 0.16) / (0.2 / 0.84), rel=1e-12)
    assert exact(p, top_k(p, 3)).value == math.inf


def test_a_neural_model_restricted_to_three_tokens_is_enumerable() -> None:
    """The same wrappers over a cache, padding and a head; laws checked, strings summed."""
    base = load(str(folder("gpt2")))
    end = base.vocabulary.ends[0]
    model = temperature(restrict(base, [end, 5, 9]), 0.8)
    assert all(outcome.holds for outcome in check_laws(model, [None, "the film"]))
    found = strings(model, 4, prompt="the film")
    assert len(found.x) == 1 + 2 + 4 + 8 * 3
    assert float(found.probability.sum()) == pytest.approx(1.0, abs=1e-5)
    logp, rows = scores(model, found.x)
    total = torch.zeros(len(found.x), dtype=torch.float64).index_add_(0, found.x.row(), logp)
    torch.testing.assert_close(total, found.logp, rtol=0, atol=1e-4)
    raw = base.readout(base.encode(found.x)).double()[:, [end, 5, 9]] / 0.8
    torch.testing.assert_close(rows[:, [end, 5, 9]], raw.log_softmax(-1), rtol=0, atol=1e-4)


def test_refusals() -> None:
    for build, message in (
        (lambda: temperature(P, 0.0), "top_k"),
        (lambda: temperature(P, math.nan), "positive finite temperature"),
        (lambda: top_k(P, 0), "at least 1"),
        (lambda: top_p(P, 0.0), r"in \(0, 1\]"),
        (lambda: top_p(P, 1.5), r"in \(0, 1\]"),
        (lambda: restrict(P, []), "at least one token id"),
        (lambda: restrict(P, [5]), "at least one token id"),
        (lambda: first_row(restrict(one([0.0, 0.5, 0.5]), [0])), "allow more tokens"),
        (lambda: extend(P, 4), "use restrict"),
        (lambda: extend(P, 6, ["x", "y"]), "size of at least 7"),
    ):
        with pytest.raises(ValueError, match=message):
            build()  # type: ignore[no-untyped-call]
    with pytest.raises(NotTractable, match="estimate it"):
        as_automaton(Opaque(P))  # type: ignore[arg-type]


class Opaque:
    """A model that is no automaton to the eye: it stands for any neural one."""

    def __init__(self, inner: Automaton) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


@pytest.fixture(scope="module")
def network() -> LanguageModel:
    return load(str(folder("gemma2")))


@pytest.mark.parametrize(
    ("wrap", "handed_over"),
    [
        (lambda model: temperature(model, 0.7), True),
        (lambda model: top_p(model, 1.0), True),
        (lambda model: restrict(model, range(300)), True),
        (lambda model: restrict(model, [0, 2]), False),
        (lambda model: extend(model, 330), True),
        (lambda model: temperature(extend(restrict(model, range(310)), 325), 2.0), True),
        (lambda model: top_k(model, 3), False),
        (lambda model: temperature(top_p(model, 0.5), 2.0), False),
    ],
)
def test_heads_follow_where_they_can(wrap, handed_over: bool, network: LanguageModel) -> None:
    model = wrap(network)
    assert (head_of(model) is not None) == handed_over
    if handed_over:
        check_laws(model, strings=2, max_tokens=4)


def test_automata_have_no_head() -> None:
    assert head_of(temperature(P, 0.5)) is None
