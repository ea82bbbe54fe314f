"""TRL's distillation trainers with klkit's divergences: the numbers of strings scored by hand, in real training."""

from functools import cache

import pytest
import torch

trl = pytest.importorskip("trl", reason="TRL is not installed: make test-trl installs it and runs this")

from datasets import Dataset
from tests.integrations.test_trl import lora, network, tokenizer
from trl.experimental.gkd import GKDConfig

import klkit
import klkit.integrations.trl.distillation as ours
from klkit import rng
from klkit.api.prompts import read_prompts
from klkit.divergences.partial import Logits
from klkit.integrations.trl import DistillationTrainer, GKDTrainer, KLMonitorCallback
from klkit.models.hf import HuggingFaceModel
from klkit.objectives.distill import distillation_loss
from klkit.sampling.ancestral import sample

LOSSES = ["forward_kl", "reverse_kl", "adaptive_kl,mass=0.5", "generalised_js,p_weight=0.3", "skew_kl"]
PROMPTS = [str(text) for text in read_prompts("klkit:reviews").contents[:16]]
KINDS = {"on-policy": (DistillationTrainer, trl.DistillationConfig), "given": (GKDTrainer, GKDConfig)}


def teacher():
    return network("reviews-positive")


def build(kind, folder, *, stock=False, rows=None, **options):
    """A trainer of the packaged reviews towards the packaged positive ones."""
    own = {
        n: options.pop(n) for n in ("loss", "divergence_temperature", "cross_entropy", "peft_config") if n in options
    }
    settings = {
        "per_device_train_batch_size": 8,
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
        "activation_checkpointing": False,
        **({"max_completion_length": 10} if kind == "on-policy" else {"lmbda": 0.0, "max_length": 64}),
        **options,
    }
    trainer_class, config = KINDS[kind]
    if stock:
        trainer_class = trainer_class.__mro__[3]
    if rows is None:
        rows = [{"prompt": prompt} for prompt in PROMPTS] if kind == "on-policy" else written()
    trainer = trainer_class(
        model=network(),
        teacher_model=teacher(),
        args=config(output_dir=str(folder), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        **own,
    )
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps  # which training sets
    return trainer


@cache
def written():
    """Prompts with answers of the teacher, as token ids."""
    p = HuggingFaceModel(teacher(), tokenizer(), name="teacher")
    contexts = [p.context(prompt) for prompt in PROMPTS]
    x = sample(p, contexts, max_tokens=20, seed=0).sequences
    assert len(set(x.lengths.tolist())) > 3
    return [row(context.tolist(), x.completion(i).tolist()) for i, context in enumerate(contexts)]


def row(prompt, completion):
    mask = [0] * len(prompt) + [1] * len(completion)
    return {"input_ids": prompt + completion, "completion_mask": mask, "prompt": tokenizer().decode(prompt)}


def batch_of(trainer, rows=8):
    trainer.model.train()
    if isinstance(trainer, GKDTrainer):
        return trainer.data_collator([trainer.train_dataset[i] for i in range(rows)])
    return trainer._generate_and_score_completions([{"prompt": p} for p in sorted(PROMPTS)[:rows]])


def decisions(batch):
    """Token ids, attention, and which tokens are the completion's: written down once more, string by string."""
    if "labels" in batch:
        tokens, attention, chosen = batch["input_ids"], batch["attention_mask"], batch["labels"] != -100
    else:
        tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        mask = batch["completion_mask"] * batch.get("tool_mask", torch.ones_like(batch["completion_mask"]))
        chosen = torch.cat([torch.zeros_like(batch["prompt_mask"]), mask], 1).bool()
    return tokens, attention, chosen


def rows_of(model, batch):
    """Logits that predict the completions' tokens, flat, string by string, and these tokens."""
    tokens, attention, chosen = decisions(batch)
    logits = model(input_ids=tokens, attention_mask=attention).logits
    rows = [logits[i, j - 1] for i, j in chosen.nonzero().tolist()]
    return torch.stack(rows), tokens[chosen]


def gradients(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def close(found, wanted, rtol=2e-4):
    assert found.keys() == wanted.keys()
    assert wanted
    for name, x in wanted.items():
        assert float((found[name] - x).norm()) <= rtol * float(x.norm()) + 1e-7, name


def disturb(trainer, scale=0.02):
    generator = rng.stream(0, "trl distillation tests")
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("kind", "adapted"), [("on-policy", False), ("on-policy", True), ("given", False)])
def test_the_loss_is_that_of_strings_scored_by_hand(kind, adapted, loss, tmp_path):
    options = {"peft_config": lora()} if adapted else {}
    options |= {"temperature": 0.7} if kind == "on-policy" else {"divergence_temperature": 0.7, "cross_entropy": 0.25}
    trainer = build(kind, tmp_path, loss=loss, **options)
    disturb(trainer)
    batch = batch_of(trainer)
    if kind == "on-policy":
        batch["tool_mask"] = (torch.rand(batch["completion_mask"].shape, generator=rng.stream(1, "t")) < 0.7).long()
    items = 40.0  # of all micro-batches together
    batch = {**batch, "num_items_in_batch": torch.tensor(items)} if kind == "on-policy" else batch
    found = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(items))
    student, tokens = rows_of(trainer.model, batch)
    by_hand = distillation_loss(
        Logits(rows_of(trainer.teacher_model, batch)[0].detach()),
        Logits(student),
        tokens,
        loss,
        normaliser=items,
        temperature=0.7,
        cross_entropy=0.0 if kind == "on-policy" else 0.25,
    )
    torch.testing.assert_close(found, by_hand.loss, rtol=1e-4, atol=1e-6)
    close(gradients(trainer, found), gradients(trainer, by_hand.loss))
    noted = trainer._metrics["train"]
    assert noted["divergence"] == [pytest.approx(float(by_hand.divergence.mean()), rel=1e-3)]
    assert noted["kl"] == [pytest.approx(float(by_hand.kl.mean()), rel=1e-3)]
    assert noted["reverse_kl"] == [pytest.approx(float(by_hand.reverse_kl.mean()), rel=1e-3)]
    assert noted["cross_entropy"] == [pytest.approx(float(by_hand.cross_entropy.mean()), rel=1e-3)]
    assert ("head_weight" in noted) == loss.startswith("adaptive")
    if "head_weight" in noted:
        assert noted["head_weight"] == [pytest.approx(float(by_hand.head_weight.mean()), rel=1e-2)]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(
    ("loss", "beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("generalised_js,p_weight=0.3", 0.3)]
)
def test_what_trl_can_do_comes_out_as_with_trl(kind, loss, beta, tmp_path):
    trainer, stock = build(kind, tmp_path, loss=loss), build(kind, tmp_path, stock=True, beta=beta)
    assert type(stock).__module__.startswith("trl.")
    disturb(trainer)
    disturb(stock)
    batch = batch_of(trainer)
    items = torch.tensor(40.0)
    batch = {**batch, "num_items_in_batch": items} if kind == "on-policy" else batch
    stock.model.train()
    losses = [t.compute_loss(t.model, dict(batch), num_items_in_batch=items) for t in (trainer, stock)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
    close(gradients(trainer, losses[0]), gradients(stock, losses[1]), rtol=1e-3)


@pytest.mark.parametrize("kind", list(KINDS))
def test_accumulated_batches_take_the_step_of_one(kind, tmp_path):
    # Of one width, because GPT-2 counts the padding that TRL puts on the left; and of unequal numbers of decisions.
    rows = [row([*range(6, 20 - i)], [*range(30, 33 + i)]) for i in range(8)] if kind == "given" else None

    def change(size, accumulated):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        trainer = build(kind, tmp_path, rows=rows, learning_rate=1.0, **options)
        before = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        trainer.train()
        after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        (logged,) = [entry for entry in trainer.state.log_history if "divergence" in entry]
        return after - before, logged

    (one, whole), (four, parts) = change(8, 1), change(2, 4)
    assert float(one.norm()) > 1e-3
    assert float((one - four).norm()) < 1e-4 * float(one.norm())
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-4)


@pytest.mark.parametrize(("kind", "loss"), [("on-policy", "adaptive_kl"), ("given", "forward_kl")])
def test_in_training_the_student_comes_closer_to_the_teacher(kind, loss, tmp_path):
    trainer = build(kind, tmp_path, loss=loss, max_steps=16, learning_rate=1e-3, optim="adamw_torch")
    disturb(trainer, 0.05)
    p = HuggingFaceModel(teacher(), tokenizer(), name="teacher")

    def distance():
        q = HuggingFaceModel(trainer.model, tokenizer(), name="student")
        return klkit.estimate(p, q, PROMPTS, samples=6, max_tokens=10, floor="none").headline

    before = distance()
    trainer.train()
    after = distance()
    assert after.value + 2 * after.stderr < 0.7 * (before.value - 2 * before.stderr)
    logged = [entry for entry in trainer.state.log_history if "divergence" in entry]
    assert len(logged) == 16
    assert logged[-1]["divergence"] < 0.5 * logged[0]["divergence"]
    assert "entropy" not in logged[0]
    assert logged[0]["loss"] == pytest.approx(logged[0]["divergence"], rel=1e-4)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_monitor_measures_the_distance_to_the_teacher(kind, tmp_path):
    trainer = build(kind, tmp_path, max_steps=2, learning_rate=1e-6)
    reference = HuggingFaceModel(teacher(), tokenizer(), name="teacher")
    options = {"samples": 4, "max_tokens": 6, "seed": 0, "floor": "none"}
    trainer.add_callback(KLMonitorCallback(trainer, PROMPTS[:4], every=2, reference=reference, **options))
    alone = klkit.estimate(HuggingFaceModel(network(), tokenizer(), name="policy"), reference, PROMPTS[:4], **options)
    trainer.train()
    logged = [entry["kl_monitor"] for entry in trainer.state.log_history if "kl_monitor" in entry]
    assert len(logged) == 2
    assert logged[0] == pytest.approx(alone.headline.value, rel=1e-4)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_batch_without_decisions_has_a_loss_of_zero_with_a_graph(kind, tmp_path):
    trainer = build(kind, tmp_path)
    batch = batch_of(trainer)
    if kind == "given":
        batch["labels"] = torch.full_like(batch["labels"], -100)
    else:
        batch["tool_mask"] = torch.zeros_like(batch["completion_mask"])
        batch["num_items_in_batch"] = torch.tensor(0.0)
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(1.0))
    assert float(loss.detach()) == 0.0
    loss.backward()
    assert not any(p.grad.any() for p in trainer.model.parameters() if p.grad is not None)
    assert "divergence" not in trainer._metrics["train"]


def test_what_is_optimised_is_said(tmp_path):
    on_policy = build("on-policy", tmp_path, loss="reverse_kl").objective
    assert on_policy.objective == "KL(student‖teacher) between the laws of whole responses"
    assert on_policy.value
    assert not on_policy.gradient
    given = build("given", tmp_path, loss="adaptive_kl", cross_entropy=0.5).objective
    assert given.objective == (
        "0.5 × [mean adaptive_kl of next-token laws along the given texts] + 0.5 × [negative log-likelihood of the "
        "given texts]"
    )
    by_teacher = build("given", tmp_path, loss="forward_kl", seq_kd=True, temperature=1.0).objective
    assert (by_teacher.objective, by_teacher.gradient) == (
        "KL(teacher‖student) between the laws of whole responses",
        True,
    )
    for found in (on_policy, by_teacher):
        assert any(note.startswith("divided by the tokens of each batch") for note in found.notes)
    other = build("on-policy", tmp_path, top_p=0.9, temperature=0.8, divergence_temperature=1.0).objective
    assert other.objective == (
        "mean adaptive_kl of next-token laws along texts of the student drawn with top_p=0.9, temperature=0.8"
    )
    assert "whole responses" not in other.objective
    assert not any(note.startswith("divided") for note in other.notes)


def test_texts_that_gkd_draws_at_another_temperature_are_no_model_s_law(tmp_path):
    drawn = "mean {} of next-token laws along texts of the {} drawn with temperature=0.9"
    by_teacher = build("given", tmp_path, loss="forward_kl", seq_kd=True).objective
    assert by_teacher.objective == drawn.format("forward_kl", "teacher")
    assert by_teacher.gradient
    assert by_teacher.notes == ("texts drawn with temperature=0.9 are not from a model's own law",)
    own = build("given", tmp_path, loss="reverse_kl", lmbda=1.0).objective
    assert own.objective == drawn.format("reverse_kl", "student")
    assert not own.gradient
    assert any(note.startswith("left out is how") for note in own.notes)
    options = {"loss": "forward_kl", "lmbda": 0.25, "divergence_temperature": 2.0}
    mixed = build("given", tmp_path, **options).objective
    assert mixed.objective == (
        "0.75 × [mean forward_kl of next-token laws at temperature 2 along the given texts] + 0.25 × [mean forward_kl "
        "of next-token laws at temperature 2 along texts of the student drawn with temperature=0.9]"
    )
    learnt = build("given", tmp_path, loss="forward_kl", seq_kd=True, cross_entropy=0.5).objective
    likelihood = "negative log-likelihood of texts of the teacher drawn with temperature=0.9"
    assert learnt.objective == f"0.5 × [{by_teacher.objective}] + 0.5 × [{likelihood}]"
    assert learnt.notes == by_teacher.notes
    given = build("given", tmp_path, loss="forward_kl").objective
    assert given.objective == "mean forward_kl of next-token laws along the given texts"


def test_options_without_effect_and_losses_without_a_teacher_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected beta left at its default of 1.0, got 0.5.*p_weight=0.5"):
        build("on-policy", tmp_path, beta=0.5)
    with pytest.raises(ValueError, match="expected a divergence of two models"):
        build("given", tmp_path, loss="cross_entropy")
    with pytest.raises(ValueError, match="expected a loss among"):
        build("given", tmp_path, loss="kld")
    with pytest.raises(ValueError, match="share of cross-entropy"):
        build("given", tmp_path, cross_entropy=1.0)


def test_another_trl_is_told_and_not_misread(tmp_path, monkeypatch):
    import trl.trainer.distillation_trainer as theirs

    trainer = build("on-policy", tmp_path)
    batch = batch_of(trainer)
    monkeypatch.setattr(trl.DistillationTrainer, "_compute_loss", lambda *args: (torch.zeros(()),) * 3)
    with pytest.raises(ImportError, match="0 calls of _chunked_divergence_loss a batch"):
        trainer.compute_loss(trainer.model, batch)
    monkeypatch.setattr(theirs, "_chunked_divergence_loss", lambda hidden, mask: None)
    with pytest.raises(ImportError, match=r"expected a TRL whose .* with _chunked_divergence_loss\(hidden, mask\)"):
        ours.require_same_call()
    monkeypatch.delattr(theirs, "_chunked_divergence_loss")
    with pytest.raises(ImportError, match=r"install trl==1\.16"):
        build("on-policy", tmp_path)
    monkeypatch.setattr(GKDTrainer.__mro__[3], "generalized_jsd_loss", lambda a, b: None)
    with pytest.raises(ImportError, match=r"generalized_jsd_loss\(a, b\)"):
        ours.require_gkd_call()


def test_a_head_in_parts_is_gathered_or_refused():
    weight = torch.ones(2, 3)
    assert ours.whole(None) is None
    assert ours.whole(weight) is weight
    weight.ds_id = 1
    with pytest.raises(ValueError, match="ZeRO stage 3"):
        ours.whole(weight)


def test_the_stock_call_is_back_after_an_error(tmp_path):
    import trl.trainer.distillation_trainer as theirs

    stock = theirs._chunked_divergence_loss
    trainer = build("on-policy", tmp_path)
    batch = batch_of(trainer)
    trainer.divergence_temperature = -1.0
    with pytest.raises(ValueError, match="positive temperature"):
        trainer.compute_loss(trainer.model, batch)
    assert theirs._chunked_divergence_loss is stock
