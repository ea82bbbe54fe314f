"""Monte Carlo and token-level k3: means and variances as sums over all strings."""

from dataclasses import replace

import pytest
import torch

import bank
from enumeration import strings
from klkit.estimators import summarise
from klkit.estimators.exact import exact
from klkit.estimators.monte_carlo import k3_token, monte_carlo
from klkit.estimators.statistics import score
from klkit.models.wrap import restrict

PAIRS = [(problem.p, problem.q, 6) for problem in (bank.A, bank.B, bank.C1, bank.C4, *bank.MEMORYLESS)]
PAIRS += [(*pair, 5) for pair in bank.random_pairs(6)] + [(*bank.short_pair(s), 9) for s in range(3)]


def fold(estimator, statistics):
    return torch.from_numpy(estimator(statistics))


@pytest.mark.parametrize(("p", "q", "limit"), PAIRS)
def test_mean_and_variance_are_exact(p, q, limit):
    law, answer = strings(p, limit), exact(p, q, max_tokens=limit)
    statistics = score(p, q, law.x)
    values = fold(monte_carlo, statistics)
    assert law.mean(values) == pytest.approx(answer.value, abs=1e-10)
    assert law.variance(values) == pytest.approx(answer.variance_mc, abs=1e-8)
    k3 = fold(k3_token, statistics)
    assert bool((k3 >= 0).all())
    if bool((statistics.rows.reverse_kl < torch.inf).all()):  # q excludes nothing that p does not
        assert law.mean(k3) == pytest.approx(answer.value, abs=1e-10)


def test_k3_of_tokens_is_short_by_the_mass_of_q_that_p_excludes():
    (_, q), p = bank.random_pair(0), restrict(bank.random_pair(0)[0], [0, 2])
    law = strings(p, 5)
    values, x = fold(k3_token, score(p, q, law.x)), law.x
    kept = q.readout(q.encode(x)).exp()[:, [0, 2]].sum(-1)
    missing = score(p, q, x).per_string(1 - kept)
    answer = exact(p, q, max_tokens=5).value
    assert law.mean(values) == pytest.approx(answer - law.mean(missing), abs=1e-10)
    assert law.mean(missing) > 0.1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("estimator", [monte_carlo, k3_token])
def test_strings_of_another_law_are_weighted_to_the_same_mean(estimator, seed):
    (p, q), (mu, _) = bank.random_pair(seed), bank.random_pair(seed + 100)
    law = strings(mu, 5)
    statistics = score(p, q, replace(law.x, sampler_logp=score(mu, mu, law.x).rows.logp))
    assert law.mean(fold(estimator, statistics)) == pytest.approx(exact(p, q, max_tokens=5).value, abs=1e-10)


@pytest.mark.parametrize("estimator", [monte_carlo, k3_token])
def test_tokens_that_p_excludes_may_be_drawn_by_another_law(estimator):
    (mu, q), p = bank.random_pair(0), restrict(bank.random_pair(1)[0], [0, 2])
    law = strings(mu, 4)
    values = fold(estimator, score(p, restrict(q, [0, 2]), replace(law.x, sampler_logp=score(mu, mu, law.x).rows.logp)))
    assert bool(values.isfinite().all())
    assert law.mean(values) == pytest.approx(exact(p, restrict(q, [0, 2]), max_tokens=4).value, abs=1e-10)


def test_a_finite_number_for_an_infinite_divergence_says_so():
    p, q = bank.INFINITE.p, bank.INFINITE.q
    law = strings(p, 2)
    lucky = score(p, q, law.x.select([0]))  # the string that is nothing but an end token
    assert "infinite" in summarise("mc", lucky).notes[0]
    assert summarise("mc", lucky).infinite == 1
    assert fold(monte_carlo, score(p, q, law.x)).max() == torch.inf
