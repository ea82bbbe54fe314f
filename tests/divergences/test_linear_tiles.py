"""The quantities from hidden states and heads, token tile by token tile, for any upstream gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from divergences.heads import Case, case, normal
from divergences.test_linear_loss import NAMES, VARIANTS, Largest
from klkit.divergences import linear
from klkit.divergences import linear_tiles as module
from klkit.divergences.backends import eager
from klkit.divergences.differentiable import Divergences
from klkit.divergences.linear import Head, Side
from klkit.divergences.linear_tiles import join, linear_divergences, tile_tokens
from klkit.divergences.sums import RowSums, values


def mixture(found: Divergences, names: list[str]) -> Tensor:
    """A loss in which the gradient of each row depends on all quantities of all rows."""
    parts = [getattr(found, name) for name in names]
    return torch.stack([(part.double() * (i + 1) / 7).sin().sum() for i, part in enumerate(parts)]).square().sum()


def check(x: Case, names: list[str], *, tolerance: float = 1e-9, **options) -> None:
    found = linear_divergences(*x.arguments(), js="js" in names, **options)
    plain = x.plain()
    for name, value in found._asdict().items():
        if value is not None:
            torch.testing.assert_close(value.double(), getattr(plain, name).detach(), rtol=tolerance, atol=tolerance)
    got = torch.autograd.grad(mixture(found, names), x.leaves(), allow_unused=True)
    wanted = torch.autograd.grad(mixture(plain, names), x.leaves(), allow_unused=True)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tile", [None, 1, 4, 11, 100])
def test_all_quantities(variant, tile):
    names = [name for name in NAMES if variant != "unequal" or name != "reverse_kl"]
    check(case(**VARIANTS[variant]), names, tile=tile)


@pytest.mark.parametrize("size", [(20, 23), (23, 20)])
def test_tiles_that_only_one_head_reaches(size):
    # With tiles of one token the last three belong to one head alone.
    excluded = "reverse_kl" if size[0] < size[1] else "kl"
    check(case(tokens=20, size=size), [name for name in NAMES if name != excluded], tile=1)


@pytest.mark.parametrize("grads", ["h", "wb", "H", "W", "hW"])
def test_only_what_needs_a_gradient(grads, monkeypatch):
    monkeypatch.setattr(linear, "TILE_BYTES", 8 * 5 * 3)  # tiles of weights within tiles of logits
    check(case(grads=grads), ["kl", "reverse_kl"], tile=8)


def test_one_parameter_everywhere():
    x = case(rows=5, widths=(6, 6), biased=False)
    x.weight, x.size, x.tokens = (x.weight[0], x.weight[0]), (20, 31), None
    check(x, ["kl", "js"], tile=7)


def test_gradcheck():
    x = case(rows=3, tokens=5, widths=(2, 3), cap=(2.0, None), factor=(0.7, 1.3))

    def quantities(h, w, b, hq, wq, bq):
        found = linear_divergences(h, Head(w, b, 0.7, 2.0), hq, Head(wq, bq, 1.3), x.tokens, js=True, tile=2)
        return tuple(y for y in found if y is not None)

    inputs = (x.hidden[0], x.weight[0], x.bias[0], x.hidden[1], x.weight[1], x.bias[1])
    assert torch.autograd.gradcheck(quantities, inputs)


def test_no_rows():
    found = linear_divergences(*case(rows=0).arguments())
    assert found.kl.shape == (0,)


def test_impossible_tokens():
    x = case(tokens=20, size=(20, 23), grads="")
    x.tokens = torch.full((11,), 21)
    found = linear_divergences(*x.arguments(), tile=6)
    assert bool((found.logp == -torch.inf).all())
    assert bool(found.logq.isfinite().all())


def test_a_second_derivative_is_refused():
    x = case()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(linear_divergences(*x.arguments()).kl.sum(), x.leaves(), create_graph=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_and_autocast(reentrant):
    x = case(grads="hw", dtype=torch.float32, biased=False)
    p, q = x.heads()

    def run(hidden):
        return mixture(linear_divergences(hidden, p, x.hidden[1], q, x.tokens), ["kl", "logp"])

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = checkpoint(run, x.hidden[0], use_reentrant=reentrant)
    loss.backward()
    wanted = torch.autograd.grad(mixture(x.plain(), ["kl", "logp"]), x.leaves())
    torch.testing.assert_close(x.hidden[0].grad, wanted[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.weight[0].grad, wanted[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    x = case(96, 3000, (64, 48), dtype=dtype, grads="hwb", spread=0.4)
    found = linear_divergences(*x.arguments(), tile=700)
    got = torch.autograd.grad(found.kl.sum(), x.leaves())
    wanted = torch.autograd.grad(x.plain().kl.sum(), x.leaves())
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == dtype
        error = float((one.double() - other.double()).norm() / other.double().norm())
        assert error < {torch.float32: 2e-6, torch.bfloat16: 5e-3}[dtype]


def test_memory_is_a_tile(monkeypatch):
    rows, tokens = 300, 2000
    x = case(rows, tokens, (8, 8), dtype=torch.float32)
    monkeypatch.setattr(module, "TILE_BYTES", 2 * 4 * rows * 128)
    with Largest() as largest:
        linear_divergences(*x.arguments()).kl.sum().backward()
    assert largest.values <= 128 * rows


def test_tile_tokens():
    def tile(rows: int) -> int:
        return tile_tokens(*[Side(torch.zeros(rows, 1), Head(torch.zeros(2, 1)), [False] * 3)] * 2)

    assert tile(0) == tile(1) == module.MOST_TOKENS
    assert tile(4096) == 1024
    assert tile(1 << 20) == module.LEAST_TOKENS


class TestJoin:
    @pytest.mark.parametrize("spread", [3.0, 1e-2, 1e-3, 1e-4, 1e-5, 0.0])
    def test_small_divergences_keep_their_digits(self, spread):
        a = (3 * normal(16, 4000)).float()
        b = (a.double() + spread * normal(16, 4000, seed=1) + 2.5).float()
        logp, logq = a.double().log_softmax(-1), b.double().log_softmax(-1)
        d = logq - logp
        exact = (logp.exp() * (d.expm1() - d)).sum(-1)
        reverse = (logq.exp() * ((-d).expm1() + d)).sum(-1)
        found = values(tiled(a, b, 300))
        digits = 1e-3 if spread == 1e-5 else 1e-4  # of 5e-11 nats
        torch.testing.assert_close(found.kl, exact, rtol=digits, atol=1e-15)
        torch.testing.assert_close(found.reverse_kl, reverse, rtol=digits, atol=1e-15)
        assert bool((found.kl >= 0).all())

    @pytest.mark.parametrize("case_", ["far", "q excludes", "p excludes", "both exclude", "one-hot"])
    def test_as_from_whole_rows(self, case_):
        a, b = 5 * normal(8, 60), 5 * normal(8, 60, seed=1)
        if case_ == "far":
            b[:, :20] += 400.0  # q's mass is where p has next to none
            a[:, 40:] += 300.0
        if case_ in ("q excludes", "both exclude"):
            b[:, 10:35] = -torch.inf
        if case_ in ("p excludes", "both exclude"):
            a[:, 10:35] = -torch.inf
        if case_ == "one-hot":
            a[:, 7] = 1e4
        wanted, got = (
            values(sums)._replace(shift=values(sums).shift + sums.paired)  # from whatever reference
            for sums in (RowSums(*eager.row_sums(a, b).unbind(1)), tiled(a, b, 10))
        )
        for name, one, other in zip(got._fields, got, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")

    def test_nan_is_not_lost(self):
        a, b = normal(2, 20), normal(2, 20)
        a[1, 3] = torch.nan
        with pytest.raises(ValueError, match="row 1 of 2 of p"):
            values(tiled(a, b, 5))


def tiled(a: Tensor, b: Tensor, size: int) -> RowSums:
    parts = []
    for start in range(0, a.shape[1], size):
        sums = RowSums(*eager.row_sums(a[:, start : start + size], b[:, start : start + size]).unbind(1))
        parts.append(sums._replace(top_p=sums.top_p + start, top_q=sums.top_q + start))
    total = parts[0]
    for part in parts[1:]:
        total = join(total, part)
    return total
