"""Different tokenizers: a refusal that says what can be compared, and bits per byte beside every divergence."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import enumeration
from klkit.api.batches import no_details
from klkit.api.bytewise import text_sizes
from klkit.api.companions import bits_per_byte
from klkit.api.compare_settings import CompareSettings
from klkit.api.gather import Gathered, TokenTables
from klkit.api.settings import Settings
from klkit.api.tokenizers import document_bits, prepare_or_explain, response_bits
from klkit.api.verbs import estimate
from klkit.estimators.statistics import score
from klkit.models.automaton import automaton, memoryless
from klkit.models.base import VocabularyMismatch
from klkit.models.byte_level import byte_level
from klkit.models.canonical import canonical
from klkit.models.spec import load
from klkit.report.shards import Batch
from klkit.sequences import Sequences
from klkit.stats.intervals import cluster_totals, ratio_stderr


@pytest.fixture(scope="module")
def pair():
    return load("klkit:docs"), load("klkit:reviews")


def test_the_refusal_says_what_can_be_compared(pair) -> None:
    p, q = pair
    with pytest.raises(VocabularyMismatch) as error:
        estimate(p, q, samples=64, max_tokens=20)
    said = str(error.value)
    assert "ids with different strings" in said
    found = re.search(r"klkit:docs takes ([\d.]+) bits per byte and klkit:reviews ([\d.]+) for the same 16 resp", said)
    assert found
    bits_p, bits_q, limit = response_bits(p, q, Settings(p="p", q="q", max_tokens=20), None)
    assert limit == 20
    assert found[1] == f"{bits_p:.3g}"
    assert found[2] == f"{bits_q:.3g}"
    assert bits_p < bits_q
    assert "--approximate" in said
    assert "--bytes" in said


def test_responses_are_as_long_as_q_can_read(pair) -> None:
    assert response_bits(*pair, Settings(p="p", q="q", max_tokens=64), None)[2] in (16, 32, 64)


def test_the_refusal_of_a_text_is_about_that_text(pair, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("The film was good, and the cast was better.")
    with pytest.raises(VocabularyMismatch, match=r"for the same text \(all of it, 43 bytes\)"):
        estimate("klkit:docs", "klkit:reviews", text=str(path))


def test_the_bits_of_a_document_are_those_of_its_tokens(pair) -> None:
    model, text = pair[1], "The film was good, and the cast was better."
    ids = torch.tensor(canonical(model)(text))
    x = Sequences.pack([model.context(None)], [ids])
    wanted = -float(enumeration.scores(model, x)[0].sum()) / math.log(2) / len(text)
    assert document_bits(model, [text]) == pytest.approx(wanted, rel=1e-5)
    both = document_bits(model, [text, ""])
    assert both == pytest.approx(wanted, rel=1e-5)
    long = text * 20
    ids = torch.tensor(canonical(model)(long))
    half = model.window // 2
    starts = range(0, len(ids), half)
    contexts = [ids[i - half : i] if i else model.context(None) for i in starts]
    x = Sequences.pack(contexts, [ids[i : i + half] for i in starts])
    assert x.decisions == len(ids) > 3 * half
    wanted = -float(enumeration.scores(model, x)[0].sum()) / math.log(2) / len(long)
    assert document_bits(model, [long]) == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(ValueError, match="got none"):
        document_bits(model, [""])


def test_where_there_are_no_bytes_the_plain_refusal_stays() -> None:
    p = memoryless([0.5, 0.5], end=0.5)
    q = automaton(torch.tensor([[0.25, 0.25, 0.5]]), torch.zeros(1, 2, dtype=torch.long), symbols=("x", "y"), name="q")
    with pytest.raises(VocabularyMismatch) as error:
        estimate(p, q, samples=64)
    assert "ids with different strings" in str(error.value)
    assert "bits per byte" not in str(error.value)


def test_settings_of_no_divergence_are_refused() -> None:
    p = memoryless([1.0], end=0.5)
    with pytest.raises(ValueError, match="settings of a divergence"):
        prepare_or_explain(p, p, Settings(p="p", q="q", approximate=True))
    with pytest.raises(ValueError, match="approximate"):
        CompareSettings.from_mapping({"p": "a", "candidates": ["b"], "approximate": True})


# Companions


def words(weights: list[float], name: str):
    return automaton(
        torch.tensor([weights], dtype=torch.float64),
        torch.zeros(1, 2, dtype=torch.long),
        symbols=("a", "ébé"),
        name=name,
    )


def test_bits_per_byte_count_the_end_but_give_it_no_bytes() -> None:
    p, q = words([0.25, 0.25, 0.5], "p"), words([0.5, 0.25, 0.25], "q")
    x = Sequences.pack(
        [p.context(None)] * 3,
        [torch.tensor([0, 1, 2]), torch.tensor([2]), torch.tensor([1, 1])],
        cluster=[0, 0, 1],
        finished=[True, True, False],
    )
    whole = Gathered(2, tables=TokenTables.of(p))
    for rows in ([0, 1], [2]):
        whole.add(Batch(score(p, q, x.select(rows)), no_details(), torch.zeros(0)))
    assert whole.bytes.tolist() == [6, 0, 10]
    found = bits_per_byte(whole.strings, whole.bytes)
    assert found["bits_per_byte_p"]["value"] == pytest.approx((2 + 2 + 1 + 1 + 2 + 2) / 16)
    assert found["bits_per_byte_q"]["value"] == pytest.approx((1 + 2 + 2 + 2 + 2 + 2) / 16)
    totals = cluster_totals(np.array([5.0, 1.0, 4.0]), np.array([6.0, 0.0, 10.0]), np.array([0, 0, 1]))
    assert found["bits_per_byte_p"]["stderr"] == pytest.approx(ratio_stderr(*totals))
    assert bits_per_byte(whole.strings, None) == {}
    assert bits_per_byte(whole.strings, torch.zeros(3)) == {}
    assert Gathered(2).bytes is None
    assert set(bits_per_byte(whole.strings, whole.bytes, ("q", "p"))) == {"bits_per_byte_q", "bits_per_byte_p"}


def test_every_run_has_them_by_the_models_names(tmp_path: Path) -> None:
    p, q = words([0.25, 0.25, 0.5], "p"), words([0.5, 0.25, 0.25], "q")
    forward = estimate(p, q, samples=64, max_tokens=20).companions
    reverse = estimate(q, p, samples=64, max_tokens=20, divergence="reverse_kl").companions
    assert forward["bits_per_byte_p"] == reverse["bits_per_byte_q"]
    over_bytes = estimate(p, q, samples=64, max_tokens=40, bytes=True)
    assert "bits_per_byte_p" in over_bytes.companions
    assert "bits per byte" in over_bytes.lines
    path = tmp_path / "text.txt"
    path.write_text("The value of a name is looked up in the namespace of the module. " * 9)
    text = estimate("klkit:docs-tuned", "klkit:docs", text=str(path), context=64)
    assert 0 < text.companions["bits_per_byte_q"]["value"] < 8


def test_byte_level_models_have_a_byte_a_decision() -> None:
    sizes = text_sizes(byte_level(words([0.25, 0.25, 0.5], "p")))
    assert sizes.sum() == 256
    assert int(sizes[256]) == 0


def test_infinite_bits_stay_infinite() -> None:
    p, q = words([0.25, 0.25, 0.5], "p"), words([0.0, 0.5, 0.5], "q")
    found = estimate(p, q, samples=64, max_tokens=20).companions
    assert found["bits_per_byte_q"]["value"] == "inf"
    assert found["bits_per_byte_p"]["value"] > 0
