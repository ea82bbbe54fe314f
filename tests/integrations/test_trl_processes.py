"""Two processes over gloo take the steps of one.

Each process runs this file as a script, which trains each trainer for a few steps and writes down where it got.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

trl = pytest.importorskip("trl", reason="TRL is not installed: make test-trl installs it and runs this")

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from klkit import rng
from klkit.integrations.trl import GRPOTrainer, RLOOTrainer
from klkit.zoo.catalogue import path

COUNT, RANK = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
PROMPTS = ["the film was", "a story", "the actors", "one more", "we liked", "the plot", "nobody", "the music"]


def drawn(trainer, prompt_ids):
    """Responses from streams named by prompt and place in its group: any number of processes draws the same."""
    place, completions = {}, []
    for ids in prompt_ids:
        key = str(list(ids))
        place[key] = place.get(key, -1) + 1
        generator = rng.stream(0, f"{key}/{place[key]}/{trainer.state.global_step}")
        length = int(torch.randint(3, 9, (1,), generator=generator))
        completions.append(torch.randint(6, 400, (length,), generator=generator).tolist())
    return completions


class GRPO(GRPOTrainer):
    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        return drawn(self, prompt_ids), None


class RLOO(RLOOTrainer):
    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        return drawn(self, prompt_ids)


def train(trainer_class, config, adapted, folder):
    torch.manual_seed(0)
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(path("reviews")),
        lambda completions, **kwargs: [float(len(set(c))) for c in completions],
        args=config(
            output_dir=str(folder / f"{COUNT}"),
            per_device_train_batch_size=8 // COUNT,
            num_generations=4,
            max_completion_length=10,
            beta=0.3,
            learning_rate=0.1 if adapted else 1e-3,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            max_steps=3,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            pad_to_multiple_of=8,  # GPT-2 counts positions from the padding on, which is then the same everywhere
        ),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=AutoTokenizer.from_pretrained(path("reviews")),
        peft_config=LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM") if adapted else None,
    )
    generator = rng.stream(0, "disturbance")
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    before = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    after = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    name = f"{trainer_class.__name__}-{COUNT}-{RANK}"
    (folder / f"{name}.json").write_text(json.dumps({"kl": kl, "processes": trainer.accelerator.num_processes}))
    torch.save(after - before, folder / f"{name}.pt")


def test_two_processes_take_the_steps_of_one(tmp_path):
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for launcher in ([], two):
        command = [sys.executable, *launcher, __file__, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    for kind in ("GRPO", "RLOO"):
        names = [f"{kind}-1-0", f"{kind}-2-0", f"{kind}-2-1"]
        alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in names)
        noted = [json.loads((tmp_path / f"{name}.json").read_text()) for name in names]
        assert [n["processes"] for n in noted] == [1, 2, 2]
        assert torch.equal(first, second)
        assert float((first - alone).norm()) < 1e-3 * float(alone.norm())
        assert min(noted[0]["kl"]) > 0
        assert noted[1]["kl"] == pytest.approx(noted[0]["kl"], rel=1e-3)


if __name__ == "__main__":
    train(GRPO, trl.GRPOConfig, True, Path(sys.argv[1]))
    train(RLOO, trl.RLOOConfig, False, Path(sys.argv[1]))
    if torch.distributed.is_initialized():  # threads of gloo that outlive the interpreter's end abort it now and then
        torch.distributed.destroy_process_group()
