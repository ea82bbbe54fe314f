"""Measuring from a cache: what the model itself would have given, exactly or on average."""

import math
from dataclasses import fields, replace

import pytest
import torch
from tests.tiny import folder

from klkit.caches.build import build
from klkit.caches.cache import StaleCache
from klkit.caches.recording import Recording
from klkit.caches.shards import CacheError
from klkit.divergences.fused import RowStatistics
from klkit.estimators import ESTIMATORS, summarise
from klkit.estimators.audit import audit
from klkit.estimators.cached import score_cached
from klkit.estimators.exact import exact
from klkit.estimators.folds import deal
from klkit.estimators.statistics import score
from klkit.estimators.tally import Tally
from klkit.models.automaton import memoryless, random_automaton
from klkit.models.base import VocabularyMismatch
from klkit.models.spec import load
from klkit.sampling.ancestral import sample
from klkit.sequences import Sequences

LACKING = {"reverse_kl", "total_variation", "variance_ratio"}
FIELDS = [f.name for f in fields(RowStatistics) if f.name != "js"]  # which is had where it is asked for


@pytest.fixture(scope="module")
def p():
    return load(str(folder("llama")))


@pytest.fixture(scope="module")
def q():
    return load(str(folder("llama", seed=1, hidden_size=16)))


@pytest.fixture(scope="module")
def x(p):
    prompts = [torch.tensor([5]), torch.tensor([7, 9, 11])] * 6
    return sample(p, prompts, max_tokens=12, seed=0).sequences


def same(got, want, names, rtol, atol):
    for name in names:
        one, other = getattr(got.rows, name), getattr(want.rows, name)
        assert one.dtype == other.dtype, name
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol, msg=name)


def test_hidden_states_reproduce_the_streamed_divergence(p, q, x, tmp_path):
    cache = build(tmp_path / "c", p, x, batch=5, shard_bytes=2000).cache
    want, got = score(p, q, x), score_cached(cache, q, batch_size=7)
    assert float(got.rows.kl.sum()) == pytest.approx(float(want.rows.kl.sum()), rel=1e-6)
    torch.testing.assert_close(got.rows.kl, want.rows.kl, rtol=2e-6, atol=1e-7)
    same(got, want, FIELDS, 1e-4, 1e-5)
    assert summarise("rb_cv", got).value == pytest.approx(summarise("rb_cv", want).value, rel=1e-5)
    assert torch.equal(got.x.targets(), want.x.targets())


def test_hidden_states_of_the_same_batches_reproduce_it_to_rounding(p, q, x, tmp_path):
    cache = build(tmp_path / "c", p, x, batch=12).cache
    want, got = score(p, q, x).rows.kl, score_cached(cache, q).rows.kl
    assert float((got / want - 1).abs().max()) < 1e-6


def test_a_hybrid_cache_gives_every_column_that_can_be_had(p, q, x, tmp_path):
    cache = build(tmp_path / "c", p, x, Recording("hybrid", k=40, draws=8), batch=5).cache
    want, got = score(p, q, x), score_cached(cache, q, batch_size=5)
    same(got, want, set(FIELDS) - LACKING - {"kl"}, 1e-4, 1e-5)
    assert all(bool(getattr(got.rows, name).isnan().all()) for name in LACKING)
    error = (got.rows.kl - want.rows.kl).double()
    assert 0 < float(error.abs().mean()) < 0.05 * float(want.rows.kl.mean())
    assert abs(float(error.mean() / error.std()) * len(error) ** 0.5) < 4


def test_everything_known_is_the_divergence_itself(p, q, x, tmp_path):
    cache = build(tmp_path / "c", p, x, Recording("hybrid", k=320, draws=1)).cache
    same(score_cached(cache, q), score(p, q, x), ["kl"], 1e-5, 1e-6)


def test_the_mean_over_seeds_is_the_divergence_of_the_strings(p, q, x, tmp_path):
    some = x.select(range(4))
    truth = float(score(p, q, some).rows.kl.double().sum())
    caches = [
        build(tmp_path / f"{seed}", p, some, Recording("hybrid", k=8, draws=4, seed=seed)).cache for seed in range(30)
    ]
    for plain in (False, True):
        found = torch.tensor([float(score_cached(c, q, plain=plain).rows.kl.double().sum()) for c in caches])
        assert abs(float((found.mean() - truth) / found.std()) * 30**0.5) < 3.5
        assert float(found.std()) < 0.1 * truth


def test_strings_may_be_chosen_and_batches_change_nothing(p, q, x, tmp_path):
    cache = build(tmp_path / "c", p, x, Recording("hybrid", k=20, draws=4)).cache
    whole, order = score_cached(cache, q), [7, 0, 3]
    some = score_cached(cache, q, order, batch_size=1)
    same(some, whole.select(torch.tensor(order)), set(FIELDS) - LACKING, 1e-4, 1e-5)
    assert torch.equal(some.x.completion(0), x.completion(7))


@pytest.fixture(scope="module")
def automata(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (random_automaton(4, 20, generator=generator) for _ in range(2))
    strings = sample(ours, [ours.context(None)] * 400, max_tokens=60, seed=0).sequences
    path = tmp_path_factory.mktemp("cache") / "c"
    return ours, theirs, build(path, ours, strings, Recording("hybrid", k=4, draws=4), batch=64).cache


@pytest.mark.parametrize("method", ESTIMATORS)
def test_every_estimator_reads_a_hybrid_cache(method, automata):
    ours, theirs, cache = automata
    statistics = score_cached(cache, theirs)
    found = summarise(method, statistics)
    truth = exact(ours, theirs, max_tokens=60).value
    assert abs(found.value - truth) < 4 * found.stderr
    assert math.isfinite(found.value)
    assert any("known in part" in note for note in found.notes)
    tally = Tally(deal(statistics.x.cluster.numpy()))
    for i in range(0, 400, 100):
        tally.add(statistics.select(torch.arange(i, i + 100)))
    assert summarise(method, tally).value == pytest.approx(found.value, rel=1e-9)


def test_control_variates_still_remove_the_noise_of_the_strings(automata):
    statistics = score_cached(automata[2], automata[1])
    assert summarise("rb_cv", statistics).stderr < 0.5 * summarise("rb", statistics).stderr


def test_the_audit_leaves_out_what_it_cannot_know_and_says_so(automata):
    ours, theirs, cache = automata
    found = audit(score_cached(cache, theirs))
    assert found.passed
    assert "known in part" in found.exempt
    names = {check.name for check in found.checks}
    assert "log_ratio_z" not in names
    assert {"surprisal_z", "likelihood_ratio", "mc_against_rb_z"} <= names
    assert all(math.isfinite(check.value) for check in found.checks)
    assert audit(score(ours, theirs, cache.strings(range(400)))).exempt == ""


def test_the_audit_still_finds_strings_of_another_law(automata, tmp_path):
    ours, theirs, _ = automata
    wrong = sample(theirs, [ours.context(None)] * 400, max_tokens=60, seed=0).sequences
    cache = build(tmp_path / "c", ours, wrong, Recording("hybrid", k=4, draws=4), batch=64).cache
    assert not audit(score_cached(cache, theirs)).passed


def test_strings_of_another_law_are_weighted(automata, tmp_path):
    ours, theirs, _ = automata
    drawn = sample(theirs, [ours.context(None)] * 50, max_tokens=60, seed=0).sequences
    other = score(theirs, ours, drawn)
    x = replace(drawn, sampler_logp=other.rows.logp)
    cache = build(tmp_path / "c", ours, x, Recording("hybrid", k=20, draws=1)).cache
    got, want = (summarise("rb", s) for s in (score_cached(cache, theirs, x=x), score(ours, theirs, x)))
    assert got.value == pytest.approx(want.value, rel=1e-4)


def test_an_exclusion_is_infinite(tmp_path):
    ours, theirs = memoryless([0.5, 0.3, 0.2], end=0.3), memoryless([0.5, 0.5, 0.0], end=0.3)
    x = sample(ours, [ours.context(None)] * 20, max_tokens=30, seed=0).sequences
    for k in (1, 4):
        cache = build(tmp_path / f"{k}", ours, x, Recording("hybrid", k=k, draws=2)).cache
        found = score_cached(cache, theirs)
        assert bool((found.rows.kl == math.inf).all())
        assert set(found.rows.excluded.tolist()) == {2}
        assert audit(found)["infinite_decisions"].value == x.decisions
        assert not any("known in part" in note and "nan" in note for note in summarise("rb", found).notes)


def test_more_rows_of_a_table_are_ids_that_p_never_takes(p, tmp_path):
    """Padding rows of q's table: their mass belongs to its law, as it does where p's law is at hand."""
    wide = load(str(folder("llama", vocab_size=512, seed=1)))
    narrow = load(str(folder("llama")))
    x = sample(narrow, [torch.tensor([5])] * 6, max_tokens=8, seed=0).sequences
    cache = build(tmp_path / "c", narrow, x, Recording("hybrid", k=320, draws=2)).cache
    got = score_cached(cache, wide).rows.kl
    logp, logq = (m.readout(m.encode(x)).double() for m in (narrow, wide))
    want = (logp.exp() * (logp - logq[:, : logp.shape[1]])).sum(1)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_a_prompt_may_be_worded_otherwise_for_q(p, q, x, tmp_path):
    cache = build(tmp_path / "c", p, x, Recording("hybrid", k=320, draws=1)).cache
    contexts = [torch.cat([torch.tensor([3]), x.context(i)]) for i in range(len(x))]
    same(score_cached(cache, q, contexts_q=contexts), score(p, q, x, contexts_q=contexts), ["kl", "logq"], 1e-4, 1e-5)
    with pytest.raises(ValueError, match="expected a context for each of 12 strings, got 3"):
        score_cached(cache, q, contexts_q=contexts[:3])


def test_what_is_not_this_cache_is_refused(p, q, x, tmp_path):
    for kind in ("top-k", "sampled"):
        with pytest.raises(CacheError, match=f"got one of kind {kind}: .* build it with --kind hybrid"):
            score_cached(build(tmp_path / kind, p, x, Recording(kind, k=4)).cache, q)
    cache = build(tmp_path / "c", p, x, Recording("hybrid", k=4, draws=2)).cache
    with pytest.raises(StaleCache, match="another tokenizer"):
        score_cached(cache, load("klkit:docs"))
    other = Sequences.pack([x.context(i) for i in range(12)], [x.completion(11 - i) for i in range(12)])
    with pytest.raises(StaleCache, match="another response"):
        score_cached(cache, q, x=other)
    wide = load(str(folder("llama", vocab_size=512)))
    for recording in (Recording(), Recording("hybrid", k=4, draws=2)):
        cache = build(tmp_path / f"wide-{recording.kind}", wide, x, recording).cache
        with pytest.raises(VocabularyMismatch, match=r"512 ids of .*, got 320 of"):
            score_cached(cache, q)
