"""Files of llama.cpp's base logits: whole ones, written from the format's description, and every broken one."""

import math
import struct

import numpy as np
import pytest
import torch
from tests.llamacpp import by_hand, record

from klkit.caches.llamacpp import LlamaCppFile, record_width, scored_tokens
from klkit.caches.llamacpp_write import records_of, write_llamacpp
from klkit.caches.shards import CacheError
from klkit.models.automaton import coin
from klkit.models.base import Vocabulary, VocabularyMismatch
from klkit.models.ngram import ngram
from klkit.rng import numpy_stream

WINDOWS = [[0, 1, 2, 1, 0], [2, 2, 1, 0, 1]]
LAWS = [[0.0, 1.0, -2.0], [3.0, 3.0, 3.0], [0.0, -40.0, -math.inf], [0.0, -20.0, 5.0]]


@pytest.fixture
def path(tmp_path):
    return by_hand(tmp_path / "base.dat", WINDOWS, LAWS, pad=9)


def test_a_file_is_what_was_written(path):
    file = LlamaCppFile.open(path)
    assert (file.size, file.scored, len(file.records)) == (3, 2, 4)
    assert file.tokens.tolist() == WINDOWS
    assert isinstance(file.records, np.memmap)
    laws = file.rows(slice(0, 4))
    truth = torch.tensor(LAWS).log_softmax(1)
    assert laws.floored.tolist() == [[False] * 3, [False] * 3, [False, True, True], [False, True, False]]
    assert (laws.logp - truth)[~laws.floored].abs().max() <= laws.step.max() / 2 + 2e-6
    assert (laws.logp[laws.floored] >= truth[laws.floored]).all()
    assert torch.equal(laws.logp[laws.floored], laws.lowest[[2, 2, 3]])
    assert laws.step[1] == 0
    for rows in (slice(1, 3), slice(3, 4), slice(2, 2)):
        assert torch.equal(file.rows(rows).logp, laws.logp[rows])


def test_the_second_half_of_a_window_is_scored_from_the_token_after_its_middle(path):
    x = LlamaCppFile.open(path).strings()
    # Positions 2 and 3 of five predict the tokens at 3 and 4.
    assert [x.context(i).tolist() for i in range(2)] == [[0, 1, 2], [2, 2, 1]]
    assert [x.completion(i).tolist() for i in range(2)] == [[1, 0], [0, 1]]
    assert x.predictors()[1].tolist() == [2, 3, 2, 3]
    assert x.cluster.tolist() == [0, 1]
    begun = LlamaCppFile.open(path).strings(first=1)
    assert [begun.context(i).tolist() for i in range(2)] == [[1, 1, 2], [1, 2, 1]]
    assert LlamaCppFile.open(path).tokens.tolist() == WINDOWS
    assert [scored_tokens(n) for n in (3, 4, 5, 512)] == [1, 1, 2, 255]
    assert [record_width(v) for v in (1, 2, 3)] == [6, 6, 8]


@pytest.mark.parametrize("size", [2, 7, 100])
def test_the_writer_agrees_with_the_description(size):
    draws = numpy_stream(size, "logits").normal(0, 6, (40, size))
    draws[0, 1:] = -np.inf
    draws[1] = 2.5
    ours = records_of(torch.tensor(draws))
    for mine, z in zip(ours, draws, strict=True):
        theirs = record(z)
        head, (step, lowest) = mine[:4].tobytes(), struct.unpack("<2f", theirs[:8])
        assert struct.unpack("<2f", head) == pytest.approx((step, lowest), rel=3e-7, abs=1e-12)
        assert mine[4:].tobytes() == theirs[8:]


def test_a_model_is_written_as_its_laws_are(tmp_path):
    model = ngram(["abacab", "caba"], 2, smoothing=0.5)
    windows = torch.tensor([[0, 1, 0, 2], [2, 0, 1, 0], [0, 0, 1, 0]])
    write_llamacpp(tmp_path / "ours", model, windows, batch_size=2)
    file = LlamaCppFile.open(tmp_path / "ours")
    x = file.strings()
    truth = model.readout(model.encode(x))
    assert (file.rows(slice(0, 3)).logp - truth).abs().max() < 2e-5
    theirs = by_hand(tmp_path / "theirs", windows.tolist(), truth.float().tolist())
    assert (tmp_path / "ours").read_bytes()[:68] == theirs.read_bytes()[:68]
    assert len((tmp_path / "ours").read_bytes()) == len(theirs.read_bytes())
    write_llamacpp(tmp_path / "begun", model, windows, first=0)
    assert torch.equal(LlamaCppFile.open(tmp_path / "begun").tokens, windows)


@pytest.mark.parametrize(
    ("windows", "what"),
    [
        (torch.ones(1, 2, dtype=torch.long), "at least 3 tokens"),
        (torch.ones(0, 4, dtype=torch.long), "at least one window"),
        (torch.full((1, 4), 2), "ids in 0..1"),
    ],
)
def test_the_writer_refuses_what_cannot_be_scored(windows, what, tmp_path):
    with pytest.raises(ValueError, match=what):
        write_llamacpp(tmp_path / "base", coin(end=0.5), windows)
    assert not list(tmp_path.iterdir())


def test_the_writer_refuses_rows_without_a_law():
    for row in ([math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]):
        with pytest.raises(ValueError, match="finite or -inf"):
            records_of(torch.tensor([row]))


def header(window=5, size=3, windows=2):
    return struct.pack("<8s3i", b"_logits_", window, size, windows)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda b: b"", "to begin with b'_logits_', got b''"),
        (lambda b: b"GGUF" + b[4:], "to begin with b'_logits_', got b'GGUFits_'"),
        (lambda b: b[:14], "a header of 20 bytes"),
        (lambda b: header(window=2) + b[20:], "n_ctx=2"),
        (lambda b: header(window=-5) + b[20:], "n_ctx=-5"),
        (lambda b: header(size=0) + b[20:], "n_vocab=0"),
        (lambda b: header(windows=0) + b[20:], "n_chunk=0"),
        (lambda b: b[:40], "expected 10 ids of text in .*, got room for 5"),
        (lambda b: b[:-1], "expected 4 scored positions .2 windows. in .*, got 3 in its"),
        (lambda b: b[:60], "expected 4 scored positions .2 windows. in .*, got 0 in its"),
        (lambda b: header(size=5) + b[20:], "expected 4 scored positions"),
        (lambda b: b + b"\0\0", "by its header"),
        (lambda b: header(size=1) + b[20:], "by its header"),
        (lambda b: header(windows=2**31 - 1, window=2**31 - 1) + b[20:], "ids of text"),
        (lambda b: b[:20] + struct.pack("<i", 3) + b[24:], "expected ids in 0..2 in .*, got 0..3"),
        (lambda b: b[:20] + struct.pack("<i", -1) + b[24:], "expected ids in 0..2 in .*, got -1..2"),
    ],
)
def test_a_broken_file_is_refused(path, change, what):
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CacheError, match=what):
        LlamaCppFile.open(path)


def test_a_file_that_is_not_there_or_is_a_folder(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(CacheError, match="--kl-divergence-base"):
            LlamaCppFile.open(path)


@pytest.mark.parametrize("head", [(math.nan, -1.0), (-1e-4, -1.0), (1e-3, -1.0), (1e-4, 0.5), (1e-4, -math.inf)])
def test_a_damaged_record_is_named(path, head):
    content = bytearray(path.read_bytes())
    begin = 20 + 4 * 10 + 2 * 2 * record_width(3)
    content[begin : begin + 8] = struct.pack("<2f", *head)
    path.write_bytes(bytes(content))
    file = LlamaCppFile.open(path)
    assert len(file.rows(slice(0, 2)).logp) == 2
    with pytest.raises(CacheError, match="at position 2;"):
        file.rows(slice(1, 4))


def test_vocabularies_that_cannot_be_the_files(path):
    file = LlamaCppFile.open(path)
    file.require_vocabulary(Vocabulary(("a", "b", "c"), (0,)), "q")
    file.require_vocabulary(Vocabulary(("a", "b", "c", None), (0,)), "q")
    with pytest.raises(VocabularyMismatch, match=r"over the 3 ids of base\.dat, got q with 2"):
        file.require_vocabulary(Vocabulary(("a", "b"), (0,)), "q")
    with pytest.raises(VocabularyMismatch, match="'d' beyond those of the file"):
        file.require_vocabulary(Vocabulary(("a", "b", "c", "d"), (0,)), "q")
    with pytest.raises(VocabularyMismatch, match="does not define, such as 2"):
        file.require_vocabulary(Vocabulary(("a", "b", None), (0,)), "q")
