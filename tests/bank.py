"""Known-answer problems: pairs of models with divergences and variances derived by hand or printed elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from klkit import rng
from klkit.models.automaton import Automaton, automaton, coin, finite, memoryless, random_automaton
from klkit.models.ngram import ngram


@dataclass(frozen=True)
class Problem:
    """A pair and what is known of it; ``None`` where no independent value is at hand."""

    name: str
    p: Automaton
    q: Automaton
    kl: float
    variance_mc: float | None = None
    variance_rb: float | None = None
    alpha: float | None = None
    variance_combined: float | None = None
    digits: int = 10  # decimals to which the values are known


def memoryless_problem(name: str, law_p: list[float], law_q: list[float], end_p: float, end_q: float) -> Problem:
    """Independent symbols: everything in closed form from one decision's log-ratios."""
    p = [*((1 - end_p) * a for a in law_p), end_p]
    q = [*((1 - end_q) * a for a in law_q), end_q]
    u = [math.log(a / b) for a, b in zip(p, q, strict=True)]
    k = sum(a * d for a, d in zip(p, u, strict=True))
    m = sum(a * d for a, d in zip(law_p, u, strict=False))
    v = sum(a * (d - m) ** 2 for a, d in zip(law_p, u, strict=False))
    length = (1 - end_p) / end_p**2  # the variance of the number of decisions
    variance_mc = v * (1 - end_p) / end_p + m**2 * length
    variance_rb = k**2 * length
    covariance = m * k * length  # given the length, C is constant and U has mean m (T − 1) + const
    noise = variance_mc - 2 * covariance + variance_rb
    return Problem(
        name,
        memoryless(law_p, end=end_p),
        memoryless(law_q, end=end_q),
        kl=k / end_p,
        variance_mc=variance_mc,
        variance_rb=variance_rb,
        alpha=(variance_mc - covariance) / noise,
        variance_combined=variance_mc - (variance_mc - covariance) ** 2 / noise,
    )


# Strings of two symbols; p's log-ratio is the same on every string, yet its decisions' divergences differ.
A = Problem(
    "A",
    finite({"ax": 0.5, "bx": 0.5}, symbols="abxz", name="A.p"),
    finite({"ax": 0.25, "bx": 0.25, "bz": 0.5}, symbols="abxz", name="A.q"),
    kl=math.log(2),
    variance_mc=0.0,
    variance_rb=math.log(3) ** 2 / 4,
    alpha=0.0,
    variance_combined=0.0,
)
# Two binary steps; the second one's law depends on the first.
B = Problem(
    "B",
    finite({"aa": 0.25, "ab": 0.25, "ba": 0.005, "bb": 0.495}, symbols="ab", name="B.p"),
    finite({"aa": 0.125, "ab": 0.125, "ba": 0.7425, "bb": 0.0075}, symbols="ab", name="B.q"),
    kl=2.39544976,
    variance_mc=3.31591358,
    variance_rb=5.06974186,
    alpha=-0.71824637,
    variance_combined=2.94457607,
    digits=8,
)


def coin_problem(name: str, end_p: float, end_q: float, kl: float, mc: float, rb: float, alpha: float) -> Problem:
    """One symbol and an end token: string length is all there is."""
    return Problem(name, coin(end=end_p), coin(end=end_q), kl, mc, rb, alpha, 0.0, digits=4)


C1 = coin_problem("C1", 0.5, 0.01, 3.228926, 0.9332, 5.2130, 0.2973)
C2 = coin_problem("C2", 0.2, 0.02, 1.490822, 0.8237, 1.7780, 0.4050)
C3 = coin_problem("C3", 0.05, 0.005, 1.423251, 0.8139, 1.9244, 0.3941)
C4 = coin_problem("C4", 0.5, 0.25, 0.287682, 0.3288, 0.0414, 0.7381)

MEMORYLESS = (
    memoryless_problem("memoryless coins", [1.0], [1.0], 0.5, 0.01),
    memoryless_problem("memoryless 3", [0.5, 0.3, 0.2], [0.2, 0.3, 0.5], 0.25, 0.2),
    memoryless_problem("memoryless, same ends", [0.9, 0.1], [0.5, 0.5], 0.1, 0.1),
    memoryless_problem("memoryless, same symbols", [0.4, 0.6], [0.4, 0.6], 0.3, 0.1),
)

KNOWN = (A, B, C1, C2, C3, C4, *MEMORYLESS)
"""Every problem whose value and variances are known without this package's solver."""

RB_LOSES = (A, B, C1, C2, C3)
"""Pairs on which Rao-Blackwell has *more* variance than Monte Carlo."""

RB_WINS = (C4, MEMORYLESS[1], MEMORYLESS[2])

INFINITE = Problem(
    "infinite",
    memoryless([0.5, 0.5], end=0.25),
    memoryless([1.0, 0.0], end=0.25),
    kl=math.inf,
)
"""q excludes symbol ``b``."""

SAME_MASK = Problem(
    "one shared zero",
    memoryless([0.5, 0.5, 0.0], end=0.25),
    memoryless([0.25, 0.75, 0.0], end=0.25),
    kl=3 * (0.5 * math.log(2) + 0.5 * math.log(2 / 3)),
)
"""Both exclude symbol ``c``: finite, where careless formulas give NaN."""


def random_pair(
    seed: int, *, states: int = 3, symbols: int = 2, spread: float = 1.0, shared: bool = False
) -> tuple[Automaton, Automaton]:
    """A seeded pair of random automata; with ``shared`` both move through the same states."""
    p = random_automaton(states, symbols, generator=rng.stream(seed, "bank", "p"), spread=spread, name="random.p")
    q = random_automaton(states, symbols, generator=rng.stream(seed, "bank", "q"), spread=spread, name="random.q")
    if shared:
        q = automaton(q.log_probabilities.exp(), p.transitions[:, :symbols], name="random.q")
    return p, q


def random_pairs(count: int, *, states: int = 3, symbols: int = 2) -> list[tuple[Automaton, Automaton]]:
    """The first ``count`` of an endless list of random pairs."""
    return [random_pair(seed, states=states, symbols=symbols) for seed in range(count)]


def ngram_pair(order: int = 3) -> tuple[Automaton, Automaton]:
    """Two character models of two small texts over one alphabet; every token possible everywhere."""
    p = ["the cat sat on the mat", "the hat that the cat had", "a man sat at the mat"]
    q = ["no one had the hat on", "the moon is on the sea", "a cat and a hen"]
    alphabet = sorted(set("".join(p + q)))
    return (
        ngram(p, order, smoothing=0.5, symbols=alphabet, name="ngram.p"),
        ngram(q, order, smoothing=0.5, symbols=alphabet, name="ngram.q"),
    )


def short_pair(seed: int = 0, *, spread: float = 1.0) -> tuple[Automaton, Automaton]:
    """Two random automata whose strings have at most four decisions: enumerable without cutting any.

    State i is reached after i symbols, and the last state ends with probability one.
    """

    def one(name: str) -> Automaton:
        logits = spread * torch.randn(7, 4, generator=rng.stream(seed, "short", name), dtype=torch.float64)
        logits[5:, :3] = -torch.inf
        #                 0 → 1 2;  1, 2 → 3 4;  3, 4 → 5 6;  5, 6 end
        successors = torch.tensor([[1, 2, 1], [3, 4, 4], [4, 3, 3], [5, 6, 5], [6, 6, 5], [5, 5, 5], [6, 6, 6]])
        return automaton(logits.softmax(-1), successors, name=f"short.{name}")

    return one("p"), one("q")
