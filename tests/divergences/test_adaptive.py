"""Adaptive KL: golden values, its head rules against a full sort in plain Python, and what must hold for all pairs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klkit.divergences import adaptive
from klkit.divergences.adaptive import adaptive_kl, head_weight
from klkit.divergences.gradients import adaptive_kl_grad_q
from klkit.divergences.kl import jeffreys, kl, reverse_kl

P = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64).log()
Z = torch.tensor([0.0, 0.5, 1.0, -0.5, 0.3], dtype=torch.float64)


def pair(seed: int, rows: int, size: int, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = scale * torch.randn(2, rows, size, generator=generator, dtype=torch.float64)
    return a.log_softmax(-1), b.log_softmax(-1)


def sorted_head(p: list[float], mass: float, head: str) -> set[int]:
    """The rules as they are said, on Python floats."""
    if mass == 1:
        return set(range(len(p)))
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    chosen, total = [], 0.0
    for i in order:
        if head == "cover" and total >= mass - 1e-12 and chosen:
            break
        if head == "inside" and total + p[i] > mass + 1e-12 and chosen:
            break
        chosen.append(i)
        total += p[i]
    return set(chosen)


@pytest.mark.parametrize(
    ("options", "weight", "value"),
    [
        ({}, 0.475838, 0.34215071),
        ({"swapped": True}, 0.475838, 0.34137645),
        ({"head": "inside"}, 0.370537, 0.34383788),
        ({"mass": 0.8}, 0.786919, 0.33716648),
    ],
    ids=str,
)
def test_golden_values(options, weight, value):
    logq = Z.log_softmax(-1)
    rule = {name: x for name, x in options.items() if name != "swapped"}
    assert abs(float(head_weight(P, logq, **rule)) - weight) < 1e-6
    assert abs(float(adaptive_kl(P, logq, **options)) - value) < 1e-8


def test_golden_gradient():
    expected = torch.tensor([-0.227321, -0.110780, 0.213472, -0.031541, 0.156171], dtype=torch.float64)
    z = Z.clone().requires_grad_()
    adaptive_kl(P, z.log_softmax(-1)).backward()
    torch.testing.assert_close(z.grad, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(z.grad, adaptive_kl_grad_q(P, Z.log_softmax(-1)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("mass", "cover", "inside"), [(0.4, {3}, {3}), (0.5, {2, 3}, {3}), (0.7, {2, 3}, {2, 3}), (0.0, {3}, {3})]
)
def test_heads_of_the_authors_example(mass, cover, inside):
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    for rule, head in (("cover", cover), ("inside", inside)):
        for i in range(4):
            q = p.clone()
            q[i] += 1.0  # the difference is at token i, and spread over the others as evenly as can be
            q /= q.sum()
            gap = (p - q).abs()
            found = float(head_weight(p.log(), q.log(), mass=mass, head=rule))
            assert abs(found - float(gap[list(head)].sum() / gap.sum())) < 1e-6


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 40),
    scale=st.sampled_from([0.0, 0.3, 2.0, 20.0]),
    mass=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    head=st.sampled_from(adaptive.HEADS),
    ties=st.booleans(),
)
def test_heads_are_those_of_a_full_sort(seed, size, scale, mass, head, ties):
    logp, logq = pair(seed, 3, size, scale)
    if ties:
        logp = (2 * logp).round().log_softmax(-1)
    p, gap = logp.exp(), (logp.exp() - logq.exp()).abs()
    found = head_weight(logp, logq, mass=mass, head=head)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adaptive, "WIDTHS", (2, 5))
        torch.testing.assert_close(head_weight(logp, logq, mass=mass, head=head), found, rtol=0, atol=1e-15)
    for row in range(3):
        members = list(sorted_head(p[row].tolist(), mass, head))
        total = float(gap[row].sum())
        expected = float(gap[row, members].sum()) / total if total else 0.5
        assert abs(float(found[row]) - expected) < 1e-12


def test_long_rows_fall_back_row_by_row():
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([[8.0], [2.0], [0.0]])  # a head of a few tokens, of hundreds, and of half of them
    logp = (scale * torch.randn(3, 5000, generator=generator)).log_softmax(-1)
    logq = torch.randn(3, 5000, generator=generator).log_softmax(-1)
    p, gap = logp.double().exp(), (logp.double().exp() - logq.double().exp()).abs()
    for row, found in enumerate(head_weight(logp, logq).tolist()):
        members = list(sorted_head((p[row] / p[row].sum()).tolist(), 0.5 - 1e-6, "cover"))
        assert abs(found - float(gap[row, members].sum() / gap[row].sum())) < 1e-3


def test_the_likeliest_tokens_are_found_by_blocks():
    order = torch.randn(4, 64 * 300 + 17, generator=torch.Generator().manual_seed(3))
    order[1] = -torch.inf
    order[1, 5::200] = 1.0
    order[2, 64 * 300 :] += 9.0
    order[3] = order[3].sort(descending=True).values
    for width in (1, 64):
        found = order.gather(-1, adaptive._likeliest(order, width)).sort(descending=True).values
        assert found.tolist() == order.topk(width).values.tolist()


def test_between_both_directions_and_their_sum():
    logp, logq = pair(1, 500, 7)
    forward, reverse = kl(logp, logq), reverse_kl(logp, logq)
    for head in adaptive.HEADS:
        value, other = adaptive_kl(logp, logq, head=head), adaptive_kl(logp, logq, head=head, swapped=True)
        assert bool((value >= torch.minimum(forward, reverse) - 1e-15).all())
        assert bool((value <= torch.maximum(forward, reverse) + 1e-15).all())
        torch.testing.assert_close(value + other, jeffreys(logp, logq), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(adaptive_kl(logp, logq, mass=1.0), forward, rtol=1e-12, atol=0)


def test_one_token_in_the_head_tilts_to_the_reverse_direction():
    logp, logq = pair(2, 3000, 6, 3.0)
    alone = logp.exp().amax(-1) >= 0.5
    assert 500 < int(alone.sum()) < 2900
    assert float(head_weight(logp, logq)[alone].max()) <= 0.5 + 1e-12


def test_equal_laws_cost_nothing_and_say_so():
    logp, _ = pair(3, 4, 5)
    z = logp.clone().requires_grad_()
    value = adaptive_kl(logp, z.log_softmax(-1))
    value.sum().backward()
    assert float(value.detach().abs().max()) < 1e-15
    assert float(z.grad.abs().max()) < 1e-15
    assert head_weight(logp, logp).tolist() == [0.5] * 4
    assert adaptive_kl(logp, logp).tolist() == [0.0] * 4


def test_order_of_the_vocabulary_and_excluded_tokens_do_not_matter():
    logp, logq = pair(4, 6, 5)
    padding = torch.full((6, 3), -torch.inf, dtype=torch.float64)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    wide = [torch.cat([x, padding], -1)[:, order] for x in (logp, logq)]
    torch.testing.assert_close(adaptive_kl(*wide), adaptive_kl(logp, logq))


def test_infinite_directions():
    p, q = torch.tensor([0.9, 0.1, 0.0]), torch.tensor([0.9, 0.0, 0.1])
    assert adaptive_kl(p.log(), q.log()).item() == torch.inf  # q‖p has all the weight, and is infinite
    q = torch.tensor([0.5, 0.5, 0.0])
    assert torch.isfinite(adaptive_kl(p.log(), q.log()))
    z = torch.tensor([[5.0, 0.0, 0.0], [1.0, 0.0, 0.0]], requires_grad=True)
    adaptive_kl(torch.stack([p.log(), q.log()]), z.log_softmax(-1)).nan_to_num(posinf=0).sum().backward()
    assert bool(z.grad.isfinite().all())


def test_no_gradient_flows_through_the_weight():
    logp, logq = pair(5, 3, 6)
    for target in (logp, logq):
        assert not head_weight(logp.requires_grad_(), logq.requires_grad_()).requires_grad
        target.requires_grad_(False)
    z = logq.detach().clone().requires_grad_()
    adaptive_kl(logp.detach(), z.log_softmax(-1)).sum().backward()
    torch.testing.assert_close(z.grad, adaptive_kl_grad_q(logp.detach(), logq.detach()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"head": "body"}, "expected head to be cover or inside"), ({"mass": 1.5}, "expected a mass from 0 to 1")],
    ids=str,
)
def test_refusals(options, message):
    logp, logq = pair(6, 1, 3)
    with pytest.raises(ValueError, match=message):
        adaptive_kl(logp, logq, **options)
