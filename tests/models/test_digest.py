"""A digest of weights: every value counts, whatever its type, and where it is held does not."""

import pytest
import torch
from tests.tiny import build, tokenizer

from klkit.models import digest
from klkit.models.digest import weights_digest
from klkit.models.hf import HuggingFaceModel

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn]


def values(seed=0):
    return torch.randn(320, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", TYPES)
def test_every_value_of_every_type_counts(dtype):
    weight = (100 * values()).to(dtype)
    own = weights_digest({"w": weight})
    assert own == weights_digest({"w": weight.clone()})
    for row, column in ((0, 0), (1, 3), (160, 31), (319, 31)):
        other = weight.clone()
        other[row, column] = 0 if weight[row, column].item() else 1
        assert weights_digest({"w": other}) != own


def test_order_sign_name_shape_and_type_count():
    weight = values()
    others = [
        {"w": weight.flip(0)},
        {"w": -weight},
        {"w": weight.t()},
        {"w": weight.reshape(32, 320)},
        {"w": weight.view(torch.int32)},
        {"v": weight},
        {"w": weight, "v": weight},
        {"w": weight[:160], "x": weight[160:]},
        {},
    ]
    found = [weights_digest(state) for state in [{"w": weight}, *others]]
    assert len(set(found)) == len(found)


def test_layout_order_and_sharing_do_not_count(monkeypatch):
    weight, other = values(), values(1)
    own = weights_digest({"a": weight, "b": other, "c": weight})
    assert weights_digest({"c": weight.clone(), "b": other.t().contiguous().t(), "a": weight.clone()}) == own
    monkeypatch.setattr(digest.os, "cpu_count", lambda: 1)
    assert weights_digest({"a": weight, "b": other, "c": weight}) == own


def test_a_shared_tensor_is_read_once(monkeypatch):
    read = []
    right = digest._hashed
    monkeypatch.setattr(digest, "_hashed", lambda part: read.append(part.numel()) or right(part))
    weight = values()
    weights_digest({"a": weight, "b": weight, "c": weight[:4]})
    assert sorted(read) == [4 * 4 * 32, 4 * 320 * 32]


def test_large_tensors_are_read_in_parts(monkeypatch):
    monkeypatch.setattr(digest, "CHUNK", 1000)
    weight = values()
    changed = weight.clone()
    changed[200, 7] += 1e-6
    assert weights_digest({"w": weight}) != weights_digest({"w": changed})


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_out_of_the_ordinary_have_a_digest():
    weight = values()

    def unusual(w):
        return [
            torch.quantize_per_tensor(w, 0.01, 0, torch.qint8),
            torch.quantize_per_channel(w, torch.full((320,), 0.01), torch.zeros(320), 0, torch.qint8),
            w.to_sparse(),
            torch.nn.Parameter(w),
            w[0, 0],
        ]

    for one, other in zip(unusual(weight), unusual(weight + 0.5), strict=True):
        assert weights_digest({"w": one}) == weights_digest({"w": one})
        assert weights_digest({"w": one}) != weights_digest({"w": other})
    empty = [torch.empty(3, 2, device="meta"), torch.empty(2, 3, device="meta"), torch.zeros(0, 3), {"state": 1}]
    assert len({weights_digest({"w": value}) for value in empty}) == 4


def test_a_model_s_digest_sees_rows_that_a_few_samples_would_miss():
    model, other = (HuggingFaceModel(build("llama"), tokenizer(), name="llama") for _ in range(2))
    assert model.digest == other.digest
    changed = HuggingFaceModel(build("llama"), tokenizer(), name="llama")
    with torch.no_grad():
        changed.model.get_input_embeddings().weight[1:5] += 0.1 * torch.randn(4, 32)
    assert changed.digest != model.digest
