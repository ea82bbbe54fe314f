"""One harness over every divergence: what each must satisfy, whatever its formula."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klkit.divergences import DIVERGENCES
from klkit.divergences.gradients import GRADIENTS
from klkit.numerics import log_softmax

every = pytest.mark.parametrize("key", DIVERGENCES)
UNBOUNDED = {"kl", "reverse_kl", "jeffreys"}
BOUNDS = {
    "js": math.log(2),
    "generalised_js": math.log(2),
    "skew_kl": -math.log(0.1),
    "skew_reverse_kl": -math.log(0.1),
    "total_variation": 1.0,
    "squared_hellinger": 1.0,
    "alpha_divergence": 4.0,
}
MIRRORED = {"kl": "reverse_kl", "reverse_kl": "kl", "skew_kl": "skew_reverse_kl", "skew_reverse_kl": "skew_kl"}


def logits(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.randn(2, *shape, generator=generator, dtype=dtype))


def masked_logits(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows: plain · shared mask · p only · q only · identical · one-hot p · one-hot q · almost identical · disjoint."""
    zp, zq = (z.clone() for z in logits(seed, 9, 6))
    zp[1, 2] = zq[1, 2] = -torch.inf
    zp[2, :2] = -torch.inf
    zq[3, 4] = -torch.inf
    zq[4] = zp[4]
    zp[5, 1:] = -torch.inf
    zq[6, 1:] = -torch.inf
    zq[7] = zp[7] + 1e-5 * zq[7]
    zp[8, :3] = zq[8, 3:] = -torch.inf
    return zp, zq


def by_definition(key: str, p: list[float], q: list[float]) -> float:
    """The textbook formula over Python floats, ``0 log 0 = 0`` and ``x / 0 = inf``."""

    def kl(p, q):
        if any(a > 0 and b == 0 for a, b in zip(p, q, strict=True)):
            return math.inf
        return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)

    def mix(w):
        return [w * a + (1 - w) * b for a, b in zip(p, q, strict=True)]

    return {
        "kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jeffreys": lambda: kl(p, q) + kl(q, p),
        "js": lambda: (kl(p, mix(0.5)) + kl(q, mix(0.5))) / 2,
        "generalised_js": lambda: (kl(p, mix(0.5)) + kl(q, mix(0.5))) / 2,
        "skew_kl": lambda: kl(p, mix(0.1)),
        "skew_reverse_kl": lambda: kl(q, mix(0.9)),
        "total_variation": lambda: math.fsum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
        "squared_hellinger": lambda: 1 - math.fsum(math.sqrt(a * b) for a, b in zip(p, q, strict=True)),
        "alpha_divergence": lambda: 4 * (1 - math.fsum(math.sqrt(a * b) for a, b in zip(p, q, strict=True))),
    }[key]()


def test_every_divergence_has_its_gradients():
    assert list(DIVERGENCES) == list(GRADIENTS)


@every
def test_value_is_the_definition(key):
    zp, zq = masked_logits()
    logp, logq = zp.log_softmax(-1), zq.log_softmax(-1)
    expected = [by_definition(key, p, q) for p, q in zip(logp.exp().tolist(), logq.exp().tolist(), strict=True)]
    torch.testing.assert_close(
        DIVERGENCES[key](logp, logq), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-14
    )


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zero_exactly_for_identical_rows(key, dtype):
    zp, _ = masked_logits()
    logp = log_softmax(zp.to(dtype))
    assert torch.equal(DIVERGENCES[key](logp, logp.clone()), torch.zeros(9, dtype=logp.dtype))


@every
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 12),
    scale=st.sampled_from([1e-7, 1e-4, 1.0, 50.0, 3e4]),
    single=st.booleans(),
)
def test_never_negative_never_nan_and_bounded(key, seed, size, scale, single):
    zp, step = logits(seed, 3, size, dtype=torch.float32 if single else torch.float64)
    zq = zp + scale * step
    generator = torch.Generator().manual_seed(seed)
    for z in (zp, zq):
        mask = torch.rand(3, size, generator=generator) < 0.3
        mask[:, 0] = False
        z.masked_fill_(mask, -torch.inf)
    value = DIVERGENCES[key](log_softmax(zp), log_softmax(zq))
    assert (value >= 0).all()
    assert (value <= BOUNDS.get(key, math.inf) * (1 + 1e-6)).all()


@every
def test_autograd_through_log_softmax_is_the_closed_form(key):
    zp, zq = masked_logits()
    zp.requires_grad_(), zq.requires_grad_()
    logp, logq = zp.log_softmax(-1), zq.log_softmax(-1)
    value = DIVERGENCES[key](logp, logq)
    for got, closed in zip(torch.autograd.grad(value.sum(), (zp, zq)), GRADIENTS[key], strict=True):
        torch.testing.assert_close(got, closed(logp.detach(), logq.detach()), rtol=1e-10, atol=1e-12)


@every
def test_closed_form_is_the_finite_difference(key):
    zp, zq = logits(3, 4)
    h = 1e-5
    for side, gradient in enumerate(GRADIENTS[key]):
        expected = []
        for j in range(4):
            up, down = [zp.clone(), zq.clone()], [zp.clone(), zq.clone()]
            up[side][j] += h
            down[side][j] -= h
            high, low = (DIVERGENCES[key](a.log_softmax(-1), b.log_softmax(-1)) for a, b in (up, down))
            expected.append((high - low) / (2 * h))
        torch.testing.assert_close(
            gradient(zp.log_softmax(-1), zq.log_softmax(-1)), torch.stack(expected), rtol=1e-6, atol=1e-9
        )


@every
def test_an_infinite_row_has_no_gradient_and_leaves_the_others_theirs(key):
    zp, zq = masked_logits()
    logp, logq = zp.log_softmax(-1).requires_grad_(), zq.log_softmax(-1).requires_grad_()
    value = DIVERGENCES[key](logp, logq)
    infinite = value == torch.inf
    assert infinite.any() == (key in UNBOUNDED)
    together = torch.autograd.grad(value.sum(), (logp, logq))
    for gradient in together:
        assert not gradient[infinite].any()
        assert gradient.isfinite().all()
    for i in range(9):
        a, b = logp.detach()[i].requires_grad_(), logq.detach()[i].requires_grad_()
        alone = torch.autograd.grad(DIVERGENCES[key](a, b), (a, b))
        torch.testing.assert_close((together[0][i], together[1][i]), alone)


@every
def test_any_batch_shape(key):
    zp, zq = logits(1, 2, 3, 5)
    logp, logq = zp.log_softmax(-1), zq.log_softmax(-1)
    value = DIVERGENCES[key](logp, logq)
    assert value.shape == (2, 3)
    torch.testing.assert_close(DIVERGENCES[key](logp[1, 2], logq[1, 2]), value[1, 2])
    assert DIVERGENCES[key](logp[:0], logq[:0]).shape == (0, 3)


@every
def test_the_order_of_the_vocabulary_and_tokens_that_both_exclude_do_not_matter(key):
    zp, zq = masked_logits()
    padding = torch.full((9, 3), -torch.inf).double()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    wide_p, wide_q = (torch.cat([z, padding], -1)[:, order].log_softmax(-1) for z in (zp, zq))
    divergence = DIVERGENCES[key]
    torch.testing.assert_close(divergence(wide_p, wide_q), divergence(zp.log_softmax(-1), zq.log_softmax(-1)))


@every
def test_merging_tokens_never_raises_it(key):
    zp, zq = logits(5, 200, 6)
    logp, logq = zp.log_softmax(-1), zq.log_softmax(-1)
    coarse_p, coarse_q = (
        torch.stack([a[:, :2].logsumexp(-1), a[:, 2:5].logsumexp(-1), a[:, 5]], -1) for a in (logp, logq)
    )
    assert (DIVERGENCES[key](coarse_p, coarse_q) <= DIVERGENCES[key](logp, logq) + 1e-15).all()


@every
def test_swapping_the_arguments(key):
    zp, zq = masked_logits()
    logp, logq = zp.log_softmax(-1), zq.log_softmax(-1)
    mirrored = DIVERGENCES[MIRRORED.get(key, key)]
    torch.testing.assert_close(DIVERGENCES[key](logq, logp), mirrored(logp, logq))
    if key in MIRRORED:
        assert not torch.allclose(DIVERGENCES[key](logq, logp)[0], DIVERGENCES[key](logp, logq)[0])


@every
def test_half_precision_is_widened_and_double_kept(key):
    zp, zq = logits(2, 3, 4)
    for dtype, expected in [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ]:
        logp, logq = zp.log_softmax(-1).to(dtype), zq.log_softmax(-1).to(dtype)
        value = DIVERGENCES[key](logp, logq)
        assert value.dtype == expected
        torch.testing.assert_close(value, DIVERGENCES[key](logp.to(expected), logq.to(expected)), rtol=0, atol=0)
    assert DIVERGENCES[key](logp.to(torch.bfloat16), logq).dtype == torch.float64


@every
@pytest.mark.parametrize("bad", ["logits", "probabilities", "nan", "empty row"])
def test_what_is_not_a_law_is_refused(key, bad):
    zp, zq = logits(2, 3, 4)
    logp, logq = zp.log_softmax(-1), zq.log_softmax(-1)
    wrong = {
        "logits": zp,
        "probabilities": logp.exp(),
        "nan": logp.where(logp < logp.max(), torch.nan),
        "empty row": torch.full_like(logp, -torch.inf),
    }[bad]
    for pair in ((wrong, logq), (logq, wrong)):
        with pytest.raises(ValueError, match="sum to 1"):
            DIVERGENCES[key](*pair)


@pytest.mark.parametrize("key", sorted(set(DIVERGENCES) - {"total_variation"}))  # that one has kinks
def test_second_derivatives(key):
    zp, zq = (z.requires_grad_() for z in logits(8, 2, 3))

    def through_logits(a, b):
        return DIVERGENCES[key](a.log_softmax(-1), b.log_softmax(-1))

    assert torch.autograd.gradgradcheck(through_logits, (zp, zq))
