"""What waits for a GPU runs without one, as far as it can."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"

INTERPRETED = """
import torch, gpu_triton
from klkit.divergences.backends import eager
from klkit.divergences.sums import RowSums, values

generator = torch.Generator().manual_seed(0)
for size, splits, scale in ((5003, 1, 1e-3), (9000, 3, 0.3), (300, 1, 1.0)):
    a = 3 * torch.randn(3, size, generator=generator)
    b = a + scale * torch.randn(3, size, generator=generator)
    gone = (torch.rand(3, size, generator=generator) < 0.5).scatter(1, a.argmax(1, keepdim=True), False)
    for x, y in ((a, b), (a.masked_fill(gone, -torch.inf), b.masked_fill(gone, -torch.inf))):
        mine = RowSums(*gpu_triton.row_sums(x, y, splits=splits, lanes=64, width=8).unbind(1))
        true = RowSums(*eager.row_sums(x.double(), y.double()).unbind(1))
        assert torch.equal(mine.top_p, true.top_p) and torch.equal(mine.top_q, true.top_q)
        for got, expected in zip(values(mine), values(true), strict=True):
            torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-16)
"""


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *command], cwd=FOLDER, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


def test_the_benchmark_runs_at_tiny_sizes(tmp_path):
    results = tmp_path / "gpu.json"
    run("gpu.py", "--device", "cpu", "--quick", "--rounds", "1", "--threads", "1", "--json", str(results))
    tables = json.loads(results.read_text())["tables"]
    assert len(tables) == 7
    assert [row[-1] for row in tables[-1]["rows"]] == ["", "", "", ""]  # nothing is claimed that was not measured
    for table in tables[1:-2]:
        assert all(float(row[-1]) < (1e-2 if "bf16" in table["title"] else 1e-5) for row in table["rows"])


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_triton_kernel_under_its_interpreter():
    run("-c", INTERPRETED, TRITON_INTERPRET="1", PYTHONPATH=str(FOLDER))
