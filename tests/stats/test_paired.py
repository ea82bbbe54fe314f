import math

import numpy as np
import pytest
from scipy import stats

from klkit.stats.paired import (
    LARGEST,
    PairedDifference,
    equivalence_p,
    holm,
    paired_difference,
    seeds_to_resolve,
    verdicts,
)
from klkit.stats.student import student_tail


@pytest.mark.parametrize("df", [1, 2, 3, 9, 31, 199, 201, 5000, 10**6])
def test_tails_are_those_of_scipy_far_out(df):
    for t in (0.0, 1e-6, 0.3, 1.0, 2.0, 5.0, 12.0, 40.0, 300.0):
        assert student_tail(t, df) == pytest.approx(stats.t.sf(t, df), rel=1e-10, abs=1e-300)
        assert student_tail(-t, df) == pytest.approx(stats.t.sf(-t, df), rel=1e-10)
    assert student_tail(1.5, math.inf) == pytest.approx(stats.norm.sf(1.5), rel=1e-12)
    assert student_tail(math.inf, df) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_a_paired_difference_is_scipys_paired_t_test(seed):
    random = np.random.default_rng(seed)
    n = int(random.integers(2, 12))
    shared = random.normal(size=n)  # what the seeds have in common cancels
    a, b = 10 + shared + 0.1 * random.normal(size=n), 10 + shared
    found, oracle = paired_difference(a, b, level=0.9), stats.ttest_rel(a, b)
    assert found.p == pytest.approx(oracle.pvalue, rel=1e-9)
    interval = oracle.confidence_interval(0.9)
    assert (found.lower, found.upper) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.same_sign == sum((a - b) * (a - b).mean() > 0)


def test_differences_without_scatter_are_certain():
    assert paired_difference([1.0, 2.0], [1.0, 2.0]).p == 1.0
    apart = paired_difference([2.0, 3.0], [1.0, 2.0])
    assert (apart.p, apart.lower, apart.upper) == (0.0, 1.0, 1.0)
    assert equivalence_p(apart, 1.5) == 0.0
    assert equivalence_p(apart, 0.5) == 1.0


def test_equivalence_is_two_one_sided_tests_and_an_interval_within_the_margin():
    random = np.random.default_rng(3)
    a, b = random.normal(size=8), random.normal(size=8)
    found = paired_difference(a, b)
    for margin in (0.2, 0.7, 2.0):
        above = stats.ttest_1samp(a - b, -margin, alternative="greater").pvalue
        below = stats.ttest_1samp(a - b, margin, alternative="less").pvalue
        assert equivalence_p(found, margin) == pytest.approx(max(above, below), rel=1e-9)
    narrow = paired_difference(a, b, level=0.9)
    edge = max(abs(narrow.lower), abs(narrow.upper))
    assert equivalence_p(found, edge) == pytest.approx(0.05, rel=1e-9)
    with pytest.raises(ValueError, match="positive margin"):
        equivalence_p(found, 0.0)


def test_holm_is_the_textbooks():
    assert holm([0.01, 0.02, 0.03, 0.04]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert holm([0.5, 0.001, 0.6]) == pytest.approx([1.0, 0.003, 1.0])
    assert holm([]) == []
    random = np.random.default_rng(0)
    p = random.random(7).tolist()
    # By definition: the smallest level at which the step-down procedure rejects.
    order = sorted(range(7), key=lambda i: p[i])
    for rank, i in enumerate(order):
        worst = max((7 - r) * p[order[r]] for r in range(rank + 1))
        assert holm(p)[i] == pytest.approx(min(1.0, worst))
    with pytest.raises(ValueError, match="from 0 to 1"):
        holm([1.5])


@pytest.mark.parametrize(("deviation", "gap", "power"), [(1.0, 1.0, 0.8), (0.93, 0.3, 0.8), (2.0, 5.0, 0.9)])
def test_the_number_of_seeds_has_the_power_it_promises(deviation, gap, power):
    def true_power(n):
        edge, shift = stats.t.ppf(0.975, n - 1), gap / deviation * math.sqrt(n)
        return stats.nct.sf(edge, n - 1, shift) + stats.nct.cdf(-edge, n - 1, shift)

    n = seeds_to_resolve(deviation, gap, power=power)
    exact = next(m for m in range(2, 10**4) if true_power(m) >= power)
    assert abs(n - exact) <= 2


def test_seeds_at_the_ends():
    assert seeds_to_resolve(0.0, 1.0) == 2
    assert seeds_to_resolve(1.0, 1e-9) > LARGEST
    with pytest.raises(ValueError, match="positive gap"):
        seeds_to_resolve(1.0, 0.0)


def difference(mean, deviation, seeds=10):
    gaps = np.linspace(-1, 1, seeds)
    gaps = mean + gaps / gaps.std(ddof=1) * deviation
    return paired_difference(gaps, np.zeros(seeds))


def test_words_follow_from_the_numbers():
    many = [difference(1.0, 0.1), difference(-1.0, 0.1), difference(0.001, 0.01), difference(0.3, 1.0)]
    margins = [0.1, 0.1, 0.1, 0.1]
    for good, words in ((1, ["better", "worse"]), (-1, ["worse", "better"]), (0, ["higher", "lower"])):
        found = [verdict for _, verdict in verdicts(many, margins, good=good)]
        assert [v.word for v in found] == [*words, "equivalent", "not resolved"]
    assert str(found[2]) == "equivalent within 0.1"
    needed = seeds_to_resolve(1.0, 0.1, alpha=0.05 / 4)
    assert needed > seeds_to_resolve(1.0, 0.1)
    assert str(found[3]) == f"not resolved ({needed} seeds would find a difference of 0.1)"
    small = verdicts([difference(0.02, 0.001)], [0.1], good=1)[0][1]
    assert str(small) == "better, by less than 0.1"


def test_one_comparison_among_many_needs_more():
    alone = difference(0.5, 0.6)
    assert 0.01 < alone.p < 0.05
    assert verdicts([alone], [0.01], good=1)[0][1].word == "better"
    adjusted = verdicts([alone] + [difference(0.0, 1.0)] * 9, [0.01] * 10, good=1)
    assert adjusted[0][1].word == "not resolved"
    assert adjusted[0][0] == pytest.approx(10 * alone.p)


def test_pairs_that_are_none_are_refused():
    for a, b in (([1.0], [2.0]), ([1.0, 2.0], [1.0]), ([1.0, math.nan], [1.0, 2.0])):
        with pytest.raises(ValueError, match="pair them by seed"):
            paired_difference(a, b)
    assert isinstance(paired_difference([1.0, 2.0], [0.0, 5.0]), PairedDifference)
