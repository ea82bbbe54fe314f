"""A small language model from nothing: weights from a seed, batches by length, AdamW with a cosine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from klkit.rng import stream

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel


@dataclass(frozen=True, slots=True)
class Example:
    """One training string: token ids that start and end with the end token, learnt from ``start`` on."""

    ids: tuple[int, ...]
    start: int = 1


def fresh(size: int, *, width: int, layers: int, window: int, seed: int) -> GPT2LMHeadModel:
    """An untrained GPT-2 whose weights depend on ``seed`` only."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=size,
        n_positions=window,
        n_embd=width,
        n_layer=layers,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=True,
    )
    # The constructor draws from the global generator; its draws are put back, and replaced below.
    with torch.random.fork_rng(devices=[]):
        model = GPT2LMHeadModel(config)
    generator = stream(seed, "init")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith("c_proj.weight")
                weight.normal_(0.0, 0.02 / math.sqrt(2 * layers) if residual else 0.02, generator=generator)
    return model


def batches(examples: Sequence[Example], tokens: int, generator: torch.Generator) -> Iterator[list[Example]]:
    """Endless batches of similar lengths, each of about ``tokens`` tokens, every pass in a new order."""
    while True:
        order = torch.randperm(len(examples), generator=generator).tolist()
        pool = 1024
        groups = []
        for i in range(0, len(order), pool):
            chosen = sorted((examples[j] for j in order[i : i + pool]), key=lambda e: len(e.ids))
            while chosen:
                count = 1
                while count < len(chosen) and (count + 1) * len(chosen[count].ids) <= tokens:
                    count += 1
                groups.append(chosen[:count])
                del chosen[:count]
        for j in torch.randperm(len(groups), generator=generator).tolist():
            yield groups[j]


def loss(model: torch.nn.Module, batch: Sequence[Example]) -> Tensor:
    """Mean of ``-log p`` (nats) over the tokens to be learnt."""
    width = max(len(e.ids) for e in batch)
    tokens = torch.zeros(len(batch), width, dtype=torch.long)
    learn = torch.zeros(len(batch), width, dtype=torch.bool)
    for i, e in enumerate(batch):
        tokens[i, : len(e.ids)] = torch.tensor(e.ids)
        learn[i, e.start : len(e.ids)] = True
    # Padding lies to the right, where causal attention never looks from a real token.
    logits = model(tokens[:, :-1], attention_mask=torch.ones_like(tokens[:, :-1])).logits
    return torch.nn.functional.cross_entropy(logits[learn[:, 1:]], tokens[:, 1:][learn[:, 1:]])


@torch.no_grad()
def mean_loss(model: torch.nn.Module, examples: Sequence[Example], size: int = 32) -> float:
    """Mean of ``-log p`` (nats per token) over all tokens of the examples."""
    total, count = 0.0, 0
    for i in range(0, len(examples), size):
        batch = examples[i : i + size]
        learnt = sum(len(e.ids) - e.start for e in batch)
        total += learnt * float(loss(model, batch))
        count += learnt
    return total / count


def train(
    model: torch.nn.Module,
    examples: Sequence[Example],
    *,
    steps: int,
    rate: float,
    seed: int,
    tokens: int = 2048,
    decay: float = 0.1,
) -> None:
    """Fit the weights that require a gradient: AdamW, a short warm-up, then a cosine down to zero."""
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [w for w in weights if w.dim() == 2], "weight_decay": decay},
            {"params": [w for w in weights if w.dim() != 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
    )
    supply = batches(examples, tokens, stream(seed, "batches"))
    warmup = max(1, steps // 20)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimizer.zero_grad()
        loss(model, next(supply)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    model.eval()
