import math

import numpy as np
import pytest
from scipy import stats

from klkit.stats import ranking
from klkit.stats.intervals import cluster_totals, ratio_stderr
from klkit.stats.paired import holm
from klkit.stats.ranking import Order, rank


def data(k=4, n=60, shared=1.0, noise=0.3, seed=0):
    generator = np.random.default_rng(seed)
    return shared * generator.exponential(size=n) + noise * generator.normal(size=(k, n)) + np.arange(k)[:, None] * 0.1


def units(n):
    return np.ones(n), np.arange(n)


def test_a_pair_is_the_paired_t_test_where_nothing_is_skewed():
    n = 40
    steps = stats.norm.ppf((np.arange(n) + 0.5) / n)  # symmetric to rounding
    x = np.stack([0.3 + steps, np.zeros(n)]) + np.random.default_rng(0).exponential(size=n)
    found = rank(x, *units(n))
    pair = found.pair(0, 1)
    oracle = stats.ttest_rel(x[1], x[0])
    assert (pair.first, pair.second) == (1, 0)
    assert pair.difference == pytest.approx(-0.3)
    assert pair.p == pytest.approx(oracle.pvalue, rel=1e-6)
    interval = oracle.confidence_interval(0.95)
    assert (pair.lower, pair.upper) == pytest.approx((interval.low, interval.high), rel=1e-6)
    assert pair.adjusted == pair.p


def test_every_pair_against_clustered_totals_and_holm():
    x = data(k=5, n=120)
    generator = np.random.default_rng(1)
    weights, cluster = generator.integers(1, 9, size=120).astype(float), generator.integers(0, 30, size=120)
    found = rank(x, weights, cluster, level=0.9)
    assert [(p.first, p.second) for p in found.pairs] == [
        (int(found.order[a]), int(found.order[b])) for a in range(5) for b in range(a + 1, 5)
    ]
    for pair in found.pairs:
        totals, sizes = cluster_totals(x[pair.first] - x[pair.second], weights, cluster)
        assert pair.difference == pytest.approx(totals.sum() / sizes.sum(), rel=1e-9)
        assert pair.stderr == pytest.approx(ratio_stderr(totals, sizes), rel=1e-9)
        t = abs(pair.difference) / pair.stderr
        assert pair.p >= 2 * stats.t.sf(t, len(totals) - 1) * (1 - 1e-9)
        assert found.pair(pair.second, pair.first) is pair
        # The interval is what the test, unadjusted, does not reject.
        assert (pair.lower < 0 < pair.upper) == (pair.p > 0.1)
    assert [p.adjusted for p in found.pairs] == holm([p.p for p in found.pairs])
    assert all((p.verdict == "closer") == (p.adjusted <= 0.1) for p in found.pairs)


def test_blocks_do_not_matter(monkeypatch):
    x = data(k=6)
    whole = rank(x, *units(60))
    monkeypatch.setattr(ranking, "BLOCK", 150)
    assert [p.p for p in rank(x, *units(60)).pairs] == pytest.approx([p.p for p in whole.pairs], rel=1e-12)


def test_rank_ranges_are_counts_of_resolved_pairs():
    x = np.concatenate([data(k=3, noise=0.01) + 5, data(k=2, noise=5.0, seed=1)])
    found = rank(x, *units(60))
    for i in range(5):
        closer = sum(p.second == i and p.verdict == "closer" for p in found.pairs)
        farther = sum(p.first == i and p.verdict == "closer" for p in found.pairs)
        assert (found.first[i], found.last[i]) == (1 + closer, 5 - farther)
        assert found.first[i] <= 1 + list(found.order).index(i) <= found.last[i]
    assert found.order.tolist() == np.argsort(found.values).tolist()
    assert found.reason == ""


def test_candidates_may_come_in_any_order():
    x, shuffled = data(k=5), np.array([3, 1, 4, 0, 2])
    found, again = rank(x, *units(60)), rank(x[shuffled], *units(60))
    assert shuffled[again.order].tolist() == found.order.tolist()
    assert again.first.tolist() == found.first[shuffled].tolist()
    assert [p.p for p in again.pairs] == [p.p for p in found.pairs]


def test_spread_is_the_larger_of_a_pair():
    x = data(k=3)
    plain, wide = rank(x, *units(60)), rank(x, *units(60), spread=np.array([1.0, 3.0, 2.0]))
    for pair in plain.pairs:
        other = wide.pair(pair.first, pair.second)
        factor = 3.0 if 1 in (pair.first, pair.second) else 2.0
        assert other.stderr == pytest.approx(factor * pair.stderr)
        assert other.upper - other.difference == pytest.approx(factor * (pair.upper - pair.difference))
        assert other.p >= pair.p


def test_without_variance_a_difference_is_certain_or_none():
    base = np.random.default_rng(0).exponential(size=30)
    found = rank(np.stack([base, base, base + 0.25]), *units(30))
    same, apart = found.pair(0, 1), found.pair(0, 2)
    assert (same.p, same.adjusted, same.verdict, same.lower, same.upper) == (1.0, 1.0, "tied", 0.0, 0.0)
    assert (apart.p, apart.verdict, apart.method, apart.stderr) == (0.0, "closer", "exact: no variance", 0.0)
    assert apart.lower == apart.upper == pytest.approx(-0.25)
    assert found.first.tolist() == [1, 1, 3]
    assert found.last.tolist() == [2, 2, 3]
    # Rounding of the sums is no difference.
    assert rank(np.stack([base, base * (1 + 1e-16) + 1e-17]), *units(30)).pairs[0].verdict == "tied"


@pytest.mark.parametrize("n", [5, 60])
def test_infinite_candidates_are_last_and_tied_with_each_other(n):
    x = data(k=4, n=n)
    x[1, 3] = x[2, 0] = math.inf
    found = rank(x, *units(n))
    assert set(found.order[2:].tolist()) == {1, 2}
    for finite in (0, 3):
        for infinite in (1, 2):
            pair = found.pair(infinite, finite)
            assert (pair.first, pair.difference, pair.p, pair.verdict) == (finite, -math.inf, 0.0, "closer")
            assert pair.method == "exact: an infinite contribution"
    both = found.pair(1, 2)
    assert (both.verdict, both.method, both.p) == ("tied", "both infinite", 1.0)
    assert math.isnan(both.difference)
    assert found.first[1] == found.first[2] == 3
    assert found.last[1] == found.last[2] == 4
    # A certain pair does not make the others harder to resolve.
    if n == 60:
        assert found.pair(0, 3).adjusted == found.pair(0, 3).p


def test_fewer_than_ten_clusters_tie():
    x = np.stack([np.zeros(9), np.full(9, 5.0)]) + np.random.default_rng(0).normal(size=9)
    found = rank(x, *units(9))
    pair = found.pairs[0]
    assert pair.verdict == "tied"
    assert math.isnan(pair.p)
    assert math.isnan(pair.lower)
    assert pair.difference == pytest.approx(-5)
    assert found.reason == "fewer than 10 clusters (9): no difference can be tested"
    assert (found.first.tolist(), found.last.tolist()) == ([1, 1], [2, 2])


def test_one_candidate_is_an_order():
    found = rank(np.ones((1, 3)), *units(3))
    assert isinstance(found, Order)
    assert (found.order.tolist(), found.first.tolist(), found.last.tolist()) == ([0], [1], [1])
    assert (found.pairs, found.reason) == ((), "")
    with pytest.raises(ValueError, match="two different candidates"):
        found.pair(0, 0)


@pytest.mark.parametrize(
    ("x", "change", "message"),
    [
        (np.ones((2, 3)), {}, "the same strings"),
        (np.ones((0, 4)), {}, "the same strings"),
        (np.array([[1.0, 1, 1, 1], [1, math.nan, 1, 1]]), {}, "for candidate 1"),
        (np.array([[-math.inf, 1, 1, 1]]), {}, "for candidate 0"),
        (np.ones((2, 4)), {"level": 1.0}, "a level between 0 and 1"),
        (np.ones((2, 4)), {"spread": np.ones(3)}, "each of 2 candidates"),
        (np.ones((2, 4)), {"spread": np.array([1.0, math.nan])}, "each of 2 candidates"),
    ],
)
def test_what_cannot_be_ranked_is_refused(x, change, message):
    with pytest.raises(ValueError, match=message):
        rank(x, *units(4), **change)


def test_equal_candidates_with_skewed_differences_are_tied():
    """Where Student's t, adjusted or not, is wrong: one candidate is constant, the others lognormal; all means 1."""
    generator = np.random.default_rng(3)
    replications, usual, used = 300, 0, 0
    for _ in range(replications):
        x = np.exp(generator.normal(size=(6, 60)) - 0.5)
        x[0] = 1.0
        found = rank(x, *units(60))
        t = np.array([abs(p.difference) / p.stderr for p in found.pairs])
        usual += min(holm((2 * stats.t.sf(t, 59)).tolist())) <= 0.05
        used += any(p.verdict == "closer" for p in found.pairs)
    assert used / replications <= 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / replications)
    assert usual / replications > 0.09


@pytest.mark.slow
def test_a_thousand_candidates():
    x = data(k=1000, n=200)
    found = rank(x, *units(200))
    assert len(found.pairs) == 499_500
    assert found.first[0] == 1
    assert found.last[0] < 500
