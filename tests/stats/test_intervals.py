import math

import numpy as np
import pytest
from scipy import stats

from klkit.stats import intervals
from klkit.stats.intervals import cluster_totals, ratio_interval, ratio_stderr, resamples, studentised


def draws(n, seed=0, sd=1.0):
    return np.exp(sd * np.random.default_rng(seed).normal(size=n))


def test_cluster_totals_sum_each_label():
    totals, weights = cluster_totals(np.array([1.0, 2, 3, 4]), np.array([1.0, 1, 2, 5]), np.array([7, -1, 7, 3]))
    assert totals.tolist() == [2, 4, 4]
    assert weights.tolist() == [1, 5, 3]


@pytest.mark.parametrize(
    ("contributions", "weights", "what"),
    [
        ([1.0, math.nan], [1.0, 1.0], "NaN for 1 of 2"),
        ([1.0, 2.0], [1.0, -1.0], "non-negative"),
        ([1.0, 2.0], [1.0, math.inf], "finite"),
        ([1.0, 2.0], [1.0, math.nan], "finite"),
        ([1.0, 2.0], [0.0, 0.0], "not all zero"),
        ([1.0], [1.0, 1.0], "three arrays of one length"),
        ([math.inf, -math.inf], [1.0, 1.0], "both signs"),
    ],
)
def test_totals_refuse_what_has_no_meaning(contributions, weights, what):
    with pytest.raises(ValueError, match=what):
        cluster_totals(np.array(contributions), np.array(weights), np.array([0, 0]))


def test_stderr_with_equal_weights_is_the_textbook_one():
    x = draws(50)
    assert ratio_stderr(x, np.full(50, 3.0)) == pytest.approx(stats.sem(x) / 3)


def test_stderr_of_a_ratio_matches_its_sampling_distribution():
    generator = np.random.default_rng(0)
    lengths = generator.geometric(0.1, size=(2000, 200)).astype(float)
    totals = 0.3 * lengths + generator.normal(size=lengths.shape) * np.sqrt(lengths)
    ratios = totals.sum(1) / lengths.sum(1)
    errors = [ratio_stderr(t, w) for t, w in zip(totals, lengths, strict=True)]
    assert np.mean(np.square(errors)) == pytest.approx(ratios.var(), rel=0.1)


def test_clusters_of_copies_count_once():
    """Ten copies of every string in one cluster: the interval of the strings themselves, not one √10 shorter."""
    x = draws(100)
    copied = cluster_totals(np.repeat(x, 10), np.ones(1000), np.repeat(np.arange(100), 10))
    assert ratio_stderr(*copied) == pytest.approx(ratio_stderr(x, np.ones(100)))
    assert ratio_interval(*copied).upper == pytest.approx(ratio_interval(x, np.ones(100)).upper)


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_t_interval_agrees_with_scipy(level):
    x = draws(37)
    found = ratio_interval(x, np.ones(37), level=level, method="t")
    expected = stats.t.interval(level, 36, x.mean(), stats.sem(x))
    assert (found.lower, found.upper) == pytest.approx(expected, rel=1e-10)


def test_studentised_resamples_are_those_of_a_plain_loop(monkeypatch):
    generator = np.random.default_rng(1)
    weights = generator.geometric(0.2, size=23).astype(float)
    totals = draws(23) * weights
    residuals = totals - totals.sum() / weights.sum() * weights
    fast = studentised(residuals, weights, resamples(23, np.random.default_rng(5)))
    drawn = np.random.default_rng(5)
    for t in fast[:200]:
        i = drawn.integers(23, size=23)
        shift = totals[i].sum() / weights[i].sum() - totals.sum() / weights.sum()
        assert t == pytest.approx(shift / ratio_stderr(totals[i], weights[i]), rel=1e-9)
    monkeypatch.setattr(intervals, "CHUNK", 100)  # four resamples at a time: same draws, same answer
    again = studentised(residuals, weights, resamples(23, np.random.default_rng(5)))
    np.testing.assert_allclose(again, fast, rtol=1e-9)


def test_bootstrap_t_leans_to_the_long_tail_and_is_reproducible():
    x = draws(64, seed=3)
    found, plain = ratio_interval(x, np.ones(64)), ratio_interval(x, np.ones(64), method="t")
    assert found.method == "bootstrap-t"
    assert found.lower > plain.lower
    assert found.upper > plain.upper
    assert found == ratio_interval(x, np.ones(64), seed=0) != ratio_interval(x, np.ones(64), seed=1)


def test_intervals_move_and_stretch_with_the_data():
    x, w = draws(40), np.random.default_rng(1).uniform(1, 3, size=40)
    base = ratio_interval(x, w)
    moved = ratio_interval(2 * x + 5 * w, w)
    assert (moved.lower, moved.upper) == pytest.approx((2 * base.lower + 5, 2 * base.upper + 5))
    mirrored = ratio_interval(-x, w)
    assert (mirrored.lower, mirrored.upper) == pytest.approx((-base.upper, -base.lower))


def test_the_rule_changes_at_400_clusters():
    assert ratio_interval(draws(399), np.ones(399)).method == "bootstrap-t"
    assert ratio_interval(draws(400), np.ones(400)).method == "t"


def test_fewer_than_ten_clusters_have_no_interval():
    found = ratio_interval(draws(9), np.ones(9))
    assert math.isnan(found.lower)
    assert math.isnan(found.upper)
    assert found.method == "none (fewer than 10 clusters)"
    assert math.isfinite(ratio_interval(draws(10), np.ones(10)).upper)


def test_one_cluster_has_no_standard_error():
    assert math.isnan(ratio_stderr(np.array([1.0]), np.array([2.0])))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("n", [1, 5, 50, 500])
def test_an_infinite_contribution_is_an_infinite_mean(sign, n):
    x = np.ones(n)
    x[0] = sign * math.inf
    found = ratio_interval(x, np.ones(n))
    assert found.lower == found.upper == sign * math.inf
    assert "infinite" in found.method
    assert math.isnan(ratio_stderr(x, np.ones(n)))


@pytest.mark.parametrize("value", [0.0, 0.1, 1e9])
@pytest.mark.parametrize("method", ["auto", "t", "bootstrap-t"])
def test_no_variance_gives_the_value(value, method):
    lengths = np.arange(1.0, 31)
    found = ratio_interval(value * lengths, lengths, method=method)
    assert found.lower == found.upper == pytest.approx(value)
    assert found.method == "exact: no variance"


def test_resamples_without_variance_widen_and_are_named():
    """One string of twenty differs: a third of the resamples miss it, and those cannot bound the mean from above."""
    x = np.zeros(20)
    x[3] = 1.0
    found = ratio_interval(x, np.ones(20))
    assert found.upper == math.inf
    assert found.lower < x.mean()
    assert found.method == "bootstrap-t: too few clusters differ"
    x[:10] = 1.0
    assert math.isfinite(ratio_interval(x, np.ones(20)).upper)


def test_clusters_without_weight_are_allowed():
    x = np.r_[draws(30), np.zeros(5)]
    w = np.r_[np.ones(30), np.zeros(5)]
    found = ratio_interval(x, w)
    assert found.lower < x.sum() / 30 < found.upper
    mostly_empty = np.r_[np.zeros(18), 1.0, 2.0]
    assert ratio_interval(mostly_empty, np.sign(mostly_empty)).lower < 1.5


@pytest.mark.parametrize("kwargs", [{"method": "bca"}, {"level": 1.0}, {"level": 0.0}, {"level": math.nan}])
def test_unknown_requests_are_refused(kwargs):
    with pytest.raises(ValueError, match="expected method"):
        ratio_interval(draws(20), np.ones(20), **kwargs)


def test_intervals_at_extreme_levels_nest():
    x = draws(60)
    widths = [(i.lower, i.upper) for i in (ratio_interval(x, np.ones(60), level=v) for v in (0.5, 0.9, 0.99, 0.9999))]
    assert sorted(widths, reverse=True) == widths
    assert [u for _, u in widths] == sorted(u for _, u in widths)


def test_coverage_of_skewed_means():
    """Exponentials, n = 64: 95 % nominal. 600 replications, so anything between 92 and 98 % is within 3.4 sigma."""
    generator = np.random.default_rng(0)
    hits = [
        found.lower <= 1 <= found.upper
        for seed in range(600)
        for found in [ratio_interval(generator.exponential(size=64), np.ones(64), seed=seed)]
    ]
    assert 0.92 < np.mean(hits) < 0.98
