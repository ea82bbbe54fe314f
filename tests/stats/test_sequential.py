import math

import numpy as np
import pytest

from klkit.stats import sequential
from klkit.stats.sequential import STAKES, final_lower_bound, running_lower_bound


def lognormal(generator, size, sd):
    return np.exp(sd * generator.normal(size=size) - sd**2 / 2)


def test_is_the_largest_ruined_mean():
    """Against the definition, evaluated for one candidate at a time without logarithms."""
    x = np.random.default_rng(1).exponential(size=40)
    bounds = running_lower_bound(x)
    step = np.max(np.cumsum(x) / np.arange(1, 41)) / sequential.GRID

    def ruined(m):
        wealth = np.mean([np.cumprod(1 + stake * (x / m - 1)) for stake in STAKES], axis=0)
        return np.maximum.accumulate(wealth) >= 20

    for t in (0, 5, 20, 39):
        assert bounds[t] == 0 or ruined(bounds[t])[t]
        assert not ruined(bounds[t] + step * 1.001)[t]


@pytest.mark.parametrize("sd", [0.5, 1.0, 1.5])
def test_tightness_stated_in_the_docstring(sd):
    generator = np.random.default_rng(0)
    share = np.mean([running_lower_bound(lognormal(generator, 300, sd))[-1] for _ in range(15)])
    assert share == pytest.approx({0.5: 0.92, 1.0: 0.84, 1.5: 0.73}[sd], abs=0.04)


@pytest.mark.parametrize("law", ["exponential", "lognormal", "rare"])
def test_violations_under_a_look_at_every_step(law):
    """A bound that peeking cannot break: 1000 runs of 200 steps each, at most 5 % + 3 sigma ever above the mean.

    The wealth at the true mean is all that decides it, so that is what is simulated.
    """
    generator = np.random.default_rng(2)
    size = (1000, 200)
    if law == "rare":  # mean one, almost always nothing
        x = np.where(generator.random(size) < 0.02, 50.0, 0.0)
    else:
        x = generator.exponential(size=size) if law == "exponential" else lognormal(generator, size, 1.5)
    violated = sequential._log_wealth(x, np.ones((1000, 1))).max(axis=1) >= math.log(20)
    assert violated.mean() <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)
    assert violated.mean() > 0.002  # not by being idle
    for i in (*np.flatnonzero(violated)[:3], *np.flatnonzero(~violated)[:3]):
        assert (running_lower_bound(x[i])[-1] > 1 - 0.02) >= violated[i]
        assert running_lower_bound(x[i])[-1] <= 1 or violated[i]


def test_rises_with_data_and_falls_with_the_level():
    x = np.random.default_rng(3).exponential(size=500)
    strict, usual, loose = (running_lower_bound(x, level) for level in (0.999, 0.95, 0.5))
    assert (np.diff(usual) >= 0).all()
    assert (strict <= usual).all()
    assert (usual <= loose).all()
    np.testing.assert_allclose(running_lower_bound(3 * x), 3 * usual)
    assert (running_lower_bound(x[:100]) <= np.maximum.accumulate(np.cumsum(x[:100]) / np.arange(1, 101))).all()


def test_chunks_do_not_matter(monkeypatch):
    x = np.random.default_rng(3).exponential(size=50)
    whole = running_lower_bound(x)
    monkeypatch.setattr(sequential, "CHUNK", 3000)
    np.testing.assert_array_equal(running_lower_bound(x), whole)


@pytest.mark.parametrize("sd", [0.1, 1.0, 3.0])
def test_the_last_bound_alone_is_the_last_of_all(sd):
    generator = np.random.default_rng(4)
    for size in (1, 2, 10, 100, 400):
        x = lognormal(generator, size, sd)
        x = np.concatenate([3 * x, x])  # the evidence peaks before the end
        for level in (0.5, 0.95):
            assert final_lower_bound(x, level) == running_lower_bound(x, level)[-1]
    assert final_lower_bound(np.zeros(0)) == final_lower_bound(np.zeros(3)) == 0
    assert final_lower_bound(np.array([1.0, math.inf, 1.0])) == math.inf
    with pytest.raises(ValueError, match="non-negative"):
        final_lower_bound(np.array([-1.0]))


def test_degenerate_values():
    assert running_lower_bound(np.zeros(0)).tolist() == []
    assert running_lower_bound(np.zeros(5)).tolist() == [0] * 5
    assert running_lower_bound(np.array([math.inf])).tolist() == [math.inf]
    bounds = running_lower_bound(np.array([1.0] * 30 + [math.inf, 1.0]))
    assert 0.5 < bounds[29] < 1
    assert bounds[30:].tolist() == [math.inf, math.inf]
    for bad in ([-1.0, 2.0], [math.nan]):
        with pytest.raises(ValueError, match="non-negative"):
            running_lower_bound(np.array(bad))
