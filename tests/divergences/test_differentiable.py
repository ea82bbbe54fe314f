"""What autograd sees of the fused quantities: shapes, refusals, autocast, checkpointing. Numbers: tests/laws."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from klkit.divergences.differentiable import divergences
from klkit.divergences.fused import row_statistics
from klkit.divergences.kl import kl, reverse_kl
from klkit.numerics import log_softmax


def pair(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for _ in range(2)]


def test_any_leading_shape():
    a, b = pair(2, 3, 11)
    tokens = torch.arange(6).view(2, 3)
    found = divergences(a, b, tokens, js=True)
    for x in found[:7]:
        assert x.shape == (2, 3)
    torch.testing.assert_close(found.kl, kl(log_softmax(a), log_softmax(b)))
    torch.testing.assert_close(found.logp, log_softmax(a).gather(-1, tokens[..., None])[..., 0])
    alone = divergences(a[0, 0], b[0, 0])
    assert alone.kl.shape == ()
    torch.testing.assert_close(alone.kl, found.kl[0, 0])
    assert divergences(a[:0], b[:0]).kl.shape == (0, 3)


def test_what_is_not_asked_for_is_none():
    found = divergences(*pair(2, 5))
    assert found.logp is found.logq is found.js is found.head_weight is None


def test_double_precision_is_kept_to_its_last_digits():
    a, b = (x.detach().double().requires_grad_() for x in pair(4, 30))
    y = torch.arange(4)

    def every(a, b):
        return tuple(x for x in divergences(a, b, y, js=True) if x is not None)

    assert torch.autograd.gradcheck(every, (a, b))


def test_a_gradient_only_where_one_is_wanted():
    a, b = pair(3, 9)
    divergences(a, b.detach()).kl.sum().backward()
    assert a.grad is not None
    assert b.grad is None
    a.grad = None
    divergences(a.detach(), b).kl.sum().backward()
    assert a.grad is None
    torch.testing.assert_close(b.grad, b.detach().softmax(-1) - a.detach().softmax(-1))


def test_a_second_derivative_is_refused():
    a, b = pair(3, 9)
    (slope,) = torch.autograd.grad(divergences(a, b).kl.sum(), a, retain_graph=True)
    assert not slope.requires_grad
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(divergences(a, b).kl.sum(), a, create_graph=True)


def test_under_activation_checkpointing():
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
    target = torch.randn(5, 11)

    def loss(h):
        return divergences(h @ weight.T, target).reverse_kl.sum()

    loss(hidden).backward()
    plain = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    checkpoint(loss, hidden, use_reentrant=False).backward()
    torch.testing.assert_close((hidden.grad, weight.grad), plain)


def test_under_autocast():
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(11, 4)
    target = torch.randn(5, 11)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = hidden @ weight.T
        assert logits.dtype == torch.bfloat16
        found = divergences(logits, target)
    assert found.kl.dtype == torch.float32
    torch.testing.assert_close(found.kl, kl(log_softmax(logits.float()), log_softmax(target)), rtol=1e-5, atol=1e-6)
    found.kl.sum().backward()
    assert bool(hidden.grad.isfinite().all())


def test_overwritten_logits_that_somebody_else_needs():
    leaf = torch.randn(3, 7, requires_grad=True)
    logits = leaf * 1.0
    other = logits.square().sum()  # saves the logits for its own backward pass
    loss = divergences(logits, torch.randn(3, 7), overwrite=True).kl.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_refusals():
    a, b = pair(3, 8)
    with pytest.raises(ValueError, match="contiguous logits to overwrite"):
        divergences(a[:, ::2], b[:, ::2], overwrite=True)
    with pytest.raises(ValueError, match="logits of one shape"):
        divergences(a, b[:, :5])
    with pytest.raises(ValueError, match="expected a backend among"):
        divergences(a, b, backend="cuda")


def test_the_same_numbers_as_without_gradients():
    a, b = pair(6, 501)
    y = torch.arange(6)
    one, other = divergences(a, b, y), row_statistics(a.detach(), b.detach(), y, (0,))
    for name in ("kl", "reverse_kl", "entropy_p", "entropy_q", "logp", "logq"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    torch.testing.assert_close(one.reverse_kl, reverse_kl(log_softmax(a), log_softmax(b)))
