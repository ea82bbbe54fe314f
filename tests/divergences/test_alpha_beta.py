"""Alpha-beta divergences and the normalised Jensen-Shannon: golden values, limits, gradients."""

import pytest
import torch

from klkit.divergences.alpha_beta import alpha_beta_divergence
from klkit.divergences.f import alpha_divergence
from klkit.divergences.gradients import alpha_beta_grad_p, alpha_beta_grad_q
from klkit.divergences.kl import kl, reverse_kl
from klkit.divergences.mixtures import jensen_shannon, normalised_jensen_shannon

P = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64).log()
Q = torch.tensor([0.0, 0.5, 1.0, -0.5, 0.3], dtype=torch.float64).log_softmax(-1)
POWERS = [(0.2, 0.7), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (2.0, 1.5), (0.0, 0.4), (3.0, 0.0)]


def pair(seed: int, scale: float, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 20, 6, generator=generator, dtype=torch.float64)
    return tuple(x.to(dtype).log_softmax(-1) for x in (2 * a, 2 * a + scale * b))


def by_definition(p: torch.Tensor, q: torch.Tensor, a: float, b: float) -> torch.Tensor:
    if b == 0:
        return ((p**a) * a * (p.log() - q.log()) - p**a + q**a).sum(-1) / a**2
    if a == 0:
        return by_definition(q, p, b, a)
    return (a / (a + b) * p ** (a + b) + b / (a + b) * q ** (a + b) - p**a * q**b).sum(-1) / (a * b)


def test_golden_value():
    assert abs(float(alpha_beta_divergence(P, Q, p_power=0.2, q_power=0.7)) - 0.40110534) < 1e-8
    expected = torch.tensor([-0.239790, -0.143158, 0.230934, -0.044665, 0.196679], dtype=torch.float64)
    torch.testing.assert_close(alpha_beta_grad_q(P, Q), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("a", "b"), POWERS)
@pytest.mark.parametrize("scale", [1.0, 0.05])
def test_definition_and_gradients(a, b, scale):
    logp, logq = pair(0, scale)
    value = alpha_beta_divergence(logp, logq, p_power=a, q_power=b)
    torch.testing.assert_close(value, by_definition(logp.exp(), logq.exp(), a, b), rtol=1e-9, atol=1e-14)
    zp, zq = logp.clone().requires_grad_(), logq.clone().requires_grad_()
    alpha_beta_divergence(zp.log_softmax(-1), zq.log_softmax(-1), p_power=a, q_power=b).sum().backward()
    torch.testing.assert_close(zp.grad, alpha_beta_grad_p(logp, logq, p_power=a, q_power=b), rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(zq.grad, alpha_beta_grad_q(logp, logq, p_power=a, q_power=b), rtol=1e-9, atol=1e-13)


def test_what_it_holds():
    logp, logq = pair(1, 1.0)
    torch.testing.assert_close(alpha_beta_divergence(logp, logq, p_power=1.0, q_power=0.0), kl(logp, logq))
    torch.testing.assert_close(alpha_beta_divergence(logp, logq, p_power=0.0, q_power=1.0), reverse_kl(logp, logq))
    torch.testing.assert_close(
        alpha_beta_divergence(logp, logq, p_power=0.3, q_power=0.7), alpha_divergence(logp, logq, p_power=0.3)
    )


@pytest.mark.parametrize(("a", "b"), POWERS)
def test_close_laws_in_single_precision(a, b):
    logp, logq = pair(2, 1e-3, torch.float32)
    exact = by_definition(logp.double().exp(), logq.double().exp(), a, b)
    value = alpha_beta_divergence(logp, logq, p_power=a, q_power=b).double()
    assert bool((value > 0).all())
    torch.testing.assert_close(value, exact, rtol=1e-3, atol=0)
    assert not alpha_beta_divergence(logp, logp, p_power=a, q_power=b).any()


def test_excluded_tokens():
    p, q = torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([0.5, 0.0, 0.5]).log()
    assert alpha_beta_divergence(p, q, p_power=1.5, q_power=0.0).item() == torch.inf
    assert alpha_beta_divergence(p, q, p_power=0.0, q_power=1.5).item() == torch.inf
    assert torch.isfinite(alpha_beta_divergence(p, q))
    with pytest.raises(ValueError, match="expected powers of 0 or more"):
        alpha_beta_divergence(p, q, p_power=0.0, q_power=0.0)


@pytest.mark.parametrize("power", [float("nan"), float("inf"), -float("inf")])
def test_powers_that_are_no_numbers_are_refused(power):
    with pytest.raises(ValueError, match=f"expected two finite powers, got p_power={power} and q_power=0.7; choose"):
        alpha_beta_divergence(P, Q, p_power=power)
    with pytest.raises(ValueError, match=f"expected two finite powers, got p_power=0.0 and q_power={power}"):
        alpha_beta_divergence(P, Q, p_power=0.0, q_power=power)


def test_normalised_jensen_shannon_joins_both_directions():
    for weight, expected in ((0.5, 0.326259), (0.0, float(kl(P, Q))), (1.0, float(reverse_kl(P, Q)))):
        assert abs(float(normalised_jensen_shannon(P, Q, p_weight=weight)) - expected) < 1e-6
    assert abs(float(normalised_jensen_shannon(P, Q, p_weight=1e-6)) - float(kl(P, Q))) < 1e-6
    assert abs(float(normalised_jensen_shannon(P, Q, p_weight=1 - 1e-6)) - float(reverse_kl(P, Q))) < 1e-6
    assert float(normalised_jensen_shannon(P, Q)) == pytest.approx(4 * float(jensen_shannon(P, Q)), rel=1e-12)
