"""The recipes: the same seed gives the same weights, bases come first, and rounding is to the nearest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from klkit.zoo import corpus
from klkit.zoo.build import build, rounded
from klkit.zoo.catalogue import CATALOGUE
from klkit.zoo.tokenizer import train as train_tokenizer
from klkit.zoo.training import Example, batches, fresh, loss, mean_loss, train


def test_same_seed_same_checkpoint(tmp_path: Path) -> None:
    first = build(tmp_path / "a", ["reviews-positive"], effort=0.002)
    torch.rand(3)  # the global generator plays no part
    second = build(tmp_path / "b", ["reviews-positive"], effort=0.002)
    assert [folder.name for folder in first] == ["reviews", "reviews-positive"]
    for a, b in zip(first, second, strict=True):
        for file in a.iterdir():
            assert file.read_bytes() == (b / file.name).read_bytes(), file
    assert CATALOGUE["reviews"].parameters == AutoModelForCausalLM.from_pretrained(first[0]).num_parameters()
    assert AutoTokenizer.from_pretrained(first[0]).chat_template
    tuned, base = (load_file(folder / "model.safetensors")["transformer.wte.weight"] for folder in reversed(first))
    assert not torch.equal(tuned, base)


def test_building_leaves_global_randomness_alone() -> None:
    state = torch.get_rng_state()
    fresh(300, width=8, layers=1, window=16, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_other_seed_other_weights() -> None:
    a, b, c = (fresh(300, width=8, layers=1, window=16, seed=s).transformer.wte.weight for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got gpt5"):
        build(tmp_path, ["gpt5"])


def test_training_learns_what_stands_after_the_start() -> None:
    model = fresh(40, width=16, layers=1, window=16, seed=0)
    examples = [Example((0, 7, 7, a, a, 0), start=3) for a in range(1, 30)]
    before = mean_loss(model, examples)
    train(model, examples, steps=150, rate=2e-2, seed=0, tokens=64)
    # The first learnt token is one of 29 at random, the other two are determined: log(29) / 3 at best.
    assert before > 3.6
    assert 1.1 < mean_loss(model, examples) < 1.4


def test_padding_does_not_change_the_loss() -> None:
    model = fresh(40, width=16, layers=1, window=16, seed=0)
    short, long = Example((0, 3, 0)), Example((0, 5, 6, 7, 8, 9, 0))
    together = loss(model, [short, long])
    assert torch.allclose(together, (2 * loss(model, [short]) + 6 * loss(model, [long])) / 8)


def test_batches_pass_over_all_examples() -> None:
    examples = [Example((0, *range(1, 1 + i % 7), 0)) for i in range(50)]
    supply, seen = batches(examples, 32, torch.Generator()), []
    while len(seen) < 50:
        batch = next(supply)
        assert len(batch) == 1 or len(batch) * max(len(e.ids) for e in batch) <= 32
        seen += batch
    assert sorted(e.ids for e in seen) == sorted(e.ids for e in examples)


@settings(deadline=None)
@given(st.lists(st.integers(-4000, 4000).map(lambda i: i / 1000), min_size=1, max_size=8), st.sampled_from([2, 4, 8]))
def test_rounding_is_to_the_nearest_grid_point(values: list[float], bits: int) -> None:
    weight = torch.tensor([values, [0.0] * len(values)])
    grid = rounded(weight, bits, dim=0)
    step = weight[0].abs().max() / (2 ** (bits - 1) - 1)
    assert float((grid[0] - weight[0]).abs().max()) <= float(step) / 2 * (1 + 1e-5)
    assert len(grid[0].unique()) <= 2**bits - 1
    assert bool((grid[1] == 0).all())


def test_tokenizer_refuses_to_leave_bytes_out() -> None:
    with pytest.raises(ValueError, match="256 bytes"):
        train_tokenizer(["a"], 100, window=8)


def test_corpus_is_prose() -> None:
    texts = [text for topic in corpus.paragraphs().values() for text in topic]
    assert len(texts) == len(set(texts)) > 500
    assert all(text[-1] in ".:" and "\n" not in text and "::=" not in text for text in texts)
    training, held = corpus.split(texts)
    assert set(training).isdisjoint(held)
    assert 0.02 < len(held) / len(texts) < 0.09
