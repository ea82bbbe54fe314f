"""What the runs of a study say: scatter between repeated runs, frontiers, hypervolumes, and how sure all that is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klkit.api.reproduce_rlhf import Point, Study
from klkit.rng import numpy_stream
from klkit.stats.pareto import frontier_shares, hypervolume, non_dominated, permutation_test
from klkit.stats.spread import Scatter, pooled_scatter, scatter_ratio

Array = NDArray[np.float64]
DRAWS = 4_999
ROOM = 1.5  # training overshoots a little; what overshoots more counts nothing


@dataclass(frozen=True, slots=True)
class ExactFrontier:
    """The best of all laws on the grammar, mean over the held-out prompts.

    Attributes:
        strengths: ``1 / coefficient`` of each point, ascending from 0.
        rewards: expected rewards.
        divergences: KL from the grammar, nats per response.
    """

    strengths: tuple[float, ...]
    rewards: tuple[float, ...]
    divergences: tuple[float, ...]

    def at(self, coefficient: float) -> tuple[float, float]:
        """Reward and divergence of the optimum at a coefficient among the points."""
        i = int(np.argmin(np.abs(np.array(self.strengths) - 1 / coefficient)))
        return self.rewards[i], self.divergences[i]


@dataclass(frozen=True, slots=True)
class Comparison:
    """An arm against the first one, on their runs alone; tests permute the two within coefficient and seed.

    Attributes:
        share: share of the two arms' pooled frontier (final points) that is the arm's.
        share_p: p-value of the difference of the shares.
        area: mean hypervolume of a repetition minus the first arm's.
        area_p: its p-value.
        objective: mean of ``reward − coefficient · KL`` minus the first arm's.
        objective_p: its p-value.
    """

    share: float
    share_p: float
    area: float
    area_p: float
    objective: float
    objective_p: float


@dataclass(frozen=True, slots=True)
class Arm:
    """An arm's runs, at their ends.

    Attributes:
        name: penalty.
        runs: how many.
        stopped: how many of them came apart before their last step.
        reward_scatter: standard deviation of the reward between runs of one coefficient.
        kl_scatter: the same of the KL, nats.
        reward_ratio: reward scatter over the first arm's.
        kl_ratio: KL scatter over the first arm's.
        objective: mean of ``reward − coefficient · KL`` over all runs.
        share: share of the frontier of all arms' final points.
        share_low: the same among points of a KL below half the reference point's.
        share_all: share of the frontier of final and half-way points.
        area: hypervolume of a repetition (the final points of one seed), mean over seeds.
        versus: the comparison with the first arm; None for that one.
    """

    name: str
    runs: int
    stopped: int
    reward_scatter: Scatter
    kl_scatter: Scatter
    reward_ratio: Scatter
    kl_ratio: Scatter
    objective: float
    share: float
    share_low: float
    share_all: float
    area: float
    versus: Comparison | None


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything reported of a study.

    Attributes:
        study: what was run.
        points: every measured point.
        exact: the optimum of the grammar.
        worst: (KL, reward) of the reference point, from the exact frontier alone.
        frontier: points on the frontier of all final points.
        arms: by arm.
    """

    study: Study
    points: tuple[Point, ...]
    exact: ExactFrontier
    worst: tuple[float, float]
    frontier: int
    arms: tuple[Arm, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self)


def exact_frontier(study: Study, prompts: Sequence[str]) -> ExactFrontier:
    """The grammar's frontier at the study's coefficients and in between."""
    from klkit.zoo.grammar import reviews
    from klkit.zoo.optimum import optimal_frontier

    wanted = [1 / c for c in study.coefficients]
    grid = sorted({0.0, *np.geomspace(0.05, 2 * max(wanted), 24).tolist(), *wanted})
    rewards, divergences = optimal_frontier(reviews(), prompts, grid)
    return ExactFrontier(tuple(grid), tuple(rewards), tuple(divergences))


def analyse(study: Study, points: Sequence[Point], exact: ExactFrontier) -> Findings:
    """Scatter, frontiers, hypervolumes and tests of all runs.

    The reference point of the hypervolume is fixed before any run: :data:`ROOM` times the KL of the exact optimum at
    the smallest coefficient, and the reward without any training.
    """
    worst = ROOM * exact.at(min(study.coefficients))[1], exact.rewards[0]
    finals = [point for point in points if point.final]
    label, cost, gain = _columns(study, finals)
    every = _columns(study, points)
    shares = frontier_shares(cost, gain, label)
    low = frontier_shares(cost, gain, label, below=worst[0] / 2)
    whole = frontier_shares(every[1], every[2], every[0])
    scatters = [_scatters(study, finals, arm) for arm in study.arms]
    arms = []
    for i, name in enumerate(study.arms):
        mine = [point for point in finals if point.arm == name]
        random = numpy_stream(0, "ratio", name)
        arms.append(
            Arm(
                name=name,
                runs=len(mine),
                stopped=sum(bool(point.stopped) for point in mine),
                reward_scatter=scatters[i][0],
                kl_scatter=scatters[i][1],
                reward_ratio=scatter_ratio(scatters[i][0], scatters[0][0], random),
                kl_ratio=scatter_ratio(scatters[i][1], scatters[0][1], random),
                objective=float(np.mean([point.reward - point.coefficient * point.kl for point in mine])),
                share=shares[i],
                share_low=low[i],
                share_all=whole[i],
                area=_area(cost[label == i], gain[label == i], np.array([point.seed for point in mine]), worst),
                versus=_compare(study, finals, name, worst) if i else None,
            )
        )
    frontier = int(non_dominated(cost, gain).sum())
    return Findings(study, tuple(points), exact, worst, frontier, tuple(arms))


def _columns(study: Study, points: Sequence[Point]) -> tuple[NDArray[np.int64], Array, Array]:
    """Arm, KL and reward of each point."""
    label = np.array([study.arms.index(point.arm) for point in points])
    return label, np.array([point.kl for point in points]), np.array([point.reward for point in points])


def _scatters(study: Study, finals: Sequence[Point], arm: str) -> tuple[Scatter, Scatter]:
    """Scatter of reward and KL between an arm's runs of one coefficient."""
    table = {(point.coefficient, point.seed): point for point in finals if point.arm == arm}
    found = []
    for name in ("reward", "kl"):
        values = [[getattr(table[c, s], name) for s in range(study.seeds)] for c in study.coefficients]
        found.append(pooled_scatter(np.array(values), numpy_stream(0, "scatter", arm, name)))
    return found[0], found[1]


def _compare(study: Study, finals: Sequence[Point], arm: str, worst: tuple[float, float]) -> Comparison:
    """The arm (label 1) against the first one (label 0)."""
    pair = [point for point in finals if point.arm in (arm, study.arms[0])]
    labels = np.array([int(point.arm == arm) for point in pair])
    blocks = [(point.coefficient, point.seed) for point in pair]
    cost, gain = np.array([point.kl for point in pair]), np.array([point.reward for point in pair])
    objective = gain - np.array([point.coefficient for point in pair]) * cost
    seeds = np.array([point.seed for point in pair])
    front = non_dominated(cost, gain)

    def share(dealt: NDArray[np.int64]) -> float:
        return float(2 * dealt[front].mean() - 1)

    def area(dealt: NDArray[np.int64]) -> float:
        one, two = (_area(cost[dealt == i], gain[dealt == i], seeds[dealt == i], worst) for i in (1, 0))
        return one - two

    def better(dealt: NDArray[np.int64]) -> float:
        return float(objective[dealt == 1].mean() - objective[dealt == 0].mean())

    def p_value(statistic: Callable[[NDArray[np.int64]], float], name: str) -> float:
        return permutation_test(
            statistic, labels, blocks, random=numpy_stream(0, "test", arm, name), draws=DRAWS
        ).p_value

    return Comparison(
        share=(share(labels) + 1) / 2,
        share_p=p_value(share, "share"),
        area=area(labels),
        area_p=p_value(area, "area"),
        objective=better(labels),
        objective_p=p_value(better, "objective"),
    )


def _area(cost: Array, gain: Array, seeds: NDArray[np.int64], worst: tuple[float, float]) -> float:
    """Mean over seeds of the hypervolume of one seed's points.

    That of all seeds' points together would favour methods that scatter: of many tries the best ones count.
    """
    areas = [
        hypervolume(cost[seeds == s], gain[seeds == s], worst_cost=worst[0], worst_gain=worst[1])
        for s in np.unique(seeds)
    ]
    return float(np.mean(areas))
