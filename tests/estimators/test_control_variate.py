"""Whole-string control variates: exact means, the bias of fitting on the same strings, unequal supports, overflow."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

import bank
from enumeration import strings
from klkit.estimators.control_variate import cv_string, k3_string, least_variance
from klkit.estimators.exact import exact
from klkit.estimators.monte_carlo import monte_carlo
from klkit.estimators.statistics import TokenStatistics, score
from klkit.models.automaton import coin
from klkit.models.wrap import restrict

PAIRS = [(problem.p, problem.q, 5) for problem in (bank.B, bank.C4, *bank.MEMORYLESS)]
PAIRS += [(*pair, 5) for pair in bank.random_pairs(4)] + [(*bank.short_pair(0), 9)]


def fold(estimator, statistics):
    return torch.from_numpy(estimator(statistics))


@pytest.mark.parametrize(("p", "q", "limit"), PAIRS)
def test_mean_and_variance_of_k3_are_exact(p, q, limit):
    law, answer = strings(p, limit), exact(p, q, max_tokens=limit)
    values = fold(k3_string, score(p, q, law.x))
    assert bool((values >= 0).all())
    assert law.mean(values) == pytest.approx(answer.value, abs=1e-10)
    ratio = torch.stack([(m.readout(m.encode(law.x)).gather(1, law.x.targets()[:, None])[:, 0]) for m in (p, q)])
    u = score(p, q, law.x).per_string(ratio[0] - ratio[1])
    g = (-u).exp() - 1
    assert law.variance(values) == pytest.approx(law.variance(u + g), rel=1e-8, abs=1e-8)


def test_unequal_supports_shift_k3_by_the_mass_that_p_excludes():
    q, p = bank.random_pair(0)[1], restrict(bank.random_pair(0)[0], [0, 2])
    law = strings(p, 5)
    covered = float(score(p, q, law.x).per_string(score(p, q, law.x).rows.logq).exp().sum())
    assert covered < 0.9
    expected = exact(p, q, max_tokens=5).value + covered - 1
    assert law.mean(fold(k3_string, score(p, q, law.x))) == pytest.approx(expected, abs=1e-10)


def draws(statistics: TokenStatistics, tuple_: tuple[int, ...]) -> TokenStatistics:
    """The statistics of a run that drew exactly these strings, each a cluster of its own."""
    chosen = statistics.select(torch.tensor(tuple_))
    return replace(chosen, x=replace(chosen.x, cluster=torch.arange(len(tuple_))))


def test_a_coefficient_fitted_on_other_folds_leaves_no_bias_and_one_fitted_on_the_same_strings_does():
    p, q = coin(end=0.5), coin(end=0.2)
    law, answer = strings(p, 3), exact(p, q, max_tokens=3).value
    statistics, probability = score(p, q, law.x), law.probability.numpy()
    crossed = same = 0.0
    for tuple_ in product(range(len(law.x)), repeat=4):
        run, weight = draws(statistics, tuple_), probability[list(tuple_)].prod()
        crossed += weight * cv_string(run).mean()
        u = fold(monte_carlo, run)
        g = torch.expm1(-u)
        same += weight * float((u + least_variance(u, g) * g).mean())
    assert crossed == pytest.approx(answer, abs=1e-10)
    assert abs(same - answer) > 1e-3


def test_with_strings_enough_the_fit_is_the_best_coefficient():
    p, q = bank.short_pair(1)
    law = strings(p, 9)
    statistics = score(p, q, law.x)
    u = fold(monte_carlo, statistics)
    g = torch.expm1(-u)
    best = -law.covariance(u, g) / law.variance(g)
    picked = torch.multinomial(law.probability, 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    run = draws(statistics, tuple(picked.tolist()))
    variance = float(np.var(cv_string(run)))
    assert variance == pytest.approx(law.variance(u + best * g), rel=0.05)
    assert variance < 0.7 * law.variance(u)


@pytest.mark.parametrize("estimator", [k3_string, cv_string])
def test_strings_of_another_law(estimator):
    (p, q), (mu, _) = bank.random_pair(0), bank.random_pair(100)
    law = strings(mu, 5)
    statistics = score(p, q, replace(law.x, sampler_logp=score(mu, mu, law.x).rows.logp))
    values = fold(estimator, replace(statistics, x=replace(statistics.x, cluster=torch.zeros(len(law.x)).long())))
    assert law.mean(values) == pytest.approx(exact(p, q, max_tokens=5).value, abs=1e-10)


def test_one_cluster_leaves_nothing_to_fit_on():
    p, q = bank.random_pair(0)
    x = strings(p, 4).x
    statistics = score(p, q, replace(x, cluster=torch.zeros(len(x)).long()))
    assert (cv_string(statistics) == monte_carlo(statistics)).all()


def test_least_variance_survives_huge_variates_and_infinite_values():
    g = torch.tensor([-1.0, -1.0, 1e300, -1.0], dtype=torch.float64)
    u = torch.tensor([1.0, 2.0, -690.0, 3.0], dtype=torch.float64)
    assert 0 < least_variance(u, g) < 1e-290
    assert least_variance(torch.tensor([torch.inf, 1.0, 2.0]), torch.tensor([-1.0, 1.0, -1.0])) == pytest.approx(0.5)
    assert least_variance(u, torch.tensor([torch.inf, 0.0, 0.0, 0.0]).double()) == 0
    assert least_variance(u, torch.ones(4).double()) == 0


def test_a_string_that_q_prefers_beyond_double_precision_is_infinite_and_not_undefined():
    p, q = coin(end=1 - 1e-12), coin(end=1e-12)
    x = strings(p, 40).x
    statistics = score(p, q, x)
    values = k3_string(statistics)
    assert values[-1] == np.inf
    assert not np.isnan(values).any()
    assert not np.isnan(cv_string(statistics)).any()
