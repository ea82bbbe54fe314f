"""Weights of strings from another policy, against sums over all strings."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from klkit.estimators.statistics import TokenStatistics, score
from klkit.models.automaton import Automaton, automaton, coin, random_automaton
from klkit.rng import stream
from klkit.sampling.ancestral import sample
from klkit.sampling.importance import effective_sample_size, from_policy
from klkit.sequences import Sequences

LIMIT = 5


def machine(name: str, spread: float = 1.0) -> Automaton:
    return random_automaton(3, 2, generator=stream(5, name), spread=spread, name=name)


def all_strings(p: Automaton, mu: Automaton) -> Sequences:
    """Every string of two symbols, ended (2) or cut at the limit, with mu's probabilities."""
    strings = [(*body, 2) for length in range(LIMIT) for body in product((0, 1), repeat=length)]
    strings += list(product((0, 1), repeat=LIMIT))
    x = Sequences.pack([p.context(None)] * len(strings), [torch.tensor(s) for s in strings])
    return replace(x, sampler_logp=score(mu, mu, x).rows.logp)


def string_law(model: Automaton, x: Sequences) -> torch.Tensor:
    statistics = score(model, model, x)
    return statistics.per_string(statistics.rows.logp).exp()


@pytest.fixture
def case() -> tuple[TokenStatistics, torch.Tensor, torch.Tensor]:
    """Statistics of all strings, their law under mu, and their law under p."""
    p, q, mu = machine("p"), machine("q"), machine("mu")
    x = all_strings(p, mu)
    return score(p, q, x), string_law(mu, x), string_law(p, x)


def test_prefix_weights_give_the_divergence_exactly(case):
    statistics, law_mu, law_p = case
    assert float(law_p.sum()) == pytest.approx(1.0, abs=1e-12)
    truth = float((law_p * statistics.per_string(statistics.log_ratio)).sum())
    weighted = statistics.per_string(statistics.prefix_weight() * statistics.rows.kl)
    assert float((law_mu * weighted).sum()) == pytest.approx(truth, abs=1e-10)
    unweighted = float((law_mu * statistics.per_string(statistics.rows.kl)).sum())
    assert abs(unweighted - truth) > 0.01  # the weights matter here


def test_string_weights_are_ratios_of_string_laws(case):
    statistics, law_mu, law_p = case
    weights = statistics.string_weight()
    torch.testing.assert_close(weights, law_p / law_mu, rtol=1e-12, atol=0.0)
    truth = float((law_p * statistics.per_string(statistics.log_ratio)).sum())
    assert float((law_mu * weights * statistics.per_string(statistics.log_ratio)).sum()) == pytest.approx(
        truth, abs=1e-10
    )


def test_prefix_weights_vary_less_than_string_weights(case):
    statistics, law_mu, _ = case
    by_prefix = statistics.per_string(statistics.prefix_weight() * statistics.rows.kl)
    by_string = statistics.string_weight() * statistics.per_string(statistics.log_ratio)

    def variance(values: torch.Tensor) -> float:
        return float((law_mu * values.square()).sum() - (law_mu * values).sum().square())

    assert variance(by_prefix) < 0.2 * variance(by_string)


def test_the_first_decision_weighs_one_and_the_last_token_is_left_out():
    p, mu = coin(end=0.5), coin(end=0.25)
    x = Sequences.pack([p.context(None)], [torch.tensor([0, 0, 1])])
    statistics = score(p, p, replace(x, sampler_logp=score(mu, mu, x).rows.logp))
    torch.testing.assert_close(statistics.prefix_weight(), torch.tensor([1.0, 2 / 3, 4 / 9], dtype=torch.float64))
    assert float(statistics.string_weight()[0]) == pytest.approx(4 / 9 * 2)


def test_what_p_excludes_weighs_nothing_from_there_on():
    p = automaton(torch.tensor([[0.5, 0.0, 0.5]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.long))
    mu = automaton(torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.long))
    x = Sequences.pack([p.context(None)], [torch.tensor([0, 1, 1, 0, 2])])
    statistics = score(p, p, replace(x, sampler_logp=score(mu, mu, x).rows.logp))
    assert statistics.prefix_weight().tolist() == [1.0, 2.0, 0.0, 0.0, 0.0]
    assert statistics.string_weight().tolist() == [0.0]
    assert effective_sample_size(statistics).tolist() == pytest.approx([1.0, 1.0, 0.0, 0.0, 0.0])


def test_from_policy_records_the_law_it_drew_from():
    mu, p = machine("mu"), machine("p")
    contexts = [mu.context(None)] * 40
    x = from_policy(mu, contexts, max_tokens=8, seed=1)
    same = sample(mu, contexts, max_tokens=8, seed=1).sequences
    assert torch.equal(x.tokens, same.tokens)
    assert same.sampler_logp is None
    torch.testing.assert_close(x.sampler_logp, score(mu, p, x).rows.logp, rtol=1e-13, atol=1e-14)


def test_on_its_own_strings_every_weight_is_one():
    mu = machine("mu")
    statistics = score(mu, mu, from_policy(mu, [mu.context(None)] * 30, max_tokens=8, seed=1))
    assert (statistics.prefix_weight() - 1).abs().max() < 1e-12
    position = statistics.x.position()
    torch.testing.assert_close(effective_sample_size(statistics), position.bincount().double())


def test_effective_sample_size_is_the_textbook_ratio():
    p, mu = machine("p", 2.0), machine("mu", 2.0)
    statistics = score(p, p, from_policy(mu, [mu.context(None)] * 50, max_tokens=10, seed=2))
    weights, position = statistics.prefix_weight(), statistics.x.position()
    for n, value in enumerate(effective_sample_size(statistics).tolist()):
        w = weights[position == n]
        assert value == pytest.approx(float(w.sum() ** 2 / w.square().sum()))
