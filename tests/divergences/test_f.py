"""f-divergences: closed values, limits and classical inequalities."""

import pytest
import torch

from klkit.divergences.f import alpha_divergence, squared_hellinger, total_variation
from klkit.divergences.kl import kl, reverse_kl


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(2)
    zp, zq = torch.randn(2, 50, 5, generator=generator, dtype=torch.float64)
    return zp.log_softmax(-1), zq.log_softmax(-1)


def test_alpha_tends_to_the_two_divergences(pair):
    torch.testing.assert_close(alpha_divergence(*pair, p_power=1 - 1e-7), kl(*pair), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(alpha_divergence(*pair, p_power=1e-7), reverse_kl(*pair), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.8])
def test_alpha_is_its_definition(pair, alpha):
    p, q = (x.exp() for x in pair)
    expected = (1 - (p**alpha * q ** (1 - alpha)).sum(-1)) / (alpha * (1 - alpha))
    torch.testing.assert_close(alpha_divergence(*pair, p_power=alpha), expected, rtol=1e-10, atol=1e-14)


def test_alpha_between_near_equal_laws():
    logp = torch.randn(3, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)
    logq = (logp + 1e-7 * logp.sin()).log_softmax(-1)
    torch.testing.assert_close(alpha_divergence(logp, logq, p_power=0.3), kl(logp, logq), rtol=1e-5, atol=0)


def test_inequalities(pair):
    tv, hellinger, divergence = total_variation(*pair), squared_hellinger(*pair), kl(*pair)
    assert (2 * tv.square() <= divergence).all()  # Pinsker
    assert (hellinger <= tv).all()  # Le Cam
    assert (tv.square() <= hellinger * (2 - hellinger) + 1e-15).all()
    assert (2 * hellinger <= divergence).all()


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_powers_outside_the_open_interval_are_refused(pair, power):
    with pytest.raises(ValueError, match="p_power strictly between 0 and 1"):
        alpha_divergence(*pair, p_power=power)
