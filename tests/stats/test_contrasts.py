import math

import numpy as np
import pytest

from klkit.stats.contrasts import plan_contrast
from klkit.stats.paired import seeds_to_resolve
from klkit.stats.ranking import rank


def nested(prompts, strings, between, within, seed=0, gap=0.0):
    """Two candidates that share most of their variance, and whose difference has these deviations."""
    generator = np.random.default_rng(seed)
    shared = 20 * generator.exponential(size=(prompts, strings))
    d = gap + between * generator.normal(size=(prompts, 1)) + within * generator.normal(size=(prompts, strings))
    cluster = np.repeat(np.arange(prompts), strings)
    return (shared + d).ravel(), shared.ravel(), np.ones(prompts * strings), cluster


def test_single_strings_agree_with_the_t_test():
    first, second, weights, cluster = nested(200, 1, 1.0, 0.0)
    deviation = float((first - second).std(ddof=1))
    found = plan_contrast(first, second, weights, cluster, difference=0.2)
    assert found.prompts == seeds_to_resolve(deviation, 0.2)
    assert found.half_width <= 0.2
    many = plan_contrast(first, second, weights, cluster, difference=0.2, comparisons=10)
    assert many.prompts == seeds_to_resolve(deviation, 0.2, alpha=0.005)
    assert plan_contrast(first, second, weights, cluster, difference=0.2, power=0.95).prompts > found.prompts


def test_a_plan_has_the_power_it_promises():
    pilot = nested(1000, 3, 1.0, 2.0)
    found = plan_contrast(*pilot, difference=0.5, seconds_per_string=1.0, seconds_per_prompt=2.0)
    assert found.strings_per_prompt == pytest.approx(math.sqrt(4 / 1 * 2), abs=1)
    assert found.seconds == found.prompts * (2 + found.strings_per_prompt)
    resolved = 0
    for seed in range(1, 301):
        first, second, weights, cluster = nested(found.prompts, found.strings_per_prompt, 1.0, 2.0, seed, gap=0.5)
        resolved += rank(np.stack([first, second]), weights, cluster).pairs[0].verdict == "closer"
    assert resolved / 300 == pytest.approx(0.8, abs=0.08)


def test_by_default_the_difference_is_the_pilots():
    first, second, weights, cluster = nested(100, 2, 1.0, 1.0, gap=0.7)
    seen = abs(float((first - second).mean()))
    found = plan_contrast(first, second, weights, cluster)
    assert found.prompts == plan_contrast(first, second, weights, cluster, difference=seen).prompts
    assert found.half_width == pytest.approx(seen, rel=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"difference": 0.0}, "positive difference"),
        ({"second": np.ones(20)}, "positive difference"),
        ({"power": 0.3}, "a power from"),
        ({"comparisons": 0}, "at least one comparison"),
        ({"second": np.full(20, math.inf)}, "not finite"),
        ({"cluster": np.zeros(20, dtype=np.int64), "difference": 1.0}, "at least 2 clusters"),
        ({"second": np.arange(20.0), "difference": 0.1, "available_prompts": 12}, "add prompts"),
    ],
)
def test_refuses_what_cannot_be_planned(change, message):
    given = {"first": np.ones(20), "second": np.zeros(20), "weights": np.ones(20), "cluster": np.arange(20)} | change
    with pytest.raises(ValueError, match=message):
        plan_contrast(**given)
