"""The monitor measures what klkit estimate measures, and training goes on as if it had not."""

import pytest
import torch

trl = pytest.importorskip("trl", reason="TRL is not installed: make test-trl installs it and runs this")

from datasets import Dataset
from peft import get_peft_model
from tests.integrations.test_trl import build, disturb, lora, network, tokenizer
from transformers import Trainer, TrainingArguments

import klkit
from klkit.api.verbs import estimate
from klkit.integrations.trl import KLMonitorCallback
from klkit.models.hf import HuggingFaceModel

FEW = {"max_tokens": 8, "samples": 4, "seed": 3}
HELD_OUT = list(klkit.read_prompts("klkit:reviews").contents)[:24]


def logged(trainer, name="kl_monitor"):
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}


@pytest.mark.parametrize("adapted", [False, True])
def test_it_measures_before_during_and_changes_nothing(adapted, tmp_path):
    options = {"max_steps": 4, "learning_rate": 0.02 if adapted else 5e-3}
    options |= {"peft_config": lora(lora_dropout=0.2)} if adapted else {}
    torch.manual_seed(0)
    plain = build("rloo", tmp_path, **options)
    plain.train()
    torch.manual_seed(0)
    watched = build("rloo", tmp_path, **options)
    monitor = KLMonitorCallback(watched, HELD_OUT, every=2, **FEW)
    watched.add_callback(monitor)
    watched.train()
    for (name, a), b in zip(plain.model.named_parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.requires_grad == b.requires_grad, name
    assert [m.step for m in monitor.history] == [0, 2, 4]
    found = logged(watched)
    assert found[0] == pytest.approx(0.0, abs=1e-9)
    assert list(found) == [0, 2, 4]
    # The same as of the finished model, loaded by itself.
    model = watched.model.merge_and_unload() if adapted else watched.model
    wanted = estimate(
        HuggingFaceModel(model.eval(), tokenizer()), klkit.load("klkit:reviews"), HELD_OUT, floor="none", **FEW
    ).headline
    assert wanted.method == "rb_cv"
    assert found[4] == pytest.approx(wanted.value, rel=1e-3)
    assert logged(watched, "kl_monitor/lower")[4] < found[4] < logged(watched, "kl_monitor/upper")[4]
    assert logged(watched, "kl_monitor/stderr")[4] == pytest.approx(wanted.stderr, rel=1e-3)
    steps = [entry for entry in watched.state.log_history if "reward" in entry]
    assert len(steps) == 4  # no metrics of TRL's were split or lost


def test_a_trained_adapter_is_compared_with_its_copy(tmp_path):
    trainer = build("grpo", tmp_path, model=get_peft_model(network(), lora()), max_steps=1)
    disturb(trainer)  # both were equal when the copy was made
    monitor = KLMonitorCallback(trainer, HELD_OUT, every=1, **FEW)
    trainer.add_callback(monitor)
    trainer.train()
    assert monitor.history[0].comparison.headline.value > 0
    assert trainer.model.active_adapter == "default"


def test_any_trainer_and_any_reference(tmp_path):
    ids = tokenizer()(["the film was a story of one more day"] * 4)["input_ids"]
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(network(), arguments, train_dataset=data, processing_class=tokenizer())
    with pytest.raises(ValueError, match="expected a reference"):
        KLMonitorCallback(trainer, HELD_OUT)
    with pytest.raises(ValueError, match="every=0"):
        KLMonitorCallback(trainer, HELD_OUT, every=0, reference="klkit:reviews")
    trainer.add_callback(KLMonitorCallback(trainer, "klkit:reviews", reference="klkit:reviews", max_tokens=6))
    trainer.train()
    assert logged(trainer) == {0: pytest.approx(0.0, abs=1e-9)}
