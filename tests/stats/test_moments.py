import math
from dataclasses import astuple
from functools import reduce
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klkit.stats.intervals import cluster_totals, ratio_interval, ratio_stderr
from klkit.stats.moments import Moments


def strings(n, seed=0, clusters=None):
    generator = np.random.default_rng(seed)
    weights = generator.geometric(0.1, size=n).astype(float)
    cluster = np.arange(n) if clusters is None else np.sort(generator.integers(clusters, size=n))
    return generator.gamma(weights), weights, cluster


def test_agree_with_the_batch_formulas():
    data = strings(300, clusters=80)
    moments = Moments.of(*data)
    totals = cluster_totals(*data)
    assert moments.clusters == len(totals[0])
    assert moments.value == pytest.approx(data[0].sum() / data[1].sum(), rel=1e-13)
    assert moments.stderr == pytest.approx(ratio_stderr(*totals), rel=1e-12)
    interval = ratio_interval(*totals, method="t", level=0.9)
    assert moments.half_width(0.9) == pytest.approx((interval.upper - interval.lower) / 2, rel=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 1000))
def test_any_split_merges_to_the_whole(sizes, seed):
    contributions, weights, cluster = strings(sum(sizes), seed)
    edges = np.cumsum([0, *sizes])
    parts = [Moments.of(contributions[a:b], weights[a:b], cluster[a:b]) for a, b in pairwise(edges)]
    whole = Moments.of(contributions, weights, cluster)
    scale = max(map(abs, astuple(whole)))
    for merged in (reduce(Moments.merge, parts, Moments()), reduce(Moments.merge, reversed(parts))):
        assert astuple(merged) == pytest.approx(astuple(whole), rel=1e-10, abs=1e-10 * scale)


def test_do_not_cancel_far_from_zero():
    """A spread of one on top of 10⁹: the sum of squares alone would have lost every digit."""
    x = 1e9 + np.tile([-1.0, 1.0], 500)
    parts = [Moments.of(x[i : i + 10], np.ones(10), np.arange(10)) for i in range(0, 1000, 10)]
    merged = reduce(Moments.merge, parts)
    assert merged.total_total == pytest.approx(1000, rel=1e-9)


def test_empty_and_single():
    empty = Moments()
    assert math.isnan(empty.value)
    assert math.isnan(empty.half_width())
    one = empty.merge(Moments.of(np.array([3.0]), np.array([2.0]), np.array([0])))
    assert one.value == 1.5
    assert math.isnan(one.stderr)
    assert math.isnan(one.half_width())
    assert one.merge(empty) == one


def test_an_infinite_contribution_stays_infinite():
    finite = Moments.of(*strings(20))
    infinite = Moments.of(np.array([1.0, math.inf]), np.ones(2), np.arange(2))
    for merged in (finite.merge(infinite), infinite.merge(finite), infinite.merge(infinite)):
        assert merged.value == math.inf
        assert math.isnan(merged.stderr)
        assert math.isnan(merged.half_width())


def test_a_constant_ratio_has_no_error():
    weights = np.arange(1.0, 50)
    assert Moments.of(0.1 * weights, weights, np.arange(49)).stderr < 1e-8
