"""Policy-gradient training as two functions: :func:`start` makes a state, :func:`step` the next one.

A step draws strings from the policy, has them rewarded, and descends ``−E_p[reward] + β KL(p‖q)`` once or a few
times on them. Nothing is written anywhere, and every random number is named by the seed and the step's number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from klkit.rng import derive, numpy_stream
from klkit.sampling.ancestral import sample
from klkit.sequences import Content
from klkit.train.gradients import Sums, form_gradients, read_part
from klkit.train.policy import Policy, full_policy
from klkit.train.recipe import Recipe
from klkit.train.rewards import Reward, rewarded

if TYPE_CHECKING:
    from klkit.models.hf import HuggingFaceModel

STEERING, GAIN = 0.2, 0.1
"""Largest relative error of the KL that steers the coefficient, and how much of it is acted on."""


class TrainingStopped(ArithmeticError):
    """A run came apart: its divergence exploded, or a gradient is no number. The weights are those before the step."""


@dataclass(frozen=True, eq=False, slots=True)
class State:
    """A run between two steps.

    Attributes:
        policy: the model under training and its reference; a step changes the weights in place.
        optimizer: its state changes in place, too.
        recipe: how it is trained.
        contexts: token ids of each prompt.
        texts: each prompt as the reward function reads it.
        reward: what is maximised.
        coefficient: price of a nat of KL in the next step.
        step: steps done.
    """

    PROGRESS: ClassVar[tuple[str, ...]] = ("step", "coefficient")

    policy: Policy
    optimizer: torch.optim.Optimizer
    recipe: Recipe
    contexts: Sequence[Int[Tensor, " _c"]]
    texts: Sequence[str]
    reward: Reward
    coefficient: float
    step: int = 0

    @property
    def learner(self) -> Policy:
        """What a checkpoint holds."""
        return self.policy


@dataclass(frozen=True, slots=True)
class Metrics:
    """What a step measured on its strings, before it changed the weights.

    Attributes:
        step: its number, from 1.
        reward: mean reward.
        reward_stderr: its standard error over prompts.
        kl: mean of ``Σ_n D_n``, the Rao-Blackwell estimate of KL(p‖q) in nats per response.
        kl_mc: mean of ``Σ_n u_n``, the Monte Carlo estimate of the same.
        length: mean number of tokens.
        finished: share of strings that ended by themselves.
        coefficient: price of a nat.
        gradient_norm: length of the gradient before it was shortened, of the last update.
        effective: effective share of the strings in the last update, ``(Σ r)² / (n Σ r²)``; 1 on-policy.
        seconds: time the step took.
        sampling_seconds: of which drawing strings took.
    """

    step: int
    reward: float
    reward_stderr: float
    kl: float
    kl_mc: float
    length: float
    finished: float
    coefficient: float
    gradient_norm: float
    effective: float
    seconds: float
    sampling_seconds: float

    def to_dict(self) -> dict[str, int | float]:
        """The numbers by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def start(
    policy: Policy | HuggingFaceModel, prompts: Sequence[Content], reward: Reward, recipe: Recipe | None = None
) -> State:
    """The state before the first step.

    Args:
        policy: what is trained; a model stands for a copy of it, held to the model itself, which stays as it is.
        prompts: texts, conversations or token ids; steps go through them in shuffled order.
        reward: from prompts and responses to numbers, see :mod:`klkit.train.rewards`.
        recipe: by default that of :class:`Recipe`.

    Raises:
        ValueError: there is no prompt, or one leaves no room for a response in a model's window.
    """
    recipe = recipe or Recipe()
    policy = policy if isinstance(policy, Policy) else full_policy(policy)
    contexts, texts = read_contexts(policy, prompts, recipe.max_tokens)
    weights = [weight for _, weight in policy.parameters]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, betas=(0.9, 0.999), weight_decay=0.0)
    return State(policy, optimizer, recipe, contexts, texts, reward, recipe.coefficient)


def step(state: State) -> tuple[State, Metrics]:
    """Draw, reward, update: the state after one step, and what it measured.

    Raises:
        TrainingStopped: the mean KL of the batch is above the recipe's bound, or a gradient is not finite.
        RewardError: the reward function raised, or returned what is no list of finite numbers, one a response.
    """
    began, recipe, policy = time.monotonic(), state.recipe, state.policy
    names = step_prompts(len(state.contexts), state.step, recipe)
    draw = sample(
        policy.model,
        [state.contexts[i] for i in names],
        max_tokens=recipe.max_tokens,
        seed=derive(recipe.seed, "rl", state.step),
        prompt=[i for i in range(recipe.prompts) for _ in range(recipe.samples)],  # a prompt may come twice
        settle=False,
    )
    drawn = time.monotonic()
    x = draw.sequences
    rewards = rewarded(state.reward, policy.model, [state.texts[i] for i in names], x)
    strings, n = replace(x, sampler_logp=draw.logp), len(x)
    size = recipe.micro_batch or n
    rows = torch.split(torch.arange(n), size)
    parts = [read_part(policy, strings.select(some), rewards[some]) for some in rows]
    weights = [weight for _, weight in policy.parameters]
    first: Sums | None = None
    for update in range(recipe.updates):
        state.optimizer.zero_grad()
        options = {"off_policy": update > 0}
        try:
            sums = Sums.cat(
                [form_gradients(policy, p, recipe, state.coefficient, share=len(p) / n, **options) for p in parts]
            )
        except ValueError as error:  # a logit or a divergence that is not finite
            raise TrainingStopped(f"expected finite numbers in step {state.step + 1}, got: {error}") from error
        norm = torch.nn.utils.clip_grad_norm_(weights, recipe.gradient_norm)
        first = first or sums
        _require_sound(state, float(sums.kl.mean()), float(norm))
        state.optimizer.step()
    assert first is not None
    moved = (sums.logp - first.logp).exp()
    by_prompt = rewards.view(recipe.prompts, recipe.samples).mean(1)
    metrics = Metrics(
        step=state.step + 1,
        reward=float(rewards.mean()),
        reward_stderr=float(by_prompt.std() / recipe.prompts**0.5) if recipe.prompts > 1 else float("nan"),
        kl=float(first.kl.mean()),
        kl_mc=float(first.log_ratio.mean()),
        length=float(x.lengths.double().mean()),
        finished=float(x.finished.double().mean()),
        coefficient=state.coefficient,
        gradient_norm=float(norm),
        effective=float(moved.sum().square() / (n * moved.square().sum())),
        seconds=time.monotonic() - began,
        sampling_seconds=drawn - began,
    )
    return replace(state, step=state.step + 1, coefficient=steered(state, metrics.kl)), metrics


def step_prompts(count: int, step: int, recipe: Recipe) -> list[int]:
    """The prompt of each string of a step: pass after pass over all prompts, each in an order of its own.

    Example:
        >>> step_prompts(3, 0, Recipe(prompts=2)) + step_prompts(3, 1, Recipe(prompts=2))
        [0, 0, 2, 2, 1, 1, 2, 2]
    """
    places = range(step * recipe.prompts, (step + 1) * recipe.prompts)
    orders = {e: numpy_stream(recipe.seed, "prompts", e).permutation(count) for e in {i // count for i in places}}
    return [int(orders[i // count][i % count]) for i in places for _ in range(recipe.samples)]


def read_contexts(policy: Policy, prompts: Sequence[Content], max_tokens: int) -> tuple[list[Tensor], list[str]]:
    """Token ids of each prompt, and its text as a reward function reads it.

    Raises:
        ValueError: there is no prompt, or one leaves no room for a response in a model's window.
    """
    if not len(prompts):
        raise ValueError("expected at least one prompt, got none; name a file with --prompts")
    contexts = [policy.model.context(content) for content in prompts]
    windows = [m.window for m in (policy.model, policy.reference) if m.window is not None]
    room = min(windows, default=None)
    tight = [i for i, c in enumerate(contexts) if room is not None and len(c) + max_tokens > room]
    if room is not None and tight:
        longest = max(tight, key=lambda i: len(contexts[i]))
        left = room - len(contexts[longest])
        raise ValueError(
            f"expected prompts that leave room for {max_tokens} tokens in the {room} that {policy.model.name} reads, "
            f"got {len(tight)} that do not: prompt {longest + 1} has {len(contexts[longest])} tokens; shorten "
            f"{'it' if len(tight) == 1 else 'them'}" + (f", or lower --max-tokens to {left}" if left > 0 else "")
        )
    decode = policy.model.tokenizer.decode
    texts = [
        content if isinstance(content, str) else str(decode(ids.tolist(), skip_special_tokens=True))
        for content, ids in zip(prompts, contexts, strict=True)
    ]
    return contexts, texts


def steered(state: State, kl: float) -> float:
    """The next step's coefficient: dearer where the divergence is above the target, cheaper below.

    Source: D. Ziegler et al. (2019), Fine-Tuning Language Models from Human Preferences, arXiv 1909.08593, section 2.2.
    """
    if state.recipe.target_kl is None:
        return state.coefficient
    error = min(max(kl / state.recipe.target_kl - 1, -STEERING), STEERING)
    return state.coefficient * (1 + GAIN * error)


def _require_sound(state: State, kl: float, norm: float) -> None:
    """Stop before a step whose gradient is no number, or after a divergence that is beyond all bounds."""
    recipe, number = state.recipe, state.step + 1
    if not kl <= recipe.max_kl:
        raise TrainingStopped(
            f"expected a mean KL of at most {recipe.max_kl:g} nats per response, got {kl:.4g} in step {number}: the "
            f"policy has come apart from its reference; lower the learning rate ({recipe.learning_rate:g}), raise the "
            f"coefficient ({state.coefficient:.3g}), or raise the bound if this is meant"
        )
    if not math.isfinite(norm):
        raise TrainingStopped(
            f"expected a finite gradient, got one of length {norm} in step {number}; lower the learning rate "
            f"({recipe.learning_rate:g}) and look at the rewards of that step"
        )
