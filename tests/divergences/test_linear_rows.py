"""Any function of logits, chunk by chunk: against the same through autograd on all logits."""

import pytest
import torch

from klkit.divergences.linear import Head
from klkit.divergences.linear_rows import linear_rows
from klkit.numerics import log_softmax


def inputs(count=23, width=5, size=17, dtype=torch.float64, *, bias=True):
    generator = torch.Generator().manual_seed(count)
    made = [torch.randn(*shape, generator=generator).to(dtype) for shape in ((count, width), (size, width), (size,))]
    return [x.requires_grad_() for x in made[: 2 + bias]]


def squares(logits, rows):
    """Something that no closed form knows: ``Σ w p²`` with a weight a row."""
    p = log_softmax(logits).exp()
    weight = torch.arange(rows.start, rows.stop, dtype=p.dtype)
    return weight * p.square().sum(-1), (p.amax(-1), weight)


def dense(hidden, weight, bias, factor, cap):
    z = factor * (hidden @ weight.T + (0.0 if bias is None else bias))
    return z if cap is None else cap * torch.tanh(z / cap)


@pytest.mark.parametrize("rows", [1, 7, 23, None])
@pytest.mark.parametrize(("factor", "cap"), [(1.0, None), (0.5, None), (2.0, 3.0)])
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients_are_those_of_all_logits(rows, factor, cap, bias):
    tensors = inputs(bias=bias)
    head = Head(tensors[1], tensors[2] if bias else None, factor, cap)
    loss, (top, place) = linear_rows(tensors[0], head, squares, rows=rows)
    added, (true_top, true_place) = squares(
        dense(tensors[0], tensors[1], tensors[2] if bias else None, factor, cap), slice(0, 23)
    )
    torch.testing.assert_close(loss, added.sum())
    torch.testing.assert_close(top, true_top.detach())
    torch.testing.assert_close(place, true_place)
    for found, true in zip(
        torch.autograd.grad(3 * loss, tensors), torch.autograd.grad(3 * added.sum(), tensors), strict=True
    ):
        torch.testing.assert_close(found, true)


def test_rows_beyond_the_tokens_of_a_padded_head_take_no_part():
    hidden, weight, _ = inputs()
    loss, _ = linear_rows(hidden, Head(weight, size=11), squares)
    added, _ = squares(hidden @ weight[:11].T, slice(0, 23))
    torch.testing.assert_close(loss, added.sum())
    grads = torch.autograd.grad(loss, (hidden, weight))
    for found, true in zip(grads, torch.autograd.grad(added.sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(found, true)


def test_half_precision_weights_are_computed_with_in_single():
    hidden, weight, bias = inputs(dtype=torch.bfloat16)
    loss, (top, _) = linear_rows(hidden, Head(weight, bias), squares, rows=4)
    assert loss.dtype == top.dtype == torch.float32
    wide = [x.detach().float().requires_grad_() for x in (hidden, weight, bias)]
    added, _ = squares(dense(*wide, 1.0, None), slice(0, 23))
    torch.testing.assert_close(loss, added.sum())
    grads = torch.autograd.grad(loss, (hidden, weight))
    for found, true in zip(grads, torch.autograd.grad(added.sum(), wide[:2]), strict=True):
        torch.testing.assert_close(found.float(), true, rtol=1e-2, atol=1e-2)


def test_nothing_is_formed_where_no_gradient_is_wanted():
    hidden, weight, bias = inputs()
    seen = []

    def look(logits, rows):
        seen.append(logits.requires_grad)
        return squares(logits, rows)

    with torch.no_grad():
        loss, _ = linear_rows(hidden, Head(weight, bias), look)
    assert not loss.requires_grad
    assert seen == [False]


def test_no_rows():
    hidden, weight, bias = inputs(count=3)
    loss, (top, _) = linear_rows(hidden[:0], Head(weight, bias), squares)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert len(top) == 0
    assert float(weight.grad.abs().max()) == 0.0


def test_one_derivative():
    hidden, weight, bias = inputs()
    loss, _ = linear_rows(hidden, Head(weight, bias), squares)
    with pytest.raises(RuntimeError, match="expected one derivative of a loss from hidden states"):
        torch.autograd.grad(loss, hidden, create_graph=True)
