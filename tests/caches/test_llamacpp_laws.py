"""Stored laws against whole ones: closed forms, the bound, and what llama.cpp makes of the same bytes."""

import math

import numpy as np
import pytest
import torch
from tests.llamacpp import by_hand

from klkit.caches.llamacpp import LlamaCppFile, StoredLaws
from klkit.caches.llamacpp_score import score_laws
from klkit.caches.shards import CacheError
from klkit.divergences.fused import row_statistics
from klkit.rng import numpy_stream


def stored(tmp_path, logits):
    """``logits`` after a trip through a file of windows of three tokens, one scored each, written by hand."""
    laws = np.asarray(logits, dtype=np.float32)
    path = by_hand(tmp_path / "base.dat", [[0, 0, 0]] * len(laws), laws.tolist())
    return LlamaCppFile.open(path).rows(slice(0, len(laws)))


def by_definition(p, q, deep):
    """KL of the laws with the tokens ``deep`` taken as one, in double precision."""
    masses = [np.append(np.exp(x[~deep]), np.exp(x[deep]).sum()) for x in (p, q)]
    return float(sum(a * math.log(a / b) for a, b in zip(*masses, strict=True) if a > 0))


def log_softmax(z):
    z = np.asarray(z, dtype=np.float64)
    return z - z.max(-1, keepdims=True) - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True))


def random_laws(name, rows=12, size=4000, slope=1.5, noise=0.5):
    """Logits that fall with the logarithm of the rank, as those of a language model."""
    return -slope * np.log(np.arange(1, size + 1)) + numpy_stream(0, name).normal(0, noise, (rows, size))


def score(laws, logq, tokens=None, ends=(0,)):
    logq = torch.as_tensor(logq)
    return score_laws(laws, logq, torch.zeros(len(logq), dtype=torch.long) if tokens is None else tokens, ends)


def test_a_small_law_in_closed_form(tmp_path):
    # Half, a quarter, and a quarter in 2^26 equal parts would need 2^26 tokens; 900 tokens at −17 have 3.7e-5.
    logits = np.concatenate([[0.0, -1.0], np.full(900, -17.0)])[None]
    other = np.concatenate([[-1.0, 0.0], np.linspace(-9, -8, 900)])[None]
    laws, p, q = stored(tmp_path, logits), log_softmax(logits)[0], log_softmax(other)[0]
    found = score(laws, log_softmax(other))
    deep = np.arange(902) > 1
    assert found.floored.tolist() == [900]
    # The bucket's mass is known to half a step in all; what is nearest to q's is taken.
    truth, error = float(np.exp(p[deep]).sum()), float(found.error)
    assert float(found.bucket) == pytest.approx(truth, abs=error)
    assert 0 <= by_definition(p, q, deep) - float(found.rows.kl) < 2 * error * math.log(1 / truth)
    assert float(found.beyond) == pytest.approx(-truth, abs=error)
    assert float(found.rows.kl) < float((np.exp(p) * (p - q)).sum())


@pytest.mark.parametrize("slope", [1.05, 1.5, 2.5, 4.0])
@pytest.mark.parametrize("change", ["cooler", "warmer", "noise", "other", "far"])
def test_the_number_is_a_lower_bound_of_every_row(tmp_path, slope, change):
    z = random_laws(change, slope=slope)
    other = {
        "cooler": z / 0.98,
        "warmer": z / 1.1,
        "noise": z + numpy_stream(1, change).normal(0, 0.03, z.shape),
        "other": random_laws("another", slope=slope),
        "far": -z,
    }[change]
    p, q = log_softmax(z.astype(np.float32)), log_softmax(other)
    truth = row_statistics(torch.tensor(p), torch.tensor(q), torch.zeros(len(z), dtype=torch.long), (0,))
    found = score(stored(tmp_path, z), q)
    assert (found.rows.kl <= truth.kl + found.rounding).all()
    assert (found.rounding <= 1e-4 + 0.02 * truth.kl).all()
    if change != "far":
        assert (found.rows.kl >= 0.95 * truth.kl - 1e-5).all()
    slack = 3 * found.error
    assert (found.rows.total_variation <= truth.total_variation + slack).all()
    assert (found.rows.entropy_p <= truth.entropy_p + slack * (1 + truth.variance_logp.sqrt())).all()
    assert (found.rows.reverse_kl <= truth.reverse_kl + slack * (1 + truth.reverse_kl)).all()
    assert found.rows.entropy_q == pytest.approx(truth.entropy_q)
    assert torch.equal(found.rows.top_p, truth.top_p)
    assert torch.equal(found.rows.top_q, truth.top_q)


@pytest.mark.parametrize("slope", [1.05, 1.5, 2.5])
def test_a_law_against_itself_is_zero_while_llamacpp_is_of_either_sign(tmp_path, slope):
    z = random_laws("self", rows=40, slope=slope)
    found = score(stored(tmp_path, z), log_softmax(z.astype(np.float32)))
    assert (found.rows.kl >= 0).all()
    assert found.rows.kl.max() < 1e-8
    assert found.llamacpp.abs().max() > 1e-6
    assert found.llamacpp.min() < 0 < found.llamacpp.max()


def test_llamacpps_number_is_its_sum(tmp_path):
    laws = stored(tmp_path, random_laws("sum", rows=3, size=501))
    logq = log_softmax(random_laws("sum of q", rows=3, size=501)).astype(np.float32)
    found = score(laws, logq)
    for i in range(3):
        total = sum(
            math.exp(a) * (a - b) for a, b in zip(laws.logp[i].tolist(), logq[i].tolist(), strict=True) if a > -16
        )
        assert float(found.llamacpp[i]) == pytest.approx(total, rel=1e-5, abs=1e-7)


def test_temperature_with_a_deep_tail(tmp_path):
    """Setting A1 of the documentation: llama.cpp reads half of the divergence, or half as much again."""
    z = random_laws("deep", rows=4, size=128_256)
    laws, p = stored(tmp_path, z), log_softmax(z.astype(np.float32))
    shares = {}
    for t in (0.98, 1.02):
        q = log_softmax(z / t)
        truth = (np.exp(p) * (p - q)).sum(1).mean()
        found = score(laws, q)
        shares[t] = (float(found.llamacpp.mean()) / truth, float(found.rows.kl.mean()) / truth)
    assert 0.3 < shares[0.98][0] < 0.6
    assert 1.4 < shares[1.02][0] < 1.7
    assert all(0.96 < bucketed < 1 for _, bucketed in shares.values())


def test_what_q_excludes(tmp_path):
    z = random_laws("excluded", rows=1, size=60_000)
    laws = stored(tmp_path, z)
    floored = laws.floored[0].numpy()
    bucket = float(np.exp(log_softmax(z)[0, floored]).sum())
    assert bucket > 2e-4
    # All that is at the floor: mass that p is known to have is lost, and named.
    found = score(laws, log_softmax(np.where(floored, -np.inf, z)))
    assert found.rows.kl.isinf().all()
    assert float(found.rows.lost) == pytest.approx(bucket, abs=2 * float(found.error))
    assert floored[int(found.rows.excluded)]
    assert found.rounding.isinf().all()
    # A part of it only: the bucket is possible, so nothing is known to be lost.
    some = floored & (np.arange(60_000) % 2 == 0)
    assert score(laws, log_softmax(np.where(some, -np.inf, z))).rows.kl.isfinite().all()
    # A token that is stored: infinite whatever the floor holds.
    found = score(laws, log_softmax(np.where(np.arange(60_000) == 1, -np.inf, z)))
    assert found.rows.kl.isinf().all()
    assert int(found.rows.excluded) == 1


def test_a_mask_that_both_laws_share_costs_nothing(tmp_path):
    z = random_laws("mask", rows=5, size=200, slope=0.5)
    z[:, ::3] = -np.inf
    found = score(stored(tmp_path, z), log_softmax(z.astype(np.float32)))
    assert (found.floored == 67).all()
    assert (found.bucket <= found.error).all()
    assert found.rows.kl.max() < 1e-8


def test_a_drawn_token_at_the_floor_has_the_floor_and_no_more(tmp_path):
    z = np.concatenate([[0.0, -20.0, -25.0], np.full(50, -1.0)])[None]
    other = np.concatenate([[0.0, -1.0, -2.0], np.full(50, -1.0)])[None]
    laws, logq = stored(tmp_path, z), torch.tensor(log_softmax(other))
    for token, floored in ((0, False), (1, True), (2, True)):
        found = score(laws, logq, torch.tensor([token]))
        assert bool(found.drawn_floored) is floored
        assert float(found.rows.logq) == pytest.approx(float(logq[0, token]))
        if floored:
            assert float(found.rows.logp) == float(laws.lowest) >= log_softmax(z)[0, token]
        else:
            assert float(found.rows.logp) == pytest.approx(log_softmax(z)[0, token], abs=3e-4)
    assert float(found.log_stored) == float(laws.lowest)


def test_an_end_token_at_the_floor_is_not_the_one_that_stands_for_all(tmp_path):
    z = np.concatenate([[-20.0, 0.0, -30.0], np.zeros(10)])[None]
    other = np.concatenate([[-1.0, 0.0, -1.0], np.zeros(10)])[None]
    laws, logq = stored(tmp_path, z), log_softmax(other)
    found = score(laws, logq, ends=(0,))
    assert float(found.rows.end_q) == pytest.approx(float(np.exp(logq[0, 0])))
    assert float(found.rows.end_p) == 0
    assert float(found.rows.end_kl) == 0
    # Where end tokens are all there is at the floor, the bucket is the event of ending, and known.
    both = score(laws, logq, ends=(0, 2))
    assert float(both.rows.end_p) == pytest.approx(float(both.bucket), abs=2 * float(both.error))
    assert float(both.rows.end_kl) > 0
    assert float(both.rows.kl) == pytest.approx(float(found.rows.kl))


def test_ids_beyond_the_files_are_impossible_under_p(tmp_path):
    z = random_laws("beyond", rows=2, size=50)
    wide = np.concatenate([z, np.full((2, 3), -3.0)], 1)
    found = score(stored(tmp_path, z), log_softmax(wide))
    outside = np.exp(log_softmax(wide)[:, 50:]).sum(1)
    assert found.outside.numpy() == pytest.approx(outside)
    assert found.rows.kl.numpy() == pytest.approx(-np.log1p(-outside), abs=1e-8)


def test_laws_without_a_mass_of_one_are_refused():
    none = torch.zeros(1, 3, dtype=torch.bool)
    for logp in (torch.tensor([[0.5, 0.25, 0.2]]).log(), torch.tensor([[0.5, 0.3, 0.3]]).log()):
        laws = StoredLaws(logp, none, torch.full((1,), 2e-4), torch.tensor([-2.0]))
        with pytest.raises(CacheError, match="a mass of 1, got one with"):
            score(laws, torch.full((1, 3), 1 / 3).log())
    # What is missing may be at the floor, if the floor is high enough for it.
    floor = torch.tensor([[False, False, True]])
    for lowest, fits in ((0.06, True), (0.04, False)):
        laws = StoredLaws(
            torch.tensor([[0.5, 0.45, lowest]]).log(), floor, torch.full((1,), 2e-4), torch.tensor([lowest]).log()
        )
        if fits:
            assert float(score(laws, torch.full((1, 3), 1 / 3).log()).bucket) == pytest.approx(0.05, abs=2e-4)
        else:
            with pytest.raises(CacheError, match="a mass of 1"):
                score(laws, torch.full((1, 3), 1 / 3).log())
