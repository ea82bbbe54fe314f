"""How often verdicts are wrong: orders of many candidates, gates, and looking after every string.

    python benchmarks/decisions.py --replications 400

prints Markdown tables and puts them into their place in docs/coverage.md.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from interval_coverage import DOCUMENT, Array, laws, lognormal, table

from klkit import rng
from klkit.estimators import summarise
from klkit.estimators.exact import exact
from klkit.estimators.statistics import TokenStatistics, score
from klkit.models.automaton import Automaton, automaton, random_automaton
from klkit.sampling.ancestral import sample
from klkit.stats.anytime import AROUND, START, anytime_difference
from klkit.stats.decision import FAIL, PASS, decide
from klkit.stats.paired import holm, seeds_to_resolve
from klkit.stats.ranking import CLOSER, Order, rank
from klkit.stats.student import student_quantile, student_tails

LEVEL = 0.95
KL = 0.1  # nats: of the candidates that are exactly as far from p as each other
POOL = 24_000  # strings
HORIZON = 3000  # looks
FITTED = (25, 100)  # cluster counts at which coefficients, which take long, are fitted too
EQUAL = (1.0, 1.0, 1.0, 1.0, 1.0)
LADDER = (1.0, 1.0, 1.15, 1.3, 1.6, 2.0)
"""Divergences of the candidates of two families, in units of ``KL``: all equal, and two equal ones among six."""


def reference() -> Automaton:
    """A random automaton with four states and five symbols."""
    return random_automaton(4, 5, generator=rng.stream(1, "coverage", "p"))


def prompts(p: Automaton) -> list[torch.Tensor]:
    """One symbol each: contexts that lead to different states."""
    return [torch.tensor([*p.vocabulary.ends, symbol]) for symbol in range(p.vocabulary.size - 1)]


def divergence(p: Automaton, q: Automaton, contexts: Iterable[torch.Tensor]) -> float:
    """The exact mean of ``KL(p‖q)`` over contexts."""
    return float(np.mean([exact(p, q, prompt=context).value for context in contexts]))


def candidates(p: Automaton, ratios: Iterable[float], contexts: list[torch.Tensor]) -> list[Automaton]:
    """Different models with ``KL(p‖q) = ratio · KL`` to rounding: each moves ``p``'s logits along a way of its own.

    By turns: everywhere, at one token of every state, and in one state only, which makes differences between them
    skewed.
    """
    found = []
    for i, ratio in enumerate(ratios):
        way = torch.randn(p.log_probabilities.shape, generator=rng.stream(0, "way", i), dtype=torch.float64)
        if i % 3 == 1:
            way[:, : way.shape[1] - 1 - i % 2] = 0
        if i % 3 == 2:
            way[torch.arange(p.states) != i % p.states] = 0

        def moved(step: float, way: torch.Tensor = way) -> Automaton:
            laws = (p.log_probabilities + step * way).softmax(-1)
            return automaton(laws, p.transitions[:, :-1], symbols=p.vocabulary.tokens[:-1], name="q")

        low, high = 0.0, 1.0
        while divergence(p, moved(high), contexts) < ratio * KL:
            high *= 2
        while (middle := (low + high) / 2) not in (low, high):
            low, high = (middle, high) if divergence(p, moved(middle), contexts) < ratio * KL else (low, middle)
        found.append(moved(high))
    return found


class Pool:
    """Strings of the reference, scored with every candidate; ``strings`` to a cluster, which is a prompt.

    Attributes:
        truths: exact divergence of each candidate.
    """

    def __init__(self, ratios: Iterable[float], strings: int, size: int) -> None:
        p = reference()
        contexts = [p.context(None)] if strings == 1 else prompts(p)
        models = candidates(p, ratios, contexts)
        self.truths = np.array([divergence(p, q, contexts) for q in models])
        self.strings, self.clusters = strings, size // strings
        chosen = rng.numpy_stream(0, "prompts", strings).integers(len(contexts), size=self.clusters)
        cluster = np.repeat(np.arange(self.clusters), strings)
        x = sample(
            p,
            [contexts[i] for i in np.repeat(chosen, strings)],
            max_tokens=2000,
            seed=0,
            prompt=cluster.tolist(),
            replicate=np.tile(np.arange(strings), self.clusters).tolist(),
            cluster=cluster.tolist(),
        ).sequences
        if not bool(x.finished.all()):
            raise RuntimeError("strings were cut, so their mean is not the exact divergence")
        self.statistics: list[TokenStatistics] = [
            score(p, q, x, batch_size=4096, features=p.embedding()) for q in models
        ]

        whole = {estimand: [summarise("rb", s, estimand=estimand) for s in self.statistics] for estimand in "SR"}
        self.sums = np.stack([estimate.contributions for estimate in whole["S"]])
        self.weights = {estimand: found[0].weights for estimand, found in whole.items()}

    def draw(self, clusters: int, method: str, estimand: str, generator: np.random.Generator) -> tuple[Array, ...]:
        """Contributions ``(k, n)``, weights, clusters and spreads of a sample without replacement."""
        drawn = generator.choice(self.clusters, clusters, replace=False)
        rows = (drawn[:, None] * self.strings + np.arange(self.strings)).ravel()
        cluster = np.repeat(np.arange(clusters), self.strings)
        if method == "rb":  # a string's sum does not depend on the others
            return self.sums[:, rows], self.weights[estimand][rows], cluster, np.ones(len(self.sums))
        found = [summarise(method, s.select(torch.from_numpy(rows)), estimand=estimand) for s in self.statistics]
        return (
            np.stack([e.contributions for e in found]),
            found[0].weights,
            cluster,
            np.array([e.spread for e in found]),
        )


def judged(found: Order, truths: Array) -> tuple[bool, float, float]:
    """Whether any verdict is false, and the shares of equal pairs tied and of different pairs resolved rightly."""
    false, tied, right = [], [], []
    for pair in found.pairs:
        gap = truths[pair.first] - truths[pair.second]
        equal, closer = abs(gap) < 1e-9, pair.verdict == CLOSER
        false.append(closer and (equal or gap > 0))
        (tied if equal else right).append(not closer if equal else closer and gap < 0)
    return any(false), *(float(np.mean(shares)) if shares else math.nan for shares in (tied, right))


def percent(share: float) -> str:
    return "" if math.isnan(share) else f"{share:.1%}"


def orders(replications: int, pool_size: int = POOL) -> Iterator[list[str]]:
    """Family-wise error and power of orders of automata with exactly known divergences."""
    for name, ratios in (("five equal", EQUAL), ("two equal of six", LADDER)):
        for strings, sizes in ((1, (20, 50, 100, 400)), (4, (25, 100))):
            pool = Pool(ratios, strings, pool_size)
            for clusters in sizes:
                for method, estimand in (("rb", "S"), ("rb", "R"), ("rb_cv", "S")):
                    if method == "rb_cv" and clusters not in FITTED:
                        continue
                    few = replications if method == "rb" else max(1, replications // 4)
                    generator = rng.numpy_stream(0, "orders", name, strings, clusters, method, estimand)
                    seen = []
                    for _ in range(few):
                        *data, spread = pool.draw(clusters, method, estimand, generator)
                        seen.append(judged(rank(*data, level=LEVEL, spread=spread), pool.truths))
                    false, tied, right = (float(np.mean(column)) for column in zip(*seen, strict=True))
                    size = f"{clusters} strings" if strings == 1 else f"{clusters} prompts x {strings}"
                    yield [name, size, f"{method}/{estimand}", str(few), percent(false), percent(tied), percent(right)]


def families() -> dict[str, Callable[[np.random.Generator, int], Array]]:
    """Eight candidates of mean one whose differences are as skewed as they come: ``(8, n)``."""

    def mixed(generator: np.random.Generator, n: int) -> Array:
        return np.stack([lognormal(spread)(generator, n) for spread in np.linspace(0, 1, 8)])

    return {
        "log-sd 0 to 1": mixed,
        "the same times a common exponential": lambda generator, n: generator.exponential(size=n) * mixed(generator, n),
        "one constant, seven of log-sd 1": lambda generator, n: np.stack(
            [np.ones(n), *(lognormal(1.0)(generator, n) for _ in range(7))]
        ),
        "alike: log-sd 1 each": lambda generator, n: np.stack([lognormal(1.0)(generator, n) for _ in range(8)]),
    }


def skewed(replications: int) -> Iterator[list[str]]:
    """Family-wise error where all differences are zero and skewed: of Student's p-values alone, and of those used."""
    for name, family in families().items():
        for n in (20, 50, 100, 200, 400):
            generator = rng.numpy_stream(0, "skewed", name, n)
            usual = used = 0
            for _ in range(replications):
                found = rank(family(generator, n), np.ones(n), np.arange(n), level=LEVEL)
                t = np.array([abs(pair.difference) / pair.stderr for pair in found.pairs])
                usual += min(holm((2 * student_tails(t, n - 1)).tolist())) <= 1 - LEVEL
                used += any(pair.verdict == CLOSER for pair in found.pairs)
            yield [name, str(n), percent(usual / replications), percent(used / replications)]


def gates(replications: int, pool_size: int = POOL) -> Iterator[list[str]]:
    """Both errors of a gate whose limit is the truth, where they are largest; and right verdicts at other limits."""
    pool = Pool((1.0, 1.0, 1.0), 1, pool_size)
    problems: dict[str, Callable[[np.random.Generator, int], Array]] = {
        "normal, sd 1": lambda generator, n: generator.normal(1, 1, size=n),
        **laws(),
    }
    for which, name in enumerate(("automata, all states", "automata, one token", "automata, one state")):
        sums = pool.sums[which] / pool.truths[which]
        problems[name] = lambda generator, n, sums=sums: generator.choice(sums, n, replace=False)
    for name, law in problems.items():
        for n in (20, 50, 100, 400, 1000):
            generator = rng.numpy_stream(0, "gates", name, n)
            found = [decide(law(generator, n), np.ones(n), 1.0, level=LEVEL) for _ in range(replications)]
            false = (sum(one.verdict == word for one in found) / replications for word in (PASS, FAIL))
            right = (sum(one.upper < 1.25 for one in found), sum(one.lower > 0.8 for one in found))
            yield [name, str(n), *map(percent, false), *(percent(count / replications) for count in right)]


def differences() -> dict[str, Callable[[np.random.Generator, int], tuple[Array, Array]]]:
    """Pairs of contributions with equal means."""
    one = lognormal(1.0)
    return {
        "normal": lambda g, n: (1 + g.normal(size=n), np.ones(n)),
        "exponential - 1": lambda g, n: (g.exponential(size=n), np.ones(n)),
        "lognormal, log-sd 1, - 1": lambda g, n: (one(g, n), np.ones(n)),
        "lognormals, log-sd 1 and 0.5": lambda g, n: (one(g, n), lognormal(0.5)(g, n)),
        "lognormals, log-sd 1 and 1": lambda g, n: (one(g, n), one(g, n)),
        "lognormal, log-sd 1.5, - 1": lambda g, n: (lognormal(1.5)(g, n), np.ones(n)),
    }


def peeking(replications: int, horizon: int = HORIZON) -> Iterator[list[str]]:
    """How often two equal candidates are told apart by looking after every string."""
    t = np.arange(1, horizon + 1)
    edge = np.array([student_quantile((1 + LEVEL) / 2, max(n - 1, 1)) for n in t[:500]])
    edge = np.concatenate([edge, np.full(horizon, edge[-1])])[:horizon]
    for name, law in differences().items():
        generator = rng.numpy_stream(0, "peeking", name)
        errors = np.zeros(2)
        for _ in range(replications):
            first, second = law(generator, horizon)
            found = anytime_difference(first, second, level=LEVEL)
            d = first - second
            mean = np.cumsum(d) / t
            stderr = np.sqrt(np.maximum(np.cumsum(d**2) / t - mean**2, 0) / np.maximum(t - 1, 1))
            looked = (np.abs(mean) > edge * stderr)[START - 1 :].any()
            errors += [found.resolved is not None, looked]
        yield [name, *(percent(share) for share in errors / replications)]


def costs(replications: int, horizon: int = 4 * HORIZON) -> Iterator[list[str]]:
    """Strings until a true difference is resolved, against those of a t test of fixed size with power 0.8."""
    for name, sign in (("long tail on the side of the difference", 1), ("long tail on the other side", -1)):
        for gap in (0.4, 0.2, 0.1):
            generator = rng.numpy_stream(0, "costs", sign, str(gap))
            fixed = seeds_to_resolve(1.0, gap)
            stops = []
            for _ in range(replications):
                d = sign * (generator.exponential(size=horizon) - 1) + gap
                found = anytime_difference(d, np.zeros(horizon), level=LEVEL)
                stops.append(found.resolved or horizon)
            middle, most = np.quantile(stops, [0.5, 0.8])
            row = [f"{gap:g}", str(fixed), f"{middle:.0f}", f"{most:.0f}", f"{most / fixed:.1f}"]
            yield [name, *row]


def sections(replications: int) -> Iterator[str]:
    """The sections of the page, as the simulations finish."""
    error = math.sqrt(0.05 * 0.95 / replications)
    yield (
        f"## Orders, gates and looking early\n\nHow often verdicts are wrong, at a nominal {1 - LEVEL:.0%}, in "
        f"{replications} replications unless a row says otherwise (an error of 5% is then measured to ± {error:.1%}, "
        f"one standard error). Rewritten by `python benchmarks/decisions.py --replications {replications}`."
    )
    header = ["candidates", "sample", "estimate", "replications", "any false verdict", "equal tied", "others resolved"]
    yield ORDERS + table(header, list(orders(replications)))
    yield SKEWED + table(["eight candidates", "clusters", "Student's t", "as used"], list(skewed(replications)))
    header = ["law", "clusters", "false pass", "false fail", "pass at 1.25", "fail at 0.8"]
    rows = list(gates(replications))
    yield GATES + table(header, rows)
    yield beyond(rows, error)
    yield PEEKING + table(["difference", "as used", "t test, looked at"], list(peeking(replications)))
    header = ["exponential differences", "difference / sd", "fixed t test", "median", "80%", "ratio"]
    yield COSTS + table(header, list(costs(min(replications, 400))))


def beyond(rows: list[list[str]], error: float) -> str:
    """Which gates err more often than chance explains, in a sentence."""
    edge = 100 * (1 - LEVEL + 2 * error)
    found = [
        f"{name}, {n} clusters ({share} false {word})"
        for name, n, *shares in rows
        for word, share in zip(("pass", "fail"), shares, strict=False)
        if float(share.rstrip("%")) > edge
    ]
    return f"Above {1 - LEVEL:.0%} by more than two standard errors: {'; '.join(found) or 'none'}."


ORDERS = f"""\
### Orders of automata

Candidates are different automata whose exact divergence from one reference is {KL:g} nats, to rounding, or a multiple
of it: 1, 1, 1.15, 1.3, 1.6 and 2 in the family of six. "Any false verdict" is the share of samples in which two equal
candidates were told apart or two others in the wrong order. Prompts are drawn from five, and strings of one prompt are
one unit. Samples come from one pool of {POOL:,} strings a family, so replications share some.

"""

SKEWED = """\
### Orders of equal candidates with skewed differences

Eight candidates of equal mean. Student's t is Holm's procedure on ordinary paired t tests; what is used takes the
larger of that p-value and the one with the skewness of the difference removed.

"""

GATES = """\
### Gates

The limit is the truth, so that a pass and a failure are both errors, and no limit has more of them. The last two
columns are verdicts that are right: with a limit of 1.25 and of 0.8 times the truth.

"""

PEEKING = f"""\
### Looking after every string

Two equal candidates are compared after every string from {START} on, up to {HORIZON:,}. As used: the asymptotic
confidence sequence with the skewness removed. The t test is Student's at every look.

"""

COSTS = f"""\
### What looking costs

Strings until the difference is resolved, looking after each of them (bounds tuned to {AROUND}), and those of a t test
whose size was fixed beforehand for a power of 0.8. The last column is the 80% quantile over that size.

"""


def filled(page: str, text: str) -> str:
    """``page`` with ``text`` between the marks of this benchmark, which are added at the end where they are missing."""
    block = f"<!-- decisions -->\n\n{text}\n\n<!-- end -->"
    pattern = r"<!-- decisions -->\n.*?<!-- end -->"
    if re.search(pattern, page, flags=re.S):
        return re.sub(pattern, lambda _: block, page, flags=re.S)
    return f"{page.rstrip()}\n\n{block}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replications", type=int, default=400)
    parser.add_argument("--output", type=Path, default=DOCUMENT)
    arguments = parser.parse_args()
    written = []
    for section in sections(arguments.replications):
        print(section, end="\n\n", flush=True)
        written.append(section)
    page = arguments.output.read_text(encoding="utf-8") if arguments.output.exists() else ""
    arguments.output.write_text(filled(page, "\n\n".join(written)), encoding="utf-8")


if __name__ == "__main__":
    main()
