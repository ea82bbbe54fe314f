"""Tiny randomly initialised models and a byte-level BPE tokenizer, on disk in Hugging Face format.

    from tests.tiny import folder, tokenizer
    model = load(folder("llama"))           # built once a session, in a temporary folder

``folder(kind, seed=0, **config)`` returns the path of a checkpoint of that architecture. Weights are
drawn wider than the library's default, so that next-token laws are far from uniform.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import torch

TEXT = (
    "the film was a quiet triumph and the cast was superb. the plot was thin but the music was lovely.\n"
    "a dull, overlong story with one good scene; we liked the ending more than the beginning.\n"
    "critics said that the actors were brilliant, that the camera work was poor and that nobody cared.\n"
) * 4

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
KINDS: dict[str, dict[str, object]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "llama": {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64},
    "qwen2": {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64},
    "qwen3": {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64},
    "mistral": {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64, "sliding_window": 6},
    "gemma2": {
        **SMALL,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "sliding_window": 6,
        "final_logit_softcapping": 3.0,
    },
    "cohere": {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64, "logit_scale": 0.25},
    "granite": {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64, "logits_scaling": 4.0},
    "gpt_neox": {**SMALL, "max_position_embeddings": 64},
    "opt": {
        **SMALL,
        "ffn_dim": 48,
        "word_embed_proj_dim": 16,
        "max_position_embeddings": 64,
        "do_layer_norm_before": False,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "expand": 2},
}


@functools.cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="klkit-tiny-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


@functools.cache
def tokenizer(vocab_size: int = 320):
    """A byte-level BPE tokenizer with one special token, which begins and ends texts as in GPT-2."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        [TEXT], vocab_size=vocab_size, min_frequency=1, special_tokens=["<|endoftext|>"], show_progress=False
    )
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token=end, eos_token=end, unk_token=end)


def build(
    kind: str = "gpt2", *, seed: int = 0, std: float = 0.4, vocabulary: int = 320, **config: object
) -> torch.nn.Module:
    """A model of the architecture ``kind`` with random weights; ``config`` overrides its small shape."""
    from transformers import AutoConfig, AutoModelForCausalLM

    words = tokenizer(vocabulary)
    settings = {
        "vocab_size": len(words),
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": None,
        **KINDS[kind],
        **config,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
        generator = torch.Generator().manual_seed(seed)
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "norm" not in name:
                weight.data.normal_(0.0, std, generator=generator)
    return model.eval()


@functools.cache
def folder(kind: str = "gpt2", *, seed: int = 0, vocabulary: int = 320, **config: object) -> Path:
    """A checkpoint folder with weights, settings and a tokenizer of that size, built once a session."""
    name = "-".join([kind, str(seed), str(vocabulary), *(f"{k}={v}" for k, v in sorted(config.items()))])
    path = _root() / name.replace("/", "_")
    build(kind, seed=seed, vocabulary=vocabulary, **config).save_pretrained(path)
    tokenizer(vocabulary).save_pretrained(path)
    return path
