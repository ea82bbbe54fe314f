"""Two processes over gloo take the steps of one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: make test-trl installs it and runs this")

SCRIPT = Path(__file__).with_name("trl_processes.py")


def test_two_processes_take_the_steps_of_one(tmp_path):
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for launcher in ([], two):
        command = [sys.executable, *launcher, str(SCRIPT), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    for kind in ("GRPO", "RLOO"):
        names = [f"{kind}-1-0", f"{kind}-2-0", f"{kind}-2-1"]
        alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in names)
        noted = [json.loads((tmp_path / f"{name}.json").read_text()) for name in names]
        assert [n["processes"] for n in noted] == [1, 2, 2]
        assert torch.equal(first, second)
        assert float((first - alone).norm()) < 1e-3 * float(alone.norm())
        assert min(noted[0]["kl"]) > 0
        assert noted[1]["kl"] == pytest.approx(noted[0]["kl"], rel=1e-3)
