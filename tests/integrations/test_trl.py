"""TRL's trainers with the divergence in them: the same numbers and gradients as on logits, in real training."""

from functools import cache

import pytest
import torch

trl = pytest.importorskip("trl", reason="TRL is not installed: make test-trl installs it and runs this")

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from klkit import rng
from klkit.divergences.differentiable import divergences
from klkit.integrations.trl import GRPOTrainer, KLTerm, RLOOTrainer
from klkit.integrations.trl.mixin import GROUP, HIDDEN, SAMPLER
from klkit.integrations.trl.seam import attach
from klkit.integrations.trl.term import averaging
from klkit.objectives.policy import kl_surrogate
from klkit.zoo.catalogue import path

TRAINERS = {"grpo": (GRPOTrainer, trl.GRPOConfig), "rloo": (RLOOTrainer, trl.RLOOConfig)}
PROMPTS = ["the film was", "a story", "the actors", "one more"] * 4
LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "vespo", "luspo", "sapo"]


def reward(completions, **kwargs):
    return [float(len(set(c))) for c in completions]


@cache
def tokenizer():
    return AutoTokenizer.from_pretrained(path("reviews"))


def network(name="reviews", **options):
    return AutoModelForCausalLM.from_pretrained(path(name), **options)


def lora(**options):
    return LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True, **options)


def build(kind, folder, *, model=None, kl=None, **options):
    """A trainer on the packaged reviews; ``options`` of its configuration, and of the trainer where they are known."""
    known = ("peft_config", "eval_dataset", "callbacks")
    own = {name: options.pop(name) for name in known if name in options}
    settings = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 10,
        "beta": 0.3,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        **options,
    }
    trainer_class, config = TRAINERS[kind]
    trainer = trainer_class(
        model or network(),
        reward,
        args=config(output_dir=str(folder), **settings),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer(),
        kl=kl,
        **own,
    )
    trainer.current_gradient_accumulation_steps = 1  # which training sets
    return trainer


def disturb(trainer, scale=0.02):
    """Move what is trained away from where it starts."""
    generator = rng.stream(0, "trl tests")
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)


def batch_of(trainer, rows=8):
    trainer.model.train()
    return trainer._generate_and_score_completions([{"prompt": p} for p in sorted(PROMPTS)[:rows]])


def penalty_gradients(trainer, batch):
    """Gradients of the penalty alone: without advantages nothing else has any."""
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, {**batch, "advantages": torch.zeros(len(batch["advantages"]))}).backward()
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def logits_of(model, batch, temperature):
    tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    width = batch["completion_ids"].shape[1]
    return model(input_ids=tokens, attention_mask=attention).logits[:, -width - 1 : -1] / temperature


def rows_on_logits(trainer, batch, reference):
    model = trainer.model
    found = divergences(
        logits_of(model, batch, trainer.temperature).flatten(0, 1),
        logits_of(reference, batch, trainer.temperature).detach().flatten(0, 1),
        batch["completion_ids"].flatten(),
    )
    shape = batch["completion_ids"].shape
    mask = batch["completion_mask"].bool()
    mask = mask & batch["tool_mask"].bool() if "tool_mask" in batch else mask
    return *(x.view(shape) for x in (found.kl, found.logp, found.logq)), mask


def close(found, wanted, rtol=2e-4):
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert float((found[name] - x).norm()) <= rtol * float(x.norm()) + 1e-7, name


@pytest.mark.parametrize(("kind", "adapted"), [("grpo", False), ("grpo", True), ("rloo", False), ("rloo", True)])
def test_the_penalty_has_the_gradient_of_the_surrogate_on_logits(kind, adapted, tmp_path):
    options = {"peft_config": lora()} if adapted else {}
    trainer = build(kind, tmp_path, temperature=0.7, **options)
    disturb(trainer)
    batch = batch_of(trainer)
    if kind == "grpo":
        batch["tool_mask"] = (torch.rand(batch["completion_mask"].shape, generator=rng.stream(1, "t")) < 0.7).long()
    found = penalty_gradients(trainer, batch)
    kl, logp, logq, mask = rows_on_logits(trainer, batch, network().train())
    surrogate = kl_surrogate(kl, logp, logq, mask)
    # GRPO's default, dapo, divides by the tokens of the batch (of tools too); RLOO's penalty is a sum per response.
    scale = len(mask) / float(batch["num_items_in_batch"]) if kind == "grpo" else 1.0
    trainer.model.zero_grad()
    (trainer.beta * scale * surrogate.loss).backward()
    close(found, {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None})
    noted = trainer._metrics["train"]
    assert noted["kl"][-1] == pytest.approx(float((kl * mask).sum() / mask.sum()), rel=1e-4)
    assert noted["kl/response"][-1] == pytest.approx(float(surrogate.value.mean()), rel=1e-4)
    assert trainer.kl_objective == "KL(p‖q) between the laws of whole responses"
    assert batch[HIDDEN].shape == (*batch["completion_ids"].shape, 64)


@pytest.mark.parametrize("name", ["mc", "hybrid", "rb_full", "token_local"])
def test_other_estimators_are_those_of_the_surrogate(name, tmp_path):
    trainer = build("grpo", tmp_path, loss_type="grpo", kl=KLTerm(estimator=name))
    disturb(trainer)
    batch = batch_of(trainer)
    found = penalty_gradients(trainer, batch)
    kl, logp, logq, mask = rows_on_logits(trainer, batch, network().train())
    trainer.model.zero_grad()
    parts = [
        kl_surrogate(kl[i, None], logp[i, None], logq[i, None], mask[i, None], estimator=name).loss / mask[i].sum()
        for i in range(len(mask))
    ]
    (trainer.beta * torch.stack(parts).mean()).backward()
    close(found, {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_averages_as_the_stock_trainer_does(loss_type, training, tmp_path):
    trainer = build("grpo", tmp_path, loss_type=loss_type, gradient_accumulation_steps=4, steps_per_generation=2)
    batch = batch_of(trainer)
    trainer.model.train(training)
    trainer.current_gradient_accumulation_steps = 4
    batch["tool_mask"] = (torch.rand(batch["completion_mask"].shape, generator=rng.stream(2, "t")) < 0.7).long()
    batch["advantages"] = torch.zeros(8)
    with trainer._seam.recording() as scored, trainer._without_stock_penalty():
        trl.GRPOTrainer._compute_loss(trainer, trainer.model, batch)
        logp = scored[0].log_probs[:, -batch["completion_ids"].shape[1] :].detach()
    # With q = p e^d at every token the stock penalty is the same everywhere.
    d = 0.5
    penalty = torch.tensor(d).exp() - d - 1
    trainer.args.use_bias_correction_kl = False
    stock = {**batch, "ref_per_token_logps": logp + d, SAMPLER: logp}
    stock = trl.GRPOTrainer._compute_loss(trainer, trainer.model, stock)
    mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
    share, scale = trainer._averaging(mask, batch)
    ours = trainer.beta * scale * (share * mask.sum(1) * penalty).mean()
    torch.testing.assert_close(ours, stock.detach(), rtol=1e-4, atol=0.0)


def test_an_unknown_loss_type_is_refused():
    one = torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="loss_type that klkit knows"):
        averaging("nova", one, max_completion_length=1, items=torch.tensor(1.0), window=1)


@pytest.mark.parametrize("kind", list(TRAINERS))
def test_an_adapter_switched_off_a_reference_adapter_and_a_reference_model_are_one(kind, tmp_path):
    trainer = build(kind, tmp_path, peft_config=lora())
    disturb(trainer)
    batch = batch_of(trainer)
    off = penalty_gradients(trainer, batch)
    trainer.ref_model = network()
    attach(trainer._seam, trainer.ref_model, trainer.temperature)
    close(penalty_gradients(trainer, {**batch, HIDDEN: trainer._read_reference(batch)}), off, rtol=1e-5)
    # A trained adapter passed in: TRL keeps a copy of it as the reference.
    model = get_peft_model(network(), lora())
    trained = {n: p.data for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer = build(kind, tmp_path, model=model)
    assert "ref" in model.peft_config
    for name, value in trained.items():
        model.get_parameter(name).data.copy_(value)
    found = penalty_gradients(trainer, {**batch, HIDDEN: trainer._read_reference(batch)})
    close(found, off, rtol=1e-5)  # the copy is of the adapter when it did nothing
    assert [n for n, p in model.named_parameters() if p.requires_grad] == list(found)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", list(TRAINERS))
def test_training_starts_at_a_divergence_of_exactly_zero(kind, adapted, tmp_path):
    options = {"peft_config": lora()} if adapted else {}
    trainer = build(
        kind, tmp_path, max_steps=3, learning_rate=0.5 if adapted else 5e-3, gradient_accumulation_steps=2, **options
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    logged = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert logged[0] == 0.0
    assert min(logged[1:]) > 0
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", list(TRAINERS))
def test_accumulated_batches_make_the_step_of_one_large_batch(kind, adapted, tmp_path):
    steps = []
    for size, window in ((8, 1), (2, 4)):
        options = {"peft_config": lora()} if adapted else {}
        trainer = build(kind, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=window, **options)
        disturb(trainer)
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train()
        steps.append({n: p.detach() - before[n] for n, p in trainer.model.named_parameters() if p.requires_grad})
    assert all(float(x.norm()) > 0 for x in steps[0].values())
    close(steps[1], steps[0], rtol=1e-3)


@pytest.mark.parametrize("kind", list(TRAINERS))
def test_responses_of_an_older_policy_are_weighed_by_their_prefixes(kind, tmp_path):
    trainer = build(kind, tmp_path, num_iterations=2, kl=KLTerm(cap=None))
    batch = batch_of(trainer)
    assert batch[SAMPLER].shape == batch["completion_ids"].shape
    disturb(trainer, 0.03)
    found = penalty_gradients(trainer, batch)
    kl, logp, logq, mask = rows_on_logits(trainer, batch, network().train())
    older = rows_on_logits(build(kind, tmp_path), batch, network())[1].detach()
    surrogate = kl_surrogate(kl, logp, logq, mask, sampler_logp=older)
    scale = len(mask) / float(batch["num_items_in_batch"]) if kind == "grpo" else 1.0
    trainer.model.zero_grad()
    (trainer.beta * scale * surrogate.loss).backward()
    close(found, {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}, rtol=1e-3)
    share = trainer._metrics["train"]["kl/effective_share"][-1]
    assert 0 < share < 1
    capped = build(kind, tmp_path, num_iterations=2, max_steps=2, kl=KLTerm(cap=0.5))
    capped.train()
    assert "capped at 0.5" in capped.kl_objective


def test_leave_one_out_takes_the_other_responses_of_the_prompt(tmp_path):
    trainer = build("rloo", tmp_path, kl=KLTerm(leave_one_out=True))
    disturb(trainer)
    batch = batch_of(trainer)
    assert batch[GROUP].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    found = penalty_gradients(trainer, batch)
    kl, logp, logq, mask = rows_on_logits(trainer, batch, network().train())
    trainer.model.zero_grad()
    (trainer.beta * kl_surrogate(kl, logp, logq, mask, group=batch[GROUP]).loss).backward()
    close(found, {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None})


def test_the_loss_is_the_stock_loss_and_beta_times_the_divergence(tmp_path):
    trainer = build("grpo", tmp_path, loss_type="luspo")
    disturb(trainer)
    batch = batch_of(trainer)
    whole = trainer._compute_loss(trainer.model, batch)
    with trainer._without_stock_penalty():
        stock = trl.GRPOTrainer._compute_loss(trainer, trainer.model, batch)
    added = trainer.beta * trainer._metrics["train"]["kl/response"][-1]
    assert float(whole - stock) == pytest.approx(added, rel=1e-4)
    assert trainer.beta == 0.3


@pytest.mark.parametrize("kind", list(TRAINERS))
def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(kind, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "peft_config": lora(), "learning_rate": 0.5}
    whole = build(kind, tmp_path / "whole", **options)
    whole.train()
    resumed = build(kind, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    history = {e["step"]: e["kl"] for e in resumed.state.log_history if "kl" in e}
    assert history == {e["step"]: e["kl"] for e in whole.state.log_history if "kl" in e}
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=name)


def test_a_moving_reference_keeps_the_head_that_its_hidden_states_belong_to(tmp_path):
    trainer = build(
        "grpo", tmp_path, max_steps=3, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.5
    )
    batch_of(trainer)
    head = trainer._seam.reference_head.weight
    assert head.data_ptr() != trainer.ref_model.lm_head.weight.data_ptr()
    trainer.train()
    assert min(e["kl"] for e in trainer.state.log_history[1:-1]) > 0


@pytest.mark.parametrize("kind", list(TRAINERS))
def test_evaluation_measures_the_divergence_too(kind, tmp_path):
    held_out = Dataset.from_dict({"prompt": PROMPTS[:4]})
    trainer = build(kind, tmp_path, eval_dataset=held_out, per_device_eval_batch_size=4)
    disturb(trainer)
    found = trainer.evaluate()
    assert found["eval_kl"] > 0
    assert found["eval_kl/response"] > found["eval_kl"]
