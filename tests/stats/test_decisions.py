"""The simulation of benchmarks/decisions.py on automata whose divergences are known, small enough for every run."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from klkit.stats.decision import decide
from klkit.stats.ranking import rank

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def decisions():
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("benchmark_decisions", FOLDER / "decisions.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FOLDER))
    for name in set(sys.modules) - before:
        if name in ("interval_coverage", "benchmark_decisions"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def pool(decisions):
    return decisions.Pool(decisions.LADDER, 1, 4000)


def at_most_five_per_cent(wrong, replications):
    """An observed rate that a true 5 % explains: at most 2.5 standard errors above it."""
    return wrong / replications <= 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / replications)


def test_candidates_are_different_and_exactly_as_far(decisions, pool):
    np.testing.assert_allclose(pool.truths, decisions.KL * np.array(decisions.LADDER), rtol=1e-13)
    assert pool.truths[0] == pytest.approx(pool.truths[1], rel=1e-14)
    assert np.abs(pool.sums[0] - pool.sums[1]).min() < 0.01 < np.abs(pool.sums[0] - pool.sums[1]).mean()
    np.testing.assert_allclose(pool.sums.mean(1), pool.truths, rtol=0.1)


@pytest.mark.parametrize("estimand", ["S", "R"])
def test_orders_of_automata(decisions, pool, estimand):
    generator, wrong, ties, right = np.random.default_rng(0), 0, [], []
    replications = 200
    for _ in range(replications):
        *data, spread = pool.draw(80, "rb", estimand, generator)
        false, tied, resolved = decisions.judged(rank(*data, spread=spread), pool.truths)
        wrong += false
        ties.append(tied)
        right.append(resolved)
    assert at_most_five_per_cent(wrong, replications)
    assert np.mean(ties) > 0.92
    assert np.mean(right) > 0.5


def test_orders_with_fitted_coefficients(decisions, pool):
    generator, wrong = np.random.default_rng(1), 0
    for _ in range(15):
        *data, spread = pool.draw(60, "rb_cv", "S", generator)
        assert (spread >= 1).all()
        wrong += decisions.judged(rank(*data, spread=spread), pool.truths)[0]
    assert wrong <= 3


def test_gates_of_automata(pool):
    generator, replications, n = np.random.default_rng(2), 200, 60
    verdicts = []
    for _ in range(replications):
        x = generator.choice(pool.sums[0], n, replace=False)
        verdicts.append(decide(x, np.ones(n), float(pool.truths[0])).verdict)
    assert at_most_five_per_cent(verdicts.count("pass"), replications)
    assert at_most_five_per_cent(verdicts.count("fail"), replications)


def test_a_false_verdict_is_noticed(decisions):
    x = np.random.default_rng(3).exponential(size=(1, 50)) * np.array([[1.0], [1.5], [2.0]])
    found = rank(x, np.ones(50), np.arange(50))
    assert decisions.judged(found, np.array([1.0, 1.5, 2.0])) == (False, pytest.approx(math.nan, nan_ok=True), 1.0)
    assert decisions.judged(found, np.array([1.0, 1.0, 2.0])) == (True, 0.0, 1.0)
    assert decisions.judged(found, np.array([1.5, 1.0, 2.0]))[0]


def test_the_page_keeps_what_others_wrote(decisions):
    page = decisions.filled("# Page\n\nold\n", "one")
    assert page == "# Page\n\nold\n\n<!-- decisions -->\n\none\n\n<!-- end -->\n"
    assert decisions.filled(page, "two") == page.replace("one", "two")


@pytest.mark.slow
@pytest.mark.parametrize(("strings", "clusters"), [(1, 50), (4, 25)])
def test_five_equal_automata_are_tied(decisions, strings, clusters):
    whole = decisions.Pool(decisions.EQUAL, strings, 24_000)
    generator, replications = np.random.default_rng(4), 1000
    wrong = 0
    for _ in range(replications):
        *data, spread = whole.draw(clusters, "rb", "S", generator)
        wrong += decisions.judged(rank(*data, spread=spread), whole.truths)[0]
    assert at_most_five_per_cent(wrong, replications)
