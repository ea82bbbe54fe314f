import math

import numpy as np
import pytest

from klkit.stats import intervals
from klkit.stats.quantiles import quantile_interval


def documents(seed, clusters=60, size=30, between=0.5):
    generator = np.random.default_rng(seed)
    level = between * generator.normal(size=(clusters, 1))
    x = level + math.sqrt(1 - between**2) * generator.normal(size=(clusters, size))
    return x.ravel(), np.repeat(np.arange(clusters), size)


@pytest.mark.parametrize("probability", [0.1, 0.25, 0.5, 0.9, 0.99])
def test_bisection_finds_the_percentiles_of_explicit_resamples(probability, monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 199)
    x, cluster = documents(0, clusters=25, size=12)
    estimate, found = quantile_interval(x, cluster, probability)
    assert estimate == np.quantile(x, probability, method="inverted_cdf")
    if found.method.startswith("none"):
        assert probability == 0.99
        return
    generator = np.random.default_rng(0)
    by_cluster = x.reshape(25, 12)
    resampled = [
        np.quantile(by_cluster[generator.integers(25, size=25)], probability, method="inverted_cdf") for _ in range(199)
    ]
    expected = np.quantile(resampled, [0.025, 0.975], method="inverted_cdf")
    assert [found.lower, found.upper] == expected.tolist()


@pytest.mark.parametrize("probability", [0.5, 0.95])
def test_coverage_with_dependent_values(probability):
    """300 replications of 60 documents; ignoring the documents would cover far less (tested alongside)."""
    truth = {0.5: 0.0, 0.95: 1.6448536}[probability]
    hits, naive = [], []
    for seed in range(300):
        x, cluster = documents(seed)
        found = quantile_interval(x, cluster, probability)[1]
        hits.append(found.lower <= truth <= found.upper)
        if seed < 100:
            # arbitrary groups of values instead of the documents
            wrong = quantile_interval(x, np.random.default_rng(seed).permutation(cluster), probability)[1]
            naive.append(wrong.lower <= truth <= wrong.upper)
    assert 0.89 < np.mean(hits) < 0.985
    assert np.mean(naive) < np.mean(hits) - 0.1


def test_extremes_have_no_interval():
    x, cluster = documents(1)
    value, found = quantile_interval(x, cluster, 1.0)
    assert value == x.max()
    assert math.isnan(found.lower)
    assert math.isnan(found.upper)
    assert quantile_interval(x, cluster, 0.0)[0] == x.min()


def test_says_when_too_few_clusters_carry_a_quantile():
    x, cluster = np.r_[np.zeros(990), np.arange(1.0, 11)], np.r_[np.arange(990) % 30, np.full(10, 3)]
    value, found = quantile_interval(x, cluster, 0.995)
    assert value == 5
    assert math.isnan(found.upper)
    assert found.method == "none (1 of 30 clusters reach beyond this quantile)"
    assert quantile_interval(np.ones(300), np.arange(300), 0.5)[1].method == (
        "none (0 of 300 clusters reach beyond this quantile)"
    )
    assert quantile_interval(np.array([2.0]), np.array([0]), 0.5)[0] == 2


def test_infinite_values_are_just_large():
    x, cluster = documents(2)
    x[::7] = math.inf
    value, found = quantile_interval(x, cluster, 0.5)
    assert math.isfinite(value)
    assert math.isfinite(found.upper)
    assert quantile_interval(x, cluster, 0.95)[0] == math.inf


@pytest.mark.parametrize(("values", "probability"), [([], 0.5), ([1.0, math.nan], 0.5), ([1.0, 2.0], 1.5)])
def test_refuses_nonsense(values, probability):
    with pytest.raises(ValueError, match="expected at least one value"):
        quantile_interval(np.array(values), np.zeros(len(values), dtype=np.int64), probability)
