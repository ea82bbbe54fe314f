"""The other direction, and laws at a temperature, by enumeration."""

import pytest
import torch

from klkit.divergences.differentiable import divergences
from klkit.divergences.linear import Head
from klkit.divergences.linear_loss import Weights, linear_loss
from klkit.objectives.forward import forward_kl_surrogate
from klkit.objectives.gradient_check import check_gradient
from klkit.objectives.policy import kl_surrogate
from klkit.objectives.policy_linear import linear_kl_surrogate
from klkit.objectives.toy import Toy


def reverse(batch):
    return (batch.rows_q.exp() * (batch.rows_q - batch.rows_p)).sum(-1)


def one_gradient_a_string(toy, loss):
    strings = range(len(toy.token))
    return torch.stack([toy.gradient(loss(toy.batch(torch.tensor([i])))) for i in strings])


def forward(batch, **options):
    return forward_kl_surrogate(reverse(batch), batch.logp, batch.logq, batch.mask, **options)


def test_on_strings_of_the_reference_the_pathwise_part_is_all():
    toy = Toy.make(4, 4)
    drawn = toy.law(toy.reference)
    found = torch.einsum("n,nkv->kv", drawn, one_gradient_a_string(toy, lambda batch: forward(batch).loss))
    torch.testing.assert_close(found, toy.targets()["forward_kl"], rtol=1e-9, atol=1e-12)
    p = toy.law(toy.policy.detach().log_softmax(-1))
    value = forward(toy.batch(torch.arange(len(drawn)))).value
    assert float(drawn @ value) == pytest.approx(float((drawn * (drawn / p).log()).sum()))


@pytest.mark.parametrize("off_policy", [False, True])
def test_on_other_strings_prefix_weights_make_it_right(off_policy):
    def weighted(batch):
        return forward(batch, sampler_logp=batch.old).loss

    assert check_gradient(weighted, off_policy=off_policy).agreement["forward_kl"].relative_error < 1e-9
    plain = check_gradient(lambda batch: forward(batch).loss, off_policy=off_policy)
    assert plain.target == "token_local_forward"
    assert "KL(q‖p)" in plain.verdict


def test_what_is_said_of_it():
    toy = Toy.make(3, 3, distance=2.0)
    batch = toy.batch(torch.arange(len(toy.token)))
    plain = forward(batch)
    assert plain.unbiased
    assert plain.effective_samples is None
    weighted = forward(batch, sampler_logp=batch.old)
    assert weighted.effective_samples[0] == pytest.approx(len(toy.token))
    capped = forward(batch, sampler_logp=batch.old, cap=1.1)
    assert not capped.unbiased
    assert "capped at 1.1" in capped.objective
    assert forward(batch, sampler_logp=batch.old, cap=1e9).unbiased
    with pytest.raises(ValueError, match="positive cap with sampler_logp"):
        forward(batch, cap=2.0)
    junk = torch.where(batch.mask, 0.0, torch.nan)
    other = forward_kl_surrogate(reverse(batch) + junk, batch.logp + junk, batch.logq + junk, batch.mask)
    assert torch.equal(other.loss, plain.loss)


def test_from_hidden_states_and_heads():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, other = (torch.randn(*s, generator=generator).double() for s in ((2, 3, 4), (7, 4), (7, 4)))
    hidden.requires_grad_()
    tokens, mask = torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([[True, True, True], [True, True, False]])
    rows = divergences(hidden @ weight.T, hidden.detach() @ other.T, tokens)
    wanted = torch.autograd.grad(forward_kl_surrogate(rows.reverse_kl, rows.logp, rows.logq, mask).loss, hidden)
    h, weights = hidden[mask], Weights(reverse_kl=torch.full((5,), 0.5).double())
    loss, _ = linear_loss(h, Head(weight), h.detach(), Head(other), tokens[mask], weights)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_laws_at_a_temperature(temperature):
    """Strings of the tempered policy, logits of both models divided: the gradient of the tempered laws' divergence."""
    toy = Toy.make(3, 3, distance=1.5)
    logits_q = toy.reference
    rows, rows_q = ((z / temperature).log_softmax(-1) for z in (toy.policy, logits_q))
    p, q = toy.law(rows), toy.law(rows_q)
    exact = toy.gradient((p * (p / q).log()).sum())

    def expected(surrogate):
        total = torch.zeros_like(exact)
        for i, weight in enumerate(p.detach()):
            total += weight * toy.gradient(surrogate(torch.tensor([i])).loss)
        return total

    def from_logits(i):
        at = toy.prefix[i]
        found = divergences(toy.policy[at] / temperature, logits_q[at] / temperature, toy.token[i])
        return kl_surrogate(found.kl, found.logp, found.logq, toy.mask[i])

    def from_heads(i):  # each prefix's logits are a row of the weight: hidden states are what the head turns into them
        at, eye = toy.prefix[i], torch.eye(toy.policy.shape[1], dtype=torch.float64)
        p_head, q_head = Head(eye).cooled(temperature), Head(eye.clone()).cooled(temperature)
        return linear_kl_surrogate(toy.policy[at], p_head, logits_q[at], q_head, toy.token[i], toy.mask[i])

    for surrogate in (from_logits, from_heads):
        torch.testing.assert_close(expected(surrogate), exact, rtol=1e-9, atol=1e-12)
