"""What a policy is worth, whatever trained it: KL by ``rb_cv`` and mean reward on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from klkit.estimators import summarise
from klkit.estimators.statistics import TokenStatistics, collect
from klkit.estimators.variates import token_features
from klkit.results import Estimate, jsonable
from klkit.rng import derive
from klkit.sampling.ancestral import sample
from klkit.sequences import Content
from klkit.stats.intervals import Interval, cluster_totals, ratio_interval, ratio_stderr
from klkit.train.policy import Policy
from klkit.train.rewards import Reward, rewarded
from klkit.train.rl import read_contexts

BATCH = 64
FEATURES = 16


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A policy's divergence from its reference and its reward, on the same strings.

    Attributes:
        step: training steps behind the policy.
        kl: KL(p‖q) by ``rb_cv``, nats per response, with its interval.
        reward: mean reward.
        reward_stderr: its standard error, clustered by prompt.
        reward_interval: its 95 % interval.
        length: mean number of tokens.
        finished: share of strings that ended by themselves.
        rewards: of each string, ``(n,)``; those of one prompt together.
    """

    step: int
    kl: Estimate
    reward: float
    reward_stderr: float
    reward_interval: Interval
    length: float
    finished: float
    rewards: NDArray[np.float64]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for a file; those that are not finite as text."""
        kl, reward = self.kl.interval(), self.reward_interval
        numbers = {
            "kl": self.kl.value,
            "kl_stderr": self.kl.stderr,
            "kl_lower": kl.lower,
            "kl_upper": kl.upper,
            "reward": self.reward,
            "reward_stderr": self.reward_stderr,
            "reward_lower": reward.lower,
            "reward_upper": reward.upper,
            "length": self.length,
            "finished": self.finished,
        }
        plain = {name: jsonable(value) for name, value in numbers.items()}
        return {"step": self.step, "method": self.kl.method, "strings": self.kl.n, **plain}


def evaluate(
    policy: Policy,
    prompts: Sequence[Content],
    reward: Reward,
    *,
    samples: int = 4,
    max_tokens: int = 64,
    seed: int = 0,
    step: int = 0,
) -> Evaluation:
    """Draw from the policy, and estimate its KL(p‖q) and its reward.

    Strings are named by the seed, prompt and replicate and not by the step, so two policies are compared with common
    random numbers.

    Args:
        samples: strings a prompt.

    Raises:
        ValueError: a prompt leaves no room for a response, or the reward function misbehaved.
    """
    contexts, texts = read_contexts(policy, prompts, max_tokens)
    model, reference = policy.model, policy.reference
    embedding = reference.embedding()
    # Any function of a token is a fair variate; the reference's embedding stays the same along a run.
    features: Float[Tensor, "v f"] | None = None if embedding is None else token_features(embedding, FEATURES)
    names = [(i, r) for i in range(len(contexts)) for r in range(samples)]
    parts: list[TokenStatistics] = []
    rewards: list[Tensor] = []
    for at in range(0, len(names), BATCH):
        some = names[at : at + BATCH]
        draw = sample(
            model,
            [contexts[i] for i, _ in some],
            max_tokens=max_tokens,
            seed=derive(seed, "evaluation"),
            prompt=[i for i, _ in some],
            replicate=[r for _, r in some],
            cluster=[i if len(contexts) > 1 else r for i, r in some],
        )
        x = draw.sequences
        hidden_q = reference.encode(x)
        # Half precision differs between the passes of a cache and of whole strings: then both read whole strings.
        hidden_p = draw.hidden if model.dtype in (torch.float32, torch.float64) else model.encode(x)
        parts.append(collect(model, hidden_p, reference, hidden_q, x, features=features))
        rewards.append(rewarded(reward, model, [texts[i] for i, _ in some], x))
    statistics = TokenStatistics.cat(parts)
    values, x = torch.cat(rewards).numpy(), statistics.x
    totals = cluster_totals(values, np.ones(len(values)), x.cluster.numpy())
    return Evaluation(
        step=step,
        kl=summarise("rb_cv", statistics),
        reward=float(values.mean()),
        reward_stderr=ratio_stderr(*totals),
        reward_interval=ratio_interval(*totals),
        length=float(x.lengths.double().mean()),
        finished=float(x.finished.double().mean()),
        rewards=values,
    )
