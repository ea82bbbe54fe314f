import math

import numpy as np
import pytest

from klkit.stats.decision import decide
from klkit.stats.intervals import ratio_interval
from klkit.stats.paired import LARGEST


def sample(n=200, seed=0):
    return np.random.default_rng(seed).exponential(size=n), np.ones(n)


def test_the_limits_are_one_sided():
    x, w = sample()
    found, interval = decide(x, w, 1.0, level=0.95), ratio_interval(x, w, level=0.9)
    assert found.method == "bootstrap-t, skewness removed"
    assert found.upper == pytest.approx(interval.upper, rel=0.02)
    assert found.lower == pytest.approx(interval.lower, rel=0.02)
    assert decide(x, w, found.upper * 1.0001).verdict == "pass"
    assert decide(x, w, found.lower * 0.9999).verdict == "fail"
    assert decide(x, w, found.upper * 0.9999).verdict == decide(x, w, found.lower * 1.0001).verdict == "undecided"
    wide = decide(x, w, 1.0, spread=2.0)
    assert wide.upper - wide.value == pytest.approx(2 * (found.upper - found.value))


def test_limits_are_never_less_cautious_than_the_interval():
    x, w = sample(500)
    found, interval = decide(x, w, 1.0), ratio_interval(x, w, level=0.9)
    assert found.method == "t, skewness removed"
    assert found.lower == interval.lower  # the long tail is above
    assert found.upper > interval.upper
    mirrored = decide(10 - x, w, 1.0)
    assert (10 - mirrored.lower, 10 - mirrored.upper) == pytest.approx((found.upper, found.lower))


def test_what_would_decide_decides():
    """With the number of clusters that an undecided sample asks for, about 80 % of all samples decide."""
    generator = np.random.default_rng(0)
    x = 1 + generator.normal(size=100)
    x = 1.1 + (x - x.mean()) / x.std(ddof=1)  # value 1.1, deviation 1
    found = decide(x, np.ones(100), 1.2)
    assert found.verdict == "undecided"
    assert found.needed == pytest.approx((1.645 + 0.842) ** 2 / 0.1**2, rel=0.01)
    again = [decide(1.1 + generator.normal(size=found.needed), np.ones(found.needed), 1.2).verdict for _ in range(300)]
    assert again.count("pass") / 300 == pytest.approx(0.8, abs=0.07)
    assert "fail" not in again
    assert str(found).endswith(f"about {found.needed} clusters would decide")


def test_an_estimate_at_the_limit_is_never_decided():
    x = np.tile([0.5, 1.5], 20)
    found = decide(x, np.ones(40), 1.0)
    assert (found.verdict, found.needed) == ("undecided", None)
    assert "never" in str(found)
    near = decide(x, np.ones(40), 1.0 + 1e-6)
    assert near.needed > LARGEST
    assert "more than 1,000,000 clusters" in str(near)


def test_certain_cases():
    infinite = decide(np.array([1.0, math.inf, 1.0]), np.ones(3), 5.0)
    assert (infinite.verdict, infinite.lower, infinite.needed) == ("fail", math.inf, None)
    assert infinite.method == "exact: an infinite contribution"
    assert str(infinite).startswith("fail: above inf")
    constant = [decide(np.ones(20), np.ones(20), limit).verdict for limit in (2.0, 1.0, 0.5)]
    assert constant == ["pass", "undecided", "fail"]
    assert decide(np.zeros(20), np.ones(20), 1e-9).verdict == "pass"


def test_too_few_clusters_decide_nothing():
    x, w = sample(9)
    found = decide(x / 100, w, 1.0)
    assert (found.verdict, found.needed) == ("undecided", 10)
    assert str(found) == "undecided: fewer than 10 clusters; take about 10 clusters"
    assert str(decide(np.ones(1), np.ones(1), 2.0)) == "undecided: fewer than 10 clusters; take at least 10 clusters"


@pytest.mark.parametrize(
    "change",
    [{"limit": 0.0}, {"limit": math.inf}, {"limit": math.nan}, {"level": 0.5}, {"level": 1.0}, {"spread": -1.0}],
)
def test_limits_that_are_none_are_refused(change):
    x, w = sample(20)
    with pytest.raises(ValueError, match="a positive finite limit"):
        decide(x, w, **{"limit": 1.0, **change})


@pytest.mark.parametrize("law", ["normal", "exponential"])
def test_both_errors_hold_at_the_limit(law):
    generator = np.random.default_rng(1)
    replications, n = 300, 40
    verdicts = []
    for _ in range(replications):
        x = 1 + generator.normal(size=n) if law == "normal" else generator.exponential(size=n)
        verdicts.append(decide(x, np.ones(n), 1.0).verdict)
    for word in ("pass", "fail"):
        assert 0.01 < verdicts.count(word) / replications < 0.05 + 3 * math.sqrt(0.05 * 0.95 / replications)
