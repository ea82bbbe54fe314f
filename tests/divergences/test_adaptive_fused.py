"""The head's weight from raw logits and from hidden states, against its definition by a full sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from divergences.heads import case
from klkit.divergences import backends
from klkit.divergences.adaptive import HEADS, HeadRule, adaptive_kl, head_weight
from klkit.divergences.backends import get
from klkit.divergences.differentiable import divergences
from klkit.divergences.gradients import adaptive_kl_grad_q
from klkit.divergences.linear import Head
from klkit.divergences.linear_loss import Weights, linear_loss
from klkit.numerics import log_softmax

P = torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05]], dtype=torch.float64).log()
Z = torch.tensor([[0.0, 0.5, 1.0, -0.5, 0.3]], dtype=torch.float64)
BACKENDS = ("eager", pytest.param("native", marks=pytest.mark.skipif(backends.find_spec("numba") is None, reason="")))
SIZE = 5003  # more than two blocks of every backend, and no multiple of one


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_sorting(a: torch.Tensor, b: torch.Tensor, rule: HeadRule, slack: float) -> torch.Tensor:
    """The definition, on logits in double precision."""
    a, b = a.double(), b.double()
    token = a.sort(dim=-1, descending=True, stable=True).indices
    p, gap = a.softmax(-1), (a.softmax(-1) - b.softmax(-1)).abs()
    likely = p.gather(-1, token)
    reached = likely.cumsum(-1)
    inside = reached - likely < rule.mass - slack if rule.rule == "cover" else reached <= rule.mass + slack
    inside[:, 0] = True
    return (gap.gather(-1, token) * inside).sum(-1) / gap.sum(-1)


def rows_of(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = normal(0, 6, SIZE), normal(1, 6, SIZE)
    sizes = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0, 20.0])[:, None]
    if kind == "from flat to peaked":
        return sizes * a, sizes * b
    if kind == "alike":
        return sizes * a, sizes * a + 0.01 * b
    if kind == "equally likely":
        return (sizes * a).round(), sizes * b
    if kind == "half precision":
        return (sizes * a).bfloat16(), (sizes * b).bfloat16()
    if kind == "uniform":
        a = torch.full((6, SIZE), -torch.inf)
        for row, count in enumerate((2, 3, 64, 1024, 1025, SIZE)):
            a[row, SIZE - count :] = 7.0
        return a, b
    if kind == "excluded":
        a, b = 3 * a, 3 * b
        a[:, 100:300], b[:, 200:400] = -torch.inf, -torch.inf
        b[3, a[3].argmax()] = -torch.inf
        a[4, 1:], b[5, 1:] = -torch.inf, -torch.inf
        return a, b
    return sizes * a + 1000, sizes * b - 1000


@pytest.mark.parametrize("backend", [*BACKENDS, "inductor"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "kind",
    ["from flat to peaked", "alike", "equally likely", "half precision", "uniform", "excluded", "far from 0"],
)
def test_as_by_sorting(kind, head, backend):
    a, b = rows_of(kind)
    for mass in (0.0, 0.1, 0.5, 0.9, 0.999):
        rule = HeadRule(mass, head)
        found = divergences(a, b, head=rule, backend=backend).head_weight
        torch.testing.assert_close(found.double(), by_sorting(a, b, rule, 1e-6), rtol=3e-5, atol=1e-6)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(2, 70),
    scale=st.sampled_from([0.0, 0.3, 2.0, 5.0]),
    mass=st.sampled_from([0.0, 0.1, 0.5, 0.77, 1.0]),
    head=st.sampled_from(HEADS),
    ties=st.booleans(),
)
def test_small_vocabularies(seed, size, scale, mass, head, ties):
    a, b = (scale * normal(seed + i, 3, size) for i in range(2))
    b += 0.1 * normal(seed + 2, 3, size)
    if ties:
        a = (2 * a).round()
    rule = HeadRule(mass, head)
    wanted = torch.ones(3, dtype=torch.float64) if mass == 1 else by_sorting(a, b, rule, 1e-6)
    for name in ("eager", "native"):
        found = divergences(a, b, head=rule, backend=name).head_weight
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)
    exact = divergences(a.double(), b.double(), head=rule).head_weight
    wanted = torch.ones(3, dtype=torch.float64) if mass == 1 else by_sorting(a, b, rule, 1e-12)
    torch.testing.assert_close(exact, wanted, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rule", "weight", "value"),
    [
        (HeadRule(), 0.475838, 0.34215071),
        (HeadRule(rule="inside"), 0.370537, 0.34383788),
        (HeadRule(mass=0.8), 0.786919, 0.33716648),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_values(dtype, rule, weight, value, backend):
    z = Z.to(dtype, copy=True).requires_grad_()
    found = divergences(P.to(dtype), z, head=rule, backend=backend)
    w = found.head_weight
    loss = w * found.kl + (1 - w) * found.reverse_kl
    assert abs(float(w) - weight) < 1e-6
    assert abs(loss.item() - value) < 1e-7
    loss.sum().backward()
    wanted = adaptive_kl_grad_q(P, Z.log_softmax(-1), mass=rule.mass, head=rule.rule)
    torch.testing.assert_close(z.grad.double(), wanted, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-7)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_and_gradient_of_the_eager_form(backend, overwrite):
    a, b = rows_of("from flat to peaked")
    z = b.double().requires_grad_()
    value = adaptive_kl(log_softmax(a.double()), log_softmax(z))
    value.sum().backward()
    got = b.clone().requires_grad_()
    found = divergences(a, got, head=HeadRule(), backend=backend, overwrite=overwrite)
    assert not found.head_weight.requires_grad
    fused = found.head_weight * found.kl + (1 - found.head_weight) * found.reverse_kl
    fused.sum().backward()
    torch.testing.assert_close(fused.double(), value, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.grad.double(), z.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mass", [0.5, 1.0])
def test_equal_laws_cost_nothing(backend, mass):
    a = 3 * normal(4, 4, SIZE)
    b = a.clone().requires_grad_()
    found = divergences(a, b, head=HeadRule(mass), backend=backend)
    assert found.head_weight.tolist() == [0.5] * 4
    loss = found.head_weight * found.kl + (1 - found.head_weight) * found.reverse_kl
    loss.sum().backward()
    assert loss.tolist() == [0.0] * 4
    assert not bool(b.grad.any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_and_tails_of_one_token(backend):
    a, b = 3 * normal(5, 2000, 6), 3 * normal(6, 2000, 6)
    p, weight = a.softmax(-1), divergences(a, b, head=HeadRule(), backend=backend).head_weight
    alone = p.amax(-1) >= 0.5
    assert 300 < int(alone.sum()) < 1900
    assert float(weight[alone].max()) <= 0.5 + 1e-6
    a, b = 0.3 * a, 0.3 * b
    rest = 1 - a.softmax(-1).amin(-1)
    weight = divergences(a, b, head=HeadRule(0.96, "inside"), backend=backend).head_weight
    all_but_one = rest <= 0.95
    assert int(all_but_one.sum()) > 300
    assert float(weight[all_but_one].min()) >= 0.5 - 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_a_wider_tensor(backend):
    a, b = (4 * normal(i, 9, 2 * 300)[:, ::2] for i in range(2))
    one, other = (
        divergences(*pair, head=HeadRule(), backend=backend).head_weight for pair in ((a, b), (a.clone(), b.clone()))
    )
    assert one.tolist() == other.tolist()


def test_what_is_not_asked_for_is_not_computed(monkeypatch):
    monkeypatch.setattr(get("eager"), "sums_and_gaps", None)
    assert divergences(P, Z, backend="eager").head_weight is None
    assert divergences(P[:0], Z[:0]).head_weight is None


@pytest.mark.parametrize("rows", [None, 1, 4])
@pytest.mark.parametrize("head", HEADS)
def test_from_hidden_states(head, rows):
    x = case()
    p, q = (x._logits(i, 37).log_softmax(-1) for i in range(2))
    value = adaptive_kl(p, q, head=head).sum()
    wanted = torch.autograd.grad(value, x.leaves(), retain_graph=True)
    seen = []

    def weigh(found, at):
        seen.append(at)
        return Weights(kl=found.head_weight, reverse_kl=1 - found.head_weight)

    loss, found = linear_loss(*x.arguments(), weigh, head=HeadRule(rule=head), rows=rows)
    torch.testing.assert_close(loss, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.head_weight, head_weight(p, q, head=head), rtol=1e-10, atol=0)
    assert not found.head_weight.requires_grad
    assert len(seen) == (1 if rows is None else -(-11 // rows))
    for one, other in zip(torch.autograd.grad(loss, x.leaves()), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_a_direction_without_weight_may_be_infinite():
    p, q = torch.tensor([[0.9, 0.1, 0.0]]), torch.tensor([[0.9, 0.05, 0.05]])
    hidden, heads = torch.ones(1, 1), [x.log().T for x in (p, q)]
    weight = heads[1].clone().requires_grad_()
    loss, found = linear_loss(
        hidden,
        Head(heads[0]),
        hidden,
        Head(weight),
        None,
        lambda found, at: Weights(kl=found.head_weight, reverse_kl=1 - found.head_weight),
        head=HeadRule(mass=1.0),
    )
    assert found.reverse_kl.tolist() == [torch.inf]
    assert found.head_weight.tolist() == [1.0]
    torch.testing.assert_close(loss.detach(), found.kl[0])
    loss.backward()
    assert bool(weight.grad.isfinite().all())


@pytest.mark.parametrize("options", [{"mass": -0.1}, {"mass": float("nan")}, {"rule": "tail"}], ids=str)
def test_rules_that_are_none(options):
    with pytest.raises(ValueError, match=r"expected (a mass from 0 to 1|head to be cover or inside)"):
        HeadRule(**options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_no_law_is_refused(side, bad, backend):
    rows = [normal(7, 3, 300), normal(8, 3, 300)]
    rows[side][1, slice(None) if bad < 0 else 17] = bad
    with pytest.raises(ValueError, match=f"row 1 of 3 of {'pq'[side]}"):
        divergences(*rows, head=HeadRule(), backend=backend)
