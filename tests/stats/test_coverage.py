"""The simulation of benchmarks/interval_coverage.py: small enough for every run, large enough to notice mistakes."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from klkit.api.plan import Plan
from klkit.stats.intervals import Interval

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "interval_coverage.py"
PAIR = "random, 4 states, 5 symbols"


@pytest.fixture(scope="module")
def coverage():
    spec = importlib.util.spec_from_file_location("benchmark_coverage", PATH)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def check(cell):
    """Coverage within 4 standard errors of 95 %; errors as large as the standard errors say, up to 4 of theirs."""
    error = math.sqrt(0.05 * 0.95 / cell.replications)
    assert abs(cell.coverage - 0.95) < 4 * error, cell.row()
    errors = np.array(cell.errors)
    kurtosis = np.mean(errors**4) / np.mean(errors**2) ** 2
    assert abs(cell.excess - 1) < 4 * math.sqrt((kurtosis - 1) / 4 / cell.replications), cell.row()


def test_intervals_of_single_strings_contain_the_exact_divergence(coverage, monkeypatch):
    kinds = [(method, estimand) for estimand in "SR" for method in ("mc", "rb")]
    monkeypatch.setattr(coverage, "KINDS", kinds)
    monkeypatch.setattr(coverage, "POOL", 12_000)
    cells = coverage.automata(300, PAIR, ["64 strings"])
    assert [cell.method for cell in cells] == ["mc/S", "rb/S", "mc/R", "rb/R"]
    for cell in cells:
        check(cell)


def test_intervals_of_prompts_with_several_strings_contain_the_exact_divergence(coverage, monkeypatch):
    """Most of what rb_cv leaves is variance between prompts: strings taken for independent would show here."""
    monkeypatch.setattr(coverage, "KINDS", [("rb_cv", "S"), ("rb", "R")])
    monkeypatch.setattr(coverage, "POOL", 8000)
    cells = list(coverage.automata(120, PAIR, ["16 prompts x 4"]))
    assert [cell.method for cell in cells] == ["rb_cv/S", "rb/R"]
    for cell in cells:
        check(cell)


def test_a_run_stops_at_the_first_look_that_is_narrow_enough(coverage):
    none = [torch.zeros(0, dtype=torch.long)]
    plan = Plan(none, none, samples=2000, max_tokens=1, seed=0)
    x = np.random.default_rng(0).exponential(size=2000)
    found = coverage.stop(x, np.arange(2000), plan, rtol=0.1)
    widths = {}
    look = plan.next_look(0)
    while look <= found.n:
        part = coverage.Estimate("rb", "kl", "KL(p‖q)", "S", x[:look], np.ones(look), np.arange(look))
        widths[look] = (part.interval().upper - part.interval().lower) / 2 / part.value
        look = plan.next_look(look)
    assert list(widths)[:3] == [64, 80, 100]
    assert [n for n, width in widths.items() if width <= 0.1] == [found.n]
    assert coverage.stop(x[:200], np.arange(200), Plan(none, none, 200, 1, 0), rtol=0.001).n == 200


def test_every_law_has_mean_one(coverage):
    generator = np.random.default_rng(0)
    for law in coverage.laws().values():
        assert law(generator, 20_000).mean() == pytest.approx(1, abs=0.15)


def test_a_row_flags_low_coverage(coverage):
    cell = coverage.Cell("x", "64 strings", "t")
    for upper in (2.0, 0.5, math.inf):
        cell.add(Interval(0.95, 0.0, upper, "t"), truth=1.0)
    assert cell.row() == ["x", "64 strings", "t", "66.7% (!)", "33.3%", "2"]
    cell.errors, cell.stderrs = [3.0, -4.0], [1.0, 7.0]
    assert cell.row()[-2] == "0.71"
    assert coverage.verdict([cell]).startswith("Below 93%: t on x, 64 strings (66.7%). Errors are 0.71 to 0.71 times")
