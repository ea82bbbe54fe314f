"""The simulation of benchmarks/coverage.py, small enough for every run and large enough to notice a blunder."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from klkit.stats.intervals import Interval

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "coverage.py"


@pytest.fixture(scope="module")
def coverage():
    spec = importlib.util.spec_from_file_location("benchmark_coverage", PATH)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_intervals_of_sampled_strings_contain_the_exact_divergence(coverage):
    cells = list(coverage.automata(50, sizes=(64,), chosen=slice(4, 5)))
    assert [c.problem.rsplit(", ")[-1] for c in cells] == [*(f"{m}/S" for m in coverage.METHODS), "rb/R"]
    for cell in cells:
        assert abs(cell.coverage - 0.95) < 4 * math.sqrt(0.05 * 0.95 / 50), cell.row()


def test_stopping_and_lower_bounds_report_every_law(coverage):
    rows = list(coverage.stopping(3, cap=200))
    assert [row[0] for row in rows] == list(coverage.laws())
    generator = np.random.default_rng(0)
    for law in coverage.laws().values():
        assert law(generator, 20_000).mean() == pytest.approx(1, abs=0.15)


def test_a_row_flags_low_coverage(coverage):
    cell = coverage.Cell("x", 64, "t")
    for upper in (2.0, 0.5, math.inf):
        cell.add(Interval(0.95, 0.0, upper, "t"), truth=1.0)
    assert cell.row() == ["x", "64", "t", "66.7% (!)", "33.3%", "2.00"]
    assert coverage.verdict([cell]) == "Below 93%: x at n = 64 (66.7%)."
