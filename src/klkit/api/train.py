"""``klkit train rl`` for Python: a whole training run, with its folder, evaluations and exact resumption."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from klkit.api.prepare import versions
from klkit.api.prompts import read_prompts
from klkit.models.spec import ModelSpec, load_network
from klkit.report.plots import reward_kl_figure
from klkit.rng import numpy_stream
from klkit.sequences import Content
from klkit.train.checkpoints import restore, save_checkpoint
from klkit.train.evaluate import Evaluation, evaluate
from klkit.train.folder import CHECKPOINTS, EVALUATIONS, FIGURE, METRICS, TrainingFolder
from klkit.train.learner import ALL_LAYERS, Learner
from klkit.train.policy import Policy, full_policy, lora_policy
from klkit.train.recipe import Recipe
from klkit.train.rewards import GRAMMAR, Reward, RewardError, read_reward
from klkit.train.rl import Metrics, State, TrainingStopped, start, step

HELD_OUT_SHARE, FEWEST_HELD_OUT, MOST_HELD_OUT = 0.2, 10, 128


@dataclass(frozen=True, slots=True)
class Training:
    """Everything that a training run needs; what is not free on resumption has to stay the same.

    Attributes:
        policy: specification of the model to train.
        reward: see :func:`klkit.train.rewards.read_reward`.
        prompts: file of prompts, or ``klkit:NAME``.
        reference: specification of the model that the KL term holds to; None for the policy as it starts.
        column: field that holds the prompts.
        held_out: file of prompts to evaluate on; None keeps a fifth of the prompts for that.
        steps: training steps in all.
        every: steps between evaluations, each with a checkpoint.
        samples: strings a held-out prompt.
        lora: rank of an adapter; 0 trains all weights.
        lora_layers: names of the layers that get one.
        device: where everything runs.
        keep: checkpoints to keep; 0 keeps all.
        recipe: how it is trained.

    Raises:
        ValueError: a number is out of range, or options exclude each other.
    """

    policy: str
    reward: str
    prompts: str
    reference: str | None = None
    column: str = "prompt"
    held_out: str | None = None
    steps: int = 200
    every: int = 25
    samples: int = 8
    lora: int = 0
    lora_layers: str | tuple[str, ...] = ALL_LAYERS
    device: str = "cpu"
    keep: int = 3
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("every", 1), ("samples", 1), ("lora", 0), ("keep", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"expected {name} of at least {least}, got {getattr(self, name)}; raise it")
        if self.lora and self.reference is not None:
            raise ValueError(
                f"expected no reference with LoRA, whose reference is the model without its adapter, got "
                f"{self.reference!r}; leave --reference out, or --lora"
            )


@dataclass(frozen=True, slots=True)
class Report:
    """What happened, for whoever watches: a step, an evaluation, or both.

    Attributes:
        step: steps done, of ``steps``.
        metrics: of the step; None for an evaluation.
        evaluation: None for a step.
        seconds: since the run began, or was resumed, ``fresh`` steps ago.
    """

    step: int
    steps: int
    metrics: Metrics | None
    evaluation: Evaluation | None
    seconds: float
    fresh: int


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished run.

    Attributes:
        state: after the last step; ``state.policy.model`` is a klkit model.
        evaluations: as in ``evaluations.jsonl``, the first before any step.
        checkpoint: the last one; None without a folder.
        notes: what a reader of the numbers should know.
    """

    state: State
    evaluations: tuple[dict[str, Any], ...]
    checkpoint: Path | None
    notes: tuple[str, ...]


def train_rl(
    training: Training,
    *,
    reward: Reward | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    observe: Callable[[Report], None] | None = None,
) -> Trained:
    """Descend ``−E_p[reward] + coefficient · KL(p‖q)`` by policy gradients, and evaluate it all along the way.

    Args:
        reward: the function itself, where it is no module's; ``training.reward`` is then its name for the record.
        out: folder to write; None keeps nothing on disk.
        resume: go on from the last checkpoint in ``out``, exactly as if the run had not stopped.
        observe: called after every step and evaluation.

    Raises:
        ValueError: a model, a prompt, an option or the reward cannot be used.
        VocabularyMismatch: the reference does not choose from the same tokens.
        TrainingStopped: the divergence exploded or a gradient is no number; the last checkpoint is kept.

    Example:
        >>> recipe = Recipe(prompts=4, max_tokens=8, learning_rate=1e-3)
        >>> training = Training("klkit:reviews", "klkit:reviews", "klkit:reviews", steps=1, samples=1, recipe=recipe)
        >>> trained = train_rl(training)
        >>> [line["step"] for line in trained.evaluations], trained.evaluations[0]["kl"] < 1e-9
        ([0, 1], True)
    """
    contents = read_prompts(training.prompts, training.column).contents
    held_out, rest, notes = split_prompts(contents, training)
    scored = read_reward(training.reward, device=training.device) if reward is None else reward
    policy = make_policy(training)
    state = start(policy, rest, scored, training.recipe)
    folder = None
    if out is not None:
        env = environment(policy, rest, held_out)
        folder = TrainingFolder.create(Path(out), asdict(training), env, resume=resume)
    lines: list[dict[str, Any]] = []
    if folder is not None and folder.checkpoints():
        state = restore(state, folder.checkpoints()[-1])
    if folder is not None:
        folder.rewind(state.step if state.step else -1)
        lines = folder.lines(EVALUATIONS)
    began, first = time.monotonic(), state.step

    def tell(metrics: Metrics | None, evaluation: Evaluation | None) -> None:
        if observe is not None:
            seconds = time.monotonic() - began
            observe(Report(state.step, training.steps, metrics, evaluation, seconds, state.step - first))

    def look() -> None:
        found = evaluate(
            policy,
            held_out,
            scored,
            samples=training.samples,
            max_tokens=training.recipe.max_tokens,
            seed=training.recipe.seed,
            step=state.step,
        )
        require_sane(found, training.recipe.max_kl)
        lines.append(found.to_dict())
        if folder is not None:
            folder.log(EVALUATIONS, lines[-1])
            if state.step:
                save_checkpoint(state, folder.path / CHECKPOINTS, keep=training.keep)
        tell(None, found)

    if not lines:
        look()
    try:
        while state.step < training.steps:
            state, metrics = step(state)
            if folder is not None:
                folder.log(METRICS, metrics.to_dict())
            tell(metrics, None)
            if state.step % training.every == 0 or state.step == training.steps:
                look()
    except RewardError:
        # It failed on strings of a policy that is as good as any before: what was learnt so far is kept.
        if folder is not None and state.step:
            save_checkpoint(state, folder.path / CHECKPOINTS, keep=training.keep)
        raise
    finally:
        if folder is not None:
            (folder.path / FIGURE).write_bytes(reward_kl_figure(lines, best_possible(training, held_out)))
    kept = [] if folder is None else folder.checkpoints()
    return Trained(state, tuple(lines), kept[-1] if kept else None, notes)


def make_policy(training: Training) -> Policy:
    """Load what is trained and what it is held to."""
    options = {} if training.device == "cpu" else {"device": training.device}
    model = load_network(training.policy, **options)
    if not training.lora:
        reference = model if training.reference is None else load_network(training.reference, **options)
        return full_policy(model, reference)
    policy = lora_policy(model, training.lora, layers=training.lora_layers, seed=training.recipe.seed, in_place=True)
    name_base(policy, training.policy)
    return policy


def name_base(learner: Learner, spec: str) -> None:
    """Name an adapter's base, so that its folder is a klkit specification by itself, wherever packaged models lie."""
    base = ModelSpec.parse(spec)
    config = learner.adapter.peft_config["default"]
    config.base_model_name_or_path, config.revision = _stable(base.path), base.revision


def split_prompts(
    contents: Sequence[Content], training: Training
) -> tuple[list[Content], list[Content], tuple[str, ...]]:
    """Prompts to evaluate on, prompts to train on, and what there is to say about it."""
    if training.held_out is not None:
        return list(read_prompts(training.held_out, training.column).contents), list(contents), ()
    count = min(MOST_HELD_OUT, max(FEWEST_HELD_OUT, round(HELD_OUT_SHARE * len(contents))))
    if count > len(contents) // 2:
        note = f"evaluated on the training prompts themselves: {len(contents)} are too few to keep some apart"
        return list(contents), list(contents), (note,)
    chosen = set(numpy_stream(training.recipe.seed, "held-out").permutation(len(contents))[:count].tolist())
    held_out = [content for i, content in enumerate(contents) if i in chosen]
    note = f"evaluated on {count} of the {len(contents)} prompts, which are not trained on"
    return held_out, [content for i, content in enumerate(contents) if i not in chosen], (note,)


def require_sane(evaluation: Evaluation, bound: float) -> None:
    """Stop where the policy has come apart by the measure that counts.

    Raises:
        TrainingStopped: its KL is above ``bound``, or is no number.
    """
    if not evaluation.kl.value <= bound:
        raise TrainingStopped(
            f"expected a KL of at most {bound:g} nats per response on the held-out prompts, got "
            f"{evaluation.kl.value:.4g} after step {evaluation.step}: the policy has come apart from its reference; "
            f"lower the learning rate, raise the coefficient, or raise the bound if this is meant"
        )


def best_possible(training: Training, prompts: Sequence[Content]) -> list[tuple[float, float]]:
    """``(KL, reward)`` that no policy surpasses, where it is known: for the packaged grammar's reward on its model."""
    from klkit.zoo.grammar import reviews
    from klkit.zoo.optimum import optimal_frontier

    texts = [content for content in prompts if isinstance(content, str)]
    base = training.reference or training.policy
    if training.reward != GRAMMAR or base.split(",")[0] != GRAMMAR or len(texts) < len(prompts):
        return []
    try:
        rewards, divergences = optimal_frontier(reviews(), texts, np.square(np.linspace(0, 2, 21)).tolist())
    except ValueError:  # prompts that the grammar cannot write
        return []
    return list(zip(divergences, rewards, strict=True))


def environment(policy: Policy, prompts: Sequence[Content], held_out: Sequence[Content]) -> dict[str, Any]:
    """Versions, and digests of what a resumed run must find unchanged."""
    model, reference = policy.model, policy.reference
    digests = {
        "policy": model.digest,
        "reference": reference.digest,
        "prompts": digest([model.context(content).tolist() for content in prompts]),
        "held-out prompts": digest([model.context(content).tolist() for content in held_out]),
    }
    return {"versions": versions(), "digests": digests}


def digest(value: object) -> str:
    """What tells a value from others, by how it is written."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _stable(path: str) -> str:
    folder = Path(path).expanduser()
    return str(folder.resolve()) if folder.is_dir() else path
