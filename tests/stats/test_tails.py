import math

import numpy as np
import pytest
from scipy import stats

from klkit.stats.tails import pareto_khat, tail, top_share


@pytest.mark.parametrize("k", [-0.3, 0.0, 0.3, 0.5, 0.8, 1.2])
def test_recovers_the_shape_of_generalised_pareto_samples(k):
    """Twenty samples of 20,000: each fit uses 425 values, so the mean has an error of about (1 + k)/√8500."""
    found = [pareto_khat(stats.genpareto.rvs(k, size=20_000, random_state=seed)) for seed in range(20)]
    shrunk = (425 * k + 10 * 0.5) / 435
    assert np.mean(found) == pytest.approx(shrunk, abs=4 * (1 + abs(k)) / math.sqrt(8500))


def test_agrees_with_maximum_likelihood():
    x = stats.genpareto.rvs(0.6, size=5000, random_state=1)
    top = np.sort(x)[-213:]
    likelihood = stats.genpareto.fit(top - np.sort(x)[-214], floc=0)[0]
    assert pareto_khat(x) == pytest.approx((213 * likelihood + 5) / 223, abs=0.03)


@pytest.mark.parametrize("n", [25, 60, 400])
def test_is_the_published_algorithm_step_by_step(n):
    """Zhang and Stephens' estimate in plain loops, then shrunk by ten pseudo-values of one half."""
    values = sorted(np.random.default_rng(n).pareto(1.5, size=n).tolist())
    size = math.ceil(min(n / 5, 3 * math.sqrt(n)))
    x = [v - values[-size - 1] for v in values[-size:]]
    m, quartile = 30 + int(math.sqrt(size)), x[math.floor(size / 4 + 0.5) - 1]

    def shape(theta):
        return sum(math.log(1 - theta * v) for v in x) / size

    def profile(theta):
        return size * (math.log(-theta / shape(theta)) - shape(theta) - 1)

    thetas = [1 / x[-1] + (1 - math.sqrt(m / (j - 0.5))) / (3 * quartile) for j in range(1, m + 1)]
    weights = [1 / sum(math.exp(profile(other) - profile(theta)) for other in thetas) for theta in thetas]
    k = shape(sum(w * theta for w, theta in zip(weights, thetas, strict=True)))
    assert pareto_khat(np.array(values)) == pytest.approx(k * size / (size + 10) + 0.5 * 10 / (size + 10), rel=1e-9)


def test_does_not_depend_on_units_or_order():
    x = np.random.default_rng(0).pareto(2, size=500)
    assert pareto_khat(1e-9 * x[::-1] + 0.0) == pytest.approx(pareto_khat(x), rel=1e-9)
    assert pareto_khat(x - 5) == pytest.approx(pareto_khat(x), rel=1e-6)


@pytest.mark.parametrize(
    ("sample", "word"),
    [
        (lambda g: g.exponential(size=1000), "light"),
        (lambda g: g.pareto(1 / 0.6, size=100_000), "doubtful"),
        (lambda g: g.pareto(1.0, size=1000), "unreliable"),
        (lambda g: np.full(1000, 0.1), "unknown"),
        (lambda g: g.exponential(size=20), "unknown"),
        (lambda g: np.r_[np.zeros(990), np.arange(10.0)], "unknown"),
    ],
)
def test_verdicts(sample, word):
    assert tail(sample(np.random.default_rng(0))).verdict.startswith(word)


def test_an_infinite_value_is_the_heaviest_tail():
    found = tail(np.r_[np.ones(50), math.inf])
    assert found.khat == math.inf
    assert math.isnan(found.top_share)
    assert found.verdict.startswith("unreliable")


def test_top_share():
    assert top_share(np.ones(1000)) == pytest.approx(0.01)
    assert top_share(np.ones(1050)) == pytest.approx(11 / 1050)
    assert top_share(np.array([5.0])) == 1
    assert math.isnan(top_share(np.zeros(10)))
    assert math.isnan(top_share(np.array([-1.0, 0.5])))


@pytest.mark.parametrize("zeros", range(9))
def test_a_tail_without_scale_has_no_shape(zeros):
    # 40 values have a tail of 8: so many of its exceedances are nothing.
    values = np.concatenate([np.zeros(32 + zeros), np.arange(1.0, 9.0 - zeros)])
    assert math.isnan(pareto_khat(values)) == (zeros >= 2)
