import numpy as np
import pytest
from scipy import stats

from klkit.stats.skewness import Lean, lean


def test_the_cubic_is_halls_for_a_mean():
    x = np.random.default_rng(0).exponential(size=40)
    found = lean(x - x.mean(), np.ones(40))
    a = stats.skew(x) / np.sqrt(40)
    t = np.linspace(-6, 6, 25)
    np.testing.assert_allclose(found.removed(t), t + a / 3 * t**2 + a**2 / 27 * t**3 + a / 6, rtol=1e-12)


@pytest.mark.parametrize("bend", [-0.4, -1e-6, 0.0, 1e-12, 0.3])
def test_restoring_undoes_removing(bend):
    found = Lean(np.array(bend), np.array(bend / 2))
    t = np.linspace(-8, 8, 33)
    removed = found.removed(t)
    assert (np.diff(removed) >= 0).all()  # never turns back, however large the skewness
    np.testing.assert_allclose(found.restored(removed), t, atol=1e-4)


def test_many_at_once_are_those_one_by_one():
    generator = np.random.default_rng(1)
    residuals, weights = generator.normal(size=(3, 20)), generator.exponential(size=20)
    together = lean(residuals, weights)
    for i in range(3):
        alone = lean(residuals[i], weights)
        assert (together.bend[i], together.shift[i]) == pytest.approx((float(alone.bend), float(alone.shift)))
    nothing = lean(np.zeros(5), np.ones(5))
    assert (float(nothing.bend), float(nothing.shift)) == (0.0, 0.0)


def tails(draw, replications, clusters, edge=2.5):
    """How often the deviate of a ratio is below ``-edge`` and above ``edge``, plain and with the skewness removed."""
    generator = np.random.default_rng(2)
    counts = np.zeros((2, 2))
    for _ in range(replications):
        totals, weights, truth = draw(generator, clusters)
        residuals = totals - totals.sum() / weights.sum() * weights
        t = (totals - truth * weights).sum() / np.sqrt(clusters / (clusters - 1) * np.sum(residuals**2))
        for row, value in enumerate((t, float(lean(residuals, weights).removed(np.array(t))))):
            counts[row] += value < -edge, value > edge
    return counts / replications


@pytest.mark.parametrize("kind", ["mean", "ratio"])
def test_both_tails_become_alike(kind):
    """In a ratio the denominator leans too: sums over strings of geometric lengths, divided by the lengths."""

    def draw(generator, n):
        if kind == "mean":
            return generator.exponential(size=n), np.ones(n), 1.0
        weights = generator.geometric(0.1, size=n).astype(float)
        return generator.gamma(0.5 * weights), weights, 0.5

    expected = stats.t.sf(2.5, 59)
    plain, removed = tails(draw, 4000, 60)
    assert max(plain) > 1.9 * expected
    assert max(removed) < 1.9 * expected
    assert abs(removed[0] - removed[1]) < 0.5 * abs(plain[0] - plain[1])
