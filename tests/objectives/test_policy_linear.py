"""The loss from hidden states and heads: the numbers and gradients of the one on logits, whatever the chunks."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from klkit.divergences.differentiable import divergences
from klkit.divergences.linear import Head
from klkit.objectives.policy import GRADIENT_ESTIMATORS, kl_surrogate
from klkit.objectives.policy_linear import _require_shapes, linear_kl_surrogate

STRINGS, DECISIONS, TOKENS = 5, 6, 23


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def masks():
    lengths = torch.tensor([6, 2, 4, 1, 5])[:, None]
    right = torch.arange(DECISIONS) < lengths
    holes = right.clone()
    holes[0, 2] = holes[2, 0] = holes[4, 1:3] = False  # what a tool wrote
    nothing = right.clone()
    nothing[3] = False
    return {"right": right, "left": right.flip(1), "holes": holes, "an empty string": nothing}


class Case:
    """Hidden states, heads and tokens of two models, with every leaf that may be trained."""

    def __init__(self, dtype=torch.float64, tied=False, head=None, bias=True):
        self.hidden_p = normal(STRINGS, DECISIONS, 4, seed=1, dtype=dtype).requires_grad_()
        self.hidden_q = normal(STRINGS, DECISIONS, 4 if tied else 3, seed=2, dtype=dtype)
        self.weight_p = normal(TOKENS, 4, seed=3, dtype=dtype).requires_grad_()
        self.weight_q = self.weight_p if tied else normal(TOKENS, 3, seed=4, dtype=dtype)
        self.bias = normal(TOKENS, seed=5, dtype=dtype).requires_grad_() if bias else None
        self.p = Head(self.weight_p, self.bias, **(head or {}))
        self.q = Head(self.weight_q, None, **(head or {}))
        self.tokens = torch.randint(TOKENS, (STRINGS, DECISIONS), generator=torch.Generator().manual_seed(6))

    def leaves(self):
        return [x for x in (self.hidden_p, self.weight_p, self.bias) if x is not None]

    def logits(self, hidden, head):
        z = hidden @ head.weight.T
        z = head.factor * (z if head.bias is None else z + head.bias)
        return z if head.cap is None else head.cap * torch.tanh(z / head.cap)

    def plain(self, mask, coefficient=1.0, advantages=None, **options):
        found = divergences(self.logits(self.hidden_p, self.p), self.logits(self.hidden_q, self.q), self.tokens)
        surrogate = kl_surrogate(found.kl, found.logp, found.logq, mask, **options)
        loss = coefficient * surrogate.loss
        if advantages is not None:
            loss = loss - (advantages * found.logp).masked_fill(~mask, 0.0).sum(1).mean()
        return loss, surrogate

    def fused(self, mask, **options):
        inputs = self.hidden_p, self.p, self.hidden_q, self.q, self.tokens, mask
        return linear_kl_surrogate(*inputs, **options)


def check(case, mask, tolerance=1e-10, rows=None, **options):
    wanted, plain = case.plain(mask, **options)
    found = case.fused(mask, rows=rows, **options)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(found.loss, wanted, **close)
    for name in ("value", "kl", "logp", "logq", "effective_samples"):
        one, other = getattr(found, name), getattr(plain, name)
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, **close)
            assert not one.requires_grad
    assert (found.objective, found.unbiased, found.estimator) == (plain.objective, plain.unbiased, plain.estimator)
    for one, other in zip(
        torch.autograd.grad(found.loss, case.leaves()), torch.autograd.grad(wanted, case.leaves()), strict=True
    ):
        torch.testing.assert_close(one, other, **close)


OPTIONS = {
    **{name: {"estimator": name} for name in GRADIENT_ESTIMATORS},
    "discounted": {"gamma": 0.7},
    "discounted mc": {"estimator": "mc", "gamma": 0.7},
    "mixed": {"mc_share": 0.3},
    "critic": {"baseline": normal(STRINGS, DECISIONS, seed=7)},
    **{
        f"group, {name}": {"estimator": name, "group": torch.tensor([3, 1, 3, 3, 1])} for name in ("rb", "mc", "hybrid")
    },
    "group, mixed": {"mc_share": 0.3, "group": torch.tensor([3, 1, 3, 3, 1])},
}
SAMPLER = normal(STRINGS, DECISIONS, seed=8) * 0.3 - 3.0


@pytest.mark.parametrize("rows", [None, 1, 4])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_as_on_logits(name, rows):
    check(Case(), masks()["holes"], rows=rows, **OPTIONS[name])


@pytest.mark.parametrize("rows", [None, 1, 4])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_off_policy(name, rows):
    options = {**OPTIONS[name], "cap": 1.5} if name == "hybrid" else OPTIONS[name]
    check(Case(), masks()["holes"], rows=rows, sampler_logp=SAMPLER, **options)


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("estimator", GRADIENT_ESTIMATORS)
def test_masks(mask, estimator):
    check(Case(), masks()[mask], rows=3, estimator=estimator)


HEADS = {"soft-cap": {"cap": 2.0}, "scale": {"factor": 0.4}, "both": {"cap": 3.0, "factor": 0.5}}


@pytest.mark.parametrize("head", HEADS)
def test_heads(head):
    check(Case(head=HEADS[head]), masks()["right"], rows=4)
    check(Case(head=HEADS[head]), masks()["right"], rows=4, sampler_logp=SAMPLER)


def test_tied_weights():
    """One head for both, as with adapters: its gradient has a part from ``q``, which ``detach`` removes."""
    check(Case(tied=True), masks()["right"], rows=4)
    case = Case(tied=True, bias=False)
    case.q = case.q.detach()
    whole = torch.autograd.grad(case.plain(masks()["right"])[0], case.leaves())
    z = case.logits(case.hidden_p, case.p), case.logits(case.hidden_q, case.q).detach()
    found = divergences(*z, case.tokens)
    alone = torch.autograd.grad(kl_surrogate(found.kl, found.logp, found.logq, masks()["right"]).loss, case.leaves())
    got = torch.autograd.grad(case.fused(masks()["right"], rows=4).loss, case.leaves())
    assert torch.allclose(whole[1], alone[1])  # plain() reads the detached head
    for one, other in zip(got, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_advantages_and_the_coefficient_come_in_the_same_visit():
    advantages = normal(STRINGS, DECISIONS, seed=9)
    for options in ({}, {"estimator": "rb_full"}, {"sampler_logp": SAMPLER}, {"coefficient": 0.0}):
        check(Case(), masks()["holes"], rows=4, **{"coefficient": 0.05, "advantages": advantages, **options})


@pytest.mark.parametrize("options", [{}, {"sampler_logp": SAMPLER.float()}, {"estimator": "rb_full"}])
def test_single_precision(options):
    check(Case(dtype=torch.float32), masks()["holes"], tolerance=2e-5, rows=4, **options)


def test_padding_holds_anything():
    case, mask = Case(), masks()["holes"]
    one = case.fused(mask)
    wanted = torch.autograd.grad(one.loss, case.leaves())
    with torch.no_grad():
        case.hidden_p[~mask] = torch.nan
        case.hidden_q[~mask] = torch.inf
        case.tokens[~mask] = -100
    junk = torch.where(mask, 1.0, torch.nan).double()
    other = case.fused(mask, advantages=0 * junk)
    assert torch.equal(one.loss, other.loss)
    for a, b in zip(wanted, torch.autograd.grad(other.loss, case.leaves()), strict=True):
        assert torch.equal(a, b)


class Products(TorchDispatchMode):
    """Counts products with the vocabulary."""

    def __init__(self):
        self.count, self.largest = 0, 0
        super().__init__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        if ("mm" in str(function) or "linear" in str(function)) and any(TOKENS in x.shape for x in tensors):
            self.count += 1
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(found) if isinstance(x, torch.Tensor))])
        return found


@pytest.mark.parametrize(("options", "products"), [
    ({}, 4),
    ({"group": torch.zeros(STRINGS, dtype=torch.long)}, 4),
    ({"advantages": torch.ones(STRINGS, DECISIONS, dtype=torch.float64)}, 4),
    ({"sampler_logp": SAMPLER}, 5),
    ({"estimator": "rb_full"}, 6),
    ({"estimator": "mc", "group": torch.zeros(STRINGS, dtype=torch.long)}, 6),
])  # fmt: skip
def test_what_each_option_costs(options, products):
    """Logits of ``p`` and ``q``, gradients of hidden states and weight: four products; a visit before costs more."""
    with Products() as counted:
        Case().fused(masks()["right"], rows=100, **options)
    assert counted.count == products


def test_what_does_not_fit_is_refused():
    case, mask = Case(), masks()["right"]
    with pytest.raises(ValueError, match="expected an estimator among rb"):
        case.fused(mask, estimator="k3")
    with pytest.raises(ValueError, match="use rb, mc or hybrid"):
        case.fused(mask, estimator="rb_full", gamma=0.5)
    hidden, shape = case.hidden_p.detach(), case.tokens.shape
    with pytest.raises(ValueError, match=r"expected hidden_p for the \(5, 6\) strings and decisions"):
        _require_shapes(hidden[:, 1:], hidden, mask, None, None, None, shape=shape)
    with pytest.raises(ValueError, match="expected advantages for the"):
        _require_shapes(hidden, hidden, mask, None, None, torch.ones(STRINGS, 1), shape=shape)


def test_an_infinite_divergence_is_refused():
    case = Case()
    case.q = case.q.cut(TOKENS - 3)
    case.tokens.clamp_(max=TOKENS - 4)
    with pytest.raises(ValueError, match="finite kl at every decision"):
        case.fused(masks()["right"])
