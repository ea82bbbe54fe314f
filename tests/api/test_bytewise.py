"""Runs over bytes: models with different tokenizers, labelled as what they are."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

import klkit
from klkit.api.bytewise import cost_notes, over_bytes, symbol_of
from klkit.api.settings import Settings
from klkit.models.automaton import automaton, memoryless
from klkit.models.base import VocabularyMismatch
from klkit.models.byte_level import byte_level
from klkit.models.wrap import temperature

# One token is "ab"; beside the letters alone it makes two tokenisations of a text.
LETTERS = memoryless([0.6, 0.4], end=0.2, name="letters")
LAW = torch.tensor([[0.3, 0.3, 0.2, 0.2]], dtype=torch.float64)
CHUNKS = automaton(LAW, torch.zeros(1, 3, dtype=torch.long), symbols=("a", "b", "ab"), name="chunks")


def test_models_of_different_tokens_are_compared_over_bytes() -> None:
    with pytest.raises(VocabularyMismatch, match="bytes=True"):
        klkit.estimate(LETTERS, CHUNKS, samples=4, max_tokens=8)
    result = klkit.estimate(LETTERS, CHUNKS, bytes=True, beam=64, samples=200, max_tokens=12)
    assert result.audit["passed"]
    assert result.headline.symbol == "byte"
    assert "of at most 12 bytes" in result.sentence
    rate = next(e for e in result.estimates if e.estimand == "R")
    assert "per byte" in str(rate)
    assert "per byte" in result.lines
    assert {"symbol": "byte"}.items() <= result.to_dict()["headline"].items()
    # The answer by hand: the exact law over bytes, string by string.
    p, q = byte_level(LETTERS), byte_level(CHUNKS)
    x = klkit.sample(p, [p.context(None)] * 200, max_tokens=12, seed=0, prompt=[0] * 200).sequences
    statistics = klkit.score(p, q, x)
    rb = next(e for e in result.estimates if e.method == "rb" and e.estimand == "S")
    assert rb.value == pytest.approx(float(statistics.per_string(statistics.rows.kl).mean()), rel=1e-9)


def test_the_notes_say_what_was_summed_dropped_and_spent() -> None:
    result = klkit.estimate(LETTERS, CHUNKS, bytes=True, beam=1, samples=20, max_tokens=12)
    notes = "\n".join(result.notes)
    for said in ("approximate", "1 heaviest", "stand for no text", "max_tokens=12", "laws and", "the beam dropped"):
        assert said in notes
    assert cost_notes(LETTERS, CHUNKS) == ()


def test_the_temperature_is_that_of_the_choices_of_tokens() -> None:
    warm = over_bytes(CHUNKS, Settings("p", "q", bytes=True, beam=9, temperature=2.0))
    wanted = byte_level(temperature(CHUNKS, 2.0), beam=9)
    start = [torch.tensor([256, 97, 98])]
    assert torch.equal(warm.begin(start)[1], wanted.begin(start)[1])
    assert not torch.allclose(warm.begin(start)[1], temperature(byte_level(CHUNKS), 2.0).begin(start)[1])
    assert symbol_of(temperature(wanted, 2.0)) == "byte"
    result = klkit.estimate(CHUNKS, LETTERS, bytes=True, temperature=2.0, samples=10, max_tokens=5)
    assert any("temperature 2" in note for note in result.notes)


def test_other_divergences_and_a_model_with_itself() -> None:
    for divergence in ("reverse_kl", "js", "jeffreys"):
        result = klkit.estimate(LETTERS, CHUNKS, bytes=True, divergence=divergence, samples=40, max_tokens=6)
        assert result.headline.symbol == "byte"
        assert any("the beam dropped" in note for note in result.notes)
    assert klkit.estimate(CHUNKS, CHUNKS, bytes=True, samples=10, max_tokens=6).headline.value == 0.0


def test_packaged_models_on_the_command_line(run, tmp_path) -> None:
    out = tmp_path / "out"
    options = ("--bytes", "--samples", "10", "--max-tokens", "5", "--beam", "4", "--floor", "dtype", "--out", out)
    code, printed, _ = run("estimate", "klkit:docs", "klkit:reviews", *options)
    assert code == 0
    assert "of at most 5 bytes" in " ".join(printed.split())
    result = json.loads((out / "result.json").read_text())
    assert result["estimates"][-1]["symbol"] == "byte"
    assert result["floor"]["n"] == 8
    assert "per token" not in (out / "report.html").read_text().split("<h2>Where")[0]
    settings = yaml.safe_load((out / "config.yaml").read_text())
    assert (settings["bytes"], settings["beam"]) == (True, 4)
