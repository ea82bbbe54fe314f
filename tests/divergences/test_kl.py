"""KL: shared masks, accuracy far below fp32 rounding, extremes."""

import math

import pytest
import torch
from torch.nn import functional

from klkit.divergences.kl import cross_entropy, entropy, jeffreys, kl, reverse_kl
from klkit.numerics import log_softmax


def torch_kl_div(logp, logq):
    return functional.kl_div(logq, logp.exp(), reduction="none").sum(-1)


def torch_kl_div_log_target(logp, logq):
    return functional.kl_div(logq, logp, log_target=True, reduction="none").sum(-1)


def plain(logp, logq):
    return (logp.exp() * (logp - logq)).sum(-1)


def plain_without_nan(logp, logq):
    return torch.nan_to_num(logp.exp() * (logp - logq)).sum(-1)


def torch_distributions(logp, logq):
    categorical = torch.distributions.Categorical
    return torch.distributions.kl_divergence(categorical(logits=logp), categorical(logits=logq))


def under_a_shared_mask(divergence):
    """Whether the value, the gradient in p's logits and that in q's are finite with one token masked in both."""
    zp = torch.tensor([0.3, -torch.inf, 1.0, -0.5], dtype=torch.float64, requires_grad=True)
    zq = torch.tensor([0.1, -torch.inf, 0.2, 0.9], dtype=torch.float64, requires_grad=True)
    value = divergence(zp.log_softmax(-1), zq.log_softmax(-1))
    gradients = torch.autograd.grad(value, (zp, zq))
    return bool(value.isfinite()), *(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize(
    "usual", [torch_kl_div, torch_kl_div_log_target, plain, plain_without_nan, torch_distributions]
)
def test_the_usual_forms_break_on_one_shared_exclusion(usual):
    assert not all(under_a_shared_mask(usual))


def test_ours_does_not_break_on_one_shared_exclusion():
    assert under_a_shared_mask(kl) == (True, True, True)


def test_a_shared_exclusion_is_the_same_as_a_smaller_vocabulary():
    keep = torch.tensor([True, False, True, True])
    zp = torch.tensor([0.3, -torch.inf, 1.0, -0.5], dtype=torch.float64, requires_grad=True)
    zq = torch.tensor([0.1, -torch.inf, 0.2, 0.9], dtype=torch.float64, requires_grad=True)
    full = kl(zp.log_softmax(-1), zq.log_softmax(-1))
    small = plain(zp[keep].log_softmax(-1), zq[keep].log_softmax(-1))
    torch.testing.assert_close(full, small)
    for a, b in zip(torch.autograd.grad(full, (zp, zq)), torch.autograd.grad(small, (zp, zq)), strict=True):
        torch.testing.assert_close(a, b)


def near_pair(eps, v=50257, rows=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    zp = 2 * torch.randn(rows, v, generator=generator)
    return zp.to(dtype), (zp + eps * torch.randn(rows, v, generator=generator)).to(dtype)


def exact(zp, zq):
    p, q = zp.double().log_softmax(-1), zq.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize(("eps", "tolerance"), [(1e-1, 1e-5), (1e-2, 1e-5), (1e-3, 5e-5), (1e-4, 5e-4)])
def test_accurate_down_to_1e_9_nats_in_single_precision(eps, tolerance):
    zp, zq = near_pair(eps)
    truth = exact(zp, zq)
    error = (kl(log_softmax(zp), log_softmax(zq)).double() / truth - 1).abs().max()
    assert error < tolerance
    if eps <= 1e-3:  # what the form is for: the plain one has lost a digit or all of them
        naive = plain(log_softmax(zp), log_softmax(zq)).double()
        assert (naive / truth - 1).abs().max() > 100 * error


def test_a_shift_of_the_logits_costs_rounding_squared():
    zp, _ = near_pair(0.0)
    value = kl(log_softmax(zp), log_softmax(zp + 0.1))
    assert (value >= 0).all()
    assert (value < 1e-12).all()


@pytest.mark.parametrize("v", [1, 2, 441, 262144])
def test_any_vocabulary_size(v):
    zp, zq = near_pair(1.0, v=v, rows=2)
    torch.testing.assert_close(kl(log_softmax(zp), log_softmax(zq)).double(), exact(zp, zq), rtol=1e-5, atol=1e-12)


def test_logits_of_thirty_thousand_in_a_close_race():
    zp = torch.full((2, 1000), -3e4)
    zp[:, 0], zp[:, 1] = 3e4, 3e4 - 2
    zq = zp.clone()
    zq[:, 1] += 1
    torch.testing.assert_close(kl(log_softmax(zp), log_softmax(zq)).double(), exact(zp, zq), rtol=1e-5, atol=0)


def test_a_common_offset():
    zp, zq = (z + 1e4 for z in near_pair(1.0, v=1000))
    torch.testing.assert_close(kl(log_softmax(zp), log_softmax(zq)).double(), exact(zp, zq), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_compared_as_they_are(dtype):
    zp, zq = near_pair(0.1, v=1000, dtype=dtype)
    torch.testing.assert_close(kl(log_softmax(zp), log_softmax(zq)).double(), exact(zp, zq), rtol=1e-5, atol=0)


def test_one_hot_rows():
    v = 1000
    one_hot = torch.full((1, v), -torch.inf)
    one_hot[0, 3] = 0.0
    flat = torch.full((1, v), -math.log(v))
    assert float(kl(one_hot, flat)) == pytest.approx(math.log(v), rel=1e-6)
    assert float(kl(flat, one_hot)) == math.inf
    assert float(kl(one_hot, one_hot)) == 0.0
    underflowing = log_softmax(torch.where(one_hot == 0, 3e4, -3e4))
    assert float(kl(underflowing, flat)) == pytest.approx(math.log(v), rel=1e-6)
    assert float(kl(flat, underflowing)) == pytest.approx(6e4 * (1 - 1 / v) - math.log(v), rel=1e-6)


def test_an_exclusion_counts_although_its_mass_underflows():
    logp = log_softmax(torch.tensor([0.0, -200.0]))
    assert float(logp[1].exp()) == 0.0
    assert float(kl(logp, torch.tensor([0.0, -torch.inf]))) == math.inf
    assert float(kl(torch.tensor([0.0, -torch.inf]), logp)) == 0.0


def test_off_the_simplex_its_gradient_is_that_of_the_non_negative_form():
    zp, zq = near_pair(1.0, v=6, dtype=torch.float64)
    logp, logq = zp.log_softmax(-1).requires_grad_(), zq.log_softmax(-1).requires_grad_()
    p, q = logp.exp(), logq.exp()
    ours = torch.autograd.grad(kl(logp, logq).sum(), (logp, logq))
    other = torch.autograd.grad(plain(logp, logq).sum(), (logp, logq))
    torch.testing.assert_close(ours, (p * (logp - logq), q - p))
    torch.testing.assert_close(other, (p * (logp - logq + 1), -p))
    assert torch.autograd.gradcheck(kl, (logp, logq))


def test_the_gradient_keeps_its_digits_at_small_divergences():
    zp, zq = (z.requires_grad_() for z in near_pair(1e-3, v=5000))
    gp, gq = torch.autograd.grad(kl(log_softmax(zp), log_softmax(zq)).sum(), (zp, zq))
    zp, zq = (z.detach().double().requires_grad_() for z in (zp, zq))
    expected = torch.autograd.grad(exact(zp, zq).sum(), (zp, zq))
    for got, truth in zip((gp, gq), expected, strict=True):
        assert float((got - truth).norm() / truth.norm()) < 1e-3
        assert got.sum(-1).abs().max() < 1e-8


def test_cross_entropy_is_entropy_plus_divergence():
    zp, zq = near_pair(1.0, v=6, dtype=torch.float64)
    logp, logq = zp.log_softmax(-1), zq.log_softmax(-1)
    torch.testing.assert_close(cross_entropy(logp, logq), entropy(logp) + kl(logp, logq))
    torch.testing.assert_close(jeffreys(logp, logq), kl(logp, logq) + reverse_kl(logp, logq))


def test_entropies_with_excluded_tokens():
    z = torch.tensor([0.0, 0.0, -torch.inf], dtype=torch.float64, requires_grad=True)
    w = torch.tensor([-torch.inf, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    value = entropy(z.log_softmax(-1))
    assert float(value.detach()) == pytest.approx(math.log(2))
    assert torch.autograd.grad(value, z)[0].abs().max() < 1e-15
    value = cross_entropy(z.log_softmax(-1), w.log_softmax(-1))
    assert float(value.detach()) == math.inf
    assert all(not g.any() for g in torch.autograd.grad(value, (z, w)))
    assert float(cross_entropy(z.log_softmax(-1), z.log_softmax(-1)).detach()) == pytest.approx(math.log(2))
