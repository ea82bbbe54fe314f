"""The headline estimator: exactly unbiased, near the best variance that is known, never worse than Rao-Blackwell."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.bank import C1, INFINITE, KNOWN, A, B, random_pair
from tests.enumeration import strings

from klkit.estimators import martingale
from klkit.estimators.exact import exact
from klkit.estimators.folds import Folds, deal
from klkit.estimators.martingale import Candidate, fit, lifted, rb_cv
from klkit.estimators.rao_blackwell import rao_blackwell
from klkit.estimators.statistics import TokenStatistics, score
from klkit.estimators.variates import token_features
from klkit.models.automaton import finite
from klkit.sampling.ancestral import sample


def pool(p, q, n, *, max_tokens=200, seed=0, prompts=1):
    x = sample(
        p,
        [p.context(None)] * n,
        max_tokens=max_tokens,
        seed=seed,
        prompt=[i % prompts for i in range(n)],
        replicate=[i // prompts for i in range(n)],
        settle=False,
    ).sequences
    return score(p, q, x, batch_size=1024, features=token_features(p.embedding()))


@pytest.mark.parametrize("per_token", [False, True])
def test_the_mean_over_all_samples_is_exact(per_token, monkeypatch):
    """Over all 4⁴ samples of four strings: selection and fitting included, the bias is zero."""
    # With two strings to learn from, the ridges on offer leave next to nothing: a weak one makes the test bite.
    weak = (Candidate("end", 0), Candidate("end, log-ratio", 1, 0.1), Candidate("all", None, 0.1))
    monkeypatch.setattr(martingale, "CANDIDATES", weak)
    p = finite({"": 0.3, "ab": 0.3, "b": 0.25, "bba": 0.15}, symbols="ab")
    q = finite({"": 0.2, "ab": 0.1, "b": 0.3, "bba": 0.4}, symbols="ab")
    law = strings(p, 6)
    everything = score(p, q, law.x, features=token_features(p.embedding()))
    kl, total, chosen = law.mean(everything.per_string(everything.rows.kl)), 0.0, set()
    for drawn in itertools.product(range(len(law.x)), repeat=4):
        sampled = everything.select(torch.tensor(drawn))
        sampled = replace(sampled, x=replace(sampled.x, cluster=torch.arange(4)))
        fitted = fit(sampled, per_token=per_token, folds=4, fewest=4)
        chosen.update(fitted.chosen)
        total += float(law.probability[list(drawn)].prod()) * float(fitted.contributions.mean())
    assert abs(total - kl) < 1e-10
    assert chosen == {"none", "end", "end, log-ratio", "all"}


@pytest.mark.parametrize("problem", KNOWN, ids=lambda problem: problem.name)
def test_known_problems_come_near_the_best_combination(problem):
    """No worse than the best mixture of Monte Carlo and Rao-Blackwell, whose coefficient nobody knows beforehand."""
    statistics = pool(problem.p, problem.q, 768)
    contributions = rb_cv(statistics)
    assert contributions.var() <= problem.variance_combined + 0.02 * problem.variance_rb
    assert abs(contributions.mean() - problem.kl) <= 4 * contributions.std() / 768**0.5 + 1e-9


@pytest.mark.parametrize("problem", [A, B, C1], ids=lambda problem: problem.name)
def test_few_strings_are_enough_where_rao_blackwell_loses(problem):
    statistics = pool(problem.p, problem.q, 32 * 20)
    means = [rb_cv(statistics.select(torch.arange(i, i + 32))).mean() for i in range(0, 640, 32)]
    assert 32 * np.mean((np.array(means) - problem.kl) ** 2) < 0.7 * problem.variance_rb


@pytest.mark.parametrize("seed", range(6))
def test_never_worse_than_rao_blackwell_on_32_strings(seed):
    p, q = random_pair(100 + seed)
    truth, statistics = exact(p, q), pool(p, q, 32 * 25)
    means = [rb_cv(statistics.select(torch.arange(i, i + 32))).mean() for i in range(0, 800, 32)]
    # The typical ratio is 0.1, and 25 estimates know it to 28 %.
    assert 32 * np.mean((np.array(means) - truth.value) ** 2) < truth.variance_rb


def test_reported_ratios_and_the_error_bar_are_honest():
    p, q = random_pair(7)
    truth, statistics = exact(p, q), pool(p, q, 64 * 40)
    fits = [fit(statistics.select(torch.arange(i, i + 64))) for i in range(0, 2560, 64)]
    errors = np.array([f.contributions.mean() - truth.value for f in fits])
    said = np.mean([f.contributions.var(ddof=1) / 64 for f in fits])
    assert 0.5 < said / np.mean(errors**2) < 2
    assert abs(errors.mean()) < 4 * errors.std() / 40**0.5
    whole = fit(statistics)
    assert whole.ratio_rb == pytest.approx(whole.contributions.var() / rao_blackwell(statistics).var())
    assert whole.ratio_mc == pytest.approx(whole.contributions.var() / truth.variance_mc, rel=0.2)


def test_order_of_strings_does_not_matter():
    statistics = pool(*random_pair(8), 48)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    assert np.allclose(rb_cv(statistics.select(order)), rb_cv(statistics)[order.numpy()], rtol=1e-9)
    halves = [statistics.select(torch.arange(24, 48)), statistics.select(torch.arange(24))]
    assert np.allclose(np.roll(rb_cv(TokenStatistics.cat(halves)), 24), rb_cv(statistics), rtol=1e-9)


def test_a_string_has_no_part_in_its_own_coefficients():
    statistics = pool(*random_pair(9), 40, prompts=10)
    cluster = statistics.x.cluster.numpy()
    fold = deal(cluster, 8, 0)
    assert {len(set(fold[cluster == k])) for k in range(10)} == {1}
    assert np.bincount(fold).tolist() in ([4] * 6 + [8] * 2, [8] * 2 + [4] * 6)
    before = fit(statistics)
    first = torch.from_numpy(fold == 0)[statistics.x.row()]
    kl = torch.where(first, 3 * statistics.rows.kl, statistics.rows.kl)
    after = fit(replace(statistics, rows=replace(statistics.rows, kl=kl)))
    assert np.array_equal(before.coefficients[0], after.coefficients[0])
    assert not np.allclose(before.coefficients[1:], after.coefficients[1:])


def test_per_token_keeps_the_precision_that_the_ratio_has():
    """Every decision of a coin diverges alike: the ratio is exact, and correcting the sums alone would spoil it."""
    statistics = pool(C1.p, C1.q, 64)
    tokens, rate = statistics.x.lengths.sum().item(), exact(C1.p, C1.q).rate
    assert rb_cv(statistics, per_token=True).sum() / tokens == pytest.approx(rate, rel=1e-9)
    assert abs(rb_cv(statistics).sum() / tokens - rate) > 1e-3


def test_rare_extremes_count_before_they_are_seen():
    statistics = pool(B.p, B.q, 24, seed=3)
    moments = Folds.of(statistics, np.zeros(24, dtype=np.int64), 1).moments[np.array([0])]
    assert statistics.log_ratio.min() > -4  # the token of probability 0.01 was not drawn,
    raised = (lifted(moments) - moments.gram)[0]
    assert np.linalg.eigvalsh(raised).min() > -1e-9
    assert raised[2, 2] > 0.1  # yet its share in the variance of the log-ratio is known


def test_equal_models_have_nothing_to_correct():
    p, _ = random_pair(10)
    fitted = fit(pool(p, p, 32))
    assert fitted.contributions.tolist() == [0.0] * 32
    assert set(fitted.chosen) == {"none"}
    assert np.isnan(fitted.ratio_rb)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_no_numbers_are_left_out_with_a_note(value):
    p, q = random_pair(12, symbols=4)
    statistics = pool(p, q, 48)
    features = statistics.features.clone()
    assert features.shape[1] == 4
    features[5, 1] = value
    features[:, 3] = value
    fitted = fit(replace(statistics, features=features))
    wanted = fit(replace(statistics, features=statistics.features[:, [0, 2]]))
    assert np.allclose(fitted.contributions, wanted.contributions, rtol=1e-9)
    assert "without 2 of its 4 token features" in fitted.notes[0]
    assert not wanted.notes
    nothing = fit(replace(statistics, features=torch.full_like(features, value)))
    assert np.isfinite(nothing.contributions).all()


@pytest.mark.parametrize("case", ["strings", "clusters", "sampler", "infinite"])
def test_falls_back_to_rao_blackwell_and_says_so(case):
    statistics = pool(*random_pair(11), 15 if case == "strings" else 32, prompts=3 if case == "clusters" else 1)
    if case == "sampler":
        statistics = replace(statistics, x=replace(statistics.x, sampler_logp=statistics.rows.logp - 0.1))
    if case == "infinite":
        statistics = pool(INFINITE.p, INFINITE.q, 32)
    fitted = fit(statistics)
    words = {
        "strings": "15 strings in 15 clusters",
        "clusters": "32 strings in 3 clusters",
        "sampler": "another law",
        "infinite": "infinite",
    }
    assert np.array_equal(fitted.contributions, rao_blackwell(statistics))
    assert words[case] in fitted.notes[0]
    assert fitted.chosen == ()
    assert not fit(pool(*random_pair(11), 32)).notes


@pytest.mark.parametrize("per_token", [False, True])
def test_errors_are_widened_by_the_share_of_coefficient_noise_between_clusters(per_token):
    """Against the definition, cluster by cluster; coefficients that all folds share add no noise."""
    statistics = pool(*random_pair(11), 48, prompts=12)
    variates = Folds.of(statistics, deal(statistics.x.cluster.numpy()), 8).sums
    theta = np.random.default_rng(0).normal(size=(8, variates.shape[1])) * 0.01
    contributions = rao_blackwell(statistics)

    def widening(theta):
        return martingale.widening(statistics.strings(), contributions, theta, variates, per_token)

    found = widening(theta)
    weights = statistics.x.lengths.double().numpy() if per_token else np.ones(48)
    noise = shown = 0.0
    for cluster in range(12):
        mine = statistics.x.cluster.numpy() == cluster
        shown += (contributions[mine] - contributions.sum() / weights.sum() * weights[mine]).sum() ** 2
        noise += 7 / 8 * (((theta - theta.mean(0)) @ variates[mine].sum(0)) ** 2).sum()
    assert 0.001 < noise / shown < 0.999
    assert found == pytest.approx((1 + noise / shown) ** 0.5)
    same = np.repeat(theta[:1], 8, axis=0)
    assert widening(same) == pytest.approx(1.0)
    assert widening(1e3 * theta) == 2**0.5
