"""Closed forms that the common harness (tests/laws) does not reach: entropies, parameters away from their defaults."""

import pytest
import torch

from klkit.divergences import f, gradients, mixtures
from klkit.divergences.kl import cross_entropy, entropy


@pytest.fixture
def logits():
    zp, zq = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    zp[0, 1] = zq[0, 1] = zp[1, 2] = zq[2, 3] = -torch.inf
    return zp.requires_grad_(), zq.requires_grad_()


def assert_same(value, logits, closed):
    for got, expected in zip(torch.autograd.grad(value.sum(), logits), closed, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_entropy(logits):
    logp = logits[0].log_softmax(-1)
    assert_same(entropy(logp), logits[:1], [gradients.entropy_grad(logp.detach())])


def test_cross_entropy(logits):
    logp, logq = (z.log_softmax(-1) for z in logits)
    pair = logp.detach(), logq.detach()
    closed = [gradients.cross_entropy_grad_p(*pair), gradients.cross_entropy_grad_q(*pair)]
    assert_same(cross_entropy(logp, logq), logits, closed)


@pytest.mark.parametrize("weight", [0.01, 0.3, 0.9])
@pytest.mark.parametrize(
    ("divergence", "grad_p", "grad_q", "name"),
    [
        (mixtures.skew_kl, gradients.skew_kl_grad_p, gradients.skew_kl_grad_q, "p_weight"),
        (
            mixtures.generalised_jensen_shannon,
            gradients.generalised_jensen_shannon_grad_p,
            gradients.generalised_jensen_shannon_grad_q,
            "p_weight",
        ),
        (f.alpha_divergence, gradients.alpha_divergence_grad_p, gradients.alpha_divergence_grad_q, "p_power"),
    ],
)
def test_parameters(logits, divergence, grad_p, grad_q, name, weight):
    logp, logq = (z.log_softmax(-1) for z in logits)
    pair = logp.detach(), logq.detach()
    closed = [grad_p(*pair, **{name: weight}), grad_q(*pair, **{name: weight})]
    assert_same(divergence(logp, logq, **{name: weight}), logits, closed)
