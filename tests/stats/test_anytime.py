import math

import numpy as np
import pytest
from scipy import stats

from klkit.stats.anytime import anytime_difference

T = 300


def test_is_the_published_sequence_where_nothing_is_skewed():
    x = np.tile([-1.0, 1.0], T) + 0.1
    found = anytime_difference(x, np.zeros(2 * T), around=100)
    log = -2 * math.log(0.05)
    rho = (log + math.log(log + 1)) / 100  # ρ²
    for t in (32, 100, 600):
        mean, sd = x[:t].mean(), x[:t].std(ddof=1)
        half = sd * math.sqrt(2 * (t * rho + 1) / (t**2 * rho) * math.log(math.sqrt(t * rho + 1) / 0.05))
        assert (found.lower[t - 1], found.upper[t - 1]) == pytest.approx((mean - half, mean + half), rel=1e-9)
    assert np.isneginf(found.lower[:31]).all()
    assert np.isposinf(found.upper[:31]).all()


def test_long_tails_widen_the_side_they_hide():
    d = np.random.default_rng(0).exponential(size=T)
    found, mirrored = anytime_difference(d, np.zeros(T)), anytime_difference(np.zeros(T), d)
    np.testing.assert_allclose(found.lower, -mirrored.upper)
    mean = np.cumsum(d) / np.arange(1, T + 1)
    assert (found.upper - mean)[40:].min() > 0
    assert ((found.upper - mean) > (mean - found.lower))[40:].all()
    assert stats.skew(d) > 1


def test_moves_and_stretches_with_the_data():
    first, second = np.random.default_rng(1).normal(size=(2, T))
    found, scaled = anytime_difference(first, second), anytime_difference(1e6 + 3 * first, 1e6 + 3 * second)
    np.testing.assert_allclose(scaled.lower, 3 * found.lower, rtol=1e-6, atol=1e-6)
    again = anytime_difference(first[:100], second[:100])
    np.testing.assert_allclose(again.upper, found.upper[:100], rtol=1e-9)  # a look does not know of later ones


def test_says_who_is_closer_and_when():
    shared = np.random.default_rng(2).exponential(size=T)
    found = anytime_difference(shared, 1.2 * shared)
    assert found.closer == "first"
    assert found.upper[found.resolved - 1] < 0 <= found.upper[found.resolved - 2]
    other = anytime_difference(1.2 * shared, shared)
    assert (other.closer, other.resolved) == ("second", found.resolved)
    same = anytime_difference(shared, shared)
    assert (same.closer, same.resolved) == ("", None)
    assert same.lower[-1] == same.upper[-1] == 0
    certain = anytime_difference(shared, shared + 0.5)
    assert (certain.closer, certain.resolved) == ("first", 32)
    assert "asymptotic" in found.method


def test_infinite_contributions():
    base = np.random.default_rng(3).exponential(size=T)
    one, early = base.copy(), base + 1.0
    one[50] = math.inf
    found = anytime_difference(one, base)
    assert (found.closer, found.resolved) == ("second", 51)
    assert found.lower[50:].tolist() == found.upper[50:].tolist() == [math.inf] * (T - 50)
    assert np.isfinite(found.upper[40:50]).all()
    assert anytime_difference(base, one).closer == "first"
    # Certain evidence overrules what the sequence had said.
    assert anytime_difference(one, early).closer == "second"
    early[80] = math.inf
    both = anytime_difference(one, early)
    assert (both.closer, both.resolved, both.method) == ("", None, "both infinite")
    assert np.isnan(both.lower[80:]).all()


def test_no_strings_say_nothing():
    found = anytime_difference(np.zeros(0), np.zeros(0))
    assert (found.closer, found.resolved, found.lower.tolist()) == ("", None, [])


@pytest.mark.parametrize(
    ("first", "change", "message"),
    [
        (np.ones(3), {}, "one contribution of each"),
        (np.array([1.0, math.nan]), {}, "got nan of the first candidate at string 1"),
        (np.array([-math.inf, 1.0]), {}, "got -inf of the first"),
        (np.ones(2), {"level": 1.0}, "a level between"),
        (np.ones(2), {"start": 1}, "a start of 2"),
        (np.ones(2), {"around": 0}, "around of 1"),
    ],
)
def test_what_has_no_sequence_is_refused(first, change, message):
    with pytest.raises(ValueError, match=message):
        anytime_difference(first, np.ones(2), **change)


@pytest.mark.parametrize("law", ["normal", "exponential", "lognormal"])
def test_peeking_is_survived(law):
    """Looks after each of 600 strings: a t test at each of them would err in a third of the runs."""
    generator = np.random.default_rng(4)
    runs, wrong = 400, 0
    for _ in range(runs):
        z = generator.normal(size=600)
        x = {"normal": 1 + z, "exponential": stats.expon.ppf(stats.norm.cdf(z)), "lognormal": np.exp(z - 0.5)}[law]
        wrong += anytime_difference(x, np.ones(600)).resolved is not None
    assert wrong / runs <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)
