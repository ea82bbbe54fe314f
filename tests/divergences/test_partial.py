"""Laws known in part: bounds from a bucket, unbiasedness from draws."""

import itertools
import math

import pytest
import torch

from klkit.divergences.adaptive import head_weight
from klkit.divergences.alpha_beta import alpha_beta_divergence
from klkit.divergences.kl import cross_entropy, kl, reverse_kl
from klkit.divergences.partial import Hybrid, Sampled, TopK, bucketed, head_bracket, sampled_cross_entropy
from klkit.objectives.distill_losses import LOSSES, token_loss

GOLDEN_P = torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05]], dtype=torch.float64).log()
GOLDEN_Q = torch.tensor([[0.0, 0.5, 1.0, -0.5, 0.3]], dtype=torch.float64).log_softmax(-1)
BOUNDED = [key for key in LOSSES if token_loss(key).merging_lowers]


def laws(seed, rows=200, size=40, spread=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    a, b = spread * torch.randn(2, rows, size, generator=generator, dtype=torch.float64)
    return (x.log_softmax(-1).to(dtype) for x in (a, b))


def top(logp, k):
    likely, tokens = logp.topk(k, dim=-1)
    rest = logp.scatter(-1, tokens, -torch.inf).logsumexp(-1) if k < logp.shape[-1] else None
    return TopK(tokens, likely, rest)


def test_golden_bucket():
    p, q = bucketed(top(GOLDEN_P, 2), GOLDEN_Q)
    assert float(kl(p, q)) == pytest.approx(0.289526, abs=5e-7)
    assert float(reverse_kl(p, q)) == pytest.approx(0.270573, abs=5e-7)


@pytest.mark.parametrize("key", BOUNDED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_bucket_is_never_above_the_whole_and_tightens_with_k(key, dtype):
    loss = token_loss(key)
    logp, logq = laws(1, dtype=dtype)
    whole = loss.rows(logp, logq)
    last = torch.zeros_like(whole)
    slack = 1e-12 if dtype == torch.float64 else 2e-6
    for k in (1, 2, 5, 15, 40):
        bound = loss.rows(*bucketed(top(logp, k), logq))
        assert bool((bound <= whole * (1 + slack) + slack).all())
        assert bool((bound >= last - slack).all())
        last = bound
    torch.testing.assert_close(last, whole, rtol=1e-5 if dtype == torch.float32 else 1e-10, atol=slack)


def test_alpha_beta_is_said_to_be_bounded_only_where_it_is():
    p, q = torch.tensor([0.2, 0.4, 0.4]).double().log(), torch.tensor([0.6, 0.2, 0.2]).double().log()
    merged = [torch.stack([x[0], x[1:].logsumexp(0)]) for x in (p, q)]
    powers = {"p_power": 1.0, "q_power": 1.0}  # ½ Σ (p − q)², which merging raises here
    assert float(alpha_beta_divergence(*merged, **powers)) > float(alpha_beta_divergence(p, q, **powers))
    assert not token_loss("alpha_beta").merging_lowers
    assert token_loss("alpha_beta,p_power=0.3,q_power=0.7").merging_lowers


def test_a_bucket_loses_nothing_where_the_ratio_in_it_is_constant():
    p = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).double()
    q = torch.cat([torch.tensor([[0.25, 0.25]]).double(), p[:, 2:] * 0.5 / 0.3], 1)
    short = bucketed(top(p.log(), 2), q.log())
    for divergence in (kl, reverse_kl):
        torch.testing.assert_close(divergence(*short), divergence(p.log(), q.log()))


def test_all_tokens_known_is_the_whole_law_with_its_gradient():
    logp, logq = laws(2, rows=5, size=6)
    found = []
    for form in (lambda z: bucketed(top(logp, 6), z), lambda z: (logp, z)):
        z = logq.clone().requires_grad_()
        (grad,) = torch.autograd.grad(reverse_kl(*form(z.log_softmax(-1))).sum(), z)
        found.append(grad)
    torch.testing.assert_close(*found)


def test_the_rest_may_be_given_or_not():
    logp, logq = laws(3)
    given = top(logp, 4)
    derived = TopK(given.tokens, given.logp)
    torch.testing.assert_close(derived.log_rest, given.rest, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kl(*bucketed(given, logq)), kl(*bucketed(derived, logq)))
    nothing = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()).log_rest
    assert float(nothing.exp()) < 1e-15


def test_the_gradient_reaches_the_tail_so_that_a_student_cannot_hide_there():
    """verl #5041: without a bucket, the reverse KL on the support falls as the student leaves it."""
    logp, _ = laws(4, rows=1, size=12, spread=1.0)
    law, z = top(logp, 3), torch.zeros(1, 12, dtype=torch.float64)
    z[:, :] = -2.0
    z.scatter_(1, law.tokens, 2.0)
    z.requires_grad_()
    reverse_kl(*bucketed(law, z.log_softmax(-1))).backward()
    outside = torch.ones(12, dtype=torch.bool).index_fill_(0, law.tokens[0], False)
    p_rest, q_rest = float(law.log_rest.exp()), float(z.softmax(-1)[0, outside].detach().sum())
    assert q_rest < p_rest  # so descending has to raise the tail
    assert bool((z.grad[0, outside] < 0).all())
    optimizer = torch.optim.Adam([z], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        reverse_kl(*bucketed(law, z.log_softmax(-1))).backward()
        optimizer.step()
    assert float(z.detach().softmax(-1)[0, outside].sum()) == pytest.approx(p_rest, rel=1e-3)


@pytest.mark.parametrize("rule", ["cover", "inside"])
@pytest.mark.parametrize("mass", [0.3, 0.5, 0.9])
def test_the_bracket_holds_the_head_weight(rule, mass):
    logp, logq = laws(5, spread=2.0)
    true = head_weight(logp, logq, mass=mass, head=rule)
    width = []
    for k in (1, 4, 12, 40):
        found = head_bracket(*bucketed(top(logp, k), logq), mass=mass, head=rule)
        assert bool((found.least <= true + 1e-12).all())
        assert bool((true <= found.greatest + 1e-12).all())
        assert bool((found.estimate >= found.least).all())
        assert bool((found.estimate <= found.greatest).all())
        width.append(float((found.greatest - found.least).mean()))
        if k == 40:
            assert bool(found.covered.all())
            torch.testing.assert_close(found.estimate, true)
    assert width == sorted(width, reverse=True)
    assert width[-1] < 1e-12


def test_a_head_that_is_not_known_is_said_so():
    logp, logq = laws(6, spread=0.1)
    found = head_bracket(*bucketed(top(logp, 3), logq))
    assert not bool(found.covered.any())
    assert float(found.least.max()) == 0.0
    assert float(found.greatest.min()) == 1.0


def test_equal_laws_weigh_both_directions_alike():
    logp, _ = laws(7, rows=3)
    p, _ = bucketed(top(logp, 4), logp)
    assert head_bracket(p, p).estimate.tolist() == [0.5] * 3


def test_draws_are_unbiased_for_the_cross_entropy_by_enumeration():
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    draws = torch.tensor(list(itertools.product(range(3), repeat=3)))
    chance = p[draws].prod(1)
    found = sampled_cross_entropy(Sampled(draws, torch.full(draws.shape, 1 / 3)), q.log().expand(len(draws), -1))
    assert float(chance @ found) == pytest.approx(float(cross_entropy(p.log(), q.log())), rel=1e-7)


def test_a_share_of_zero_pads_a_row():
    law = Sampled(torch.tensor([[1, 0]]), torch.tensor([[1.0, 0.0]]))
    assert float(sampled_cross_entropy(law, torch.tensor([[0.0, 1.0]]).log())) == 0.0


def test_known_tokens_and_draws_are_unbiased_for_the_cross_entropy_and_its_gradient_by_enumeration():
    p = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
    z = torch.tensor([[0.1, -0.4, 0.7, 0.2, -1.0]], dtype=torch.float64, requires_grad=True)
    wanted = cross_entropy(p.log()[None], z.log_softmax(-1)).sum()
    (slope,) = torch.autograd.grad(wanted, z)
    draws = torch.tensor(list(itertools.product((2, 3, 4), repeat=3)))
    chance, n = (p[draws] / 0.3).prod(1), len(draws)
    some = torch.tensor([0, 1])
    law = Hybrid(
        some.expand(n, -1),
        p.log()[some].expand(n, -1),
        torch.full((n,), 0.3, dtype=torch.float64).log(),
        draws,
        p.log()[draws],
        torch.ones(n, dtype=torch.bool),
    )
    found = chance @ sampled_cross_entropy(law.sampled(), z.log_softmax(-1).expand(n, -1))
    (grad,) = torch.autograd.grad(found, z)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-12)
    torch.testing.assert_close(grad, slope, rtol=1e-12, atol=1e-14)
    assert float(law.top().log_rest[0]) == pytest.approx(math.log(0.3))


def test_ids_out_of_range():
    with pytest.raises(ValueError, match=r"expected ids in 0..39, the tokens that q chooses from, got 1..40"):
        bucketed(TopK(torch.tensor([[1, 40]]), torch.tensor([[0.5, 0.25]]).log()), next(laws(1, rows=1)))
