"""Whole runs: what they leave on disk, how they go on where they stopped, and what they keep when they fail."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from klkit.api.train import Training, split_prompts, train_rl
from klkit.models.spec import load, load_pair
from klkit.report.record import RunFolderError
from klkit.train.checkpoints import checkpoints
from klkit.train.recipe import Recipe
from klkit.train.rewards import grammar_reward
from klkit.train.rl import TrainingStopped

RECIPE = Recipe(prompts=4, max_tokens=10, learning_rate=2e-3, coefficient=0.2, target_kl=1.0)
REWARD = "klkit.train.rewards:grammar_reward"  # by its place: then no exact frontier is worked out for the figure
SMALL = Training("klkit:reviews", REWARD, "klkit:reviews", steps=6, every=3, samples=1, recipe=RECIPE)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(path):
    return [{k: v for k, v in line.items() if "seconds" not in k} for line in lines(path)]


@pytest.mark.parametrize("lora", [0, 2])
def test_a_run_goes_on_exactly_where_it_stopped(tmp_path, lora):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    training = replace(SMALL, lora=lora)
    train_rl(training, out=whole)
    train_rl(replace(training, steps=3), out=halves)
    # What a crash leaves: lines of steps whose checkpoint is missing, and a checkpoint half written.
    with (halves / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "reward": 1.0}\n{"step": 5, "rew')
    (halves / "checkpoints" / "step-000005.part").mkdir()
    train_rl(training, out=halves, resume=True)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert untimed(whole / name) == untimed(halves / name)
    one, two = (checkpoints(path / "checkpoints")[-1] for path in (whole, halves))
    assert one.name == two.name == "step-000006"
    names = [path.name for path in one.glob("*.safetensors")]
    assert len(names) == 2
    for name in names:
        a, b = load_file(one / name), load_file(two / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    assert json.loads((one / "training.json").read_text()) == json.loads((two / "training.json").read_text())


def test_the_folder_holds_a_model_in_common_format_and_all_numbers(tmp_path):
    trained = train_rl(SMALL, out=tmp_path / "run")
    found = {path.name for path in (tmp_path / "run").iterdir()}
    assert found == {"config.yaml", "env.json", "metrics.jsonl", "evaluations.jsonl", "checkpoints", "reward_kl.png"}
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["recipe"]["penalty"] == "rb"
    assert [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    evaluations = lines(tmp_path / "run" / "evaluations.jsonl")
    assert [(line["step"], line["method"]) for line in evaluations] == [(0, "rb_cv"), (3, "rb_cv"), (6, "rb_cv")]
    assert evaluations[0]["kl"] < 1e-9 < evaluations[1]["kl"] < evaluations[1]["kl_upper"]
    assert trained.checkpoint.name == "step-000006"
    again = load(str(trained.checkpoint))
    for a, b in zip(again.model.parameters(), trained.state.policy.model.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (tmp_path / "run" / "reward_kl.png").read_bytes().startswith(b"\x89PNG")


def test_an_adapter_s_checkpoint_is_a_specification_of_its_own(tmp_path):
    trained = train_rl(replace(SMALL, lora=2, steps=3), out=tmp_path / "run")
    p, q = load_pair(str(trained.checkpoint), "klkit:reviews")
    assert p.model is q.model  # one set of weights
    config = json.loads((trained.checkpoint / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "klkit:reviews"
    mine = trained.state.policy.model
    context = mine.context("the plot was")
    assert torch.allclose(p.readout(p.begin([context])[1]), mine.readout(mine.begin([context])[1]), atol=1e-6)


def test_other_settings_cannot_go_on_in_the_same_folder(tmp_path):
    train_rl(replace(SMALL, steps=1, every=1), out=tmp_path / "run")
    for changed, message in (
        (replace(SMALL, recipe=replace(RECIPE, coefficient=0.3)), "recipe.coefficient: 0.2 then, 0.3 now"),
        (replace(SMALL, reward="other:reward"), "reward: '.*grammar_reward' then, 'other:reward' now"),
    ):
        with pytest.raises(RunFolderError, match=message):
            train_rl(changed, reward=grammar_reward, out=tmp_path / "run", resume=True)
    with pytest.raises(RunFolderError, match="which holds a training run; add --resume to continue it"):
        train_rl(SMALL, out=tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(RunFolderError, match="which holds other files"):
        train_rl(SMALL, out=tmp_path / "other", resume=True)


def test_a_reward_that_fails_leaves_what_was_learnt(tmp_path):
    calls = []

    def failing(prompts, responses):
        calls.append(len(responses))
        if len(calls) == 4:  # one evaluation and two steps went well
            raise RuntimeError("the judge is out")
        return grammar_reward(prompts, responses)

    training = replace(SMALL, reward="mine:failing")
    with pytest.raises(ValueError, match="got RuntimeError: the judge is out"):
        train_rl(training, reward=failing, out=tmp_path / "run")
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000002"]
    train_rl(training, reward=grammar_reward, out=tmp_path / "run", resume=True)
    train_rl(SMALL, out=tmp_path / "whole")
    assert untimed(tmp_path / "run" / "metrics.jsonl") == untimed(tmp_path / "whole" / "metrics.jsonl")


def test_a_run_that_comes_apart_keeps_its_last_good_checkpoint(tmp_path):
    training = replace(
        SMALL, steps=20, every=1, recipe=replace(RECIPE, learning_rate=4e-3, max_kl=0.5, coefficient=0.0)
    )
    with pytest.raises(TrainingStopped, match=r"expected a (mean )?KL of at most 0.5 nats per response"):
        train_rl(training, out=tmp_path / "run")
    evaluations = lines(tmp_path / "run" / "evaluations.jsonl")
    kept = checkpoints(tmp_path / "run" / "checkpoints")
    assert int(kept[-1].name.removeprefix("step-")) == evaluations[-1]["step"] >= 1
    assert all(line["kl"] <= 0.5 for line in evaluations)
    assert (tmp_path / "run" / "reward_kl.png").stat().st_size > 0


def test_old_checkpoints_go(tmp_path):
    train_rl(replace(SMALL, steps=3, every=1, keep=2), out=tmp_path / "run")
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000002", "step-000003"]


def test_a_damaged_checkpoint_is_named(tmp_path):
    train_rl(replace(SMALL, steps=2, every=1), out=tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-000002" / "optimizer.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"expected a checkpoint of this run in .*step-000002, got"):
        train_rl(SMALL, out=tmp_path / "run", resume=True)


def test_held_out_prompts_are_not_trained_on():
    prompts = [f"prompt {i}" for i in range(100)]
    held_out, rest, _ = split_prompts(prompts, SMALL)
    assert (len(held_out), len(rest)) == (20, 80)
    assert not set(held_out) & set(rest)
    few, same, notes = split_prompts(prompts[:12], SMALL)
    assert few == same == prompts[:12]
    assert "too few to keep some apart" in notes[0]


def test_another_reference_is_held_to():
    training = replace(SMALL, policy="klkit:reviews-positive", reference="klkit:reviews", steps=1, samples=2)
    first = train_rl(training).evaluations[0]
    assert first["kl"] > 0.1
    with pytest.raises(ValueError, match="expected no reference with LoRA"):
        replace(training, lora=4)
