"""The draw: exact law, honest margins, nothing masked is ever drawn."""

import math

import pytest
import torch
from scipy import stats

from klkit.numerics import log_softmax
from klkit.rng import stream
from klkit.sampling.draw import SLAB, Noise, block_masses, block_rows, block_shape, draw, gumbel_argmax

SIZES = [1, 2, 3, 4, 5, 7, 11, 16, 17, 441, 50257]


def rows(count: int, size: int, *, spread: float = 2.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return log_softmax(spread * torch.randn(count, size, generator=stream(0, "rows", size), dtype=torch.float64)).to(
        dtype
    )


def gumbel(count: int, size: int, *, seed: int = 0) -> torch.Tensor:
    uniform = torch.rand(count, sum(block_shape(size)), generator=stream(seed, "gumbel"), dtype=torch.float64)
    return -(-(uniform.log())).log()


@pytest.mark.parametrize("size", SIZES)
def test_blocks_cut_the_vocabulary(size):
    count, width = block_shape(size)
    assert (count - 1) * width < size <= count * width
    assert count + width <= 2 * math.sqrt(size) + 2


@pytest.mark.parametrize("size", SIZES)
def test_block_law_times_law_inside_the_block_is_the_law(size):
    # Each stage draws exactly from its weights; this is the product of what they draw from.
    logp = rows(3, size)
    count, width = block_shape(size)
    masses = block_masses(logp)
    joint = torch.cat(
        [block_rows(logp, torch.full((3,), b)).softmax(-1) * masses[:, b : b + 1] for b in range(count)], 1
    )
    assert joint.shape == (3, count * width)
    torch.testing.assert_close(joint[:, :size], logp.exp(), rtol=1e-12, atol=1e-15)
    assert not joint[:, size:].any()


def test_gumbel_argmax_has_the_law_of_its_weights():
    # Two standard Gumbels on a grid of their quantiles: the integral over the unit square, no randomness.
    side = 400
    quantile = -(-(((torch.arange(side, dtype=torch.float64) + 0.5) / side).log())).log()
    noise = torch.cartesian_prod(quantile, quantile)
    for first in (0.5, 0.2, 0.03):
        weights = torch.tensor([first, 1 - first], dtype=torch.float64).log().expand(len(noise), 2)
        chosen, _ = gumbel_argmax(weights, noise)
        assert float((chosen == 0).double().mean()) == pytest.approx(first, abs=2 / side)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2, 11, 16])
def test_draws_follow_the_law(size, dtype):
    n = 100_000
    logp = rows(1, size, spread=1.0, dtype=dtype)
    tokens, _ = draw(logp.expand(n, size), gumbel(n, size))
    assert stats.chisquare(tokens.bincount(minlength=size), n * torch.softmax(logp[0].double(), 0)).pvalue > 1e-3


@pytest.mark.parametrize("size", [2, 5, 9, 10, 50])
def test_masked_tokens_are_never_drawn(size):
    n = 2000
    for allowed in ([size - 1], [0], [0, size - 1], list(range(size // 2, size))):
        logits = torch.full((n, size), -torch.inf)
        logits[:, allowed] = 0.0
        tokens, margin = draw(log_softmax(logits), gumbel(n, size))
        assert set(tokens.tolist()) == set(allowed)
        assert not margin.isnan().any()
        assert bool((margin == torch.inf).all()) == (len(allowed) == 1)


def test_masses_that_underflow_do_no_harm():
    logp = torch.full((1, 9), -200.0)
    logp[0, 4] = 0.0
    assert block_masses(logp).tolist() == [[0.0, 1.0, 0.0]]
    tokens, margin = draw(logp.expand(1000, 9), gumbel(1000, 9))
    assert bool((tokens == 4).all())
    assert bool((margin > 100).all())


def test_a_margin_above_twice_the_error_keeps_the_token():
    n, size, error = 20_000, 50, 0.02
    logp, noise = rows(n, size), gumbel(n, size)
    tokens, margin = draw(logp, noise)
    shaken = logp + error * (2 * torch.rand(n, size, generator=stream(0, "shake"), dtype=torch.float64) - 1)
    same = draw(shaken, noise)[0] == tokens
    safe = margin > 2 * error
    assert bool(same[safe].all())
    assert not bool(same[~safe].all())  # the bound is not vacuous: some close choices do change
    assert float((~safe).double().mean()) < 2 * 2 * error


def test_noise_depends_on_the_string_and_the_step_only():
    def noise() -> Noise:
        return Noise([stream(3, "string", 0, i) for i in range(6)], 30)

    everyone, alone = noise(), noise()
    steps = 2 * SLAB + 3
    for step in range(steps):
        # Strings 0 and 1 leave early, in the middle of a slab and at its end.
        present = torch.tensor([i for i in range(6) if not (i == 0 and step > 5) and not (i == 1 and step >= SLAB)])
        together = everyone.take(present, step)
        assert torch.equal(alone.take(torch.tensor([4]), step)[0], together[(present == 4).nonzero()[0, 0]])


def test_noise_is_standard_gumbel():
    noise = Noise([stream(0, "law", i) for i in range(200)], 441)
    values = torch.cat([noise.take(torch.arange(200), step).reshape(-1) for step in range(4)])
    assert bool(values.isfinite().all())
    assert stats.kstest(values.numpy(), stats.gumbel_r.cdf).pvalue > 1e-3


def test_noise_survives_a_uniform_zero(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.zeros(shape, dtype=torch.float64))
    assert bool(Noise([stream(0)], 9).take(torch.tensor([0]), 0).isfinite().all())
