"""Numerical forms against double precision and against each other."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klkit import numerics
from klkit.numerics import (
    FLOOR,
    NEAR,
    by_rows,
    divergence_terms,
    excess,
    excess_series,
    floored,
    linear,
    log1mexp,
    log_softmax,
    lost,
    paired,
    require_mass,
    rows_per_chunk,
    split,
    widen,
)
from klkit.rng import stream


def precise_excess(d: float) -> float:
    """``exp(d) - 1 - d`` from its series, to double precision."""
    if abs(d) > 1:
        return math.expm1(d) - d
    return math.fsum(d**k / math.factorial(k) for k in range(2, 30))


def test_widen_keeps_single_and_double():
    for dtype, expected in [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ]:
        assert widen(torch.zeros(1, dtype=dtype)).dtype == expected


def test_log_softmax_of_half_precision_is_taken_in_single():
    z = torch.randn(3, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    logp = log_softmax(z)
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp.double(), z.double().log_softmax(-1), rtol=1e-6, atol=1e-6)


def test_log_softmax_keeps_masks_and_huge_logits():
    z = torch.tensor([[0.0, -torch.inf, 0.0], [3e38, -3e38, 0.0]])
    assert log_softmax(z)[0, 1] == -torch.inf
    assert log_softmax(z)[1].exp().tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_log_softmax_names_the_bad_row(bad):
    z = torch.zeros(2, 3, 4)
    z[1, 1, 2] = bad
    with pytest.raises(ValueError, match="row 4 of 6 is not"):
        log_softmax(z)


def test_log_softmax_refuses_a_row_without_a_token():
    with pytest.raises(ValueError, match="row 1 of 2"):
        log_softmax(torch.tensor([[0.0, 0.0], [-torch.inf, -torch.inf]]))


@given(st.floats(-700, 700))
def test_excess_is_accurate_and_non_negative(d):
    value = float(excess(torch.tensor(d, dtype=torch.float64)))
    assert value >= 0
    assert value == pytest.approx(precise_excess(d), rel=1e-12, abs=1e-300)


@given(st.floats(-80, 80, width=32))
def test_excess_in_single_precision(d):
    value = float(excess(torch.tensor(d)))
    assert value >= 0
    assert value == pytest.approx(precise_excess(d), rel=5e-6, abs=1e-30)


def test_excess_of_an_excluded_token_is_infinite():
    assert float(excess(torch.tensor(-torch.inf))) == torch.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_series_at_its_edge(dtype):
    d = torch.tensor([-NEAR, NEAR], dtype=dtype)
    even, odd = excess_series(d)
    tolerance = 3 * torch.finfo(dtype).eps
    for e, o, x in zip(even.tolist(), odd.tolist(), d.tolist(), strict=True):
        assert e + o == pytest.approx(precise_excess(x), rel=tolerance)
        assert e - o == pytest.approx(precise_excess(-x), rel=tolerance)


def test_split_is_exact():
    d = torch.tensor([-3.0, -NEAR, -0.1, 0.0, 0.2, NEAR, 1e18, -1e18])
    near, far = split(d)
    assert torch.equal(near + far, d)
    assert not (near * far).any()
    assert near.abs().max() <= NEAR


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergence_terms_are_non_negative_and_sum_to_the_divergence(dtype):
    logp, logq = (6 * torch.randn(2, 50, 200, generator=torch.Generator().manual_seed(0), dtype=dtype)).log_softmax(-1)
    terms = divergence_terms(logp.exp(), logq.exp(), logq - logp)
    assert (terms >= 0).all()
    a, b = logp.double(), logq.double()
    torch.testing.assert_close(terms.sum(-1).double(), (a.exp() * (a - b)).sum(-1), rtol=1e-5, atol=0)


def test_terms_are_not_negative_where_both_probabilities_lose_their_digits():
    p = torch.full((1,), 1e-45)  # the smallest number there is: p * 0.9 rounds to p
    assert divergence_terms(p, p, torch.full((1,), 0.9)).tolist() == [0.0]


def test_the_floor_makes_no_nan():
    a, b = (floored(torch.tensor(x)) for x in ([0.0, -torch.inf, -torch.inf], [-torch.inf, 0.0, -torch.inf]))
    d = b - a
    assert d.tolist() == [pytest.approx(FLOOR), pytest.approx(-FLOOR), 0.0]
    assert d.square().isfinite().all()
    assert divergence_terms(a.exp(), b.exp(), d).isfinite().all()
    assert bool(lost(d))
    assert not bool(lost(d.clamp(min=-1e6)))


def test_no_gradient_passes_the_floor():
    z = torch.tensor([0.0, -torch.inf], requires_grad=True)
    (floored(z) * torch.tensor([2.0, 3.0])).sum().backward()
    assert z.grad is not None
    assert z.grad.tolist() == [2.0, 0.0]


def test_paired_refuses_other_shapes():
    for a, b in [((2, 3), (3,)), ((2, 3), (2, 4)), ((), ())]:
        with pytest.raises(ValueError, match="one shape"):
            paired(torch.zeros(a), torch.zeros(b))


def test_require_mass_counts_the_bad_rows():
    require_mass(torch.tensor([1.0, 0.97, 1.03]), "p")
    with pytest.raises(ValueError, match=r"got 3 in a row of p \(2 such rows of 3\)"):
        require_mass(torch.tensor([1.0, 3.0, math.nan]), "p")


@given(st.floats(-700, -1e-300))
def test_log1mexp(x):
    exact = math.log(-math.expm1(x)) if x > -1 else math.log1p(-math.exp(x))
    assert float(log1mexp(torch.tensor(x, dtype=torch.float64))) == pytest.approx(exact, rel=1e-14)


def test_log1mexp_at_the_ends():
    assert log1mexp(torch.tensor([0.0, -torch.inf])).tolist() == [-torch.inf, 0.0]


@given(st.integers(1, 10**6), st.sampled_from([2, 4, 8]))
def test_chunks_fit_the_budget(width, size):
    rows = rows_per_chunk(width, bytes_per_value=size)
    assert rows >= 1
    assert rows == 1 or rows * width * size <= 2 << 20


@pytest.mark.parametrize("shape", [(5,), (0, 5), (1, 5), (3, 4, 5), (7, 300_000)])
def test_work_by_rows_is_work_on_the_whole(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = torch.randn(*shape[:-1], 1, generator=torch.Generator().manual_seed(1))
    assert torch.equal(by_rows(lambda a, b: a * b, x, y), x * y)
    assert torch.equal(by_rows(lambda a, b: (a * b).amax(-1), x, y), (x * y).amax(-1))
    sizes = []
    by_rows(lambda a: sizes.append(a.numel() * 4) or a.sum(-1), x)
    assert max(sizes) <= 2 << 20


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("biased", [False, True])
def test_large_products_are_those_of_double_precision(rows, biased, monkeypatch):
    x, weight = torch.randn(rows, 40, generator=stream(0, "x")), torch.randn(500, 40, generator=stream(0, "w"))
    bias = torch.randn(500, generator=stream(0, "b")) if biased else None
    wide = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    monkeypatch.setattr(numerics, "PRODUCT_WORK", 0)
    for left, right in ((x, weight), (x.repeat_interleave(2, 1)[:, ::2], weight), (x, weight.t().contiguous().t())):
        torch.testing.assert_close(linear(left, right, bias).double(), wide, rtol=0, atol=2e-5)
    for work in (0, 1 << 60):
        monkeypatch.setattr(numerics, "PRODUCT_WORK", work)
        out = torch.zeros(rows, 600)[:, :500]
        assert linear(x, weight, bias, out=out).data_ptr() == out.data_ptr()
        torch.testing.assert_close(out.double(), wide, rtol=0, atol=2e-5)
    assert torch.equal(linear(x.double(), weight.double()), torch.nn.functional.linear(x.double(), weight.double()))


def test_products_that_are_trained_keep_their_gradient(monkeypatch):
    monkeypatch.setattr(numerics, "PRODUCT_WORK", 0)
    x, weight = torch.ones(2, 3), torch.ones(4, 3, requires_grad=True)
    linear(x, weight).sum().backward()
    assert torch.equal(weight.grad, torch.full((4, 3), 2.0))
    with torch.no_grad():
        assert not linear(x, weight).requires_grad
