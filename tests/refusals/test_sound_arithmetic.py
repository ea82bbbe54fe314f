"""Logits that are no numbers, or are processed, or in half precision; and numbers too good to be true."""

import copy
import json
import math
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny import build, folder, tokenizer

import klkit
from klkit.estimators.statistics import score
from klkit.models.checkpoints import quiet
from klkit.models.hf import HuggingFaceModel
from klkit.numerics import log_softmax
from klkit.sequences import Sequences

FEW = {"samples": 8, "max_tokens": 6, "floor": "none"}
X = Sequences.pack([torch.tensor([5, 6]), torch.tensor([9])], [torch.tensor([11, 7, 0]), torch.tensor([8, 200, 0])])


def spoilt(value):
    """A model whose logits are no numbers any more once it has been checked: its vector of a token is ``value``."""
    model = HuggingFaceModel(build("gpt2", seed=1), tokenizer(), name="spoilt")
    model.model.transformer.wte.weight.data[7] = value
    return model


def question(result):
    check = result.audit["checks"]["no_difference_share"]
    assert check["verdict"] == "warn"
    return check["advice"]


# Logits that are not numbers


def test_nan_weights_are_refused_when_the_model_is_loaded(run, tmp_path):
    network = build("gpt2")
    network.transformer.ln_f.weight.data[3] = torch.nan
    network.save_pretrained("broken")
    tokenizer().save_pretrained("broken")
    before = set(tmp_path.iterdir())
    code, out, err = run("estimate", str(folder("gpt2")), "./broken")
    assert (code, out) == (2, "")
    assert "got NaN" in err
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_come_apart_later_are_refused_on_either_side(value):
    p, q = HuggingFaceModel(build("gpt2"), tokenizer(), name="p"), spoilt(value)
    with pytest.raises(ValueError, match=r"rows? 0 of \d+ of q is not .* load the model with dtype=float32"):
        klkit.estimate(p, q, **FEW)
    with pytest.raises(
        ValueError, match=r"expected logits that are finite or -inf.* load the model with dtype=float32"
    ):
        klkit.estimate(q, p, **FEW)


def test_an_overflow_in_half_precision_is_refused_with_the_remedy():
    logits = torch.tensor([[7e4, 0.0]]).half()
    assert logits.isinf().any()
    with pytest.raises(ValueError, match="overflow in half precision: load the model with dtype=float32"):
        log_softmax(logits)


# Half precision is a storage format


def test_half_precision_logits_are_normalised_in_single():
    # The value is that of exact arithmetic on what the bf16 networks put out, not of a bf16 softmax.
    p, q = (HuggingFaceModel(build("llama", seed=seed).bfloat16(), tokenizer(), name=str(seed)) for seed in range(2))
    laws = [torch.log_softmax(m.encode(X).double() @ m.model.lm_head.weight.double().T, -1) for m in (p, q)]
    wanted = (laws[0].exp() * (laws[0] - laws[1])).sum(-1)
    found = score(p, q, X).rows.kl
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), wanted, rtol=1e-4)
    coarse = [law.bfloat16() for law in laws]
    rounded = (coarse[0].exp() * (coarse[0] - coarse[1])).sum(-1).double()
    assert not torch.allclose(rounded, wanted, rtol=1e-4)  # else this test could not fail


# Raw logits, whatever generation is set to


def test_settings_of_generation_do_not_change_the_number(tmp_path):
    plain, other = str(folder("gpt2")), str(folder("gpt2", seed=1))
    processed = shutil.copytree(plain, tmp_path / "processed")
    path = processed / "generation_config.json"
    settings = json.loads(path.read_text())
    settings |= {"do_sample": True, "top_k": 3, "top_p": 0.5, "temperature": 0.3, "repetition_penalty": 2.0}
    settings |= {"suppress_tokens": [5, 6, 7], "forced_eos_token_id": 0, "min_new_tokens": 4}
    path.write_text(json.dumps(settings))
    results = [klkit.estimate(spec, other, **FEW).headline for spec in (plain, str(processed))]
    assert results[0].value == results[1].value
    assert math.isfinite(results[1].value)


# Exactly zero everywhere is questioned, with what is known of the reason


def test_the_same_weights_under_two_names_are_called_that(tmp_path):
    again = shutil.copytree(folder("gpt2"), tmp_path / "again")
    result = klkit.estimate(str(folder("gpt2")), str(again), **FEW)
    assert abs(result.headline.value) < 1e-9
    assert question(result).startswith(
        "No decision differs by more than rounding. Both sides have the same weights, value for value (digest "
    )
    assert "this compares one model under two names; look at the paths and options of both" in question(result)


def test_an_adapter_that_changes_nothing_is_called_that(tmp_path):
    base = str(folder("gpt2"))
    with quiet():  # as initialised: B is zero
        wrapped = get_peft_model(build("gpt2"), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
        wrapped.save_pretrained(tmp_path)
    result = klkit.estimate(base, f"{base},peft={tmp_path}", **FEW)
    assert abs(result.headline.value) < 1e-9
    assert "The adapter of q changes nothing: its B matrices are all zero, as LoRA initialises them" in question(result)
    assert "was it saved before it was trained?" in question(result)


def test_weights_that_differ_where_nothing_reads_them_are_called_that():
    network = build("gpt2")
    other = copy.deepcopy(network)
    other.transformer.wpe.weight.data[-1] += 1  # a position that no string reaches
    models = (HuggingFaceModel(m, tokenizer(), name=name) for m, name in ((network, "p"), (other, "q")))
    assert "what differs takes no part in these predictions" in question(klkit.estimate(*models, **FEW))


def test_a_model_with_itself_by_name_is_no_surprise():
    base = str(folder("gpt2"))
    check = klkit.estimate(base, base, **FEW).audit["checks"]["no_difference_share"]
    assert (check["verdict"], check["advice"]) == ("pass", "The two sides are said to be one model.")
