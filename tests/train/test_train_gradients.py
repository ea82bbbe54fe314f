"""The same gradients whichever way they are formed, and a reference that costs no weights of its own."""

import pytest
import torch
from tests.tiny import folder

from klkit.models.spec import load
from klkit.sampling.ancestral import sample
from klkit.train import gradients
from klkit.train.gradients import Sums, form_gradients, read_part
from klkit.train.penalties import PENALTIES
from klkit.train.policy import Decisions, full_policy, lora_policy
from klkit.train.recipe import Recipe


@pytest.fixture(scope="module")
def policy():
    made = full_policy(load(str(folder("gpt2")), dtype="float64"), load(str(folder("gpt2", seed=1)), dtype="float64"))
    with torch.no_grad():
        made.model.model.transformer.h[0].mlp.c_fc.weight.add_(0.01)
    return made


def strings(policy, prompts=("the film", "a dull"), each=2):
    from dataclasses import replace

    contexts = [policy.model.context(text) for text in prompts for _ in range(each)]
    names = [i for i in range(len(prompts)) for _ in range(each)]
    draw = sample(policy.model, contexts, max_tokens=7, seed=5, prompt=names)
    return replace(draw.sequences, sampler_logp=draw.logp + 0.1 * draw.logp.sin())  # an older policy, nearly


def collected(policy):
    found = torch.cat([w.grad.reshape(-1) for _, w in policy.parameters if w.grad is not None])
    policy.model.model.zero_grad()
    return found


REWARDS = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("penalty", list(PENALTIES))
def test_chunked_heads_and_whole_logits_agree(policy, penalty, off_policy, monkeypatch):
    part = read_part(policy, strings(policy), REWARDS)
    recipe = Recipe(penalty=penalty)
    sums = form_gradients(policy, part, recipe, 0.7, off_policy=off_policy)
    whole = collected(policy)
    monkeypatch.setattr(gradients, "DIRECT_BYTES", 0)
    again = form_gradients(policy, part, recipe, 0.7, off_policy=off_policy)
    assert torch.allclose(collected(policy), whole, rtol=0, atol=1e-10 * float(whole.abs().max()))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(fields(sums), fields(again), strict=True))


def fields(sums):
    return sums.kl, sums.log_ratio, sums.logp


def test_parts_of_a_batch_add_up_to_it(policy):
    x, recipe = strings(policy), Recipe()
    form_gradients(policy, read_part(policy, x, REWARDS), recipe, 0.7)
    whole = collected(policy)
    sums = [
        form_gradients(policy, read_part(policy, x.select(rows), REWARDS[rows]), recipe, 0.7, share=0.5)
        for rows in (torch.tensor([0, 1]), torch.tensor([2, 3]))
    ]
    assert torch.allclose(collected(policy), whole, rtol=0, atol=1e-12 * float(whole.abs().max()) + 1e-14)
    assert len(Sums.cat(sums).kl) == 4


def test_decisions_are_predicted_by_the_column_before(policy):
    x = strings(policy, prompts=("the film was", "a"))
    found = Decisions.of(x)
    assert torch.equal(found.tokens[found.mask], x.targets())
    _, column = x.predictors()
    assert torch.equal(found.column[found.mask], column)
    assert torch.allclose(found.hidden(policy.model)[found.mask], policy.model.encode(x))


def test_a_model_without_a_head_to_hand_over_trains_on_its_logits(policy, monkeypatch):
    part = read_part(policy, strings(policy), REWARDS)
    form_gradients(policy, part, Recipe(), 0.7)
    wanted = collected(policy)
    # Keep the networks whole: what they hand over are then logits.
    for model in (policy.model, policy.reference):
        monkeypatch.setattr(model._network, "_head", None)
    form_gradients(policy, read_part(policy, strings(policy), REWARDS), Recipe(), 0.7)
    found = collected(policy)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-10 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "cohere"])
def test_lora_starts_at_its_reference_and_leaves_the_base_alone(kind):
    model = load(str(folder(kind)))
    made = lora_policy(model, 2, seed=1)
    x = strings(made)
    part = read_part(made, x, REWARDS)
    sums = form_gradients(made, part, Recipe(), 0.7)
    assert sums.kl.tolist() == [0.0] * 4  # one set of weights, the same kernels: not a rounding apart
    names = {name for name, w in made.model.model.named_parameters() if w.grad is not None}
    assert names
    assert all("lora_" in name for name in names)
    assert {name for name, _ in made.parameters} >= names
    assert not any("lora" in name for name, _ in model.model.named_parameters())


def test_lora_gradients_are_those_of_a_policy_of_its_own():
    made = lora_policy(load(str(folder("gpt2")), dtype="float64"), 2, seed=1)
    with torch.no_grad():
        for name, weight in made.parameters:
            if "lora_B" in name:
                weight.fill_(0.02)
    x = strings(made)
    form_gradients(made, read_part(made, x, REWARDS), Recipe(), 0.7)
    shared = collected(made)
    apart = type(made)(made.model, made.adapter, reference=load(str(folder("gpt2")), dtype="float64"))
    form_gradients(apart, read_part(apart, x, REWARDS), Recipe(), 0.7)
    assert torch.allclose(collected(apart), shared, rtol=1e-9, atol=1e-12)
    assert float(shared.abs().max()) > 0
