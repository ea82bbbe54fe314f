"""Mixture divergences: which law the parameter weights, limits, accuracy between near-equal laws."""

import math

import pytest
import torch

from klkit.divergences.kl import kl, reverse_kl
from klkit.divergences.mixtures import (
    generalised_jensen_shannon,
    jensen_shannon,
    log_mixture,
    skew_kl,
    skew_reverse_kl,
)
from klkit.numerics import log_softmax


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(2)
    zp, zq = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    return zp.log_softmax(-1), zq.log_softmax(-1)


@pytest.mark.parametrize("w", [0.01, 0.3, 0.9])
def test_the_parameter_weights_the_law_it_names(pair, w):
    logp, logq = pair
    p, q = logp.exp(), logq.exp()
    m, n = w * p + (1 - w) * q, w * q + (1 - w) * p
    torch.testing.assert_close(skew_kl(logp, logq, p_weight=w), (p * (p / m).log()).sum(-1))
    torch.testing.assert_close(skew_reverse_kl(logp, logq, q_weight=w), (q * (q / n).log()).sum(-1))
    torch.testing.assert_close(
        generalised_jensen_shannon(logp, logq, p_weight=w),
        w * (p * (p / m).log()).sum(-1) + (1 - w) * (q * (q / m).log()).sum(-1),
    )


def test_disjoint_laws_reach_the_bounds():
    logp, logq = torch.tensor([1.0, 0.0]).double().log(), torch.tensor([0.0, 1.0]).double().log()
    assert float(jensen_shannon(logp, logq)) == pytest.approx(math.log(2), rel=1e-15)
    assert float(skew_kl(logp, logq, p_weight=0.2)) == pytest.approx(-math.log(0.2), rel=1e-15)
    assert float(skew_reverse_kl(logp, logq, q_weight=0.3)) == pytest.approx(-math.log(0.3), rel=1e-15)


def test_limits(pair):
    w = 1e-7
    torch.testing.assert_close(skew_kl(*pair, p_weight=w), kl(*pair), rtol=1e-5, atol=0)
    torch.testing.assert_close(generalised_jensen_shannon(*pair, p_weight=w) / w, kl(*pair), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        generalised_jensen_shannon(*pair, p_weight=1 - w) / w, reverse_kl(*pair), rtol=1e-5, atol=0
    )


def test_accurate_between_near_equal_laws_in_single_precision():
    generator = torch.Generator().manual_seed(0)
    zp = 2 * torch.randn(4, 50257, generator=generator)
    zq = zp + 1e-3 * torch.randn(4, 50257, generator=generator)
    truth = jensen_shannon(zp.double().log_softmax(-1), zq.double().log_softmax(-1))
    assert (truth < 2e-7).all()
    torch.testing.assert_close(jensen_shannon(log_softmax(zp), log_softmax(zq)).double(), truth, rtol=1e-3, atol=0)


def test_log_mixture_with_infinite_odds_is_one_of_the_laws(pair):
    logp, logq = pair
    logp = torch.cat([logp, torch.full((4, 1), -torch.inf)], -1)
    logq = torch.cat([logq[:, :-1], torch.full((4, 1), -torch.inf), logq[:, -1:]], -1)
    for odds, law in ((torch.inf, logp), (-torch.inf, logq)):
        mixture = log_mixture(logp, logq, torch.tensor([odds], dtype=torch.float64))
        torch.testing.assert_close(mixture.exp(), law.exp(), rtol=1e-15, atol=0)


@pytest.mark.parametrize("weight", [0.0, 1.0, -0.1, float("nan")])
def test_weights_outside_the_open_interval_are_refused(pair, weight):
    with pytest.raises(ValueError, match="p_weight strictly between 0 and 1"):
        skew_kl(*pair, p_weight=weight)
    with pytest.raises(ValueError, match="q_weight strictly between 0 and 1"):
        skew_reverse_kl(*pair, q_weight=weight)
