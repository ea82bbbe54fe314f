"""Estimand F from a file of base logits, against the same estimand from the model that wrote it."""

import json
import math

import pytest
import torch
from tests.llamacpp import by_hand
from tests.tiny import TEXT, folder, tokenizer

from klkit.api.llamacpp import measure_llamacpp, score_against
from klkit.caches.llamacpp import LlamaCppFile, first_token, strings_of
from klkit.caches.llamacpp_write import write_llamacpp
from klkit.caches.shards import CacheError
from klkit.estimators.statistics import score
from klkit.models.automaton import coin
from klkit.models.base import VocabularyMismatch
from klkit.models.spec import load
from klkit.models.wrap import extend, temperature


@pytest.fixture(scope="module")
def pair():
    return load(str(folder("gpt2")), name="p"), load(str(folder("gpt2", seed=1)), name="q")


@pytest.fixture(scope="module")
def windows():
    ids = torch.tensor(tokenizer()(TEXT)["input_ids"])
    return ids[: 12 * 24].view(12, 24)


def written(tmp_path, model, windows, **options):
    write_llamacpp(tmp_path / "base.dat", model, windows, **options)
    return tmp_path / "base.dat"


def test_the_same_pair_as_from_both_models(pair, windows, tmp_path):
    p, q = pair
    exact = score(p, q, strings_of(windows))
    result = measure_llamacpp(written(tmp_path, p, windows), q, batch_size=5)
    truth, precision = float(exact.rows.kl.double().mean()), result.companions["precision"]
    assert abs(result.headline.value - truth) <= precision["rounding"] < 1e-2 * truth
    assert result.headline.estimand == "F"
    assert (result.headline.n, result.headline.clusters) == (12, 12)
    assert result.companions["entropy_q"]["value"] == pytest.approx(float(exact.rows.entropy_q.mean()), rel=1e-5)
    assert result.companions["same_top"]["value"] == pytest.approx(float(exact.rows.same_top.double().mean()))
    theirs = result.companions["llamacpp"]
    assert theirs["perplexity_q"] == pytest.approx(math.exp(-exact.rows.logq.mean()), rel=1e-5)
    assert theirs["perplexity_p"] == pytest.approx(math.exp(-exact.rows.logp.mean()), rel=1e-3)
    assert theirs["mean_kld"] == pytest.approx(truth, abs=1e-3)
    assert not result.failed
    assert result.companions["text_start"] == TEXT[:80]


@pytest.mark.parametrize("cooled", [1.0, 0.1])
def test_the_same_model_gives_zero(pair, windows, tmp_path, cooled):
    p = temperature(pair[0], cooled)
    result = measure_llamacpp(written(tmp_path, p, windows), p)
    assert 0 <= result.headline.value < 1e-8
    assert (result.companions["precision"]["floored_tokens"] > 10) == (cooled < 1)


def test_a_deep_law_gives_a_lower_bound_that_says_so(pair, windows, tmp_path):
    p, q = temperature(pair[0], 0.1), temperature(pair[0], 0.105)
    exact = score(p, q, strings_of(windows))
    result = measure_llamacpp(written(tmp_path, p, windows), q)
    truth, precision = float(exact.rows.kl.double().mean()), result.companions["precision"]
    assert 0.97 * truth < result.headline.value <= truth + precision["rounding"]
    assert result.headline.direction == "lower bound on KL(p‖q)"
    assert result.sentence.startswith("lower bound on KL(p‖q) = ")
    assert any("lower bounds" in note for note in result.notes)
    assert precision["positions_with_floor"] > 0.5
    assert precision["text_tokens_at_floor"] > 0
    assert any("at the floor, where p gives" in note for note in result.notes)


def test_without_a_floor_it_is_the_divergence(tmp_path):
    result = measure_llamacpp(written(tmp_path, coin(end=0.5), torch.ones(12, 6, dtype=torch.long)), coin(end=0.25))
    assert result.headline.direction == "KL(p‖q)"
    assert result.headline.value == pytest.approx(0.143841, abs=1e-5)
    bits = measure_llamacpp(tmp_path / "base.dat", coin(end=0.25), unit="bits")
    assert bits.headline.to_dict()["value"] == pytest.approx(0.143841 / math.log(2), abs=1e-5)
    assert bits.companions["llamacpp"]["mean_kld"] == pytest.approx(0.143841 / math.log(2), abs=1e-5)


def test_llamacpps_own_error_bar(pair, windows, tmp_path):
    path = written(tmp_path, pair[0], windows)
    result = measure_llamacpp(path, pair[1])
    kld = torch.cat([s.laws.llamacpp for s in score_against(LlamaCppFile.open(path), pair[1])]).tolist()
    n, mean = len(kld), sum(kld) / len(kld)
    assert n == 12 * 11
    spread = math.sqrt((sum(x * x for x in kld) / n - mean**2) / (n - 1))
    assert result.companions["llamacpp"]["mean_kld"] == pytest.approx(mean)
    assert result.companions["llamacpp"]["independent_stderr"] == pytest.approx(spread)
    (theirs,) = [e for e in result.estimates if e.method == "llamacpp"]
    assert theirs.value == pytest.approx(mean)


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_batches_change_nothing(pair, windows, tmp_path, batch_size):
    path = written(tmp_path, temperature(pair[0], 0.3), windows)
    seen = []
    result = measure_llamacpp(path, pair[1], batch_size=batch_size, observe=lambda *now: seen.append(now))
    assert result.headline.value == pytest.approx(measure_llamacpp(path, pair[1]).headline.value, rel=1e-5)
    assert seen[-1] == (12, 12)


def test_a_token_that_begins_texts_is_read_in_every_window_if_the_file_begins_with_it(pair, windows, tmp_path):
    p, q = pair
    begin = tokenizer().bos_token_id
    text = torch.cat([torch.tensor([begin]), windows.reshape(-1)[:-1]]).view_as(windows)
    path = written(tmp_path, p, text)
    assert first_token(LlamaCppFile.open(path).tokens, temperature(q, 2.0)) == begin
    assert measure_llamacpp(path, p).headline.value < 1e-8
    assert any("in place of its first token" in note for note in measure_llamacpp(path, p).notes)
    assert measure_llamacpp(path, p, first=None).headline.value > 1e-3
    assert measure_llamacpp(path, p, first=begin).settings["first"] == begin
    plain = written(tmp_path, p, windows)
    assert first_token(LlamaCppFile.open(plain).tokens, q) is None
    assert first_token(LlamaCppFile.open(path).tokens, coin(end=0.5)) is None
    assert any("as it is stored" in note for note in measure_llamacpp(plain, p).notes)


def test_rows_of_q_that_no_token_belongs_to(pair, windows, tmp_path):
    p, q = pair
    size = q.vocabulary.size
    path = written(tmp_path, p, windows)
    assert measure_llamacpp(path, extend(q, size + 5, [None] * 5)).headline.value == pytest.approx(
        measure_llamacpp(path, q).headline.value, rel=1e-6
    )
    with pytest.raises(VocabularyMismatch, match="beyond those of the file"):
        measure_llamacpp(path, extend(q, size + 1, ["<new>"]))
    with pytest.raises(VocabularyMismatch, match=f"over the {size} ids"):
        measure_llamacpp(path, coin(end=0.5))


def test_windows_that_q_cannot_read(pair, tmp_path):
    path = by_hand(tmp_path / "base.dat", [[5] * 80], [[0.0] * 320] * 39)
    with pytest.raises(ValueError, match="llama-perplexity -c 64"):
        measure_llamacpp(path, pair[0])


def test_bad_options_and_damage(pair, windows, tmp_path):
    path = written(tmp_path, pair[0], windows)
    for first in ("some", -1, 320):
        with pytest.raises(ValueError, match="for first"):
            measure_llamacpp(path, pair[1], first=first)
    with pytest.raises(ValueError, match="nats, bits"):
        measure_llamacpp(path, pair[1], unit="bans")
    content = bytearray(path.read_bytes())
    begin = 20 + 4 * windows.numel()
    content[begin + 8 : begin + 8 + 2 * 320] = b"\xff" * 640
    path.write_bytes(bytes(content))
    with pytest.raises(CacheError, match="a mass of 1"):
        measure_llamacpp(path, pair[1])


def test_an_infinite_divergence_stays_infinite(tmp_path):
    path = by_hand(tmp_path / "base.dat", [[1, 1, 1]] * 10, [[0.0, 0.0]] * 10)
    result = measure_llamacpp(path, coin(end=1.0))
    assert result.headline.value == math.inf
    assert result.companions["llamacpp"]["mean_kld"] == "inf"
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_run_folder(pair, windows, tmp_path):
    path = written(tmp_path, temperature(pair[0], 0.2), windows)
    result = measure_llamacpp(path, pair[1], out=tmp_path / "run", batch_size=5)
    kept = json.loads((tmp_path / "run" / "result.json").read_text())
    assert kept == json.loads(json.dumps(result.to_dict()))
    assert kept["settings"]["llamacpp"] == str(path.resolve())
    assert kept["provenance"]["models"]["p"]["name"] == "base.dat (llama.cpp base logits)"
    assert "lower bound on KL" in (tmp_path / "run" / "report.html").read_text()
