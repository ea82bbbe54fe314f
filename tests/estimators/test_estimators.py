"""The table of estimators and the summary of a run."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import bank
from enumeration import strings
from klkit.estimators import ESTIMATORS, summarise
from klkit.estimators.exact import exact
from klkit.estimators.statistics import score
from klkit.sampling.ancestral import sample
from klkit.sampling.importance import from_policy


def drawn(n=400, prompts=20):
    p, q = bank.random_pair(0)
    prompt = [i % prompts for i in range(n)]
    return p, q, sample(p, [p.context(None)] * n, max_tokens=40, seed=0, prompt=prompt).sequences


def test_the_keys_are_fixed():
    assert list(ESTIMATORS) == ["mc", "k3_string", "cv_string", "k3_token", "ht", "rb", "rb_cv"]


@pytest.mark.parametrize("method", ESTIMATORS)
@pytest.mark.parametrize("estimand", ["S", "R"])
def test_every_estimator_agrees_with_the_exact_answer(method, estimand):
    p, q, x = drawn(2000)
    answer = exact(p, q, max_tokens=40)
    estimate = summarise(method, score(p, q, x, batch_size=500), estimand=estimand)
    truth = answer.value if estimand == "S" else answer.rate
    assert abs(estimate.value - truth) < 4 * estimate.stderr
    assert 0 < estimate.stderr < 0.4 * truth
    assert (estimate.n, estimate.clusters, estimate.method, estimate.estimand) == (2000, 20, method, estimand)


@pytest.mark.parametrize("method", ESTIMATORS)
def test_equal_models_give_zero(method):
    p, _, x = drawn(60)
    estimate = summarise(method, score(p, p, x))
    assert estimate.value == pytest.approx(0, abs=1e-14)
    assert estimate.stderr == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("method", ESTIMATORS)
def test_infinite_divergences_are_infinite_or_explained_but_never_undefined(method):
    p, q = bank.INFINITE.p, bank.INFINITE.q
    x = sample(p, [p.context(None)] * 40, max_tokens=40, seed=0, prompt=[0] * 40).sequences
    estimate = summarise(method, score(p, q, x))
    assert estimate.value == np.inf
    assert estimate.infinite == x.decisions


def test_text_from_elsewhere_is_measured_by_its_decisions_alone():
    p, q, x = drawn(30, prompts=5)
    statistics = score(p, q, x)
    estimate = summarise("rb", statistics, estimand="F", notes=("corpus: none",))
    assert estimate.value == pytest.approx(float(statistics.rows.kl.mean()), rel=1e-12)
    assert estimate.weights.tolist() == x.lengths.tolist()
    assert estimate.notes[0] == "corpus: none"
    assert "given text" in estimate.notes[1]
    assert estimate.truncated == 0
    # Whoever wrote the text, its tokens are not weighted.
    other = replace(statistics, x=replace(x, sampler_logp=torch.full((x.decisions,), -1.0)))
    assert summarise("rb", other, estimand="F").value == estimate.value


@pytest.mark.parametrize("method", [key for key in ESTIMATORS if key != "rb"])
def test_methods_that_trust_the_tokens_to_be_from_p_refuse_a_given_text(method):
    p, q, x = drawn(30)
    with pytest.raises(ValueError, match="expected method 'rb' for estimand 'F'"):
        summarise(method, score(p, q, x), estimand="F")


@pytest.mark.parametrize(("method", "estimand"), [("k1", "S"), ("rb", "Q")])
def test_unknown_names_are_refused(method, estimand):
    p, q, x = drawn(5)
    with pytest.raises(ValueError, match=r"expected a method among mc, .* and an estimand among S, R, F"):
        summarise(method, score(p, q, x), estimand=estimand)


def test_the_share_of_cut_strings_is_reported():
    p, q, _ = drawn(1)
    x = sample(p, [p.context(None)] * 50, max_tokens=2, seed=0).sequences
    assert 0 < summarise("rb", score(p, q, x)).truncated == 1 - float(x.finished.double().mean()) < 1


def test_the_reverse_divergence_is_the_other_pair_over_the_other_strings():
    p, q, _ = drawn(1)
    x = sample(q, [q.context(None)] * 500, max_tokens=40, seed=0).sequences
    estimate = summarise("rb", score(q, p, x), divergence="reverse_kl", direction="KL(q‖p)")
    assert abs(estimate.value - exact(q, p, max_tokens=40).value) < 4 * estimate.stderr
    assert (estimate.divergence, estimate.direction) == ("reverse_kl", "KL(q‖p)")
    # The same from p's strings, by their weights.
    y = sample(p, [p.context(None)] * 2000, max_tokens=5, seed=0)
    weighted = summarise("rb", score(q, p, replace(y.sequences, sampler_logp=y.logp), batch_size=2000))
    assert abs(weighted.value - exact(q, p, max_tokens=5).value) < 4 * weighted.stderr


def test_strings_of_another_law_come_with_what_they_are_worth():
    p, q, _ = drawn(1)
    mu = bank.random_pair(7)[0]
    x = from_policy(mu, [mu.context(None)] * 300, max_tokens=5, seed=0)
    estimate = summarise("rb", score(p, q, x), estimand="R")
    assert "of 300 strings from p" in estimate.notes[0]
    assert abs(estimate.value - exact(p, q, max_tokens=5).rate) < 4 * estimate.stderr


def test_enumerated_strings_have_the_exact_rate():
    p, q, _ = drawn(1)
    law = strings(p, 5)
    statistics = score(p, q, law.x)
    estimate = summarise("rb", statistics, estimand="R")
    mean, length = (law.mean(torch.from_numpy(v)) for v in (estimate.contributions, estimate.weights))
    assert mean / length == pytest.approx(exact(p, q, max_tokens=5).rate, abs=1e-12)
