"""The objective of a step by exact enumeration: whose gradient each KL penalty has, and the reward's."""

import pytest
import torch

from klkit.objectives.gradient_check import check_gradient
from klkit.objectives.toy import Toy
from klkit.train.penalties import BASELINES, PENALTIES, RETURNS, leave_one_out, objective_loss

ON_POLICY = [name for name, known in PENALTIES.items() if known.unbiased]


def rows(batch):
    return (batch.rows_p.exp() * (batch.rows_p - batch.rows_q)).sum(-1)


def penalised(penalty, *, rewards=None, off_policy=False, coefficient=1.0, **options):
    def loss(batch):
        return objective_loss(
            rows(batch),
            batch.logp,
            batch.logq,
            batch.mask,
            torch.zeros(len(batch.mask), dtype=torch.float64) if rewards is None else rewards(batch),
            torch.zeros(len(batch.mask), dtype=torch.long),
            penalty=penalty,
            coefficient=coefficient,
            sampler_logp=batch.old if off_policy else None,
            **options,
        )

    return loss


@pytest.mark.parametrize("baseline", [True, False])
@pytest.mark.parametrize("penalty", ON_POLICY)
def test_those_said_to_be_unbiased_have_the_gradient_of_the_divergence(penalty, baseline):
    report = check_gradient(penalised(penalty, kl_baseline=baseline), strings=2)
    assert report.agreement["kl"].relative_error < 1e-9


@pytest.mark.parametrize("penalty", [*RETURNS, "rb_full"])
def test_so_they_have_on_strings_of_an_older_policy(penalty):
    report = check_gradient(penalised(penalty, off_policy=True), strings=2, off_policy=True)
    assert report.agreement["kl"].relative_error < 1e-9


@pytest.mark.parametrize(
    ("penalty", "target"),
    [("token_local", "token_local"), ("k2_loss", "token_local"), ("k3_loss", "token_local_forward")],
)
def test_losses_of_single_tokens_follow_what_their_words_say(penalty, target):
    assert check_gradient(penalised(penalty), strings=2).target == target


def test_k1_in_the_loss_has_no_gradient():
    assert check_gradient(penalised("k1_loss"), strings=2).vanishes


def test_the_detached_divergence_lacks_exactly_its_pathwise_part():
    toy = Toy.make(3, 3)
    targets = toy.targets()
    # What it has is the derivative through the visits: the whole minus that of divergences at fixed prefixes.
    found = torch.zeros_like(toy.policy)
    law = toy.law(toy.policy.detach().log_softmax(-1))
    loss = penalised("rb_detached", kl_baseline=False)
    for i in range(len(law)):
        for j in range(len(law)):
            value = loss(toy.batch(torch.tensor([i, j])))
            found += float(law[i] * law[j]) * toy.gradient(value)
    assert torch.allclose(found, targets["kl"] - targets["token_local"], rtol=0, atol=1e-12)
    assert not check_gradient(loss, strings=2).correct


@pytest.mark.parametrize("penalty", ["k2_reward", "k3_reward", "rb_detached"])
def test_values_in_the_reward_are_not_the_divergence(penalty):
    assert check_gradient(penalised(penalty), strings=2).target is None


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("penalty", ["rb", "rb_full", "mc"])
def test_the_reward_has_its_exact_gradient(penalty, off_policy):
    toy = Toy.make(3, 3)

    def rewards(batch):  # of whole strings, any number that the policy has no part in
        return (batch.logq.masked_fill(~batch.mask, 0.0)).sum(1).sin()

    everything = toy.batch(torch.arange(len(toy.token)))
    value = (toy.law(toy.policy.log_softmax(-1)) * rewards(everything)).sum()
    wanted = 0.3 * toy.targets()["kl"] - toy.gradient(value)
    loss = penalised(penalty, rewards=rewards, coefficient=0.3, off_policy=off_policy)
    law = toy.law(toy.old if off_policy else toy.policy.detach().log_softmax(-1))
    found = torch.zeros_like(toy.policy)
    for i in range(len(law)):
        for j in range(len(law)):
            batch = toy.batch(torch.tensor([i, j]), off_policy=off_policy)
            found += float(law[i] * law[j]) * toy.gradient(loss(batch))
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)


def test_a_clipped_string_pushes_no_further():
    logp = torch.tensor([[-1.0], [-1.0]], requires_grad=True)
    old = torch.tensor([[-2.0], [-1.0]])  # the first has become e times as probable
    zero, mask = torch.zeros(2, 1), torch.ones(2, 1, dtype=torch.bool)
    group, options = torch.tensor([0, 0]), {"penalty": "rb", "coefficient": 0.0, "sampler_logp": old}
    for clip, pushes in ((0.2, False), (None, True)):
        loss = objective_loss(zero, logp, zero, mask, torch.tensor([1.0, 0.0]), group, clip=clip, **options)
        (gradient,) = torch.autograd.grad(loss, logp)
        assert (float(gradient[0]) != 0) is pushes
        assert float(gradient[1]) != 0


def test_values_outside_the_mask_do_not_matter():
    one = torch.ones(2, 2)
    mask = torch.tensor([[True, True], [True, False]])
    group, rewards = torch.tensor([0, 0]), torch.tensor([1.0, 0.0])
    for penalty in PENALTIES:
        found = []
        for junk in (0.0, float("nan"), float("inf")):
            logp = torch.tensor([[-1.0, -2.0], [-3.0, junk]], requires_grad=True)
            logq = torch.tensor([[-1.5, -1.0], [-2.0, junk]])
            kl = (one + logp.detach().nan_to_num()).masked_fill(~mask, junk)
            loss = objective_loss(kl, logp, logq, mask, rewards, group, penalty=penalty, coefficient=0.5)
            found.append(torch.autograd.grad(loss, logp)[0])
        assert torch.equal(found[0], found[1]), penalty
        assert torch.equal(found[0], found[2]), penalty


def test_leave_one_out_of_interleaved_groups():
    values = torch.tensor([1.0, 10.0, 2.0, 20.0, 6.0])
    assert leave_one_out(values, torch.tensor([3, 8, 3, 8, 3])).tolist() == [-3.0, -10.0, -1.5, 10.0, 4.5]


def test_every_baseline_says_that_it_is_one():
    assert [name for name, known in BASELINES.items() if known.unbiased] == ["k1_reward"]


def test_at_the_optimum_the_noise_of_k1_in_the_reward_is_the_rewards_own():
    # There reward − β log p(y)/q(y) is the same for every string, so nothing is left of the gradient, not even noise.
    # What has less noise of its own, and does not share the reward's, has more of both together.
    toy, coefficient = Toy.make(3, 3), 0.7
    wanted = toy.law(toy.policy.log_softmax(-1)).detach()  # an optimum of the reward that is made for it:
    reward = coefficient * (wanted / toy.law(toy.reference)).log()
    spread = {}
    for penalty in ("k1_reward", "rb", "mc"):
        total = []
        for i in range(len(wanted)):
            for j in range(len(wanted)):
                chosen = torch.tensor([i, j])
                loss = penalised(penalty, rewards=lambda _, at=chosen: reward[at], coefficient=coefficient)
                total.append(wanted[i] * wanted[j] * toy.gradient(loss(toy.batch(chosen))).square().sum())
        spread[penalty] = float(sum(total))
    assert spread["k1_reward"] < 1e-25
    assert spread["rb"] > 0.01
    assert spread["mc"] > 0.01
