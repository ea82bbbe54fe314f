"""Per-decision statistics: sums along strings, chunks and batches, weights."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bank import random_pair
from enumeration import per_string, scores, strings
from klkit.divergences.fused import RowStatistics
from klkit.divergences.mixtures import jensen_shannon
from klkit.estimators import statistics as module
from klkit.estimators.statistics import TokenStatistics, collect, earlier_sums, score, weighted
from klkit.models.base import VocabularyMismatch
from klkit.sampling.ancestral import sample
from klkit.sampling.importance import from_policy


def assert_same(a: TokenStatistics, b: TokenStatistics) -> None:
    assert (a.rows.js is None) == (b.rows.js is None)
    for f in fields(RowStatistics)[: None if a.rows.js is not None else -1]:
        torch.testing.assert_close(getattr(a.rows, f.name), getattr(b.rows, f.name), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(a.features, b.features, rtol=1e-13, atol=1e-15)
    assert (a.mixture is None) == (b.mixture is None)
    if a.mixture is not None:
        torch.testing.assert_close(a.mixture, b.mixture, rtol=1e-12, atol=1e-15)


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6), cut=st.integers(0, 30), seed=st.integers(0, 10**6))
def test_earlier_sums_agree_with_a_loop_however_the_decisions_are_chunked(lengths, cut, seed):
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    values = torch.randn(len(row), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    seen = torch.zeros(len(lengths), dtype=torch.float64)
    expected = []
    for i, value in zip(row.tolist(), values, strict=True):
        expected.append(float(seen[i]))
        seen[i] += value
    carry = torch.zeros(len(lengths), dtype=torch.float64)
    parts = [earlier_sums(values[:cut], row[:cut], carry), earlier_sums(values[cut:], row[cut:], carry)]
    assert torch.cat(parts).tolist() == pytest.approx(expected, abs=1e-14)
    assert carry.tolist() == pytest.approx(seen.tolist(), abs=1e-14)


def test_an_infinite_value_reaches_nothing_but_the_rest_of_its_string():
    values = torch.tensor([1.0, torch.inf, 2.0, 3.0, 4.0])
    before = earlier_sums(values, torch.tensor([0, 0, 0, 1, 1]), torch.zeros(2))
    assert before.tolist() == [0.0, 1.0, torch.inf, 0.0, 3.0]


@pytest.mark.parametrize("js", [False, True])
def test_chunks_and_batches_change_nothing(monkeypatch, js):
    p, q = random_pair(0)
    x = sample(p, [p.context(None)] * 30, max_tokens=12, seed=0).sequences
    hidden = p.encode(x), q.encode(x)
    table = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = collect(p, hidden[0], q, hidden[1], x, features=table, mixture=True, js=js)
    monkeypatch.setattr(module, "rows_per_chunk", lambda width: 7)
    assert_same(collect(p, hidden[0], q, hidden[1], x, features=table, mixture=True, js=js), whole)
    assert_same(score(p, q, x, batch_size=4, features=table, mixture=True, js=js), whole)


def test_selected_strings_keep_their_decisions():
    p, q = random_pair(0)
    x = sample(p, [p.context(None)] * 9, max_tokens=12, seed=0).sequences
    rows = torch.tensor([4, 4, 0, 8])
    assert_same(score(p, q, x, mixture=True).select(rows), score(p, q, x.select(rows), mixture=True))
    assert_same(score(p, q, x, js=True).select(rows), score(p, q, x.select(rows), js=True))


def test_the_divergence_of_next_token_laws_is_summed_by_string():
    p, q = random_pair(0)
    law = strings(p, 4)
    logp, logq = (scores(model, law.x)[1] for model in (p, q))
    found = score(p, q, law.x, js=True).strings()
    torch.testing.assert_close(found.js, per_string(law.x, jensen_shannon(logp, logq)), rtol=1e-12, atol=1e-15)
    assert score(p, q, law.x).strings().js is None


def test_features_have_mean_zero_given_the_prefix():
    p, q = random_pair(1)
    law = strings(p, 4)
    statistics = score(p, q, law.x, features=torch.eye(3, dtype=torch.float64))
    for position in range(4):
        there = (law.x.position() == position).double()
        for feature in statistics.features.T:
            assert law.mean(statistics.per_string(feature * there)) == pytest.approx(0, abs=1e-14)


def test_weights_are_one_on_policy_and_turn_means_over_mu_into_means_over_p():
    (p, q), (mu, _) = random_pair(2), random_pair(3)
    x = sample(p, [p.context(None)] * 5, max_tokens=9, seed=0).sequences
    own = score(p, q, x)
    assert bool((own.prefix_weight() == 1).all())
    assert bool((own.string_weight() == 1).all())
    law = strings(mu, 5)
    mine = strings(p, 5)
    other = score(p, q, replace(law.x, sampler_logp=score(mu, mu, law.x).rows.logp))
    assert law.mean(other.string_weight()) == pytest.approx(1, abs=1e-12)
    length = law.mean(other.per_string(other.prefix_weight()))
    assert length == pytest.approx(mine.mean(mine.x.lengths), abs=1e-12)
    whole = other.x.lengths - 1 + other.x.lengths.cumsum(0) - other.x.lengths
    torch.testing.assert_close(other.token_weight()[whole], other.string_weight())


def test_what_p_never_does_weighs_nothing():
    assert weighted(torch.tensor([0.0, 2.0]), torch.tensor([-torch.inf, 3.0])).tolist() == [0.0, 6.0]


def test_strings_of_a_policy_carry_their_law():
    (p, q), (mu, _) = random_pair(2), random_pair(3)
    x = from_policy(mu, [mu.context(None)] * 6, max_tokens=8, seed=0)
    statistics = score(p, q, x, batch_size=4)
    expected = statistics.rows.logp - score(mu, q, x).rows.logp
    torch.testing.assert_close(statistics.importance_ratio(), expected)


def test_vocabularies_of_different_sizes_are_refused():
    p, q = random_pair(0)[0], random_pair(0, symbols=3)[1]
    x = sample(p, [p.context(None)], max_tokens=3, seed=0).sequences
    with pytest.raises(VocabularyMismatch, match=r"expected two models .* got rows of 3 and 4"):
        score(p, q, x)
