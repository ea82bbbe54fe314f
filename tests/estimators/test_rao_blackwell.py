"""Rao-Blackwell: exact means and variances, the pairs on which it loses, other laws, the chain rule."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import bank
from enumeration import strings
from klkit.estimators import summarise
from klkit.estimators.exact import exact
from klkit.estimators.monte_carlo import monte_carlo
from klkit.estimators.rao_blackwell import rao_blackwell
from klkit.estimators.statistics import score
from klkit.models.automaton import automaton
from klkit.sampling.ancestral import sample

PAIRS = [(problem.p, problem.q, 6) for problem in (bank.A, bank.B, bank.C1, bank.C4, *bank.MEMORYLESS)]
PAIRS += [(*pair, 5) for pair in bank.random_pairs(6)] + [(*bank.short_pair(s), 9) for s in range(3)]
LONG_ENOUGH = {"A": 3, "B": 3, "C1": 60, "C2": 200, "C3": 700, "C4": 60}  # to the digits of the printed values


def fold(estimator, statistics):
    return torch.from_numpy(estimator(statistics))


@pytest.mark.parametrize(("p", "q", "limit"), PAIRS)
def test_mean_and_variance_are_exact(p, q, limit):
    law, answer = strings(p, limit), exact(p, q, max_tokens=limit)
    values = fold(rao_blackwell, score(p, q, law.x))
    assert law.mean(values) == pytest.approx(answer.value, abs=1e-10)
    assert law.variance(values) == pytest.approx(answer.variance_rb, abs=1e-8)


@pytest.mark.parametrize("problem", [bank.A, bank.B, bank.C1, bank.C2, bank.C3, bank.C4], ids=lambda p: p.name)
def test_printed_values_among_them_pairs_on_which_rao_blackwell_loses(problem):
    law = strings(problem.p, LONG_ENOUGH[problem.name])
    statistics = score(problem.p, problem.q, law.x, batch_size=len(law.x))
    mc, rb = fold(monte_carlo, statistics), fold(rao_blackwell, statistics)
    digits = 0.6 * 10.0 ** -min(problem.digits, 8)
    assert law.mean(rb) == pytest.approx(problem.kl, abs=1e-6 if problem.digits == 4 else 1e-8)
    assert law.variance(mc) == pytest.approx(problem.variance_mc, abs=digits)
    assert law.variance(rb) == pytest.approx(problem.variance_rb, abs=digits)
    assert (law.variance(rb) > law.variance(mc)) == (problem in bank.RB_LOSES)


@pytest.mark.parametrize("seed", range(4))
def test_strings_of_another_law_need_the_weight_of_the_prefix_only(seed):
    (p, q), (mu, _) = bank.random_pair(seed), bank.random_pair(seed + 100)
    law, answer = strings(mu, 5), exact(p, q, max_tokens=5)
    statistics = score(p, q, replace(law.x, sampler_logp=score(mu, mu, law.x).rows.logp))
    rb = fold(rao_blackwell, statistics)
    assert law.mean(rb) == pytest.approx(answer.value, abs=1e-10)
    assert law.variance(rb) < law.variance(fold(monte_carlo, statistics))
    lengths = statistics.strings().decisions
    assert law.mean(rb) / law.mean(lengths) == pytest.approx(answer.rate, abs=1e-10)


def test_what_only_the_other_law_writes_does_not_make_it_infinite():
    mu, p, q = (
        automaton(torch.tensor(rows, dtype=torch.float64), torch.tensor([[0, 1], [0, 1]]))
        for rows in (
            [[0.4, 0.2, 0.4], [0.3, 0.3, 0.4]],
            [[0.5, 0.0, 0.5], [0.2, 0.3, 0.5]],  # p never writes the second symbol, after which ...
            [[0.2, 0.3, 0.5], [0.5, 0.0, 0.5]],  # ... q would exclude what p allows
        )
    )
    law = strings(mu, 4)
    statistics = score(p, q, replace(law.x, sampler_logp=score(mu, mu, law.x).rows.logp))
    assert bool((statistics.rows.kl == torch.inf).any())
    assert law.mean(fold(rao_blackwell, statistics)) == pytest.approx(exact(p, q, max_tokens=4).value, abs=1e-10)
    assert summarise("rb", statistics).infinite == 0


def test_the_divergence_splits_into_ending_and_content():
    p, q = bank.random_pair(4)
    law = strings(p, 5)
    statistics = score(p, q, law.x)
    end = p.vocabulary.ends[0]
    assert end == 2
    logp, logq = (model.readout(model.encode(law.x))[:, :end].log_softmax(-1) for model in (p, q))
    content = (logp.exp() * (logp - logq)).sum(-1)
    rows = statistics.rows
    torch.testing.assert_close(rows.kl, rows.end_kl + (1 - rows.end_p) * content, rtol=0, atol=1e-12)
    total = law.mean(statistics.per_string(rows.end_kl)) + law.mean(statistics.per_string((1 - rows.end_p) * content))
    assert total == pytest.approx(exact(p, q, max_tokens=5).value, abs=1e-10)


def test_the_rate_is_a_ratio_of_means_and_the_same_by_every_method():
    law = strings(bank.C1.p, 60)
    statistics = score(bank.C1.p, bank.C1.q, law.x)
    length = law.mean(law.x.lengths)
    for estimator in (rao_blackwell, monte_carlo):
        assert law.mean(fold(estimator, statistics)) / length == pytest.approx(1.6145, abs=5e-5)
    # The mean of per-string means is another quantity for Monte Carlo: length depends on the tokens to come.
    assert law.mean(fold(monte_carlo, statistics) / law.x.lengths) == pytest.approx(2.5020, abs=5e-5)


def test_an_excluded_token_is_seen_without_being_drawn():
    p, q = bank.INFINITE.p, bank.INFINITE.q
    statistics = score(p, q, strings(p, 2).x.select([0]))
    assert summarise("rb", statistics).value == np.inf
    shared = score(bank.SAME_MASK.p, bank.SAME_MASK.q, strings(bank.SAME_MASK.p, 3).x)
    assert np.isfinite(rao_blackwell(shared)).all()


def test_a_model_against_itself_is_exactly_zero():
    p, _ = bank.random_pair(0)
    x = sample(p, [p.context(None)] * 50, max_tokens=20, seed=0).sequences
    estimate = summarise("rb", score(p, p, x))
    assert (estimate.value, estimate.stderr) == (0.0, 0.0)
