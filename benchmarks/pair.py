"""A pair of random GPT-2 models, small in depth and width but with a real vocabulary."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging

from klkit.models.hf import HuggingFaceModel

logging.set_verbosity_error()
logging.disable_progress_bar()


def words(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of one word an id; the last one ends a response."""
    vocabulary = {f"w{i}": i for i in range(size - 1)} | {"<end>": size - 1}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="w0")


@torch.no_grad()
def pair(size: int, *, layers: int = 4, width: int = 256) -> tuple[HuggingFaceModel, HuggingFaceModel]:
    """``p``, with logits as spread as a trained model's, and ``q``, with every weight moved by 2 % of its spread."""
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=4, vocab_size=size, n_positions=1024, bos_token_id=0, eos_token_id=size - 1
    )
    tokenizer = words(size)
    networks = []
    for _ in range(2):
        torch.manual_seed(0)
        networks.append(GPT2LMHeadModel(config))
        networks[-1].lm_head.weight.mul_(4)
    for weight in networks[1].parameters():
        weight.add_(0.02 * weight.std() * torch.randn_like(weight))
    return tuple(HuggingFaceModel(n, tokenizer, name=name) for n, name in zip(networks, "pq", strict=True))
