"""Heads against the formula in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from klkit.divergences import linear
from klkit.divergences.linear import Head


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def formula(head: Head, hidden: Tensor) -> Tensor:
    """``cap · tanh(factor · (W h + b) / cap)`` in double precision, all of it at once."""
    u = hidden.double() @ head.weight.double().T
    u = head.factor * (u if head.bias is None else u + head.bias.double())
    z = u if head.cap is None else head.cap * torch.tanh(u / head.cap)
    return z[:, : head.tokens]


class TestLogits:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("biased", [False, True])
    @pytest.mark.parametrize(("factor", "cap", "size"), [(1.0, None, None), (0.3, None, 290), (2.0, 3.0, 1)])
    def test_formula(self, dtype, biased, factor, cap, size, monkeypatch):
        monkeypatch.setattr(linear, "TILE_BYTES", 4 * 16 * 70)  # 70 rows a tile: 300 rows do not divide
        head = Head(normal(300, 16).to(dtype), normal(300, seed=1).to(dtype) if biased else None, factor, cap, size)
        hidden = normal(9, 16, seed=2).to(dtype)
        got = head.logits(hidden)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got.double(), formula(head, hidden), rtol=0, atol=2e-5)

    def test_room_beyond_the_tokens_is_excluded(self):
        head, hidden = Head(normal(5, 3), size=4), normal(2, 3, seed=1)
        room = torch.zeros(2, 7, dtype=torch.float64)
        assert head.logits(hidden, room) is room
        torch.testing.assert_close(room[:, :4], formula(head, hidden))
        assert bool((room[:, 4:] == -torch.inf).all())
        with pytest.raises(ValueError, match="room for 4 logits"):
            head.logits(hidden, room[:, :3])

    def test_autocast_and_training_leave_it_alone(self):
        weight = torch.nn.Parameter(normal(40, 8).float())
        hidden = normal(3, 8, seed=1).float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = Head(weight).logits(hidden)
        assert not got.requires_grad
        torch.testing.assert_close(got.double(), formula(Head(weight), hidden), rtol=0, atol=1e-5)

    def test_mixed_precisions_meet_in_the_wider(self):
        weight, hidden = normal(40, 8).bfloat16(), normal(3, 8, seed=1)
        torch.testing.assert_close(Head(weight).logits(hidden), formula(Head(weight), hidden))
        assert Head(weight).logits(hidden.float()).dtype == torch.float32

    def test_no_rows(self):
        assert Head(normal(4, 3)).logits(normal(0, 3)).shape == (0, 4)


class TestHead:
    @pytest.mark.parametrize("cap", [None, 2.0])
    def test_cooled_divides_the_logits(self, cap):
        head, hidden = Head(normal(5, 3), normal(5, seed=1), 0.7, cap), normal(2, 3, seed=2)
        torch.testing.assert_close(head.cooled(0.25).logits(hidden), head.logits(hidden) / 0.25)

    def test_cut_keeps_the_first(self):
        head, hidden = Head(normal(5, 3)), normal(2, 3, seed=1)
        assert torch.equal(head.cut(2).logits(hidden), head.logits(hidden)[:, :2])
        assert head.cut(2).cut(4).tokens == 2

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"factor": float("nan")}, "finite factor"),
            ({"cap": 0.0}, "positive finite cap"),
            ({"size": 6}, "size in 1..5"),
            ({"size": 0}, "size in 1..5"),
        ],
    )
    def test_what_does_not_fit(self, wrong, message):
        with pytest.raises(ValueError, match=message):
            Head(torch.zeros(5, 3), **wrong)

    def test_a_bias_of_another_layer(self):
        with pytest.raises((ValueError, TypeError)):
            Head(torch.zeros(5, 3), torch.zeros(4))
