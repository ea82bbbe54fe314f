"""One training step of TRL's trainers, stock and with klkit's term, on the same responses.

    python benchmarks/trl_step.py [--threads 2] [--json PATH]

A step is all but drawing responses, which is the same work for both: scores of the policy and of the reference,
rewards, loss, backward pass, AdamW. Stock is RLOO with its k1 penalty in the reward, and GRPO with its k3 penalty in
the loss. A decoder of 8 layers of width 512 over 32,768 tokens, randomly initialised, float32: the head holds two
fifths of the weights, more than in most models, and the term's cost is all in the head. 8 responses of 96 tokens.

This is a CPU's comparison: TRL's Triton kernel for the head runs on accelerators only, and some of the difference is
that klkit multiplies with oneDNN where it is faster.

Memory is that of the weights and what a first step adds to it (gradients and the optimiser's state among it), in a
process of its own.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import trl
from common import MEBI, Table, begin, milliseconds, options, peak_memory, peak_of, ratio, report, side_by_side
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from klkit import rng
from klkit.integrations import trl as ours
from klkit.zoo.catalogue import path

PROMPTS, GROUP, PROMPT, RESPONSE = 2, 4, 32, 96
TIME, MEMORY = 1.10, 1.15
"""Targets: klkit's step against the stock one."""


def config(quick: bool) -> LlamaConfig:
    width, layers, size = (32, 1, 600) if quick else (512, 8, 32768)
    return LlamaConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 64),
        max_position_embeddings=PROMPT + RESPONSE,
        tie_word_embeddings=False,
    )


def build(name: str, folder: str) -> Any:
    """The trainer that a row of the table names: who, which, and how it trains."""
    who, kind, how = name.split()
    stock = getattr(trl, f"{kind}Trainer")
    base = getattr(ours, f"{kind}Trainer") if who == "klkit" else stock
    generator = rng.stream(0, "responses")
    drawn = torch.randint(6, 400, (PROMPTS * GROUP, RESPONSE), generator=generator).tolist()

    class Fixed(base):  # type: ignore[misc,valid-type]
        """Draws the same responses every time, at no cost."""

        def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
            return drawn if kind == "RLOO" else (drawn, None)

    arguments = getattr(trl, f"{kind}Config")(
        output_dir=folder,
        per_device_train_batch_size=PROMPTS * GROUP,
        num_generations=GROUP,
        max_completion_length=RESPONSE,
        beta=0.05,
        learning_rate=1e-4,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    adapter = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if how == "LoRA" else None
    trainer = Fixed(
        AutoModelForCausalLM.from_pretrained(folder),
        lambda completions, **_: list(map(float, range(len(completions)))),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["a"]}),
        processing_class=AutoTokenizer.from_pretrained(path("reviews")),
        peft_config=adapter,
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    trainer.model.train()
    return trainer


def step(trainer: Any) -> None:
    """A whole step, from prompts on."""
    prompts = ["a" * (PROMPT // 2), "b" * (PROMPT // 2)]
    rows = [{"prompt": prompt} for prompt in prompts for _ in range(GROUP)]
    trainer._step, trainer._buffered_inputs = 0, None
    trainer.training_step(trainer.model, rows, None)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def weights(trainer: Any) -> float:
    """MiB of all weights, of the reference too."""
    models = [trainer.model] + ([] if trainer.ref_model is None else [trainer.ref_model])
    return sum(p.numel() * p.element_size() for m in models for p in m.parameters()) / MEBI


def main() -> None:
    arguments = options(__doc__, rounds=7).parse_args()
    begin(arguments)
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            LlamaForCausalLM(config(arguments.quick)).save_pretrained(folder)
        if arguments.peak:
            trainer = build(arguments.peak.replace("_", " "), folder)
            print(weights(trainer) + peak_of(partial(step, trainer)))
            return
        kinds = [f"{kind} {how}" for kind in ("RLOO", "GRPO") for how in ("full", "LoRA")]
        names = [f"{who} {kind}" for kind in kinds for who in ("TRL", "klkit")]
        work: dict[str, Callable[[], object]] = {n: partial(step, build(n, str(Path(folder)))) for n in names}
        seconds = side_by_side(work, arguments.rounds)
    memory = {}
    if not arguments.quick:
        common = ["--threads", str(arguments.threads)]
        memory = {n: peak_memory(__file__, n.replace(" ", "_"), common) for n in names}
    rows = []
    for name, taken in seconds.items():
        stock = name.replace("klkit", "TRL")
        own = name != stock
        more = f"{memory[name] / memory[stock]:.2f}" if own and memory else ""
        times = f"{ratio(seconds, name, stock):.2f}" if own else ""
        rows.append([name, milliseconds(taken), times, f"{memory[name]:.0f}" if memory else "", more])
    title = f"A training step without drawing, {PROMPTS * GROUP} responses of {RESPONSE} tokens, fp32"
    columns = ["", "ms (least)", f"x TRL's (<= {TIME})", "peak MiB", f"x TRL's (<= {MEMORY})"]
    report([Table(title, columns, rows)], seconds, arguments)


if __name__ == "__main__":
    sys.exit(main())
