"""Steps on a packaged model: they learn, repeat themselves, leave the given model alone, and stop in time."""

import pytest
import torch
from tests.tiny import folder

from klkit.models.base import VocabularyMismatch
from klkit.models.spec import load
from klkit.train.evaluate import evaluate
from klkit.train.policy import full_policy, lora_policy
from klkit.train.recipe import Recipe
from klkit.train.rewards import grammar_reward
from klkit.train.rl import TrainingStopped, start, step, step_prompts

PROMPTS = ["the plot was", "i thought", "the acting felt", "for me the music"]


@pytest.fixture(scope="module")
def model():
    return load("klkit:reviews")


def weights(model):
    return torch.cat([w.detach().reshape(-1) for w in model.model.parameters()])


def recipe(**options):
    return Recipe(**{"prompts": 8, "max_tokens": 24, "learning_rate": 2e-3, "coefficient": 0.5, **options})


def test_a_few_steps_raise_the_reward_and_the_given_model_stays(model):
    before = weights(model)
    state = start(model, PROMPTS, grammar_reward, recipe())
    first = evaluate(state.policy, PROMPTS, grammar_reward, samples=16, max_tokens=24)
    assert 0 <= first.kl.value < 1e-9
    for _ in range(12):
        state, metrics = step(state)
    last = evaluate(state.policy, PROMPTS, grammar_reward, samples=16, max_tokens=24, step=state.step)
    assert last.reward > first.reward + 1
    assert last.kl.method == "rb_cv"
    assert last.kl.value > 0.3
    assert metrics.step == state.step == 12
    assert torch.equal(weights(model), before)
    assert not torch.equal(weights(state.policy.model), before)


def test_the_first_step_is_at_the_reference(model):
    _, metrics = step(start(model, PROMPTS, grammar_reward, recipe(max_tokens=8)))
    assert metrics.kl == metrics.kl_mc == 0.0
    assert metrics.effective == 1.0


def test_runs_repeat_by_their_seed(model):
    def run(**options):
        state = start(model, PROMPTS, grammar_reward, recipe(max_tokens=8, **options))
        for _ in range(2):
            state, _ = step(state)
        return weights(state.policy.model)

    assert torch.equal(run(), run())
    assert not torch.equal(run(), run(seed=1))
    assert torch.allclose(run(), run(micro_batch=4), atol=3e-3)  # Adam's first steps are as long as the rate


@pytest.mark.parametrize("penalty", ["rb", "k3_loss"])
def test_several_updates_a_batch_move_away_from_the_sampler(model, penalty):
    state = start(model, PROMPTS, grammar_reward, recipe(max_tokens=8, updates=3, penalty=penalty, cap=5.0))
    state, metrics = step(state)
    assert 0 < metrics.effective < 1
    assert metrics.kl == 0.0  # measured before the first update


def test_the_coefficient_is_steered_to_its_target(model):
    state = start(model, PROMPTS, grammar_reward, recipe(max_tokens=8, target_kl=1e-3))
    state, _ = step(state)
    assert state.coefficient == pytest.approx(0.5 * 0.98)  # no divergence yet: cheaper, by a tenth of a fifth
    state, metrics = step(state)
    assert metrics.kl > 2e-3
    assert state.coefficient == pytest.approx(0.5 * 0.98 * 1.02)


def test_a_divergence_beyond_its_bound_stops_the_run_before_the_weights_change(model):
    state = start(model, PROMPTS, grammar_reward, recipe(max_tokens=8, max_kl=1e-4, learning_rate=1e-2))
    state, _ = step(state)
    before = weights(state.policy.model)
    with pytest.raises(TrainingStopped, match=r"expected a mean KL of at most 0\.0001 nats per response, got"):
        step(state)
    assert torch.equal(weights(state.policy.model), before)


def test_a_gradient_that_is_no_number_stops_the_run_before_the_weights_change(model):
    def boundless(prompts, responses):
        return [1e300 * len(text) for text in responses]

    state = start(model, PROMPTS, boundless, recipe(max_tokens=8))
    before = weights(state.policy.model)
    with pytest.raises(TrainingStopped, match="expected a finite gradient"):
        step(state)
    assert torch.equal(weights(state.policy.model), before)


def test_weights_that_are_no_numbers_stop_the_run(model, monkeypatch):
    state = start(model, PROMPTS, grammar_reward, recipe(max_tokens=8))
    # As if they had become so between the draw and the update: the sampler itself refuses such a model.
    monkeypatch.setattr("klkit.train.rl.form_gradients", lambda *_, **__: (_ for _ in ()).throw(ValueError("a NaN")))
    with pytest.raises(TrainingStopped, match="expected finite numbers in step 1, got: a NaN"):
        step(state)


def test_every_prompt_comes_once_a_pass():
    seen = [i for t in range(5) for i in step_prompts(10, t, Recipe(prompts=4, samples=3))]
    assert len(seen) == 60
    for start_, stop in ((0, 30), (30, 60)):
        assert sorted(seen[start_:stop:3]) == list(range(10))


def test_prompts_without_room_for_a_completion_are_named(model):
    long = " ".join(["the plot was superb and"] * 30)
    with pytest.raises(ValueError, match=r"expected prompts that leave room for 8 tokens in the 128 .* 1 that do not"):
        start(model, [*PROMPTS, " ".join(["plot"] * 125)], grammar_reward, recipe(max_tokens=8))
    with pytest.raises(ValueError, match="expected a prompt of at most 128 tokens"):
        start(model, [*PROMPTS, long], grammar_reward, recipe(max_tokens=8))
    with pytest.raises(ValueError, match="expected at least one prompt"):
        start(model, [], grammar_reward)


def test_a_reference_with_another_vocabulary_is_refused(model):
    with pytest.raises(VocabularyMismatch, match="expected a reference with the policy's vocabulary, got other tokens"):
        full_policy(model, load(str(folder("gpt2"))))
    other_ends = load("klkit:reviews", ends=[0, 5])
    with pytest.raises(VocabularyMismatch, match="got other end tokens"):
        full_policy(model, other_ends)


def test_lora_on_the_head_is_refused():
    with pytest.raises(ValueError, match="expected LoRA on layers below the output head"):
        lora_policy(load(str(folder("llama"))), 2, layers=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"expected layers of .* that an adapter fits on, got"):
        lora_policy(load(str(folder("llama"))), 2, layers=["no_such_layer"])
    with pytest.raises(ValueError, match="expected a LoRA rank of at least 1"):
        lora_policy(load(str(folder("llama"))), 0)


def test_policies_that_cannot_be_trained_whole_are_refused():
    with pytest.raises(ValueError, match="expected weights in float32 to train all of them, got torch"):
        full_policy(load("klkit:reviews", dtype="bfloat16"))
    with pytest.raises(ValueError, match="expected a model without an adapter to train"):
        full_policy(load("klkit:docs-lora"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": "k4"}, "expected a KL penalty among rb, mc"),
        ({"samples": 1}, "samples of at least 2"),
        ({"coefficient": -1.0}, "a coefficient of 0 or more"),
        ({"coefficient": float("nan")}, "a coefficient of 0 or more"),
        ({"learning_rate": 0.0}, "a positive learning_rate"),
        ({"gamma": 1.5}, "a discount gamma from 0 to 1"),
        ({"gamma": 0.5, "penalty": "k1_reward"}, "expected gamma with one of rb, mc, hybrid"),
        ({"mc_share": 0.5, "penalty": "mc"}, "expected mc_share with rb only"),
        ({"micro_batch": 3}, "a multiple of 2 samples, got 3; 4 would do"),
        ({"updates": 0}, "expected updates of at least 1"),
    ],
)
def test_recipes_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)
