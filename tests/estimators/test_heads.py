"""Head and tail of next-token laws, by sorting and adding up token after token."""

import pytest
import torch

from klkit import rng
from klkit.divergences.adaptive import adaptive_kl
from klkit.divergences.kl import kl, reverse_kl
from klkit.estimators.heads import FAR, MASS, HeadTally, head_statistics
from klkit.estimators.statistics import score
from klkit.models.automaton import random_automaton
from klkit.sampling.ancestral import sample


def brute(p, q):
    """The same of one row, with Python's own sums."""
    order = sorted(range(len(p)), key=lambda i: -p[i])
    head, mass = [], 0.0
    for i in order:
        if mass >= MASS - 1e-12:
            break
        head.append(i)
        mass += p[i]
    head_gap = sum(abs(p[i] - q[i]) for i in head)
    tail_gap = sum(abs(p[i] - q[i]) for i in order if i not in head)
    far = [i for i in order if p[i] < FAR]
    weight = head_gap / (head_gap + tail_gap) if head_gap + tail_gap else 0.5
    return head_gap, tail_gap, weight, sum(p[i] for i in far), sum(q[i] for i in far), len(head) == 1


def rows(count, size, spread, seed=0):
    generator = rng.stream(seed, "heads")
    return (spread * torch.randn(count, size, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize(("size", "spread"), [(5, 1.0), (40, 3.0), (300, 4.0)])
def test_every_number_is_that_of_adding_up_token_after_token(size, spread):
    a, b = rows(30, size, spread)
    found = head_statistics(a, b)
    p, q = a.softmax(-1).tolist(), b.softmax(-1).tolist()
    for i in range(30):
        wanted = brute(p[i], q[i])
        got = (found.head_gap, found.tail_gap, found.weight, found.far_p, found.far_q, found.single)
        assert [float(x[i]) for x in got] == pytest.approx([float(x) for x in wanted], abs=1e-12)
    if spread > 2:
        assert 0 < float(found.single.double().mean()) < 1
        assert float(found.far_q.max()) > float(found.far_p.max()) > 0


def test_gaps_add_up_to_twice_the_total_variation_and_the_weight_is_that_of_adaptive_kl():
    a, b = rows(20, 50, 2.0)
    logp, logq = a.log_softmax(-1), b.log_softmax(-1)
    found = head_statistics(a + 3.0, b - 1.0)  # logits need not be normalised
    torch.testing.assert_close(found.head_gap + found.tail_gap, (logp.exp() - logq.exp()).abs().sum(-1))
    mixed = found.weight * kl(logp, logq) + (1 - found.weight) * reverse_kl(logp, logq)
    torch.testing.assert_close(mixed, adaptive_kl(logp, logq))


def test_equal_laws_and_laws_with_excluded_tokens_have_numbers():
    a = torch.tensor([[1.0, 0.0, -torch.inf], [0.0, 0.0, -torch.inf]])
    same = head_statistics(a, a)
    assert same.weight.tolist() == [0.5, 0.5]
    assert not same.head_gap.any()
    assert not same.tail_gap.any()
    assert same.single.tolist() == [True, True]  # the second row's first token reaches one half exactly
    leaking = head_statistics(a, torch.zeros(2, 3))
    assert leaking.far_q.tolist() == pytest.approx([1 / 3, 1 / 3])
    assert leaking.far_p.tolist() == [0.0, 0.0]


def test_a_tally_sees_every_decision_in_order():
    p, q = (random_automaton(3, 4, generator=rng.stream(i, "heads"), spread=2.0) for i in range(2))
    x = sample(p, [p.context(None)] * 9, max_tokens=8, seed=0).sequences
    tally = HeadTally()
    score(p, q, x, batch_size=4, watch=tally)
    logp, logq = (model.readout(model.encode(x)) for model in (p, q))
    torch.testing.assert_close(tally.statistics().tail_gap, head_statistics(logp, logq).tail_gap)
