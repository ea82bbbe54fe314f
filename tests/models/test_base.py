"""Reading trunk vectors out in chunks: log-probabilities, and logits in one buffer."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import build, tokenizer
from torch import Tensor

from klkit.models import base
from klkit.models.automaton import coin
from klkit.models.base import head_of, read_logits, read_rows
from klkit.models.hf import HuggingFaceModel
from klkit.models.wrap import extend, restrict, temperature, top_k

MODEL = HuggingFaceModel(build("gemma2"), tokenizer())  # with a cap
HIDDEN = torch.randn(23, 32, generator=torch.Generator().manual_seed(0))


def copied(model: base.LanguageModel, hidden: Tensor, rows: int | None) -> list[Tensor]:
    return [chunk.clone() for chunk in read_logits(model, hidden, rows=rows)]


@pytest.mark.parametrize("rows", [None, 1, 4, 23, 100])
@pytest.mark.parametrize(
    "model",
    [MODEL, temperature(MODEL, 0.5), extend(restrict(MODEL, range(300)), 333), top_k(MODEL, 5)],
    ids=lambda model: model.name[-12:],
)
def test_logits_normalise_to_the_read_out(model, rows):
    chunks = copied(model, HIDDEN, rows)
    assert [len(chunk) for chunk in chunks] == [len(chunk) for chunk in read_rows(model, HIDDEN, rows=rows)]
    got = torch.cat(chunks).log_softmax(-1)
    torch.testing.assert_close(got, model.readout(HIDDEN), rtol=0, atol=2e-6)


def test_one_buffer_holds_them_all(monkeypatch):
    monkeypatch.setattr(base, "CHUNKS_A_READOUT", 1)
    monkeypatch.setattr(base, "rows_per_chunk", lambda size: 3)
    places = {chunk.untyped_storage().data_ptr() for chunk in read_logits(MODEL, HIDDEN)}
    assert len(places) == 1
    chunk = next(read_logits(MODEL, HIDDEN))
    assert chunk.untyped_storage().nbytes() == 3 * 320 * 4


def test_without_a_head_they_are_log_probabilities():
    model = coin(end=0.25)
    hidden = model.begin([model.context(None)] * 5)[1]
    assert head_of(model) is None
    assert torch.equal(torch.cat(copied(model, hidden, 2)), model.readout(hidden))


def test_no_rows():
    (chunk,) = read_logits(MODEL, HIDDEN[:0])
    assert chunk.shape == (0, 320)
