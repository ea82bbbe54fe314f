"""How often the error bars hold what they promise: simulations with known answers.

    python benchmarks/interval_coverage.py --replications 400

prints Markdown tables and writes them to docs/coverage.md.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from klkit import rng
from klkit.api.plan import Plan
from klkit.api.settings import MINIMUM_STRINGS
from klkit.estimators import summarise
from klkit.estimators.exact import exact
from klkit.estimators.statistics import TokenStatistics, score
from klkit.models.automaton import Automaton, coin, memoryless, random_automaton
from klkit.results import Estimate
from klkit.sampling.ancestral import sample
from klkit.stats.intervals import Interval, ratio_interval
from klkit.stats.sequential import running_lower_bound
from klkit.stats.tails import pareto_khat

LEVEL = 0.95
ENOUGH = 0.93
KINDS = (("mc", "S"), ("rb", "S"), ("rb_cv", "S"), ("mc", "R"), ("rb", "R"), ("rb_cv", "R"))
"""Methods and what they estimate: per response (``S``) and per token, a ratio (``R``)."""
SIZES = ("64 strings", "256 strings", "16 prompts x 4", "12 prompts x 8", "48 prompts x 4")
PROMPTED = ("random, 4 states, 5 symbols", "random, 8 states, 20 symbols")  # whose divergence depends on the prompt
POOL = 32_000  # strings
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "coverage.md"

Array = NDArray[np.float64]
Law = Callable[[np.random.Generator, int], Array]


@dataclass
class Cell:
    """Coverage of one interval on one problem at one sample size."""

    problem: str
    size: str
    method: str
    covered: int = 0
    below: int = 0  # the interval ends below the truth
    replications: int = 0
    widths: list[float] = field(default_factory=list)  # relative to the truth
    errors: list[float] = field(default_factory=list)
    stderrs: list[float] = field(default_factory=list)

    def add(self, interval: Interval, truth: float) -> None:
        self.replications += 1
        self.covered += interval.lower <= truth <= interval.upper
        self.below += interval.upper < truth
        self.widths.append((interval.upper - interval.lower) / truth)

    def add_estimate(self, estimate: Estimate, truth: float) -> None:
        self.add(estimate.interval(LEVEL), truth)
        self.errors.append(estimate.value - truth)
        self.stderrs.append(estimate.stderr)

    @property
    def coverage(self) -> float:
        return self.covered / self.replications

    @property
    def excess(self) -> float:
        """Root mean square error over root mean square standard error: 1 if errors are as large as they say."""
        return math.sqrt(np.mean(np.square(self.errors)) / np.mean(np.square(self.stderrs)))

    def row(self) -> list[str]:
        mark = " (!)" if self.coverage < ENOUGH else ""
        return [
            self.problem,
            self.size,
            self.method,
            f"{self.coverage:.1%}{mark}",
            f"{self.below / self.replications:.1%}",
            *([f"{self.excess:.2f}"] if self.errors else []),
            f"{np.median(self.widths):.2g}",
        ]


def lognormal(spread: float) -> Law:
    """Values of mean one whose logarithms have this standard deviation."""
    return lambda generator, n: np.exp(spread * generator.normal(size=n) - spread**2 / 2)


def lognormals(replications: int) -> Iterator[Cell]:
    """Intervals on independent lognormal totals of mean one."""
    for spread in (0.5, 1.0, 1.5, 2.0):
        for n in (32, 64, 100, 256, 400):
            generator = rng.numpy_stream(0, "lognormal", str(spread), n)
            cells = [Cell(f"{spread:g}", str(n), method) for method in ("t", "bootstrap-t")]
            for seed in range(replications):
                x = lognormal(spread)(generator, n)
                for cell in cells:
                    cell.add(ratio_interval(x, np.ones(n), level=LEVEL, method=cell.method, seed=seed), 1.0)
            yield from cells


def pairs() -> dict[str, tuple[Automaton, Automaton]]:
    """Pairs of automata: lengths alone, tokens alone, and both together in random ones."""

    def drawn(states: int, symbols: int, seed: int) -> tuple[Automaton, Automaton]:
        p, q = (random_automaton(states, symbols, generator=rng.stream(seed, "coverage", name)) for name in "pq")
        return p, q

    return {
        "coins, end .5 and .25": (coin(end=0.5), coin(end=0.25)),
        "independent symbols": (memoryless([0.5, 0.3, 0.2], end=0.1), memoryless([0.2, 0.3, 0.5], end=0.12)),
        "random, 3 states, 2 symbols": drawn(3, 2, 0),
        "random, 4 states, 5 symbols": drawn(4, 5, 1),
        "random, 8 states, 20 symbols": drawn(8, 20, 2),
    }


def pool(name: str, prompts: int, strings: int) -> tuple[TokenStatistics, dict[str, float]]:
    """Scored strings, ``strings`` for each of ``prompts``, and the exact answers per response and per token.

    With one string a prompt every prompt is empty. With several, prompts are drawn with replacement from 100 fixed
    ones, of four random symbols each, and the truth is the mean over these 100.
    """
    p, q = pairs()[name]
    contexts = [p.context(None)]
    if strings > 1:
        symbols = p.vocabulary.size - 1
        words = rng.numpy_stream(0, "prompts", name).integers(symbols, size=(100, 4))
        contexts = [torch.tensor([*p.vocabulary.ends, *word]) for word in words]
    answers = [exact(p, q, prompt=context) for context in contexts]
    value = float(np.mean([answer.value for answer in answers]))
    truths = {"S": value, "R": value / float(np.mean([answer.decisions for answer in answers]))}
    chosen = rng.numpy_stream(0, "chosen prompts", name).integers(len(contexts), size=prompts)
    cluster = np.repeat(np.arange(prompts), strings).tolist()
    x = sample(
        p,
        [contexts[i] for i in np.repeat(chosen, strings)],
        max_tokens=3000,
        seed=0,
        prompt=cluster,
        replicate=np.tile(np.arange(strings), prompts).tolist(),
        cluster=cluster,
    ).sequences
    if not bool(x.finished.all()):
        raise RuntimeError(f"strings of {name} were cut, so their mean is not the exact divergence")
    return score(p, q, x, batch_size=4096, features=p.embedding()), truths


def automata(replications: int, name: str, sizes: Iterable[str] = SIZES) -> list[Cell]:
    """Intervals of the estimators on strings sampled from a pair of automata whose divergence is known exactly.

    Samples are drawn without replacement from a pool at least 125 times as large. Estimates without variance are left
    out: on the simplest pairs all tokens have the same divergence.
    """
    cells: list[Cell] = []
    for size in sizes:
        prompts, strings = (int(part) for part in size.replace(" strings", " x 1").replace(" prompts", "").split(" x "))
        if strings > 1 and name not in PROMPTED:
            continue
        statistics, truths = pool(name, POOL // strings, strings)
        mine = {}
        some = statistics.select(torch.arange(min(len(statistics.x), 2000)))
        for method, estimand in KINDS:
            rough = summarise(method, some, estimand=estimand)
            if rough.stderr * math.sqrt(rough.n) > 1e-3 * truths[estimand]:
                mine[method, estimand] = Cell(name, size, f"{method}/{estimand}")
        generator = rng.numpy_stream(0, "samples", name, size)
        for _ in range(replications):
            drawn = generator.choice(len(statistics.x) // strings, prompts, replace=False)
            rows = (drawn[:, None] * strings + np.arange(strings)).ravel()
            sampled = statistics.select(torch.from_numpy(rows))
            for (method, estimand), cell in mine.items():
                cell.add_estimate(summarise(method, sampled, estimand=estimand), truths[estimand])
        cells += mine.values()
    return cells


def laws() -> dict[str, Law]:
    """Non-negative laws of mean one."""
    return {"exponential": lambda generator, n: generator.exponential(size=n)} | {
        f"lognormal, log-sd {spread:g}": lognormal(spread) for spread in (0.5, 1.0, 1.5)
    }


def stopping(replications: int, *, rtol: float = 0.1, cap: int = 20_000) -> Iterator[list[str]]:
    """Coverage of the reported interval after stopping at ``rtol``, at the looks that a run with ``rtol`` takes.

    With one prompt strings are independent. With 32 they share a factor of mean one and standard deviation 0.15.
    """
    for prompts in (1, 32):
        none = [torch.zeros(0, dtype=torch.long)] * prompts
        plan = Plan(none, none, samples=cap // prompts, max_tokens=1, seed=0)
        for name, law in laws().items():
            generator = rng.numpy_stream(0, "stopping", name, prompts)
            cell, stopped = Cell(name, "", ""), []
            for _ in range(replications):
                x = law(generator, plan.total)
                cluster = np.arange(plan.total)
                if prompts > 1:
                    factors = generator.gamma(1 / 0.15**2, 0.15**2, size=prompts)
                    cluster %= prompts
                    x *= factors[cluster]
                final = stop(x, cluster, plan, rtol)
                stopped.append(final.n)
                cell.add(final.interval(LEVEL), 1.0)
            below = f"{cell.below / replications:.1%}"
            yield [name, str(prompts), f"{np.median(stopped):.0f}", f"{cell.coverage:.1%}", below]


def stop(x: Array, cluster: NDArray[np.int64], plan: Plan, rtol: float) -> Estimate:
    """The estimate at the first look whose interval is narrow enough, or of all strings."""
    look = plan.next_look(0)
    while look < plan.total:
        found = Estimate("rb", "kl", "KL(p‖q)", "S", x[:look], np.ones(look), cluster[:look])
        # Half an interval is about two standard errors: no need to resample where one of them is too much.
        if found.n >= MINIMUM_STRINGS and found.stderr < rtol * found.value:
            interval = found.interval(LEVEL)
            if interval.upper - interval.lower <= 2 * rtol * found.value:
                return found
        look = plan.next_look(look)
    return Estimate("rb", "kl", "KL(p‖q)", "S", x, np.ones(plan.total), cluster)


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


def sections(replications: int, jobs: int = 1) -> Iterator[str]:
    """The document, section by section, as the simulations finish."""
    error = math.sqrt(LEVEL * (1 - LEVEL) / replications)
    yield (
        f"# Coverage of the error bars\n\nHow often the nominal {LEVEL:.0%} intervals contain the exact answer, in "
        f"{replications} replications (so every percentage has a standard error of about {error:.1%}). Rewritten by "
        f"`python benchmarks/interval_coverage.py --replications {replications}`. Cells below {ENOUGH:.0%} are marked "
        f'(!). "Truth above" counts the misses in which the interval ends below the truth: the dangerous side.'
    )
    with ProcessPoolExecutor(jobs) as executor:
        strings = [cell for cells in executor.map(partial(automata, replications), pairs()) for cell in cells]
    header = ["problem", "sample", "estimate", "coverage", "truth above", "error / stderr", "median width / truth"]
    yield "## Strings of automata with an exactly known divergence\n\n" + AUTOMATA
    yield table(header, [cell.row() for cell in strings])
    yield verdict(strings)
    header = ["log-sd", "n", "interval", "coverage", "truth above", "median width / truth"]
    synthetic = list(lognormals(replications))
    yield "## Lognormal totals\n\nIndependent values of mean one, with tails far heavier than any automaton's."
    yield table(header, [cell.row() for cell in synthetic])
    yield heavy_tails(synthetic) + " " + recognition(replications)
    header = ["law", "prompts", "median n", "coverage", "truth above"]
    yield STOPPING + table(header, list(stopping(replications)))
    header = ["law", "ever above the mean", "bound / mean at 64", "at 300", "at 1000"]
    few = min(replications, 200)
    yield f"## The anytime lower bound\n\n{few} replications.\n\n" + table(header, list(lower_bounds(few)))


def verdict(cells: list[Cell]) -> str:
    """Which cells fall short, and whether errors are as large as their standard errors say, in sentences."""
    short = [f"{c.method} on {c.problem}, {c.size} ({c.coverage:.1%})" for c in cells if c.coverage < ENOUGH]
    first = f"Below {ENOUGH:.0%}: " + "; ".join(short) if short else f"No cell is below {ENOUGH:.0%}"
    largest = max(cells, key=lambda cell: cell.excess)
    return (
        f"{first}. Errors are {min(c.excess for c in cells):.2f} to {largest.excess:.2f} times as large as the "
        f"standard errors say, in the root mean square; most on {largest.problem}, {largest.size}, {largest.method}."
    )


def span(values: Iterable[float]) -> str:
    """Smallest and largest of some shares, in per cent."""
    found = list(values)
    return f"{min(found):.0%} to {max(found):.0%}"


def heavy_tails(cells: list[Cell]) -> str:
    """What the lognormal table says, in sentences."""

    def covered(spread: str, method: str) -> str:
        return span(c.coverage for c in cells if (c.problem, c.method) == (spread, method))

    missed = sum(c.replications - c.covered for c in cells)
    above = sum(c.below for c in cells) / max(missed, 1)
    most = max(cells, key=lambda cell: int(cell.size)).size
    last = {c.method: f"{c.coverage:.0%}" for c in cells if (c.problem, c.size) == ("1.5", most)}
    return (
        f"With a log-sd of 1.5 bootstrap-t covers {covered('1.5', 'bootstrap-t')} and t {covered('1.5', 't')}; with 2 "
        f"they cover {covered('2', 'bootstrap-t')} and {covered('2', 't')}. Of all misses in this table {above:.0%} "
        f"have the truth above the interval: the values that carry the mean are too rare to be in the sample, and no "
        f"resampling can invent them. From 400 clusters on an estimate's own interval is t's, which for a log-sd of "
        f"1.5 covers {last['t']} at {most}, where bootstrap-t would cover {last['bootstrap-t']}."
    )


def recognition(replications: int, n: int = 256) -> str:
    """How often the Pareto k̂ beside an estimate gives a heavy tail away, in sentences."""
    shares = []
    for spread in (0.5, 1.0, 1.5, 2.0):
        generator = rng.numpy_stream(0, "khat", str(spread))
        found = [pareto_khat(lognormal(spread)(generator, n)) > 0.5 for _ in range(replications)]
        shares.append(f"{np.mean(found):.0%} (log-sd {spread:g})")
    return (
        f"The Pareto k̂ beside every estimate is there to recognise such tails, imperfectly: with {n} strings it "
        f"exceeds 0.5 in {', '.join(shares[:-1])} and {shares[-1]} of the samples. When it does, read the upper bound "
        f"as too low, and quote a quantile, or the anytime lower bound below, which holds whatever the tail."
    )


AUTOMATA = f"""\
Estimates per response (`/S`) and per token (`/R`, a ratio). String lengths of automata have geometric tails, so sums
over strings are skewed but have all their moments: the case the intervals are built for. Where there are prompts, each
is drawn from 100 fixed ones, the truth is the mean over these 100, and strings of one prompt are one unit of the
interval. "Error / stderr" compares the root mean square of the errors with that of the standard errors. Samples are
drawn from one pool of {POOL:,} strings, so replications share some."""

STOPPING = """\
## Stopping at a half-width of 10 %

The rule of `--rtol 0.1`: looks at 64 strings and whenever there are a quarter more, in whole rounds of the prompts; at
most 20,000. With 32 prompts, a random factor of mean 1 and standard deviation 0.15 is common to the strings of each.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replications", type=int, default=400)
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the pairs of automata")
    parser.add_argument("--output", type=Path, default=DOCUMENT)
    arguments = parser.parse_args()
    written = []
    for section in sections(arguments.replications, arguments.jobs):
        print(section, end="\n\n", flush=True)
        written.append(section)
    before = arguments.output.read_text(encoding="utf-8") if arguments.output.exists() else ""
    kept = re.search(r"<!-- decisions -->\n.*?<!-- end -->", before, flags=re.S)  # of benchmarks/decisions.py
    written += [kept[0]] if kept else []
    arguments.output.write_text("\n\n".join(written) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
