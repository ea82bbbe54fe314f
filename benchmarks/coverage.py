"""How often the error bars hold what they promise: simulations with known answers.

    python benchmarks/coverage.py --replications 1000

prints Markdown tables and writes them to docs/coverage.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from klkit import rng
from klkit.estimators import ESTIMATORS, summarise
from klkit.estimators.exact import exact
from klkit.estimators.statistics import score
from klkit.models.automaton import Automaton, coin, memoryless, random_automaton
from klkit.sampling.ancestral import sample
from klkit.stats.intervals import Interval, ratio_interval
from klkit.stats.sequential import running_lower_bound
from klkit.stats.student import student_quantile

LEVEL = 0.95
ENOUGH = 0.93
METHODS = [method for method in ("mc", "rb", "rb_cv") if method in ESTIMATORS]
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "coverage.md"


@dataclass
class Cell:
    """Coverage of one method on one problem at one sample size."""

    problem: str
    n: int
    method: str
    covered: int = 0
    below: int = 0  # the interval ends below the truth
    replications: int = 0
    widths: list[float] = field(default_factory=list)  # relative to the truth

    def add(self, interval: Interval, truth: float) -> None:
        self.replications += 1
        self.covered += interval.lower <= truth <= interval.upper
        self.below += interval.upper < truth
        self.widths.append((interval.upper - interval.lower) / truth)

    @property
    def coverage(self) -> float:
        return self.covered / self.replications

    def row(self) -> list[str]:
        mark = " (!)" if self.coverage < ENOUGH else ""
        return [
            self.problem,
            str(self.n),
            self.method,
            f"{self.coverage:.1%}{mark}",
            f"{self.below / self.replications:.1%}",
            f"{np.median(self.widths):.2f}",
        ]


HEADER = ["problem", "n", "interval", "coverage", "truth above", "median width / truth"]


def lognormals(replications: int) -> Iterator[Cell]:
    """Intervals on independent lognormal totals of mean one."""
    for spread in (0.5, 1.0, 1.5, 2.0):
        for n in (32, 64, 100, 256, 400):
            generator = rng.numpy_stream(0, "lognormal", str(spread), n)
            cells = [Cell(f"lognormal, log-sd {spread:g}", n, method) for method in ("t", "bootstrap-t")]
            for seed in range(replications):
                x = np.exp(spread * generator.normal(size=n) - spread**2 / 2)
                for cell in cells:
                    cell.add(ratio_interval(x, np.ones(n), level=LEVEL, method=cell.method, seed=seed), 1.0)
            yield from cells


def pairs() -> list[tuple[str, Automaton, Automaton]]:
    """Pairs of automata: lengths alone, tokens alone, and both together in random ones."""

    def drawn(states: int, symbols: int, seed: int) -> tuple[Automaton, Automaton]:
        p, q = (random_automaton(states, symbols, generator=rng.stream(seed, "coverage", name)) for name in "pq")
        return p, q

    return [
        ("coins, end .5 and .25", coin(end=0.5), coin(end=0.25)),
        ("coins, end .5 and .01", coin(end=0.5), coin(end=0.01)),
        ("independent symbols", memoryless([0.5, 0.3, 0.2], end=0.1), memoryless([0.2, 0.3, 0.5], end=0.12)),
        ("random, 3 states, 2 symbols", *drawn(3, 2, 0)),
        ("random, 4 states, 5 symbols", *drawn(4, 5, 1)),
        ("random, 8 states, 20 symbols", *drawn(8, 20, 2)),
    ]


def automata(replications: int, *, sizes: tuple[int, ...] = (64, 256), chosen: slice = slice(None)) -> Iterator[Cell]:
    """Intervals of the estimators on strings sampled from automata whose divergence is known exactly.

    Per string (``/S``) for each estimator, and per token (``/R``, a ratio) for ``rb``. Cells without variance are
    left out: on the simplest pairs the control variates explain everything. The strings of each
    replication are its own at the smallest size; larger samples are drawn without replacement from one pool.
    """
    for name, p, q in pairs()[chosen]:
        truth = exact(p, q)
        pool = max(replications * min(sizes), 16 * max(sizes))
        x = sample(p, [p.context(None)] * pool, max_tokens=2000, seed=0).sequences
        if not bool(x.finished.all()):
            raise RuntimeError(f"strings of {name} were cut, so their mean is not the exact divergence")
        statistics = score(p, q, x, batch_size=4096, features=p.embedding())
        lengths = x.lengths.double().numpy()
        for n in sizes:
            cells = {
                method: Cell(f"{name}, {method}/S", n, "auto")
                for method in METHODS
                if ESTIMATORS[method](statistics.select(torch.arange(min(pool, 2000)))).std() > 1e-3 * truth.value
            }
            rate = Cell(f"{name}, rb/R", n, "auto")
            generator = rng.numpy_stream(0, "strings", name, n)
            for seed in range(replications):
                if n == min(sizes):
                    rows = np.arange(seed * n, (seed + 1) * n)
                else:
                    rows = generator.choice(pool, n, replace=False)
                mine = statistics.select(torch.from_numpy(rows))
                for method, cell in cells.items():
                    cell.add(summarise(method, mine).interval(LEVEL), truth.value)
                interval = ratio_interval(ESTIMATORS["rb"](mine), lengths[rows], level=LEVEL, seed=seed)
                if truth.variance_rate() > 1e-12:
                    rate.add(interval, truth.rate)
            yield from (*cells.values(), *([rate] if rate.replications else []))


def laws() -> dict[str, Callable[[np.random.Generator, int], NDArray[np.float64]]]:
    """Non-negative laws of mean one."""
    spreads = (0.5, 1.0, 1.5)
    return {"exponential": lambda g, n: g.exponential(size=n)} | {
        f"lognormal, log-sd {s:g}": lambda g, n, s=s: np.exp(s * g.normal(size=n) - s**2 / 2) for s in spreads
    }


def stopping(replications: int, *, rtol: float = 0.1, minimum: int = 64, cap: int = 20_000) -> Iterator[list[str]]:
    """Coverage of the reported interval after stopping at ``rtol``, looking every 16 strings."""
    for name, law in laws().items():
        generator = rng.numpy_stream(0, "stopping", name)
        looks = np.arange(minimum, cap + 1, 16)
        quantiles = np.array([student_quantile((1 + LEVEL) / 2, int(n) - 1) for n in looks])
        cell, stopped = Cell(name, 0, "auto"), []
        for seed in range(replications):
            x = law(generator, cap)
            # should_stop at every look at once
            first, second = np.cumsum(x)[looks - 1], np.cumsum(x**2)[looks - 1]
            mean = first / looks
            stderr = np.sqrt(np.maximum(second / looks - mean**2, 0) / (looks - 1))
            tight = quantiles * stderr <= rtol * mean
            n = int(looks[tight.argmax()]) if tight.any() else cap
            stopped.append(n)
            cell.add(ratio_interval(x[:n], np.ones(n), level=LEVEL, seed=seed), 1.0)
        yield [name, f"{np.median(stopped):.0f}", f"{cell.coverage:.1%}", f"{cell.below / replications:.1%}"]


def lower_bounds(replications: int) -> Iterator[list[str]]:
    """How often the anytime lower bound is ever above the mean within 1000 looks, and how tight it gets."""
    for name, law in laws().items():
        generator = rng.numpy_stream(0, "lower bound", name)
        bounds = np.stack([running_lower_bound(law(generator, 1000), LEVEL) for _ in range(replications)])
        shares = [f"{bounds[:, n - 1].mean():.0%}" for n in (64, 300, 1000)]
        yield [name, f"{(bounds[:, -1] > 1).mean():.1%}", *shares]


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sections(replications: int) -> Iterator[str]:
    """The document, section by section, as the simulations finish."""
    error = math.sqrt(LEVEL * (1 - LEVEL) / replications)
    yield (
        f"# Coverage of the error bars\n\nHow often the nominal {LEVEL:.0%} intervals contain the exact answer, in "
        f"{replications} replications (so every percentage has a standard error of about {error:.1%}). Rewritten by "
        f"`python benchmarks/coverage.py --replications {replications}`. Cells below {ENOUGH:.0%} are marked (!). "
        f'"Truth above" counts the misses in which the interval ends below the truth: the dangerous side.'
    )
    strings = list(automata(replications))
    yield "## Strings of automata with an exactly known divergence\n\n" + table(HEADER, [c.row() for c in strings])
    yield verdict(strings) + AUTOMATA
    synthetic = list(lognormals(replications))
    yield "## Lognormal totals\n\n" + table(HEADER, [c.row() for c in synthetic])
    yield LOGNORMAL
    header = ["law", "median n", "coverage", "truth above"]
    yield "## Stopping at a half-width of 10 %\n\nLooks every 16 strings from 64 on, at most 20,000.\n\n" + table(
        header, list(stopping(replications))
    )
    header = ["law", "ever above the mean", "bound / mean at 64", "at 300", "at 1000"]
    yield "## The anytime lower bound\n\n" + table(header, list(lower_bounds(min(replications, 200))))


def verdict(cells: list[Cell]) -> str:
    """Which cells fall short, in a sentence."""
    short = [f"{c.problem} at n = {c.n} ({c.coverage:.1%})" for c in cells if c.coverage < ENOUGH]
    return (f"Below {ENOUGH:.0%}: " + "; ".join(short) if short else f"No cell is below {ENOUGH:.0%}") + "."


LOGNORMAL = """\
These totals have no such tail limit, and here the intervals do fall short. With a log-sd of 1.5 the bootstrap-t covers
about 92 %, with 2 about 84 to 89 %, and t covers far less; hundreds of strings hardly help. Almost all misses lie on
one side: the truth is above the interval, because the strings that carry the mean are too rare to be in the sample,
and no resampling can invent them. Bootstrap-t is still the better of the two at 400 clusters, where the automatic
rule goes over to t: ask for `method="bootstrap-t"` if the tail is heavy.

The Pareto k̂ beside every estimate is there to recognise this, imperfectly: with 256 strings it exceeds 0.5 in no
sample at log-sd 0.5, in 13 % at 1, 59 % at 1.5 and 86 % at 2. When it does, read the upper bound as too low, draw ten
times the strings rather than twice, quote a quantile or the anytime lower bound below (which holds whatever the tail)
and do not quote the upper bound as a guarantee."""

AUTOMATA = """

String lengths of automata have geometric tails, so sums over strings are skewed but have all their moments: the
case the intervals are built for. Where `rb_cv` falls short at 64 strings, its coefficients come from the same few
strings, a noise that the contributions do not show in full: on two pairs the estimates spread 4 and 5 % more than
their standard errors say, and intervals had to be 15 % wider to cover 95 % (measured at 64 strings only; at 256
nothing was missing). With so few, quote `rb` if the interval matters more than its width. Samples of 256 are drawn
from one pool, so replications share strings. Strings of language models can have heavier tails than any
automaton's; the next table shows how much worse it gets."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replications", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=DOCUMENT)
    arguments = parser.parse_args()
    written = []
    for section in sections(arguments.replications):
        print(section, end="\n\n", flush=True)
        written.append(section)
    arguments.output.write_text("\n\n".join(written) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
