"""Which kernels a process uses, and that they can be forced."""

import os
import subprocess
import sys

import pytest
import torch

from klkit.divergences import backends
from klkit.divergences.fused import row_statistics

FEW, MANY = 10**6, 10**12


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch):
    monkeypatch.delenv("KLKIT_BACKEND", raising=False)


def choice(positions: int, **environment: str) -> str:
    """What a fresh process would choose, without loading anything for it."""
    script = (
        f"import sys; from klkit.divergences.backends import choose; name = choose({positions}); "
        f"print(name, 'numba' in sys.modules)"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    name, loaded = done.stdout.split()
    assert loaded == "False"
    return name


def test_a_short_run_loads_nothing_and_a_long_one_is_worth_it():
    pytest.importorskip("numba")
    assert choice(FEW) == "eager"
    assert choice(MANY) == "native"
    assert choice(MANY, KLKIT_BACKEND="eager") == "eager"
    assert choice(FEW, KLKIT_BACKEND="native") == "native"


def test_double_precision_and_accelerators_stay_with_pytorch():
    assert backends.choose(MANY, dtype=torch.float64) == "eager"
    assert backends.choose(MANY, "meta") == "eager"


def test_an_unknown_name(monkeypatch):
    monkeypatch.setenv("KLKIT_BACKEND", "fortran")
    with pytest.raises(ValueError, match="expected KLKIT_BACKEND to be auto or one of"):
        backends.choose(FEW)


def test_without_numba(monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert backends.choose(MANY) == "eager"
    with pytest.raises(ImportError, match=r"pip install 'klkit\[fast\]'"):
        backends.get("native")


def test_backends_agree_with_each_other():
    pytest.importorskip("numba")
    generator = torch.Generator().manual_seed(0)
    a = 3 * torch.randn(40, 5003, generator=generator)
    b = a + torch.logspace(-4, 0.5, 40)[:, None] * torch.randn(40, 5003, generator=generator)
    one, other = (row_statistics(a, b, torch.arange(40), (0,), backend=name) for name in ("eager", "native"))
    for name in ("kl", "reverse_kl", "total_variation", "entropy_p", "entropy_q", "logp", "logq"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=2e-6, atol=1e-12)
