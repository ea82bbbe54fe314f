"""Strings of a model drawn by a vLLM engine, to be scored here.

An engine draws tokens many times faster than one process of transformers, but the full-vocabulary
log-probabilities that exact divergences need are what it is worst at handing out. So only token ids
are taken from it, and both models are run over the finished strings:

    engine = LLM("org/model", dtype="bfloat16")  # from vllm
    p, q = klkit.load("org/model,dtype=bfloat16"), klkit.load("org/other,dtype=bfloat16")
    x = sample(engine, p, [p.context(None)] * 1000, max_tokens=256, seed=0, prompt=[0] * 1000)
    print(summarise("rb", klkit.score(p, q, x)))  # summarise from klkit.estimators

Written against the interface of ``LLM.generate`` and ``SamplingParams`` in vLLM's sources and tested
with a stand-in for the engine; it has not been run with vLLM itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from klkit import rng
from klkit.models.base import LanguageModel
from klkit.sampling.ancestral import name_strings
from klkit.sequences import Sequences


def sample(
    engine: Any,
    model: LanguageModel,
    contexts: Sequence[Int[Tensor, " _c"]],
    *,
    max_tokens: int,
    seed: int,
    prompt: Sequence[int] | None = None,
    replicate: Sequence[int] | None = None,
    cluster: Sequence[int] | None = None,
    weighted: bool = False,
    **options: Any,
) -> Sequences:
    """Draw one string ``y ~ p(· | context)`` for each context from ``engine``, which serves the weights of ``model``.

    Sampling is plain: temperature 1, nothing cut off or penalised, whatever the model's generation config says,
    and a string ends where ``model`` says that it ends. Every string has a seed of its own, from its name as in
    :func:`klkit.sampling.ancestral.sample`; how far that repeats a string in another batch is up to the engine.

    Args:
        engine: a ``vllm.LLM``. It batches by itself: give it all contexts at once.
        model: ``p`` as klkit scores it.
        max_tokens: decisions a string may have; a string cut there is not ``finished``.
        prompt: names of the prompts, as for :func:`klkit.sampling.ancestral.sample`.
        replicate: tells strings of one prompt apart.
        cluster: independent units.
        weighted: also record the engine's log-probability of each drawn token. Estimates then weigh the strings by
            how the engine's law differs from ``model``'s (other kernels, quantised weights or caches), which makes
            them right but less precise; the engine's ``logprobs_mode`` must be the default, ``raw_logprobs``.
        options: passed on to ``engine.generate``, ``lora_request`` for instance.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: the engine returned strings that ``model`` could not have been sampled to give: of other
            contexts, with tokens outside its vocabulary, going on after an end token, or stopped before one.
    """
    prompt, replicate, cluster = name_strings(len(contexts), prompt, replicate, cluster)
    ends = sorted(model.vocabulary.ends)
    seeds = [rng.derive(seed, "string", k, r) for k, r in zip(prompt, replicate, strict=True)]
    requests = [{"prompt_token_ids": context.tolist()} for context in contexts]
    outputs = engine.generate(
        requests, [_plain(s, ends, max_tokens, weighted) for s in seeds], **{"use_tqdm": False, **options}
    )
    if len(outputs) != len(contexts):
        raise ValueError(f"expected one output for each of {len(contexts)} contexts, got {len(outputs)}")
    completions = []
    for i, (request, output) in enumerate(zip(requests, outputs, strict=True)):
        if output.prompt_token_ids is not None and list(output.prompt_token_ids) != request["prompt_token_ids"]:
            raise ValueError(
                f"expected the engine to continue the tokens it was given, got a prompt of {output.prompt_token_ids} "
                f"for context {i}, {request['prompt_token_ids']}; it must not add tokens of its own"
            )
        tokens = list(output.outputs[0].token_ids)
        _require_string(tokens, i, model, max_tokens, output.outputs[0].finish_reason)
        completions.append(torch.tensor(tokens, dtype=torch.long))
    x = Sequences.pack(
        [c.cpu() for c in contexts],
        completions,
        prompt=prompt,
        cluster=cluster,
        finished=[int(tokens[-1]) in ends for tokens in completions],
    )
    return replace(x, sampler_logp=_logprobs(outputs)) if weighted else x


def _plain(seed: int, ends: list[int], max_tokens: int, weighted: bool) -> Any:
    """Sampling parameters under which an engine draws from the model's own law."""
    try:
        parameters = import_module("vllm").SamplingParams
    except ModuleNotFoundError as missing:
        raise ImportError(
            "expected vLLM for its SamplingParams, but it is not installed: pip install vllm"
        ) from missing
    return parameters(
        n=1,
        temperature=1.0,
        top_p=1.0,
        top_k=-1,
        min_p=0.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=1.0,
        seed=seed,
        # The engine's own idea of an end may differ from the model's here, so only the latter counts.
        ignore_eos=True,
        stop_token_ids=ends,
        min_tokens=0,
        max_tokens=max_tokens,
        logprobs=0 if weighted else None,
        detokenize=False,
    )


def _require_string(tokens: list[int], i: int, model: LanguageModel, max_tokens: int, reason: str | None) -> None:
    """Refuse a completion that sampling from ``model`` cannot give."""
    ends = model.vocabulary.ends
    if any(not 0 <= token < model.vocabulary.size for token in tokens):
        raise ValueError(
            f"expected tokens of the {model.vocabulary.size} that {model.name} has, got {min(tokens)} to {max(tokens)} "
            f"in string {i}; the engine must serve the same model"
        )
    if any(token in ends for token in tokens[:-1]):
        raise ValueError(
            f"expected string {i} to stop at the first of {model.name}'s end tokens {list(ends)}, got one of them "
            f"before the last of its {len(tokens)} tokens; check how this engine handles stop_token_ids"
        )
    if len(tokens) > max_tokens or (len(tokens) < max_tokens and not (tokens and tokens[-1] in ends)):
        raise ValueError(
            f"expected string {i} to end with one of {model.name}'s end tokens or to have {max_tokens} tokens, got "
            f"{len(tokens)} tokens (finish reason {reason!r}); the engine's max_model_len must hold prompt and response"
        )


def _logprobs(outputs: Sequence[Any]) -> Float[Tensor, " m"]:
    """The engine's log-probability of every drawn token."""
    values = [
        entry[token].logprob
        for output in outputs
        for token, entry in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)
