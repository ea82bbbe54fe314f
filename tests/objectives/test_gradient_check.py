"""The checker on losses whose verdict is known, and on mistakes it has to catch."""

import pytest
import torch

from klkit.objectives.gradient_check import check_gradient
from klkit.objectives.policy import kl_surrogate
from klkit.objectives.toy import Toy


def u(batch):
    return (batch.logp - batch.logq).masked_fill(~batch.mask, 0.0)


def full(batch):
    return (batch.rows_p.exp() * (batch.rows_p - batch.rows_q)).sum(-1).masked_fill(~batch.mask, 0.0)


def k1_in_loss(batch):
    return u(batch).sum(1).mean()


def k3_in_reward(batch):
    k3 = (torch.expm1(-u(batch)) + u(batch)).detach()
    return (k3.sum(1) * batch.logp.sum(1)).mean()


def own_token_advantage(batch):
    return (full(batch).detach() * batch.logp).sum(1).mean()


def wrong_sign(batch):
    d = full(batch)
    later = (d.flip(1).cumsum(1).flip(1) - d).detach()
    return (d - later * batch.logp).sum(1).mean()


def shifted_mask(batch):
    mask = torch.cat([batch.mask[:, 1:], torch.zeros_like(batch.mask[:, :1])], 1)
    return kl_surrogate(full(batch), batch.logp, batch.logq, mask).loss


@pytest.mark.parametrize("loss", [k1_in_loss, k3_in_reward, own_token_advantage, wrong_sign, shifted_mask])
def test_mistakes_are_rejected(loss):
    report = check_gradient(loss)
    assert not report.correct
    assert report.agreement["kl"].relative_error > 0.05
    assert "KL(p‖q) between the laws" not in report.verdict.split("nearest")[0]


def test_no_gradient_at_all_is_said():
    for loss in (k1_in_loss, own_token_advantage):
        report = check_gradient(loss)
        assert report.vanishes
        assert "regularises nothing" in report.verdict
    constant = check_gradient(lambda batch: torch.zeros((), dtype=torch.float64))
    assert constant.vanishes
    assert constant.variance == 0


def test_directions_and_local_forms_are_told_apart():
    def k2(batch):
        return 0.5 * u(batch).square().sum(1).mean()

    def k3(batch):
        return (torch.expm1(-u(batch)) + u(batch)).sum(1).mean()

    def forward(batch):  # strings of p, weighted to those of q
        whole = u(batch).sum(1)
        return ((-whole.detach()).exp() * -batch.logp.sum(1)).mean()

    assert check_gradient(k2).target == "token_local"
    assert check_gradient(k3).target == "token_local_forward"
    assert check_gradient(forward).target == "forward_kl"
    assert "other direction" in check_gradient(k3).verdict


def test_targets_against_finite_differences():
    toy = Toy.make(3, 3)
    found, step = toy.targets()["kl"], 1e-6
    for place in ((0, 0), (1, 2), (4, 1)):
        values = []
        for sign in (1, -1):
            logits = toy.policy.detach().clone()
            logits[place] += sign * step
            p, q = toy.law(logits.log_softmax(-1)), toy.law(toy.reference)
            values.append(float((p * (p / q).log()).sum()))
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(found[place]), abs=1e-8)


def test_the_toys_strings_are_all_there_are():
    toy = Toy.make(5, 4)
    assert len(toy.token) == 1 + 4 + 16 + 64 * 5
    for rows in (toy.policy.detach().log_softmax(-1), toy.reference, toy.old):
        assert float(toy.law(rows).sum()) == pytest.approx(1, abs=1e-12)


def test_a_report_reads_well():
    text = str(check_gradient(k3_in_reward))
    assert max(map(len, text.splitlines()[1:])) <= 80
    assert "cosine" in text


def test_what_is_no_scalar_is_refused():
    with pytest.raises(ValueError, match=r"got a tensor of shape \(1, 4\)"):
        check_gradient(lambda batch: batch.logp)
    with pytest.raises(ValueError, match="expected a finite scalar from the loss, got nan"):
        check_gradient(lambda batch: batch.logp.sum() * torch.nan)
