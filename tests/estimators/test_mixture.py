"""Jensen-Shannon and Jeffreys of laws over strings, against sums over all strings."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import bank
from enumeration import strings
from klkit.estimators import summarise
from klkit.estimators.exact import exact
from klkit.estimators.mixture import combine, jeffreys, jensen_shannon
from klkit.estimators.statistics import score
from klkit.models.automaton import coin, memoryless
from klkit.results import Estimate
from klkit.sampling.ancestral import sample

PAIRS = [bank.random_pair(s) for s in range(3)]
PAIRS += [(bank.C1.p, bank.C1.q), (bank.B.p, bank.B.q), (bank.INFINITE.p, bank.INFINITE.q), (coin(end=0.5),) * 2]
PAIRS += [(memoryless([1.0, 0.0], end=0.5), memoryless([0.0, 1.0], end=0.25))]  # nothing but the empty string in common


def exact_half(p, q, limit):
    """``KL(P ‖ ½P + ½Q)`` from the probabilities of whole strings."""
    law = strings(p, limit)
    logq = score(p, q, law.x).per_string(score(p, q, law.x).rows.logq)
    return law.mean(law.logp - torch.logaddexp(law.logp, logq) + math.log(2))


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_each_half_is_exact(p, q):
    for a, b in ((p, q), (q, p)):
        law = strings(a, 4)
        assert law.mean(score(a, b, law.x, mixture=True).strings().mixture) == pytest.approx(
            exact_half(a, b, 4), abs=1e-10
        )


def test_the_divergence_of_strings_is_not_that_of_next_tokens():
    p, q = bank.random_pair(0)
    law = strings(p, 4)
    naive = score(p, q, law.x)
    logp, logq = (m.readout(m.encode(law.x)) for m in (p, q))
    logm = torch.logaddexp(logp, logq) - math.log(2)
    per_token = law.mean(naive.per_string((logp.exp() * (logp - logm)).sum(-1)))
    assert abs(per_token - exact_half(p, q, 4)) > 0.01


@pytest.mark.parametrize("estimand", ["S", "R"])
def test_two_runs_of_independent_strings_add_their_variances(estimand):
    p, q = bank.random_pair(0)
    limit, n = 6, 4000
    halves = []
    for seed, a, b in ((1, p, q), (2, q, p)):
        x = sample(a, [a.context(None)] * n, max_tokens=limit, seed=seed, prompt=[0] * n).sequences
        halves.append(score(a, b, x, batch_size=n, mixture=True))
    estimate = jensen_shannon(*halves, estimand=estimand)
    truth = (exact_half(p, q, limit) + exact_half(q, p, limit)) / 2
    length = [half.x.lengths.double().mean() for half in halves]
    if estimand == "R":
        truth /= (exact(p, q, max_tokens=limit).decisions + exact(q, p, max_tokens=limit).decisions) / 2
    assert abs(estimate.value - truth) < 4 * estimate.stderr
    sums = [half.strings().mixture for half in halves]
    if estimand == "S":
        expected = math.sqrt(sum(float(s.var()) / n for s in sums)) / 2
    else:
        scale = float(sum(length)) / 2
        rest = [s - estimate.value * half.x.lengths for s, half in zip(sums, halves, strict=True)]
        expected = math.sqrt(sum(float(r.var()) / n for r in rest)) / 2 / scale
    assert estimate.stderr == pytest.approx(expected, rel=0.03)
    assert (estimate.divergence, estimate.direction, estimate.n) == ("js", "JS(p, q)", 2 * n)


def half(contributions, cluster, weights=None, estimand="S", **options):
    contributions = np.asarray(contributions, dtype=float)
    weights = np.ones(len(contributions)) if weights is None else np.asarray(weights, dtype=float)
    return Estimate("rb", "kl", "KL(p‖q)", estimand, contributions, weights, np.asarray(cluster), **options)


def test_a_prompt_that_is_hard_in_both_directions_counts_once():
    generator = np.random.default_rng(0)
    prompt = np.repeat(np.arange(50), 4)
    hard = generator.exponential(size=50)[prompt]
    forward, backward = (half(hard + generator.normal(size=200), prompt) for _ in range(2))
    total = np.bincount(prompt, forward.contributions + backward.contributions) / 4
    estimate = jeffreys(forward, backward)
    assert estimate.value == pytest.approx(forward.value + backward.value, abs=1e-12)
    assert estimate.stderr == pytest.approx(total.std(ddof=1) / math.sqrt(50), rel=1e-10)
    assert estimate.stderr > 1.2 * math.hypot(forward.stderr, backward.stderr)


def test_runs_of_different_sizes_count_the_same():
    forward = half([1.0, 3.0, 5.0, 7.0], [0, 0, 1, 1], estimand="R", weights=[1, 2, 3, 4])
    backward = half([2.0, 4.0], [0, 1], estimand="R", weights=[5, 5], truncated=0.5, notes=("cut",))
    estimate = combine(forward, backward, share=0.5, divergence="js", direction="JS(p, q)")
    assert estimate.value == pytest.approx((4 + 3) / 2 / ((2.5 + 5) / 2), abs=1e-12)
    assert (estimate.truncated, estimate.notes) == (pytest.approx(1 / 6), ("cut",))


def test_jeffreys_is_infinite_if_a_direction_is():
    p, q = bank.INFINITE.p, bank.INFINITE.q
    forward, backward = (
        summarise(
            "rb", score(a, b, sample(a, [a.context(None)] * 20, max_tokens=30, seed=0, prompt=[0] * 20).sequences)
        )
        for a, b in ((p, q), (q, p))
    )
    assert jeffreys(forward, backward).value == math.inf
    assert jeffreys(backward, forward).infinite > 0


def test_halves_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="spread alike over the same clusters"):
        jeffreys(half([1.0, 2.0], [0, 1]), half([1.0, 2.0], [0, 2]))
    with pytest.raises(ValueError, match="spread alike over the same clusters"):
        jeffreys(half([1.0, 2.0, 3.0], [0, 0, 1]), half([1.0, 2.0], [0, 1]))
    with pytest.raises(ValueError, match="one estimand"):
        jeffreys(half([1.0, 2.0], [0, 1]), half([1.0, 2.0], [0, 1], estimand="R"))
    p, q = bank.random_pair(0)
    statistics = score(p, q, strings(p, 2).x)
    with pytest.raises(ValueError, match="mixture=True"):
        jensen_shannon(statistics, statistics)


def test_strings_of_another_law_are_weighted():
    (p, q), (mu, _) = bank.random_pair(0), bank.random_pair(100)
    law = strings(mu, 4)
    x = replace(law.x, sampler_logp=score(mu, mu, law.x).rows.logp)
    statistics = score(p, q, x, mixture=True)
    for estimand in ("S", "R"):  # with equal halves a contribution is that of the string itself
        estimate = jensen_shannon(statistics, statistics, estimand=estimand)
        assert law.mean(torch.from_numpy(estimate.contributions[: len(x)])) == pytest.approx(
            exact_half(p, q, 4), abs=1e-10
        )
    lengths = torch.from_numpy(estimate.weights[: len(x)])
    assert law.mean(lengths) == pytest.approx(exact(p, q, max_tokens=4).decisions, abs=1e-10)
