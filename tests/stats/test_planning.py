import math

import numpy as np
import pytest
from scipy import stats

from klkit.stats.intervals import cluster_totals, ratio_interval
from klkit.stats.planning import plan


def nested(prompts, strings, between, within, seed=0, mean=10.0):
    generator = np.random.default_rng(seed)
    x = mean + between * generator.normal(size=(prompts, 1)) + within * generator.normal(size=(prompts, strings))
    return x.ravel(), np.ones(prompts * strings), np.repeat(np.arange(prompts), strings)


def test_variance_components_are_recovered():
    found = plan(*nested(4000, 4, between=2, within=3), rtol=0.01)
    assert found.between == pytest.approx(4, rel=0.1)
    assert found.within == pytest.approx(9, rel=0.05)
    assert found.design_effect == pytest.approx(1 + 3 * 4 / 13, rel=0.05)


def test_a_plan_keeps_its_promise():
    found = plan(*nested(500, 3, between=2, within=3), rtol=0.02)
    realised = [
        ratio_interval(*cluster_totals(*nested(found.prompts, found.strings_per_prompt, 2, 3, seed)), method="t")
        for seed in range(1, 21)
    ]
    assert np.mean([(i.upper - i.lower) / 2 for i in realised]) == pytest.approx(0.2, rel=0.1)
    assert found.half_width <= 0.2 + 1e-3


def test_prompts_are_the_smallest_number_that_does():
    data = nested(40, 1, between=1, within=0)
    found = plan(*data, atol=0.4)
    assert found.half_width <= 0.4
    assert math.isnan(found.within)

    def half_width(prompts):
        return stats.t.ppf(0.975, prompts - 1) * math.sqrt(found.between / prompts)

    assert found.half_width == pytest.approx(half_width(found.prompts))
    assert half_width(found.prompts - 1) > 0.4


def test_dear_prompts_get_more_strings_at_the_least_cost():
    data = nested(300, 5, between=1, within=4)
    found = plan(*data, rtol=0.02, seconds_per_string=1.0, seconds_per_prompt=9.0)
    assert found.strings_per_prompt == pytest.approx(12, abs=2)  # √(16/1 · 9)
    assert found.seconds == found.prompts * (9 + found.strings_per_prompt)
    for other in (1, found.strings_per_prompt // 2, found.strings_per_prompt * 2):
        needed = (found.between + found.within / other) / found.half_width**2 * 1.96**2
        assert found.seconds < 1.02 * needed * (9 + other)
    assert plan(*data, rtol=0.02, seconds_per_string=1.0).strings_per_prompt == 1


def test_few_prompts_are_made_up_for_by_strings_as_far_as_possible():
    data = nested(300, 5, between=1, within=4)
    free = plan(*data, atol=0.5)
    bound = plan(*data, atol=0.5, available_prompts=free.prompts // 4)
    assert bound.prompts == free.prompts // 4
    assert bound.strings_per_prompt > 4
    assert bound.half_width <= 0.5
    with pytest.raises(ValueError, match="add prompts"):
        plan(*data, atol=0.05, available_prompts=100)


def test_ratio_estimates_plan_on_residuals():
    """Contributions in proportion to lengths have no error per token, however different the lengths."""
    lengths = np.random.default_rng(0).geometric(0.05, size=50).astype(float)
    found = plan(0.3 * lengths, lengths, np.arange(50), rtol=0.01)
    assert found.prompts == 10
    assert found.half_width < 1e-12


def test_unequal_clusters():
    x, w, cluster = nested(600, 6, between=2, within=3)
    keep = np.random.default_rng(0).random(len(x)) < 0.5
    found = plan(x[keep], w[keep], cluster[keep], rtol=0.01)
    assert found.between == pytest.approx(4, rel=0.2)
    assert found.within == pytest.approx(9, rel=0.1)


def test_components_of_very_unequal_clusters_by_hand():
    x, cluster = np.array([1.0, 3.0, 2.0, 6.0, 4.0, 4.0, 5.0, 7.0]), np.array([0, 0, 1, 2, 2, 2, 2, 2])
    groups = [x[cluster == i] for i in range(3)]
    within = sum(float(np.sum((g - g.mean()) ** 2)) for g in groups) / 5
    between = sum(len(g) * (g.mean() - x.mean()) ** 2 for g in groups) / 2
    size = (8 - (4 + 1 + 25) / 8) / 2
    found = plan(x, np.ones(8), cluster, atol=1.0)
    assert found.within == pytest.approx(within)
    assert found.between == pytest.approx((between - within) / size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rtol": 0.1, "atol": 0.1}, "one positive target"),
        ({}, "one positive target"),
        ({"rtol": 0.0}, "one positive target"),
        ({"rtol": 0.1, "contributions": np.array([1.0, math.inf])}, "infinite"),
        ({"rtol": 0.1, "contributions": np.zeros(2)}, "other than zero"),
        ({"atol": 0.1, "cluster": np.zeros(2, dtype=np.int64)}, "at least 2 clusters"),
    ],
)
def test_refuses_what_cannot_be_planned(change, message):
    data = {"contributions": np.array([1.0, 2.0]), "weights": np.ones(2), "cluster": np.arange(2)} | change
    with pytest.raises(ValueError, match=message):
        plan(**data)
