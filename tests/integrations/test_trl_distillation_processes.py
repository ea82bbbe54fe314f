"""Distillation by two processes over gloo takes the steps of one: tokens of all of them weigh the same.

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
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gkd import GKDConfig

from klkit import rng
from klkit.integrations.trl import DistillationTrainer, GKDTrainer
from klkit.zoo.catalogue import path

COUNT, RANK = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
PROMPTS = ["the film was", "a story", "the actors", "one more", "we liked", "the plot", "nobody", "the music"]
# Of one width, because GPT-2 counts the padding that TRL puts on the left.
GIVEN = [
    {"input_ids": list(range(6 + i, 23 + i)), "completion_mask": [0] * (14 - i) + [1] * (3 + i), "prompt": "x"}
    for i in range(8)
]


class OnPolicy(DistillationTrainer):
    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        """Responses from streams named by the prompt: any number of processes draws the same."""
        found = []
        for ids in prompt_ids:
            generator = rng.stream(0, f"{list(ids)}/{self.state.global_step}")
            length = int(torch.randint(3, 9, (1,), generator=generator))
            found.append(torch.randint(6, 400, (length,), generator=generator).tolist())
        return found


def train(trainer_class, config, rows, folder, **options):
    torch.manual_seed(0)
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(path("reviews")),
        AutoModelForCausalLM.from_pretrained(path("reviews-positive")),
        args=config(
            output_dir=str(folder / f"{COUNT}"),
            per_device_train_batch_size=4 // COUNT,
            gradient_accumulation_steps=2,
            learning_rate=0.3,
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
            activation_checkpointing=False,
            **options,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(path("reviews")),
        loss="adaptive_kl",
    )
    before = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    trainer.train()
    noted = [entry["divergence"] for entry in trainer.state.log_history if "divergence" in entry]
    after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    name = f"{trainer_class.__name__}-{COUNT}-{RANK}"
    found = {"divergence": noted, "processes": trainer.accelerator.num_processes}
    (folder / f"{name}.json").write_text(json.dumps(found))
    torch.save(after - before, folder / f"{name}.pt")


def test_two_processes_take_the_steps_of_one(tmp_path):
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for launcher in ([], two):
        command = [sys.executable, *launcher, __file__, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    for kind in ("OnPolicy", "GKDTrainer"):
        names = [f"{kind}-1-0", f"{kind}-2-0", f"{kind}-2-1"]
        alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in names)
        noted = [json.loads((tmp_path / f"{name}.json").read_text()) for name in names]
        assert [n["processes"] for n in noted] == [1, 2, 2]
        assert torch.equal(first, second)
        assert float(alone.norm()) > 1e-3
        assert float((first - alone).norm()) < 1e-3 * float(alone.norm()), kind
        # TRL logs means of the means of micro-batches, which hold other strings in the two runs.
        assert noted[1]["divergence"] == pytest.approx(noted[0]["divergence"], rel=0.2)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    prompts = [{"prompt": prompt} for prompt in PROMPTS]
    train(OnPolicy, trl.DistillationConfig, prompts, folder, max_completion_length=10, pad_to_multiple_of=8)
    train(GKDTrainer, GKDConfig, GIVEN, folder, lmbda=0.0, max_length=64)
    if torch.distributed.is_initialized():  # threads of gloo that outlive the interpreter's end abort it now and then
        torch.distributed.destroy_process_group()
