"""Horvitz-Thompson: every possible run of a tiny model, the jackknife behind its error bar, precision."""

from dataclasses import replace
from decimal import Decimal, getcontext
from itertools import product

import numpy as np
import pytest
import torch

import bank
from enumeration import Strings, strings
from klkit.estimators.exact import exact
from klkit.estimators.horvitz_thompson import horvitz_thompson, log_inclusion
from klkit.estimators.monte_carlo import monte_carlo
from klkit.estimators.statistics import TokenStatistics, score
from klkit.models.automaton import coin
from klkit.sampling.ancestral import sample

P, Q, MU = coin(end=0.5), coin(end=0.2), coin(end=0.35)


def all_runs(law: Strings, statistics: TokenStatistics, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Probability of each run of so many draws, and its contributions; each run is given a prompt of its own."""
    runs = torch.tensor(list(product(range(len(law.x)), repeat=draws)))
    chosen = statistics.select(runs.flatten())
    prompt = torch.arange(len(runs)).repeat_interleave(draws)
    values = horvitz_thompson(replace(chosen, x=replace(chosen.x, prompt=prompt)))
    return law.probability[runs].prod(1).numpy(), values.reshape(len(runs), draws)


@pytest.mark.parametrize("draws", [1, 2, 4])
def test_all_runs_of_a_tiny_model(draws):
    law = strings(P, 3)
    statistics = score(P, Q, law.x)
    probability, values = all_runs(law, statistics, draws)
    estimate = values.mean(1)
    assert probability @ estimate == pytest.approx(exact(P, Q, max_tokens=3).value, abs=1e-10)
    # The textbook form, run by run.
    p, u = law.probability.numpy(), monte_carlo(statistics)
    terms = p * u / (1 - (1 - p) ** draws)
    textbook = [sum(terms[i] for i in set(run)) for run in product(range(len(p)), repeat=draws)]
    np.testing.assert_allclose(estimate, textbook, atol=1e-12)


def test_the_error_bar_does_not_underestimate_on_average():
    draws = 5
    law = strings(P, 3)
    probability, values = all_runs(law, score(P, Q, law.x), draws)
    estimate = values.mean(1)
    variance = probability @ (estimate - probability @ estimate) ** 2
    jackknife = probability @ (values.var(1, ddof=1) / draws)
    assert variance <= jackknife < 3 * variance
    assert variance < 0.7 * law.variance(torch.from_numpy(monte_carlo(score(P, Q, law.x)))) / draws


def test_strings_of_another_law():
    law = strings(MU, 3)
    statistics = score(P, Q, replace(law.x, sampler_logp=score(MU, MU, law.x).rows.logp))
    probability, values = all_runs(law, statistics, 3)
    assert probability @ values.mean(1) == pytest.approx(exact(P, Q, max_tokens=3).value, abs=1e-10)


def test_without_repeated_long_strings_it_is_monte_carlo():
    p, q = bank.random_pair(0, symbols=24)
    x = sample(p, [p.context(None)] * 40, max_tokens=60, seed=0, prompt=[0] * 40).sequences
    keep = [i for i in range(40) if int(x.lengths[i]) > 12]
    statistics = score(p, q, x.select(keep))
    assert len(keep) > 10
    np.testing.assert_allclose(horvitz_thompson(statistics), monte_carlo(statistics), rtol=1e-9)


def test_prompts_are_estimated_apart_and_equal_strings_of_two_prompts_are_two():
    law = strings(P, 3)
    statistics = score(P, Q, law.x).select(torch.tensor([0, 0, 1, 0, 2, 2, 2]))
    prompt = torch.tensor([5, 5, 5, 1, 1, 1, 1])
    together = horvitz_thompson(replace(statistics, x=replace(statistics.x, prompt=prompt)))
    for rows in (torch.arange(3), torch.arange(3, 7)):
        alone = statistics.select(rows)
        alone = replace(alone, x=replace(alone.x, prompt=torch.zeros(len(rows)).long()))
        np.testing.assert_allclose(together[rows.numpy()], horvitz_thompson(alone), atol=1e-14)


def test_cut_and_ended_strings_differ():
    x = strings(P, 2).x
    assert sorted(x.finished.tolist()) == [False, True, True]
    probability, values = all_runs(strings(P, 2), score(P, Q, x), 2)
    assert probability @ values.mean(1) == pytest.approx(exact(P, Q, max_tokens=2).value, abs=1e-12)


@pytest.mark.parametrize("log_p", [-0.0, -1e-12, -0.3, -30.0, -49.9, -50.1, -700.0])
@pytest.mark.parametrize("draws", [1, 2, 1000])
def test_inclusion_is_accurate_from_certain_to_beyond_underflow(log_p, draws):
    getcontext().prec = 400
    p = Decimal(log_p).exp()
    expected = float((1 - (1 - p) ** draws).ln())
    value = float(log_inclusion(torch.tensor([log_p], dtype=torch.float64), torch.tensor([draws])))
    assert value == pytest.approx(expected, rel=1e-13, abs=1e-13)


def test_a_string_too_rare_for_double_precision_keeps_its_logarithm():
    assert log_inclusion(torch.tensor([-5000.0]), torch.tensor([1])).tolist() == [-5000.0]


def test_an_infinite_string_makes_its_prompt_infinite():
    p, q = bank.INFINITE.p, bank.INFINITE.q
    statistics = score(p, q, strings(p, 2).x)
    assert (horvitz_thompson(statistics) == np.inf).all()
