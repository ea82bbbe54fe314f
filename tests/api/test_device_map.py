"""Models spread over devices by accelerate, here over memory and disk: the same numbers, in one process only."""

import pytest

pytest.importorskip("accelerate", reason="accelerate, which peft and trl bring, is not installed")

from transformers import AutoModelForCausalLM

import klkit
from klkit.api.prepare import load_models
from klkit.api.settings import Settings
from klkit.models.checkpoints import quiet
from klkit.models.hf import HuggingFaceModel
from klkit.models.spec import load, locate
from klkit.train.processes import Processes

PAIR = ("klkit:docs-tuned", "klkit:docs")
SMALL = {"samples": 20, "max_tokens": 6}
PARTS = ("transformer.wte", "transformer.wpe", "transformer.drop", "transformer.ln_f", "lm_head")
LAYERS = tuple(f"transformer.h.{i}" for i in range(4))


def test_a_placed_model_gives_the_same_result():
    plain = klkit.estimate(*PAIR, **SMALL)
    placed = klkit.estimate(f"{PAIR[0]},device_map=auto", f"{PAIR[1]},device_map=cpu", **SMALL)
    assert placed.headline.value == plain.headline.value


@pytest.mark.parametrize("disk", [LAYERS[2:], (*PARTS, *LAYERS[1:])])
def test_weights_that_lie_on_disk_are_fetched(disk, tmp_path):
    places = {part: "disk" if part in disk else "cpu" for part in (*PARTS, *LAYERS)}
    own, q = load(PAIR[0]), load(PAIR[1])
    with quiet():
        network = AutoModelForCausalLM.from_pretrained(
            locate(PAIR[0]), device_map=places, offload_folder=tmp_path, dtype="float32"
        )
    p = HuggingFaceModel(network, own.tokenizer, name="placed")
    assert any(weight.is_meta for weight in p.model.parameters())
    assert p.width == own.width  # still cut in front of the head
    placed, plain = klkit.estimate(p, q, **SMALL), klkit.estimate(own, q, **SMALL)
    assert placed.headline.value == pytest.approx(plain.headline.value, rel=1e-6)


def test_one_of_several_processes_does_not_spread_a_model_over_the_devices_of_all():
    settings = Settings(p=PAIR[0], q=f"{PAIR[1]},device_map=auto")
    with pytest.raises(ValueError, match="run one process"):
        load_models(settings, Processes(1, 2))
