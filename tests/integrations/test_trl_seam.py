"""What a model's forward returns to TRL's scoring, on architectures with caps and scales; and what is refused."""

import warnings
from pathlib import Path

import pytest
import torch

trl = pytest.importorskip("trl", reason="TRL is not installed: make test-trl installs it and runs this")

from peft import LoraConfig
from tests.integrations.test_trl import batch_of, build, lora, network
from tests.tiny import folder
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl.trainer.utils import add_fused_lm_head

import klkit.integrations.trl as ours
from klkit import rng
from klkit.divergences.differentiable import divergences
from klkit.integrations.trl import KLTerm
from klkit.integrations.trl.seam import Seam, attach
from klkit.models.base import VocabularyMismatch
from klkit.zoo.catalogue import path

KINDS = ["gpt2", "llama", "gemma2", "cohere", "granite", "mamba"]


def scored(model, tokens, labels, seam=None, **how):
    """One scoring call, with the seam's reference if there is one."""
    if seam is None:
        return model(input_ids=tokens, labels=labels, fused_lm_head=True)
    with seam.recording(**how):
        return model(input_ids=tokens, labels=labels, fused_lm_head=True)


def strings(size, seed=0):
    tokens = torch.randint(6, size, (3, 9), generator=rng.stream(seed, "seam"))
    labels = tokens.clone()
    labels[:, :4] = -100
    labels[1, 7:] = -100
    return tokens, labels


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_trl_and_divergences_those_of_logits(kind):
    temperature = 0.7
    seam = Seam()
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder(kind, seed=i)).eval() for i in (0, 1))
    tokens, labels = strings(policy.config.vocab_size)
    with torch.no_grad():
        logits = [m(input_ids=tokens).logits[:, :-1] / temperature for m in (policy, reference)]
    stock = AutoModelForCausalLM.from_pretrained(folder(kind, seed=0)).eval()
    add_fused_lm_head(stock, temperature=temperature, outputs=("log_probs", "entropy"))
    for model in (policy, reference):
        attach(seam, model, temperature)
    with seam.keeping(5) as kept, torch.no_grad():
        scored_reference = model(input_ids=tokens, labels=labels, fused_lm_head=True)
    assert not scored_reference.log_probs.any()
    found, wanted = scored(policy, tokens, labels, seam, reference=kept[0]), scored(stock, tokens, labels)
    torch.testing.assert_close(found.log_probs, wanted.log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropy, wanted.entropy, rtol=1e-5, atol=1e-5)
    mask = labels[:, 1:] != -100
    rows = divergences(*(z[mask] for z in logits), labels[:, 1:][mask])
    torch.testing.assert_close(found.kl[mask], rows.kl, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.reference_log_probs[mask], rows.logq, rtol=1e-5, atol=1e-5)
    assert not found.kl[~mask].any()
    # Without a reference the same log-probabilities, and gradients of them as TRL's.
    alone = scored(policy, tokens, labels, seam)
    assert alone.kl is None
    torch.testing.assert_close(alone.log_probs, found.log_probs, rtol=1e-6, atol=1e-6)
    (alone.log_probs.sum() - 0.3 * alone.entropy.square().sum()).backward()
    (wanted.log_probs.sum() - 0.3 * wanted.entropy.square().sum()).backward()
    for (name, a), b in zip(policy.named_parameters(), stock.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert float((a.grad - b.grad).norm()) <= 1e-4 * float(b.grad.norm()) + 1e-6, name
    plain = policy(input_ids=tokens, labels=tokens)  # other calls are the model's own
    assert plain.logits.shape == (3, 9, policy.config.vocab_size)
    assert float(plain.loss) > 0


def test_a_batch_without_scored_positions_has_a_gradient_of_zero():
    seam, model = Seam(), network()
    attach(seam, model, 1.0)
    tokens, labels = strings(400)
    with seam.keeping(5) as kept, torch.no_grad():
        model(input_ids=tokens, labels=labels, fused_lm_head=True)
    found = scored(model, tokens, torch.full_like(labels, -100), seam, reference=kept[0])
    (found.log_probs.sum() + found.kl.sum()).backward()
    assert not model.lm_head.weight.grad.any()


def test_the_load_balancing_loss_of_a_mixture_of_experts_comes_along():
    config = Qwen3MoeConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
    )
    with torch.random.fork_rng():
        model = Qwen3MoeForCausalLM(config).eval()
    seam = Seam()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    tokens, labels = strings(50)
    wanted = model(input_ids=tokens, labels=labels, fused_lm_head=True, output_router_logits=True)
    attach(seam, model, 1.0)
    with seam.recording():
        found = model(input_ids=tokens, labels=labels, fused_lm_head=True, output_router_logits=True)
    torch.testing.assert_close(found.log_probs, wanted.log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.aux_loss, wanted.aux_loss)
    assert float(found.aux_loss) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_scores_the_sampler_and_the_policy_alike(dtype, tmp_path):
    model = network(dtype=dtype)
    trainer = build("rloo", tmp_path, model=model, bf16=True, max_steps=3, num_iterations=2, learning_rate=5e-3)
    trainer.train()
    share = [e["kl/effective_share"] for e in trainer.state.log_history if "kl" in e]
    assert share[0] == pytest.approx(1.0, abs=1e-6)
    assert trainer.state.log_history[0]["kl"] == 0.0


def test_logits_that_do_not_follow_from_the_head_are_refused():
    model = network()
    stock = model.forward

    def forward(*args, **kwargs):
        output = stock(*args, **kwargs)
        output.logits = output.logits + 1e-2 * output.logits.square()
        return output

    model.forward = forward
    with pytest.raises(ValueError, match=r"expected logits that are the output head's"):
        attach(Seam(), model, 1.0)


@pytest.mark.parametrize("how", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_an_adapted_head_is_refused(how, tmp_path):
    config = LoraConfig(r=2, task_type="CAUSAL_LM", **{"target_modules": ["c_attn"], **how})
    with pytest.raises((ValueError, NotImplementedError), match="head"):
        build("rloo", tmp_path, peft_config=config)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_nothing_to_regularise_is_refused(kind, tmp_path):
    with pytest.raises(ValueError, match="nothing to regularise"):
        build(kind, tmp_path, beta=0.0)


def test_an_option_without_effect_is_refused(tmp_path):
    with pytest.raises(ValueError, match="use_bias_correction_kl"):
        build("grpo", tmp_path, use_bias_correction_kl=False)
    with pytest.raises(ValueError, match="estimator"):
        KLTerm(estimator="k3")
    with pytest.raises(ValueError, match="cap"):
        KLTerm(cap=-1.0)
    trainer = build("rloo", tmp_path, kl=KLTerm(engine=True))
    with pytest.raises(ValueError, match="engine's log-probabilities"):
        trainer._compute_loss(trainer.model, batch_of(trainer))


def test_a_reference_of_another_vocabulary_is_refused(tmp_path):
    model = network()
    model.config._name_or_path = str(path("docs"))  # from which TRL loads the reference
    trainer = build("grpo", tmp_path, model=model)
    with pytest.raises(VocabularyMismatch, match="reference over the policy's 512 tokens"):
        trainer.train()


@pytest.mark.parametrize("option", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"generation_kwargs": {"top_k": 3}}])
def test_truncated_sampling_is_told(option, tmp_path):
    with pytest.warns(UserWarning, match="the divergence is that of the whole laws"):
        build("grpo", tmp_path, **option)


def test_dropout_is_told_and_plain_settings_are_not(tmp_path):
    with pytest.warns(UserWarning, match="expected no dropout"):
        build("grpo", tmp_path, peft_config=lora(lora_dropout=0.1))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        build("grpo", tmp_path, peft_config=lora())
    # By klkit's folder: any checkout may lie below a folder of that name, its environment included.
    package = str(Path(ours.__file__).parents[2])
    assert not [w for w in told if w.filename.startswith(package) or str(w.message).startswith("expected")]


def test_an_older_trl_is_refused(monkeypatch):
    monkeypatch.setattr(ours, "version", lambda name: "1.14.2")
    with pytest.raises(ImportError, match=r"expected TRL 1.15 or newer, .* got 1.14.2"):
        ours.require_trl()
    monkeypatch.setattr(ours, "version", lambda name: "1.15.0.dev0")
    ours.require_trl()


def test_a_batch_of_other_strings_than_the_reference_read_is_refused(tmp_path):
    trainer = build("grpo", tmp_path)
    batch = batch_of(trainer)
    batch["ref_hidden_states"] = batch["ref_hidden_states"][:4]
    with pytest.raises(ValueError, match="expected 4 strings scored"):
        trainer._compute_loss(trainer.model, batch)


def test_the_names_are_there_and_others_are_not():
    assert ours.GRPOTrainer is ours.trainer("GRPOTrainer")
    assert issubclass(ours.RLOOTrainer, trl.RLOOTrainer)
    with pytest.raises(AttributeError):
        _ = ours.DPOTrainer
