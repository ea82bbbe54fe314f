"""One harness over every backend: values and gradients against double precision, row after row of hard cases."""

import math
import shutil
from importlib.util import find_spec

import pytest
import torch

from klkit.divergences import backends
from klkit.divergences.differentiable import divergences
from klkit.divergences.fused import row_statistics
from klkit.divergences.sums import RowSums, norms_of, values
from klkit.numerics import excess

NO = -math.inf
INDUCTOR = pytest.param(
    "inductor", marks=[pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")]
)
NATIVE = pytest.param("native", marks=pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed"))
EVERY = pytest.mark.parametrize("backend", ["eager", NATIVE, INDUCTOR])
ROWS, SIZE = 16, 50257


def normal(seed: int, rows: int = ROWS, size: int = SIZE) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def noisy(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    a = 3 * normal(0)
    return a, a + scale * normal(1)


def masked(which: str) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = noisy(0.3)
    gone = normal(2) > 0
    gone.scatter_(1, a.argmax(1, keepdim=True), False)
    return (a.masked_fill(gone, NO) if "p" in which else a), (b.masked_fill(gone, NO) if "q" in which else b)


def one_hot() -> tuple[torch.Tensor, torch.Tensor]:
    a = torch.zeros(ROWS, SIZE)
    a[:, 7] = 100.0
    return a, 0.01 * normal(1)


CASES = {
    "KL of 0.5": lambda: noisy(1.0),
    "KL of 4e-2": lambda: noisy(0.3),
    "KL of 5e-5": lambda: noisy(1e-2),
    "KL of 5e-7": lambda: noisy(1e-3),
    "KL of 5e-9": lambda: noisy(1e-4),
    "unrelated": lambda: (3 * normal(0), 8 * normal(1)),
    "logits of 3e4": lambda: (1e4 * normal(0), 1e4 * normal(0) + normal(1)),
    "offset of 1e4": lambda: (noisy(0.3)[0] + 1e4, noisy(0.3)[1]),
    "masked in both": lambda: masked("pq"),
    "masked in p": lambda: masked("p"),
    "one-hot p": one_hot,
    "one-hot q": lambda: one_hot()[::-1],
}
TOLERANCE = {"KL of 5e-7": 1e-5, "KL of 5e-9": 1e-4, "KL of 5e-5": 4e-6, "logits of 3e4": 4e-6, "offset of 1e4": 4e-6}


def truth(a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    logp, logq = a.double().log_softmax(-1), b.double().log_softmax(-1)
    p, q = logp.exp(), logq.exp()
    d = (logq.clamp(min=-1e18) - logp.clamp(min=-1e18)).masked_fill((logp == NO) & (logq == NO), 0.0)
    level_p, level_q = (x.clamp(min=-1e18) for x in (logp, logq))
    kl = torch.where(p > 0, p * excess(d.clamp(max=700)), q).sum(-1)
    mean = (p * d).sum(-1, keepdim=True)
    return {
        "kl": kl,
        "reverse_kl": torch.where(q > 0, q * excess((-d).clamp(max=700)), p).sum(-1),
        "entropy_p": -(p * level_p).sum(-1),
        "entropy_q": -(q * level_q).sum(-1),
        "total_variation": (p - q).abs().sum(-1) / 2,
        "variance_logp": (p * (level_p - (p * level_p).sum(-1, keepdim=True)).square()).sum(-1),
        "variance_ratio": (p * (d - mean).square()).sum(-1),
    }


@EVERY
@pytest.mark.parametrize("case", CASES)
def test_values_against_double_precision(backend, case):
    a, b = CASES[case]()
    got = row_statistics(a, b, torch.arange(ROWS), (0,), backend=backend)
    rtol = TOLERANCE.get(case, 2e-6)
    for name, expected in truth(a, b).items():
        if name == "reverse_kl" and case == "masked in p":
            assert bool((got.reverse_kl == math.inf).all())
            continue
        loose = 1e-3 if "logits" in case and "kl" not in name else max(rtol, 2e-5 if "variance" in name else 0)
        absolute = 2e-7 if name.startswith(("entropy", "variance")) or "one-hot" in case else 1e-30
        value = getattr(got, name).double()
        torch.testing.assert_close(value, expected, rtol=loose, atol=absolute, msg=lambda m, n=name: f"{n}: {m}")
    assert bool((got.kl >= 0).all())
    assert torch.equal(got.top_p, a.argmax(-1))
    assert torch.equal(got.top_q, b.argmax(-1))


@EVERY
def test_equal_rows_diverge_by_nothing(backend):
    a = 3 * normal(0)
    same = row_statistics(a, a.clone(), torch.arange(ROWS), (0,), backend=backend)
    assert not same.kl.any()
    assert not same.reverse_kl.any()
    assert not same.total_variation.any()
    shifted = row_statistics(a, a + 0.37, torch.arange(ROWS), (0,), backend=backend)
    assert bool((shifted.kl >= 0).all())
    assert float(shifted.kl.max()) < 1e-12


@EVERY
def test_what_q_alone_excludes_is_infinite(backend):
    a, b = masked("q")
    got = row_statistics(a, b, torch.arange(ROWS), (0,), backend=backend)
    assert bool((got.kl == math.inf).all())
    assert bool((got.lost > 0).all())
    torch.testing.assert_close(got.reverse_kl.double(), truth(a, b)["reverse_kl"], rtol=2e-6, atol=0)
    b.scatter_(1, a.argmax(1, keepdim=True), NO)  # even p's top token, which is everybody's reference
    got = row_statistics(a, b, torch.arange(ROWS), (0,), backend=backend)
    assert bool((got.kl == math.inf).all())
    torch.testing.assert_close(got.reverse_kl.double(), truth(a, b)["reverse_kl"], rtol=2e-6, atol=0)


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_what_it_is_in_single(backend, dtype):
    a, b = (x[:, :3000].to(dtype) for x in noisy(0.3))
    tokens = torch.arange(ROWS)
    half = row_statistics(a, b, tokens, (0,), backend=backend)
    single = row_statistics(a.float(), b.float(), tokens, (0,), backend=backend)
    for name in ("kl", "reverse_kl", "entropy_p", "logp", "variance_ratio"):
        torch.testing.assert_close(getattr(half, name), getattr(single, name), rtol=1e-6, atol=0)
    upstream = torch.rand(ROWS, generator=torch.Generator().manual_seed(3))
    found = []
    for x in (a, a.float()):
        x = x.clone().requires_grad_()
        (divergences(x, b.to(x.dtype), backend=backend).kl * upstream).sum().backward()
        found.append(x.grad)
    assert found[0].dtype == dtype
    torch.testing.assert_close(found[0].float(), found[1], rtol=2**-7, atol=1e-7)


@EVERY
@pytest.mark.parametrize("size", [2, 3, 1000, 1024, 1025, 2049])
@pytest.mark.parametrize("rows", [0, 1, 33])
def test_every_shape(backend, size, rows):
    a = 3 * normal(0, rows, size)
    b = a + normal(1, rows, size)
    got = row_statistics(a, b, torch.zeros(rows, dtype=torch.long), (0,), backend=backend)
    expected = truth(a, b)
    for name in ("kl", "reverse_kl", "entropy_p", "total_variation"):
        torch.testing.assert_close(getattr(got, name).double(), expected[name], rtol=5e-6, atol=1e-7)


@EVERY
def test_rows_of_a_wider_tensor(backend):
    a, b = (normal(seed, 5, 700)[:, 100:611] for seed in (0, 1))
    tokens = torch.arange(5)
    one = row_statistics(a, b, tokens, (0,), backend=backend)
    other = row_statistics(a.contiguous(), b.contiguous(), tokens, (0,), backend=backend)
    torch.testing.assert_close(one.kl, other.kl, rtol=0, atol=0)
    x = a.clone(memory_format=torch.preserve_format).requires_grad_()
    divergences(x, b, backend=backend).kl.sum().backward()
    torch.testing.assert_close(x.grad.sum(-1), torch.zeros(5), rtol=0, atol=1e-6)


QUANTITIES = ("kl", "reverse_kl", "entropy_p", "entropy_q", "logp", "logq", "js")


def plain(a: torch.Tensor, b: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """The quantities as anybody would write them, for automatic differentiation in double precision."""
    logp, logq = a.log_softmax(-1), b.log_softmax(-1)
    p, q = logp.exp(), logq.exp()
    m = torch.logaddexp(logp, logq) - math.log(2)
    return {
        "kl": (p * (logp - logq)).sum(-1),
        "reverse_kl": (q * (logq - logp)).sum(-1),
        "entropy_p": -(p * logp).sum(-1),
        "entropy_q": -(q * logq).sum(-1),
        "logp": logp.gather(-1, y[:, None])[:, 0],
        "logq": logq.gather(-1, y[:, None])[:, 0],
        "js": 0.5 * (p * (logp - m)).sum(-1) + 0.5 * (q * (logq - m)).sum(-1),
    }


@EVERY
@pytest.mark.parametrize("quantity", [*QUANTITIES, "all"])
@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_gradients_against_automatic_differentiation(backend, quantity, scale):
    a = 3 * normal(0, 6, 1500)
    b = a + scale * normal(1, 6, 1500)
    y, upstream = torch.arange(6) * 7, torch.rand(7, 6, generator=torch.Generator().manual_seed(2)) + 0.1
    wanted = QUANTITIES if quantity == "all" else (quantity,)

    def gradient(function, dtype):
        x, z = (t.to(dtype, copy=True).requires_grad_() for t in (a, b))
        found = function(x, z)
        sum((found[name] * upstream[QUANTITIES.index(name)]).sum() for name in wanted).backward()
        return [torch.zeros_like(t) if t.grad is None else t.grad for t in (x, z)]

    mine = gradient(lambda x, z: divergences(x, z, y, js=True, backend=backend)._asdict(), torch.float32)
    theirs = gradient(lambda x, z: plain(x, z, y), torch.float64)
    for got, expected in zip(mine, theirs, strict=True):
        assert float((got.double() - expected).norm()) <= 2e-6 * float(expected.norm()) + 1e-9


@EVERY
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_gradient_rows_sum_to_zero(backend, scale):
    a, b = (x.requires_grad_() for x in noisy(scale))
    for name in ("kl", "reverse_kl", "js"):
        a.grad = b.grad = None
        getattr(divergences(a, b, js=True, backend=backend), name).sum().backward()
        for x in (a, b):
            total, norm = x.grad.double().sum(-1).abs(), x.grad.double().norm(dim=-1)
            # Where one token has most of the mass, its own rounding is what is left: at most two units of it.
            assert bool((total <= 2e-6 * norm).all()), (name, float((total / norm).max()))
            assert float((total <= 1e-6 * norm).double().mean()) >= 0.8, name


@EVERY
@pytest.mark.parametrize("quantity", ["kl", "entropy_p"])
def test_gradients_of_almost_even_rows_sum_to_zero(backend, quantity):
    # Thousands of like entries add up what single precision takes from coefficients near log V.
    a = 0.1 * normal(0, 4, 30000)
    b = a + 0.1 * normal(1, 4, 30000)
    x = a.requires_grad_()
    getattr(divergences(x, b, backend=backend), quantity).sum().backward()
    total, norm = x.grad.double().sum(-1).abs(), x.grad.double().norm(dim=-1)
    assert bool((total <= 5e-5 * norm).all()), float((total / norm).max())


@EVERY
def test_masked_rows_have_finite_gradients(backend):
    for which in ("pq", "p", "q"):
        a, b = (x.requires_grad_() for x in masked(which))
        found = divergences(a, b, js=True, backend=backend)
        (found.kl + found.reverse_kl + found.js + found.entropy_p).masked_fill(found.kl == math.inf, 0.0).sum()
        torch.autograd.backward([found.kl.sum(), found.reverse_kl.sum(), found.js.sum(), found.entropy_p.sum()])
        for x in (a, b):
            assert bool(x.grad.isfinite().all())
            assert not x.grad[x.isinf()].any()
    alone = masked("q")[0].requires_grad_()
    divergences(alone, masked("q")[1], backend=backend).kl.sum().backward()
    assert not alone.grad.any()  # infinite, whatever a small step does


@EVERY
def test_gradients_may_replace_the_logits(backend):
    a, b = noisy(0.3)
    apart = [x.clone().requires_grad_() for x in (a, b)]
    divergences(*apart, backend=backend).kl.sum().backward()
    leaves = [x.clone().requires_grad_() for x in (a, b)]
    logits = [x * 1.0 for x in leaves]
    divergences(*logits, overwrite=True, backend=backend).kl.sum().backward()
    for x, leaf, other in zip(logits, leaves, apart, strict=True):
        assert torch.equal(leaf.grad, other.grad)
        assert torch.equal(x.detach(), other.grad)


@EVERY
def test_norms_and_second_sweep_agree(backend):
    a, b = noisy(0.3)
    kernels = backends.get(backend)
    sums = RowSums(*kernels.row_sums(a, b).unbind(1))
    found = values(sums)
    swept = kernels.second_sweep(a, b, norms_of(sums, found))
    expected = plain(a.double(), b.double(), torch.zeros(ROWS, dtype=torch.long))["js"]
    torch.testing.assert_close(swept[:, 0], expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(swept[:, 2], truth(a, b)["total_variation"], rtol=2e-6, atol=0)
