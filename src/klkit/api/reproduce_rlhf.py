"""Sentiment control with every KL penalty, several coefficients and seeds: the runs, each measured in the same way.

A policy that starts at ``klkit:reviews`` is trained towards the sentiment of film reviews, under each penalty, for each
coefficient and seed. Runs of one coefficient and seed share prompts and random numbers and differ in the penalty alone.
Whatever they were trained with, reward and KL are measured on the same held-out prompts by ``rb_cv`` with one seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klkit.api.jobs import Job, Watch, finish, openings
from klkit.api.prompts import read_prompts
from klkit.estimators import ESTIMATORS
from klkit.estimators.statistics import score
from klkit.models.hf import HuggingFaceModel
from klkit.models.spec import load_network
from klkit.sampling.ancestral import sample
from klkit.train.recipe import Recipe
from klkit.train.rewards import grammar_reward, rewarded
from klkit.train.rl import TrainingStopped, start, step

MODEL = "klkit:reviews"
ARMS = ("mc", "rb", "rb_full", "rb_detached", "token_local", "k3_loss", "k1_reward")
"""The last is what trainers with the KL in the reward do, and what arXiv 2504.10637 compares with."""


@dataclass(frozen=True, slots=True)
class Study:
    """What is trained and how it is measured; every field but ``seeds`` and ``coefficients`` changes single runs.

    Attributes:
        arms: KL penalties that are compared, keys of :data:`klkit.train.penalties.PENALTIES`; the first is the one
            that others are held against.
        coefficients: prices of a nat.
        seeds: repeated runs of each arm and coefficient.
        steps: of each run.
        prompts: training prompts a step, with two strings each.
        max_tokens: longest response, in training and in measuring.
        learning_rate: AdamW's.
        held_out: prompts that runs are measured on.
        strings: strings drawn for each of them.

    Raises:
        ValueError: fewer than two arms or seeds.
    """

    arms: tuple[str, ...] = ARMS
    coefficients: tuple[float, ...] = (0.4, 0.7, 1.2, 2.0)
    seeds: int = 5
    steps: int = 100
    prompts: int = 16
    max_tokens: int = 64
    learning_rate: float = 3e-4
    held_out: int = 64
    strings: int = 16

    def __post_init__(self) -> None:
        if len(set(self.arms)) < 2 or self.seeds < 2:
            raise ValueError(f"expected two arms and two seeds at least, got {self.arms} and {self.seeds} seeds")

    def recipe(self, arm: str, coefficient: float, seed: int) -> Recipe:
        """How a run is trained."""
        return Recipe(
            penalty=arm, coefficient=coefficient, prompts=self.prompts, samples=2, max_tokens=self.max_tokens,
            learning_rate=self.learning_rate, seed=seed,
        )  # fmt: skip


SMOKE = Study(
    arms=("mc", "rb", "token_local"), coefficients=(0.5,), seeds=2, steps=6, prompts=8, max_tokens=32,
    held_out=12, strings=4,
)  # fmt: skip
"""The same in seconds: it shows that everything works, and nothing else."""


@dataclass(frozen=True, slots=True)
class Point:
    """A policy measured on the held-out prompts.

    Attributes:
        arm: penalty it was trained with.
        coefficient: price of a nat.
        seed: of its run.
        step: training steps done.
        final: whether the run ended here.
        reward: mean sentiment of prompt and response.
        reward_error: its standard error for these prompts (from the strings of each prompt).
        kl: KL(p‖q), nats per response.
        kl_error: its standard error, likewise.
        length: mean tokens of a response.
        stopped: why the run ended before its last step; empty if it did not.
    """

    arm: str
    coefficient: float
    seed: int
    step: int
    final: bool
    reward: float
    reward_error: float
    kl: float
    kl_error: float
    length: float
    stopped: str = ""


def reproduce_rlhf(study: Study, out: Path, *, workers: int = 1, observe: Watch | None = None) -> list[Point]:
    """Train and measure every run, one process a core; what is in ``out`` is not done again.

    Raises:
        ValueError: ``out`` cannot be written, or holds runs of other settings.
    """
    jobs = [
        Job(f"{arm}-{coefficient:g}-{seed}", run_settings(study, arm, coefficient, seed))
        for seed in range(study.seeds)  # whole repetitions first, so that what there is is balanced
        for coefficient in study.coefficients
        for arm in study.arms
    ]
    found = finish(train_and_measure, jobs, out / "runs", workers=workers, observe=observe)
    return [Point(**point) for result in found for point in result["points"]]


def run_settings(study: Study, arm: str, coefficient: float, seed: int) -> dict[str, Any]:
    """All that one run depends on."""
    shared = {k: v for k, v in asdict(study).items() if k not in ("arms", "coefficients", "seeds")}
    return {"arm": arm, "coefficient": coefficient, "seed": seed, "study": shared}


def train_and_measure(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """One run: the points half-way and at the end, and reward and KL of its own strings at every step."""
    study = Study(**settings["study"])
    recipe = study.recipe(settings["arm"], settings["coefficient"], settings["seed"])
    reference = load_network(MODEL)
    held_out = [str(text) for text in read_prompts(MODEL).contents]
    state = start(reference, openings(256, seed=0, without=held_out), grammar_reward, recipe)
    identity = {"arm": recipe.penalty, "coefficient": recipe.coefficient, "seed": recipe.seed}
    points, curve, stopped = [], [], ""
    while state.step < study.steps and not stopped:
        try:
            state, metrics = step(state)
            curve.append([round(metrics.reward, 6), round(metrics.kl, 6)])
        except TrainingStopped as error:
            stopped = str(error)
        if state.step == study.steps // 2 and not stopped:
            points.append(identity | {"final": False} | measure(state.policy.model, reference, study, state.step))
    last = measure(state.policy.model, reference, study, state.step)
    points.append(identity | {"final": True, "stopped": stopped} | last)
    return {"points": points, "curve": curve}


def held_out_prompts(study: Study) -> list[str]:
    """The packaged openings that runs are measured on; training meets none of them."""
    return [str(text) for text in read_prompts(MODEL).contents[: study.held_out]]


def measure(p: HuggingFaceModel, q: HuggingFaceModel, study: Study, done: int) -> dict[str, Any]:
    """Reward and KL on the held-out prompts: the same prompts, estimator and random numbers for every policy."""
    prompts = held_out_prompts(study)
    contexts = [p.context(prompt) for prompt in prompts]
    names = [k for k in range(len(contexts)) for _ in range(study.strings)]
    x = sample(
        p, [contexts[k] for k in names], max_tokens=study.max_tokens, seed=0, prompt=names, settle=False
    ).sequences
    kl = ESTIMATORS["rb_cv"](score(p, q, x, batch_size=256)).reshape(len(contexts), study.strings)
    found = rewarded(grammar_reward, p, [prompts[k] for k in names], x)
    rewards = found.numpy().reshape(kl.shape)
    return {
        "step": done,
        "reward": float(rewards.mean()),
        "reward_error": fixed_prompts_error(rewards),
        "kl": float(kl.mean()),
        "kl_error": fixed_prompts_error(kl),
        "length": float(x.lengths.double().mean()),
    }


def fixed_prompts_error(values: NDArray[np.float64]) -> float:
    """Standard error of the mean of ``(prompt, string)`` values over new strings for the same prompts.

    Example:
        >>> fixed_prompts_error(np.array([[0.0, 2.0], [10.0, 12.0]]))
        0.7071067811865476
    """
    prompts, strings = values.shape
    return math.sqrt(float(values.var(1, ddof=1).sum()) / strings) / prompts if strings > 1 else math.nan
