"""Figures 2 and 3 of arXiv 2404.02657: free logits descend a divergence towards a fixed law, and where they pass.

Figure 2 shows that KL(p‖q) and KL(q‖p) have one minimum where ``q`` is free, Figure 3 that they approach it from
different ends: "head first" and "tail first". The second holds for some measures of head and tail and not for others,
and depends on the optimiser; what is counted here is in how many of many draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from klkit.divergences.adaptive import adaptive_kl, head_weight
from klkit.divergences.f import total_variation
from klkit.divergences.kl import jeffreys, kl, reverse_kl
from klkit.divergences.mixtures import jensen_shannon
from klkit.rng import stream

Rows = Callable[[Tensor, Tensor], Float[Tensor, " n"]]
OBJECTIVES: dict[str, Rows] = {
    "fkl": kl,
    "rkl": reverse_kl,
    "sum": lambda logp, logq: 0.5 * jeffreys(logp, logq),
    "akl": adaptive_kl,
    "akl_r": lambda logp, logq: adaptive_kl(logp, logq, swapped=True),
    "jsd": jensen_shannon,
}
"""What is descended, by name; ``p`` is fixed and the logits of ``q`` are free."""

OPTIMISERS = ("adam", "sgd")
SETTINGS = ((25.0, 75.0, 10.0), (50.0, 50.0, 15.0), (25.0, 74.0, 15.0))
"""Figure 2: centres of the two bells, and the width that both of them have in the paper's notebook."""
FAR = 37
"""Figure 3: points from here on are its far tail."""
EARLY = 20
"""Figure 3: steps that are looked at one by one."""


@dataclass(frozen=True, slots=True)
class ToyStudy:
    """How much of it is done.

    Attributes:
        draws: random starts, and in Figure 3 also random targets.
        steps_2: optimiser steps in Figure 2.
        steps_3: optimiser steps in Figure 3.
        seed: names every random number.
    """

    draws: int = 50
    steps_2: int = 200
    steps_3: int = 800
    seed: int = 0


SMOKE = ToyStudy(draws=4, steps_2=3, steps_3=20)
"""The same in seconds: it shows that everything works, and nothing else."""


@dataclass(frozen=True, slots=True)
class ToyRow:
    """Medians over draws after some steps.

    Attributes:
        figure: 2 or 3.
        setting: of Figure 2, from 1; 0 in Figure 3.
        optimiser: one of :data:`OPTIMISERS`.
        objective: key of :data:`OBJECTIVES`.
        step: steps done.
        forward_kl: KL(p‖q), nats.
        reverse_kl: KL(q‖p), nats.
        worst_kl: the larger of the two in the worst draw.
        head_gap: ``Σ |p − q|`` over the likeliest points with half of the mass.
        tail_gap: the same over all others.
        far_mass: what ``q`` gives the far tail of Figure 3; NaN in Figure 2.
        far_ratio: median ``|log q/p|`` there; NaN in Figure 2.
    """

    figure: int
    setting: int
    optimiser: str
    objective: str
    step: int
    forward_kl: float
    reverse_kl: float
    worst_kl: float
    head_gap: float
    tail_gap: float
    far_mass: float
    far_ratio: float


@dataclass(frozen=True, slots=True)
class ToyCount:
    """In how many draws a claim holds.

    Attributes:
        claim: key of :data:`CLAIMS`.
        optimiser: one of :data:`OPTIMISERS`.
        step: steps done; 0 is the start.
        held: draws in which it holds.
        draws: of so many.
        fkl: median of the measure under ``fkl``.
        rkl: the same under ``rkl``.
    """

    claim: str
    optimiser: str
    step: int
    held: int
    draws: int
    fkl: float
    rkl: float


CLAIMS = {
    "head gap": "FKL has the smaller gap in the head",
    "tail gap": "RKL has the smaller gap outside the head",
    "far mass": "RKL has less mass in the far tail",
    "far ratio": "RKL has the smaller median |log q/p| in the far tail",
    "head share": "FKL's gradient has the larger share in the head",
    "far share": "RKL's gradient has the larger share in the far tail",
}
"""Readings of "head first" and "tail first", by the measure that is compared."""
LARGER = ("head share", "far share")
MEASURED = {"head gap": "head_gap", "tail gap": "tail_gap", "far mass": "far_mass", "far ratio": "far_ratio"}


@dataclass(frozen=True, slots=True)
class Toy:
    """What was found.

    Attributes:
        study: what was asked for.
        rows: medians.
        counts: of claims.
        pictures: laws of the first draw, for the figures: ``(figure, setting, objective, step)`` to ``q``, with
            ``"teacher"`` at step 0; Adam only.
    """

    study: ToyStudy
    rows: list[ToyRow]
    counts: list[ToyCount]
    pictures: dict[tuple[int, int, str, int], list[float]]

    def count(self, claim: str, optimiser: str, step: int) -> ToyCount:
        """The count of one claim."""
        return next(c for c in self.counts if (c.claim, c.optimiser, c.step) == (claim, optimiser, step))


def reproduce_toy(study: ToyStudy) -> Toy:
    """Both figures under both optimisers, with every objective, for all draws at once."""
    rows: list[ToyRow] = []
    counts: list[ToyCount] = []
    pictures: dict[tuple[int, int, str, int], list[float]] = {}
    logp = long_tail(study)
    for optimiser in OPTIMISERS:
        for i, setting in enumerate(SETTINGS, 1):
            target = bells(*setting).expand(study.draws, -1)
            found = _all(study, target, 2, i, optimiser, study.steps_2, lambda step: step in (1, 200), pictures)
            rows += [row for per_step in found.values() for row, _ in per_step]
        found = _all(study, logp, 3, 0, optimiser, study.steps_3, lambda step: step in (1, 5, 10, 300), pictures)
        rows += [row for per_step in found.values() for row, _ in per_step]
        counts += _counts(found, optimiser)
        counts += _starts(study, logp, optimiser)
    return Toy(study, rows, counts, pictures)


def bells(first: float, second: float, width: float) -> Float[Tensor, " v"]:
    """Log-probabilities of Figure 2's target: 3 parts of one bell and 5 of another, at 0, 2, ..., 98.

    Example:
        >>> float(bells(25.0, 75.0, 10.0).exp().sum().round(decimals=12)), len(bells(25.0, 75.0, 10.0))
        (1.0, 50)
    """
    x = torch.arange(0, 100, 2, dtype=torch.float64)
    bell = [share * torch.exp(-0.5 * ((x - mu) / width) ** 2) for share, mu in ((0.3, first), (0.5, second))]
    return (bell[0] + bell[1]).log().log_softmax(0)


def long_tail(study: ToyStudy) -> Float[Tensor, "n v"]:
    """Log-probabilities of Figure 3's targets: half a bell with a percent of noise, at 0, 1.25, ..., 98.75."""
    x = torch.arange(0, 100, 1.25, dtype=torch.float64)
    noise = [
        torch.rand(len(x), dtype=torch.float64, generator=stream(study.seed, "toy", k)) for k in range(study.draws)
    ]
    return (-0.5 * (x / 16) ** 2 + (0.01 * torch.stack(noise)).log1p()).log_softmax(-1)


def starts(study: ToyStudy, size: int) -> Float[Tensor, "n v"]:
    """Logits to begin with, uniform on [0, 1]: the same for every objective."""
    drawn = [
        torch.rand(size, dtype=torch.float64, generator=stream(study.seed, "start", size, k))
        for k in range(study.draws)
    ]
    return torch.stack(drawn)


Measured = Mapping[str, Float[Tensor, " n"]]


@torch.no_grad()
def measure(logp: Float[Tensor, "n v"], logq: Float[Tensor, "n v"], *, far: bool) -> dict[str, Float[Tensor, " n"]]:
    """The numbers of :class:`ToyRow` in each draw."""
    weight, gap = head_weight(logp, logq), 2 * total_variation(logp, logq)
    nothing = torch.full_like(gap, math.nan)
    return {
        "forward_kl": kl(logp, logq),
        "reverse_kl": reverse_kl(logp, logq),
        "head_gap": weight * gap,
        "tail_gap": (1 - weight) * gap,
        "far_mass": logq[:, FAR:].exp().sum(-1) if far else nothing,
        "far_ratio": (logq - logp)[:, FAR:].abs().quantile(0.5, -1) if far else nothing,
    }


def _all(
    study: ToyStudy,
    logp: Float[Tensor, "n v"],
    figure: int,
    setting: int,
    optimiser: str,
    steps: int,
    drawn: Callable[[int], bool],
    pictures: dict[tuple[int, int, str, int], list[float]],
) -> dict[str, list[tuple[ToyRow, Measured]]]:
    """Rows and measures of every objective at the steps that are looked at."""
    looked = {*range(1, EARLY + 1), 50, 100, 200, 300, 400, 600, steps}
    found: dict[str, list[tuple[ToyRow, Measured]]] = {}
    if optimiser == "adam":
        pictures[figure, setting, "teacher", 0] = logp[0].exp().tolist()
    for name, objective in OBJECTIVES.items():
        z = starts(study, logp.shape[1]).requires_grad_()
        descent: torch.optim.Optimizer
        if optimiser == "adam":
            descent = torch.optim.Adam([z], lr=0.1 if figure == 2 else 0.2)
        else:
            descent = torch.optim.SGD([z], lr=5.0)
        found[name] = []
        for step in range(1, steps + 1):
            descent.zero_grad()
            # Draws do not meet: the gradient of their sum is each one's own.
            objective(logp, z.log_softmax(-1)).sum().backward()  # type: ignore[no-untyped-call]
            descent.step()
            if step in looked:
                values = measure(logp, z.log_softmax(-1), far=figure == 3)
                found[name].append((_row(values, figure, setting, optimiser, name, step), values))
            if optimiser == "adam" and drawn(step):
                pictures[figure, setting, name, step] = z[0].detach().softmax(-1).tolist()
    return found


def _row(values: Measured, figure: int, setting: int, optimiser: str, objective: str, step: int) -> ToyRow:
    worst = float(torch.maximum(values["forward_kl"], values["reverse_kl"]).max())
    medians = {name: float(x.quantile(0.5)) for name, x in values.items()}
    return ToyRow(figure, setting, optimiser, objective, step, worst_kl=worst, **medians)


def _counts(found: Mapping[str, Sequence[tuple[ToyRow, Measured]]], optimiser: str) -> list[ToyCount]:
    """Claims about the first steps of Figure 3."""
    out = []
    for (row, fkl), (_, rkl) in zip(found["fkl"], found["rkl"], strict=True):
        for claim, name in MEASURED.items():
            holds = fkl[name] < rkl[name] if claim == "head gap" else rkl[name] < fkl[name]
            if row.step <= EARLY:
                out.append(_count(claim, optimiser, row.step, holds, fkl[name], rkl[name]))
    return out


def _starts(study: ToyStudy, logp: Float[Tensor, "n v"], optimiser: str) -> list[ToyCount]:
    """Claims about the shares of the first gradient, ``Σ |∂z|`` in head and far tail over the whole."""
    shares = {}
    p = logp.exp()
    head = p.cumsum(-1) - p < 0.5  # the points are in the order of their mass, but for the noise
    for name in ("fkl", "rkl"):
        z = starts(study, logp.shape[1]).requires_grad_()
        OBJECTIVES[name](logp, z.log_softmax(-1)).sum().backward()  # type: ignore[no-untyped-call]
        assert z.grad is not None
        size = z.grad.abs()
        shares[name] = (size * head).sum(-1) / size.sum(-1), size[:, FAR:].sum(-1) / size.sum(-1)
    fkl, rkl = shares["fkl"], shares["rkl"]
    return [
        _count("head share", optimiser, 0, fkl[0] > rkl[0], fkl[0], rkl[0]),
        _count("far share", optimiser, 0, rkl[1] > fkl[1], fkl[1], rkl[1]),
    ]


def _count(claim: str, optimiser: str, step: int, holds: Tensor, fkl: Tensor, rkl: Tensor) -> ToyCount:
    return ToyCount(
        claim, optimiser, step, int(holds.sum()), len(holds), float(fkl.quantile(0.5)), float(rkl.quantile(0.5))
    )


def ends(toy: Toy) -> list[ToyRow]:
    """The rows of the last steps."""
    last = {2: toy.study.steps_2, 3: toy.study.steps_3}
    return [row for row in toy.rows if row.step == last[row.figure]]


def conditions(toy: Toy) -> list[tuple[str, bool]]:
    """What must come out, each with whether it did: all of it held in every draw that was ever made."""
    study = toy.study
    left = max(row.worst_kl for row in ends(toy) if row.optimiser == "adam")
    out = []
    if study.steps_2 >= 200 and study.steps_3 >= 800:
        out.append(("Adam: all objectives end with both KLs below 1e-3, in both figures", left < 1e-3))

    def every(claim: str, optimiser: str, steps: Sequence[int]) -> bool:
        return all((c := toy.count(claim, optimiser, step)).held == c.draws for step in steps)

    early = range(1, EARLY + 1)
    return [
        *out,
        ("Adam: FKL has the smaller head gap at steps 5 and 10", every("head gap", "adam", (5, 10))),
        ("both: RKL has the smaller median |log q/p| in the far tail at steps 1 to 20",
         every("far ratio", "adam", early) and every("far ratio", "sgd", early)),
        ("SGD: RKL has less mass in the far tail at steps 1 to 20", every("far mass", "sgd", early)),
        ("at the start FKL's gradient has the larger share in the head, RKL's in the far tail",
         every("head share", "adam", (0,)) and every("far share", "adam", (0,))),
    ]  # fmt: skip
