"""Rewards of responses: a function of one's own, a sequence classifier, or the packaged grammar's exact one."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from klkit.sequences import Sequences

if TYPE_CHECKING:
    from klkit.models.hf import HuggingFaceModel

Reward = Callable[[list[str], list[str]], Sequence[float]]
"""From prompts and responses, one of each a string, to a number for each."""

GRAMMAR = "klkit:reviews"
CLASSIFIER = "classifier:"
KINDS = "module:function, classifier:MODEL (or classifier:MODEL#LABEL), or klkit:reviews"


class RewardError(ValueError):
    """A reward function raised, or returned anything but one finite number for each response."""


def grammar_reward(prompts: list[str], responses: list[str]) -> list[float]:
    """The packaged grammar's sentiment of prompt and response together: an integer, exact.

    Example:
        >>> grammar_reward(["the acting was"], [" superb ."])
        [2.0]
    """
    from klkit.zoo.grammar import reward

    return [reward(prompt + response) for prompt, response in zip(prompts, responses, strict=True)]


def read_reward(name: str, *, device: str = "cpu") -> Reward:
    """The reward that ``name`` stands for.

    Args:
        name: ``module:function``, ``classifier:MODEL`` with a folder or hub id (and ``#LABEL``, a logit's name or
            number), or ``klkit:reviews``.
        device: where a classifier runs.

    Raises:
        ValueError: there is no such module, function, classifier or logit.

    Example:
        >>> read_reward("klkit:reviews") is grammar_reward
        True
    """
    if name == GRAMMAR:
        return grammar_reward
    if name.startswith(CLASSIFIER):
        source, _, label = name.removeprefix(CLASSIFIER).partition("#")
        return classifier_reward(source, label or None, device=device)
    module, colon, function = name.partition(":")
    if not colon or not module or not function or module == "klkit":
        raise ValueError(f"expected a reward of the form {KINDS}, got {name!r}; name one of these")
    # As `python -m` does: functions that lie in the folder where one works.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"expected a function {function!r} in the module {module!r} for the reward, got: {error}; check the names, "
            f"and run where the module can be imported"
        ) from error
    if not callable(found):
        raise ValueError(
            f"expected a function at {name}, got {type(found).__name__}; it takes prompts and responses, two lists of "
            f"str, and returns a list of floats"
        )
    return found  # type: ignore[no-any-return]


def classifier_reward(source: str, label: str | None = None, *, device: str = "cpu", batch_size: int = 64) -> Reward:
    """One raw logit of a sequence classifier on prompt and response together.

    Args:
        source: folder or hub id.
        label: name or number of the logit; by default the only one, or the last of several.

    Raises:
        ValueError: it cannot be loaded, or has no such logit.
    """
    import transformers

    from klkit.models.checkpoints import quiet

    library: Any = transformers
    with quiet():
        try:
            network, info = library.AutoModelForSequenceClassification.from_pretrained(source, output_loading_info=True)
            tokenizer = library.AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            first = str(error).strip().split("\n", maxsplit=1)[0]
            raise ValueError(
                f"expected a sequence classifier in transformers format, got {source!r}: {first}; name its "
                f"folder or hub id"
            ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"expected a trained sequence classifier, got {source!r}, which lacks {', '.join(missing[:3])}: its head "
            f"would be random numbers; name a checkpoint that was trained to classify"
        )
    network = network.eval().to(device)
    names = {str(v): int(k) for k, v in network.config.id2label.items()}
    count = int(network.config.num_labels)
    chosen = count - 1 if label is None else names.get(label, int(label) if label.isdecimal() else count)
    if chosen >= count:
        raise ValueError(
            f"expected one of the logits {', '.join(names)} (or 0 to {count - 1}) of {source}, got {label!r}; write "
            f"classifier:{source}#{next(iter(names))}"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        network.config.pad_token_id = tokenizer.pad_token_id

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        found: list[float] = []
        for i in range(0, len(texts), batch_size):
            inputs = tokenizer(texts[i : i + batch_size], return_tensors="pt", padding=True, truncation=True).to(device)
            with torch.inference_mode():
                found += network(**inputs).logits[:, chosen].float().tolist()
        return found

    return score


def response_texts(model: HuggingFaceModel, x: Sequences) -> list[str]:
    """Each completion as text, without its end token and other special ones."""
    ids = [x.completion(i).tolist() for i in range(len(x))]
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return [str(text) for text in model.tokenizer.batch_decode(ids, **options)]


def rewarded(reward: Reward, model: HuggingFaceModel, prompts: list[str], x: Sequences) -> Float[Tensor, " n"]:
    """The rewards of the strings ``x``, checked, in double precision.

    Raises:
        RewardError: the function raised, or returned anything but one finite number for each response.
    """
    responses = response_texts(model, x)
    name = getattr(reward, "__qualname__", type(reward).__name__)
    try:
        found = reward(prompts, responses)
        values = [float(value) for value in found]
    except Exception as error:
        # Whatever a stranger's function raises; its own traceback stays attached.
        raise RewardError(
            f"expected a list of numbers from the reward {name}, got {type(error).__name__}: {error}; it was called "
            f"with {len(responses)} prompts and responses, the first response {responses[0][:60]!r}"
        ) from error
    if len(values) != len(responses):
        raise RewardError(
            f"expected {len(responses)} rewards from {name}, one a response, got {len(values)}; return them in the "
            f"order of the responses"
        )
    wrong = [i for i, value in enumerate(values) if not math.isfinite(value)]
    if wrong:
        raise RewardError(
            f"expected finite rewards from {name}, got {values[wrong[0]]} for {len(wrong)} of {len(values)} responses, "
            f"the first {responses[wrong[0]][:60]!r}; return a number for every text, the empty one included"
        )
    return torch.tensor(values, dtype=torch.float64)
