"""How noisy each estimator of the KL gradient is along a training run: fixed prompts, independent rollouts.

At checkpoints of one run, ``K`` batches of strings are drawn, one string for each of the same prompts. On every batch
each estimator gives one gradient of all weights; all of them see the same strings. Reported are the total variance
``tr Cov g``, the variance of the norm ``‖g‖``, and how far the biased ones are from the truth.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from klkit.api.jobs import Job, Watch, finish, openings
from klkit.api.prompts import read_prompts
from klkit.divergences.differentiable import divergences
from klkit.estimators import ESTIMATORS
from klkit.estimators.statistics import TokenStatistics, score
from klkit.files import write_atomically
from klkit.models.hf import HuggingFaceModel
from klkit.models.spec import load_network
from klkit.objectives.policy import GRADIENT_ESTIMATORS, best_share, kl_surrogate
from klkit.rng import numpy_stream
from klkit.sampling.ancestral import sample
from klkit.train.policy import Decisions
from klkit.train.recipe import Recipe
from klkit.train.rewards import grammar_reward
from klkit.train.rl import start, step

Array = NDArray[np.float64]
MODEL = "klkit:reviews"
PUBLISHED = (59.90, 45.44)  # variance of the gradient's norm in arXiv 2504.10637: MC, RB
FORMULAS = {
    "mc_full": "U Σ_n s_n, U = Σ_n u_n",
    "mc": GRADIENT_ESTIMATORS["mc"].formula,
    "hybrid": GRADIENT_ESTIMATORS["hybrid"].formula,
    "rb_full": GRADIENT_ESTIMATORS["rb_full"].formula,
    "rb": GRADIENT_ESTIMATORS["rb"].formula,
    "mix": "(1 − c) rb + c mc, c fitted on other rollouts",
    "rb_detached": "(Σ_j D_j) Σ_n s_n",
    "token_local": GRADIENT_ESTIMATORS["token_local"].formula,
}
"""Every estimator compared, with its gradient for one string; the last two are biased."""
BIASED = ("rb_detached", "token_local")
FOLDS = 8
RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class GradientStudy:
    """What is measured; every field changes the numbers.

    Attributes:
        checkpoints: steps of the training run at which gradients are compared.
        prompts: prompts a batch, one string each.
        rollouts: independent batches at each checkpoint.
        max_tokens: longest response.
        penalty: KL term that the run itself is trained with.
        coefficient: its price of a nat.
        learning_rate: of the run.
        seed: names every random draw.

    Raises:
        ValueError: checkpoints that do not increase from 1, or too few rollouts for the folds.
    """

    checkpoints: tuple[int, ...] = (3, 6, 12, 25, 50, 75, 100)
    prompts: int = 32
    rollouts: int = 256
    max_tokens: int = 64
    penalty: str = "rb"
    coefficient: float = 0.7
    learning_rate: float = 3e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if list(self.checkpoints) != sorted({c for c in self.checkpoints if c > 0}) or not self.checkpoints:
            raise ValueError(
                f"expected checkpoints that increase from 1, got {self.checkpoints}; before the first step policy and "
                f"reference are one, and every gradient is 0"
            )
        if self.rollouts < 2 * FOLDS:
            raise ValueError(f"expected at least {2 * FOLDS} rollouts, got {self.rollouts}; spreads need repetitions")


SMOKE = GradientStudy(checkpoints=(2, 6), prompts=8, rollouts=24, max_tokens=32)
"""The same in seconds: it shows that everything works, and nothing else."""


@dataclass(frozen=True, slots=True)
class Spread:
    """One estimator at one checkpoint; gradients of the mean over the batch's strings, in all weights.

    Attributes:
        step: the checkpoint.
        kl: KL(p‖q) there, nats per response (``rb_cv`` on the strings of all rollouts).
        kl_error: its standard error.
        method: key of :data:`FORMULAS`.
        total: ``tr Cov g``.
        total_ratio: that over ``mc_full``'s; then the bounds of its 95 % interval (bootstrap over rollouts).
        total_lower: lower bound.
        total_upper: upper bound.
        norm: ``Var ‖g‖``.
        norm_ratio: that over ``mc_full``'s, with bounds as before.
        norm_lower: lower bound.
        norm_upper: upper bound.
        bias: ``‖E g − E g_rb‖ / ‖E g_rb‖``, from products of different rollouts: no noise is squared; 0 where their
            mean is below 0; then the bounds of its 95 % interval (jackknife over rollouts).
        bias_lower: lower bound.
        bias_upper: upper bound.
        bias_z: mean of ``g − g_rb`` along its own direction, found on the other half of the rollouts, over its
            standard error: near 0 for an unbiased estimator.
    """

    step: int
    kl: float
    kl_error: float
    method: str
    total: float
    total_ratio: float
    total_lower: float
    total_upper: float
    norm: float
    norm_ratio: float
    norm_lower: float
    norm_upper: float
    bias: float
    bias_lower: float
    bias_upper: float
    bias_z: float


def reproduce_gradient(
    study: GradientStudy, out: Path, *, workers: int = 1, observe: Watch | None = None
) -> list[Spread]:
    """Train the run, measure at its checkpoints, one process a checkpoint; what is in ``out`` is not done again.

    Raises:
        ValueError: ``out`` cannot be written, or holds a study of other settings.
    """
    train = Job("training-run", {"study": _plain(study)})
    jobs = [Job(f"gradient-{c:05d}", {"study": _plain(study), "checkpoint": c}) for c in study.checkpoints]
    finish(train_checkpoints, [train], out / "runs")
    found = finish(measure_checkpoint, jobs, out / "runs", workers=workers, observe=observe)
    return [Spread(**row) for result in found for row in result["rows"]]


def train_checkpoints(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The run whose checkpoints are looked at; writes their weights, returns reward and KL of each step."""
    study = _study(settings)
    folder.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(
        penalty=study.penalty, coefficient=study.coefficient, learning_rate=study.learning_rate,
        max_tokens=study.max_tokens, seed=study.seed,
    )  # fmt: skip
    held_out = [str(text) for text in read_prompts(MODEL).contents]
    state = start(load_network(MODEL), openings(256, seed=study.seed, without=held_out), grammar_reward, recipe)
    curve = []
    while state.step < study.checkpoints[-1]:
        state, metrics = step(state)
        curve.append([metrics.reward, metrics.kl])
        if state.step in study.checkpoints:
            weights = {name: weight.detach() for name, weight in state.policy.parameters}
            write_atomically(_weights(folder, state.step), partial(save_file, weights))
    return {"curve": curve}


def measure_checkpoint(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Rows of :class:`Spread` at one checkpoint."""
    study = _study(settings)
    p, q = load_network(MODEL, name="policy"), load_network(MODEL)
    trained = load_file(_weights(folder, settings["checkpoint"]))
    with torch.no_grad():
        for name, weight in p.model.named_parameters():
            weight.copy_(trained[name])
    contexts = [p.context(text) for text in read_prompts(MODEL).contents[: study.prompts]]
    gradients: dict[str, list[Tensor]] = {}
    pool: list[TokenStatistics] = []
    for k in range(study.rollouts):
        x = sample(
            p, contexts, max_tokens=study.max_tokens, seed=study.seed, replicate=[k] * len(contexts), settle=False
        ).sequences
        pool.append(score(p, q, x))
        for method, gradient in estimated_gradients(p, q, Decisions.of(x)).items():
            gradients.setdefault(method, []).append(gradient)
    kl = ESTIMATORS["rb_cv"](TokenStatistics.cat(pool)).reshape(study.rollouts, -1).mean(1)
    stacked = {method: torch.stack(values) for method, values in gradients.items()}
    found = spreads(stacked, study.seed)
    error = float(kl.std(ddof=1) / len(kl) ** 0.5)
    return {"rows": [{"step": settings["checkpoint"], "kl": float(kl.mean()), "kl_error": error, **r} for r in found]}


def estimated_gradients(p: HuggingFaceModel, q: HuggingFaceModel, block: Decisions) -> dict[str, Float[Tensor, " d"]]:
    """Each estimator's gradient in all weights of ``p``, mean over strings; ``mix`` needs more batches than one."""
    weights = [w for w in p.model.parameters() if w.requires_grad]
    tokens = block.x.tokens[:, : int(block.x.stop.max()) - 1]
    rows = torch.arange(len(tokens))[:, None].expand_as(block.column)[block.mask]
    columns = block.column[block.mask]

    def logits(model: HuggingFaceModel) -> Tensor:
        # Padding lies to the right, where causal attention never looks.
        whole: Tensor = model.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        return whole[rows, columns]

    with torch.no_grad():
        logits_q = logits(q)
    found = divergences(logits(p), logits_q, block.tokens[block.mask])
    assert found.logp is not None
    assert found.logq is not None
    kl, logp, logq = (block.spread(values) for values in (found.kl, found.logp, found.logq))
    scores = logp.sum(1)
    losses = {
        "mc_full": ((logp - logq).detach().sum(1) * scores).mean(),
        "rb_detached": (kl.detach().sum(1) * scores).mean(),
    }
    for method in GRADIENT_ESTIMATORS:
        losses[method] = kl_surrogate(kl, logp, logq, block.mask, estimator=method).loss
    return {
        method: torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, weights, retain_graph=True)])
        for method, loss in losses.items()
    }


def spreads(gradients: Mapping[str, Float[Tensor, "k d"]], seed: int) -> list[dict[str, Any]]:
    """Variances, their ratios to ``mc_full`` with intervals, and biases, from one gradient a rollout and estimator."""
    rb, mc = gradients["rb"], gradients["mc"]
    fold = torch.arange(len(rb)) % FOLDS
    share = best_share(rb, mc, fold)[fold][:, None].to(rb)
    known = {**gradients, "mix": (1 - share) * rb + share * mc}
    rollouts = len(rb)
    picks = numpy_stream(seed, "gradient", rollouts).integers(0, rollouts, (RESAMPLES, rollouts))
    counts = np.stack([np.bincount(pick, minlength=rollouts) for pick in picks]).astype(np.float64)
    counts = np.concatenate([np.ones((1, rollouts)), counts])  # the first row is the sample itself
    total, norm = {}, {}
    for method in FORMULAS:
        products = _products(known[method])
        squares = np.diag(products)
        total[method] = (counts @ squares - ((counts @ products) * counts).sum(1) / rollouts) / (rollouts - 1)
        lengths = np.sqrt(squares)
        norm[method] = (counts @ squares - (counts @ lengths) ** 2 / rollouts) / (rollouts - 1)
    size = math.sqrt(max(_mean_product(_products(rb))[0], 0.0)) or math.nan
    out = []
    for method in FORMULAS:
        row: dict[str, Any] = {"method": method}
        for name, values in (("total", total), ("norm", norm)):
            ratio = values[method] / values["mc_full"]
            lower, upper = np.quantile(ratio[1:], [0.025, 0.975])
            row |= {
                name: float(values[method][0]), f"{name}_ratio": float(ratio[0]),
                f"{name}_lower": float(lower), f"{name}_upper": float(upper),
            }  # fmt: skip
        gap = known[method] - rb
        square, error = _mean_product(_products(gap))
        for name, value in (
            ("bias", square),
            ("bias_lower", square - 1.96 * error),
            ("bias_upper", square + 1.96 * error),
        ):
            row[name] = math.sqrt(max(value, 0.0)) / size
        out.append(row | {"bias_z": _split_z(gap)})
    return out


def _products(gradients: Float[Tensor, "k d"]) -> Array:
    """Inner products of all pairs of rollouts, ``(k, k)``."""
    return (gradients @ gradients.T).double().numpy()


def _mean_product(products: Array) -> tuple[float, float]:
    """``‖E g‖²`` without bias, the mean product of two different rollouts, and its standard error (jackknife)."""
    k, trace = len(products), np.diag(products)
    total = products.sum() - trace.sum()
    without = (total - 2 * (products.sum(1) - trace)) / ((k - 1) * (k - 2))
    error = math.sqrt((k - 1) / k * float(np.square(without - without.mean()).sum()))
    return float(total / (k * (k - 1))), error


def _split_z(gap: Float[Tensor, "k d"]) -> float:
    """Mean of ``gap`` along the direction that the other half of the rollouts gives it, over its standard error."""
    first, second = gap[0::2], gap[1::2]
    along = (second @ first.mean(0)).double()
    spread = float(along.std())
    return float(along.mean()) / (spread / len(along) ** 0.5) if spread > 0 else 0.0


def _plain(study: GradientStudy) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(study)))  # type: ignore[no-any-return]


def _study(settings: Mapping[str, Any]) -> GradientStudy:
    fields: dict[str, Any] = dict(settings["study"])
    return GradientStudy(**{**fields, "checkpoints": tuple(fields["checkpoints"])})


def _weights(folder: Path, step: int) -> Path:
    return folder / f"step-{step:05d}.safetensors"
