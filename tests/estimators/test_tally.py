"""A run that keeps sums only says what the decisions of all its strings say, and holds none of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.bank import INFINITE, random_pair

from klkit.estimators import ESTIMATORS, summarise
from klkit.estimators.audit import audit
from klkit.estimators.folds import deal
from klkit.estimators.martingale import fit, fitted
from klkit.estimators.mixture import jensen_shannon
from klkit.estimators.statistics import TokenStatistics, score
from klkit.estimators.strings import StringStatistics
from klkit.estimators.tally import Tally
from klkit.estimators.variates import token_features
from klkit.sampling.ancestral import sample
from klkit.sampling.importance import from_policy


def draw(p, q, n=96, *, max_tokens=40, prompts=1, mixture=False):
    names = [i % prompts for i in range(n)]
    x = sample(p, [p.context(None)] * n, max_tokens=max_tokens, seed=0, prompt=names, settle=False).sequences
    return score(p, q, x, batch_size=n, features=token_features(p.embedding()), mixture=mixture)


def tallied(statistics: TokenStatistics, size: int, *, clusters: int = 96) -> Tally:
    tally = Tally(deal(np.arange(clusters)))
    for rows in torch.arange(len(statistics.x)).split(size):
        tally.add(statistics.select(rows))
    return tally


@pytest.mark.parametrize("size", [1, 7, 96])
@pytest.mark.parametrize("prompts", [1, 12])
def test_every_estimator_says_the_same_however_strings_come_in_batches(size, prompts):
    statistics = draw(*random_pair(3), prompts=prompts)
    tally = tallied(statistics, size, clusters=prompts if prompts > 1 else 96)
    for method, estimator in ESTIMATORS.items():
        assert np.allclose(estimator(tally), estimator(statistics), rtol=1e-10, atol=1e-12), method
        for estimand in "SR":
            one, other = (summarise(method, part, estimand=estimand) for part in (tally, statistics))
            assert one.value == pytest.approx(other.value, rel=1e-10)
            assert one.stderr == pytest.approx(other.stderr, rel=1e-8)
            assert (one.notes, one.prompts, one.truncated) == (other.notes, other.prompts, other.truncated)
    assert fitted(tally).chosen == fit(statistics).chosen
    assert audit(tally).to_dict()["passed"]
    for one, other in zip(audit(tally).checks, audit(statistics).checks, strict=True):
        assert (one.name, one.verdict) == (other.name, other.verdict)
        assert one.value == pytest.approx(other.value, rel=1e-9, abs=1e-12)


def test_infinite_divergences_are_counted_and_their_tokens_named():
    statistics = draw(INFINITE.p, INFINITE.q)
    tally = tallied(statistics, 10)
    one, other = summarise("mc", tally), summarise("mc", statistics)
    assert one.infinite == other.infinite > 0
    assert summarise("rb_cv", tally).value == np.inf
    assert audit(tally)["infinite_decisions"].advice == audit(statistics)["infinite_decisions"].advice


def test_strings_of_another_law_keep_their_weights():
    (p, q), (mu, _) = random_pair(1), random_pair(2)
    x = from_policy(mu, [mu.context(None)] * 40, max_tokens=8, seed=0, prompt=[0] * 40)
    statistics = score(p, q, x, mixture=True)
    strings = statistics.strings()
    before, after, whole = statistics.prefix_weight(), statistics.token_weight(), statistics.string_weight()
    assert strings.foreign
    assert whole.std() > 0.1
    wanted = {
        "weight": whole,
        "mc": statistics.per_string(after * statistics.log_ratio),
        "rb": statistics.per_string(before * statistics.rows.kl),
        "decisions": statistics.per_string(before),
        "mixture": statistics.per_string(before * statistics.mixture),
        "log_drawn": statistics.per_string(x.sampler_logp),
        "logp": statistics.per_string(statistics.rows.logp),
    }
    for name, values in wanted.items():
        torch.testing.assert_close(getattr(strings, name), values, rtol=1e-12, atol=1e-12, msg=name)
    tally = tallied(statistics, 9)
    for method, estimator in ESTIMATORS.items():
        assert np.allclose(estimator(tally), estimator(statistics), rtol=1e-10), method
    assert audit(tally)["effective_share"].value == pytest.approx(audit(statistics)["effective_share"].value)


def test_symmetric_divergences_read_sums_as_well():
    p, q = random_pair(4)
    halves = draw(p, q, mixture=True), draw(q, p, mixture=True)
    one, other = jensen_shannon(*(tallied(half, 10) for half in halves)), jensen_shannon(*halves)
    assert one.value == pytest.approx(other.value, rel=1e-12)
    assert one.stderr == pytest.approx(other.stderr, rel=1e-12)


def test_what_is_kept_does_not_grow_with_the_length_of_the_strings():
    """96 strings of 4 and of 40 times 4 tokens leave arrays of the same shapes behind."""

    def kept(tally):
        strings, folds = tally.strings(), tally.folds()
        sizes = [value.nbytes for f in StringStatistics.__slots__ if hasattr(value := getattr(strings, f), "nbytes")]
        return sum(sizes) + folds.sums.nbytes + folds.fold.nbytes + folds.moments.gram.nbytes

    p, q = random_pair(5)
    short = draw(p, q, max_tokens=4)
    statistics = TokenStatistics.cat([short] * 40)
    lengths = 40 * short.x.lengths
    order = torch.arange(len(short.x)).repeat_interleave(40) + torch.arange(40).repeat(96) * 96
    glued = replace(
        statistics.select(order),
        x=replace(
            short.x,
            tokens=torch.zeros(96, int(lengths.max()) + 1, dtype=torch.long),
            start=torch.ones(96, dtype=torch.long),
            stop=1 + lengths,
        ),
    )
    assert glued.x.decisions == 40 * short.x.decisions
    assert kept(tallied(glued, 8)) == kept(tallied(short, 8)) < 96 * 700 + 8 * 40**2 * 8


def test_completions_are_told_apart_by_their_tokens_alone():
    p, _ = random_pair(6)
    statistics = draw(p, p, 60, max_tokens=4, prompts=2)
    words = [tuple(statistics.x.completion(i).tolist()) for i in range(60)]
    marks = [tuple(row) for row in statistics.strings().identity.tolist()]
    assert len(set(words)) == len(set(marks)) == len(set(zip(words, marks, strict=True))) < 60
    other = replace(statistics.x, tokens=torch.nn.functional.pad(statistics.x.tokens, (1, 3), value=1))
    other = replace(other, start=other.start + 1, stop=other.stop + 1)
    assert torch.equal(replace(statistics, x=other).strings().identity, statistics.strings().identity)


def test_without_folds_nothing_is_fitted():
    statistics = draw(*random_pair(3))
    tally = Tally()
    tally.add(statistics)
    assert tally.folds() is None
    assert "not dealt into folds" in fitted(tally).notes[0]
    assert np.array_equal(ESTIMATORS["rb_cv"](tally), ESTIMATORS["rb"](statistics))
    halves = Tally(np.arange(96) % 2)
    halves.add(statistics)
    assert "fewer than 4 folds" in fitted(halves).notes[0]
