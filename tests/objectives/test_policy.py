"""Gradients of the surrogates by exact enumeration: equalities, not statistics."""

import math

import pytest
import torch

from klkit.divergences.differentiable import divergences
from klkit.objectives.gradient_check import check_gradient
from klkit.objectives.policy import GRADIENT_ESTIMATORS, best_share, kl_surrogate
from klkit.objectives.toy import Toy

RIGHT = [name for name, known in GRADIENT_ESTIMATORS.items() if known.unbiased]


def rows(batch):
    return (batch.rows_p.exp() * (batch.rows_p - batch.rows_q)).sum(-1)


def surrogate(off_policy=False, **options):
    def loss(batch):
        sampler = batch.old if off_policy else None
        return kl_surrogate(rows(batch), batch.logp, batch.logq, batch.mask, sampler_logp=sampler, **options).loss

    return loss


def error(loss, **options):
    return check_gradient(loss, **options).agreement["kl"].relative_error


@pytest.mark.parametrize("estimator", RIGHT)
@pytest.mark.parametrize("off_policy", [False, True])
def test_unbiased_for_the_sequence_divergence(estimator, off_policy):
    report = check_gradient(surrogate(off_policy, estimator=estimator), off_policy=off_policy)
    assert report.agreement["kl"].relative_error < 1e-9
    assert report.correct


def test_without_prefix_weights_old_strings_bias_every_estimator():
    for estimator in RIGHT:
        assert error(surrogate(estimator=estimator), off_policy=True) > 0.05


@pytest.mark.parametrize("off_policy", [False, True])
def test_what_token_local_leaves_out_is_the_score_of_later_divergences(off_policy):
    """Its bias, term by term: ``E Σ_n s_n Σ_{j>n} D_j``."""
    toy = Toy.make()
    local = check_gradient(surrogate(estimator="token_local"), toy=toy)
    assert local.target == "token_local"
    everything = torch.arange(len(toy.token))
    batch = toy.batch(everything)
    d = rows(batch).masked_fill(~batch.mask, 0.0).detach()
    later = d.flip(1).cumsum(1).flip(1) - d
    law = toy.law(toy.policy.detach().log_softmax(-1))
    missing = toy.gradient((law * (later * batch.logp).sum(1)).sum())
    targets = toy.targets()
    torch.testing.assert_close(targets["token_local"] + missing, targets["kl"], rtol=1e-10, atol=1e-12)


def test_detaching_the_rao_blackwell_return_loses_the_pathwise_part():
    def detached(batch):
        d = rows(batch).masked_fill(~batch.mask, 0.0)
        return (d.sum(1).detach() * batch.logp.sum(1)).mean()

    toy = Toy.make()
    found = check_gradient(detached, toy=toy)
    assert found.target is None
    whole = toy.targets()
    lost = whole["token_local"].norm() / whole["kl"].norm()
    assert found.agreement["kl"].relative_error == pytest.approx(float(lost), rel=1e-9)


def variances(toy):
    """Total variance of one string's gradient, by estimator, and the largest bias of each."""
    at = torch.arange(len(toy.token))
    law = toy.law(toy.policy.detach().log_softmax(-1))
    batch = toy.batch(at)
    d, u, logp = (x.masked_fill(~batch.mask, 0.0) for x in (rows(batch), batch.logp - batch.logq, batch.logp))
    fixed_d, fixed_u = d.detach(), u.detach()
    later = fixed_d.flip(1).cumsum(1).flip(1) - fixed_d
    mass, value = (torch.zeros(len(toy.policy), dtype=law.dtype) for _ in range(2))
    weight = law[:, None].expand_as(later)[toy.mask]
    mass.index_add_(0, toy.prefix[toy.mask], weight)
    value.index_add_(0, toy.prefix[toy.mask], weight * later[toy.mask])
    critic = (value / mass)[toy.prefix].masked_fill(~toy.mask, 0.0)  # E[Σ_{j>n} D_j | prefix before n]
    causal_u = fixed_u.flip(1).cumsum(1).flip(1)
    losses = {
        "mc_full": fixed_u.sum(1, keepdim=True) * logp,
        "mc": causal_u * logp,
        "hybrid": (fixed_u + later) * logp,
        "rb_full": d + fixed_d.sum(1, keepdim=True) * logp,
        "rb": d + later * logp,
        "rb with the true value": d + (later - critic) * logp,
        "rb_detached": fixed_d.sum(1, keepdim=True) * logp,
        "token_local": d,
        "mc_token": fixed_u * logp,
    }
    exact, spread, bias = toy.targets()["kl"], {}, {}
    for name, loss in losses.items():
        found = torch.stack([toy.gradient(x) for x in loss.sum(1)])
        mean = torch.einsum("n,nkv->kv", law, found)
        spread[name] = float(law @ (found - mean).square().sum((1, 2)))
        bias[name] = float((mean - exact).abs().max())
    return spread, bias


@pytest.mark.parametrize(("distance", "divergence"), [(0.5, 0.092), (1.2, 0.493), (2.5, 1.823)])
def test_variances_are_ordered_as_derived(distance, divergence):
    """Nine gradients at small, middling and large divergence: who is unbiased, and who varies less than whom."""
    toy = Toy.make(4, 4, distance=distance)
    assert check_gradient(lambda batch: batch.logp.sum(), toy=toy).kl == pytest.approx(divergence, abs=1e-3)
    spread, bias = variances(toy)
    wrong = {"rb_detached", "token_local", "mc_token"}
    assert {name for name, found in bias.items() if found > 1e-9} == wrong
    assert bias["token_local"] == pytest.approx(bias["mc_token"])  # the same term is missing
    assert spread["rb with the true value"] < spread["rb"] < spread["hybrid"] < spread["mc"] < spread["mc_full"]
    assert spread["rb"] < spread["rb_full"] < spread["mc_full"]
    assert spread["token_local"] == min(spread[name] for name in spread if name != "rb_detached")
    assert spread["token_local"] < spread["mc_token"] < spread["mc"]
    assert spread["rb_detached"] < spread["rb_full"]
    assert (spread["rb_full"] < spread["hybrid"]) == (divergence < 1)  # the full return's noise grows with KL
    for name in ("rb", "mc", "hybrid", "rb_full", "token_local"):
        report = check_gradient(surrogate(estimator=name), toy=toy)
        assert report.variance == pytest.approx(spread[name])


@pytest.mark.parametrize(("p_end", "q_end", "mc_full", "mc", "rb", "rb_full"), [
    (0.5, 0.01, 2.562, 2.202, 5.847, 27.10),
    (0.2, 0.02, 2.726, 0.840, 1.791, 9.456),
])  # fmt: skip
def test_one_symbol_families_in_which_rao_blackwell_loses(p_end, q_end, mc_full, mc, rb, rb_full):
    """Theorem 5 as printed does not hold: with one symbol the token is the only news, and RB averages it out."""
    z = torch.tensor(math.log(p_end / (1 - p_end)), dtype=torch.float64, requires_grad=True)
    t = torch.arange(400).double()  # strings: so many symbols, then the end
    logp_end, logp_on = torch.nn.functional.logsigmoid(z), torch.nn.functional.logsigmoid(-z)
    logq_end, logq_on = math.log(q_end), math.log1p(-q_end)
    divergence = logp_end.exp() * (logp_end - logq_end) + logp_on.exp() * (logp_on - logq_on)
    (slope,) = torch.autograd.grad(divergence, z, retain_graph=True)
    d, u_end, u_on = (float(x.detach()) for x in (divergence, logp_end - logq_end, logp_on - logq_on))
    law = (logp_end + t * logp_on).exp().detach()
    s_end, s_on = 1 - p_end, -p_end
    score = s_end + t * s_on
    gradients = {
        "mc_full": (mc_full, (u_end + t * u_on) * score),
        "mc": (mc, s_end * u_end + s_on * (t * u_end + t * (t + 1) / 2 * u_on)),
        "rb": (rb, (t + 1) * float(slope) + s_on * d * t * (t + 1) / 2),
        "rb_full": (rb_full, (t + 1) * float(slope) + (t + 1) * d * score),
    }
    exact = -math.log((1 - p_end) / (1 - q_end)) * (1 - p_end) / p_end
    if p_end == 0.5:
        assert exact == pytest.approx(0.683097, abs=5e-7)
    for expected, found in gradients.values():
        mean = float(law @ found)
        assert mean == pytest.approx(exact, rel=1e-9)
        assert float(law @ found.square()) - mean**2 == pytest.approx(expected, rel=5e-4)


@pytest.mark.parametrize("estimator", ["rb", "mc", "hybrid"])
@pytest.mark.parametrize("off_policy", [False, True])
def test_baselines_change_no_expectation(estimator, off_policy):
    critic = torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = surrogate(off_policy, estimator=estimator, baseline=critic)
    assert error(loss, off_policy=off_policy) < 1e-9


@pytest.mark.parametrize("estimator", ["rb", "mc", "hybrid"])
@pytest.mark.parametrize("off_policy", [False, True])
def test_the_mean_over_the_prompts_other_strings_is_a_baseline(estimator, off_policy):
    toy = Toy.make(3, 3, distance=2.0)
    group = torch.zeros(2, dtype=torch.long)
    with_it = check_gradient(
        surrogate(off_policy, estimator=estimator, group=group), strings=2, off_policy=off_policy, toy=toy
    )
    assert with_it.agreement["kl"].relative_error < 1e-9


def test_strings_of_other_prompts_are_no_baseline():
    toy = Toy.make(3, 3)
    batch = toy.batch(torch.tensor([3, 9]))
    apart = kl_surrogate(rows(batch), batch.logp, batch.logq, batch.mask, group=torch.tensor([4, 7]))
    alone = kl_surrogate(rows(batch), batch.logp, batch.logq, batch.mask)
    assert torch.equal(apart.loss, alone.loss)


@pytest.mark.parametrize("share", [-0.5, 0.3, 1.0])
def test_any_fixed_mixture_with_monte_carlo_is_unbiased(share):
    assert error(surrogate(mc_share=share)) < 1e-9


def test_the_best_share_is_worse_than_neither():
    toy = Toy.make(3, 3, distance=1.5)
    law = toy.law(toy.policy.detach().log_softmax(-1))
    one = {
        name: torch.stack(
            [toy.gradient(surrogate(estimator=name)(toy.batch(torch.tensor([i])))).flatten() for i in range(len(law))]
        )
        for name in ("rb", "mc")
    }
    drawn = torch.multinomial(law, 4000, replacement=True, generator=torch.Generator().manual_seed(0))
    shares = best_share(one["rb"][drawn], one["mc"][drawn], torch.arange(4000) % 2)
    centred = {name: g - (law[:, None] * g).sum(0) for name, g in one.items()}
    exact = (law[:, None] * centred["rb"] * (centred["rb"] - centred["mc"])).sum()
    exact /= (law[:, None] * (centred["rb"] - centred["mc"]).square()).sum()
    torch.testing.assert_close(shares, exact.expand(2), rtol=0, atol=0.1)
    best = check_gradient(surrogate(mc_share=float(exact)), toy=toy).variance
    assert best <= check_gradient(surrogate(), toy=toy).variance
    assert best <= check_gradient(surrogate(estimator="mc"), toy=toy).variance


def test_discounts_run_from_local_to_right():
    assert check_gradient(surrogate(gamma=0.0)).target == "token_local"
    errors = [error(surrogate(gamma=gamma)) for gamma in (0.0, 0.5, 0.9, 1.0)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9
    toy = Toy.make()
    batch = toy.batch(torch.tensor([40]))
    found = kl_surrogate(rows(batch), batch.logp, batch.logq, batch.mask, gamma=0.5)
    assert not found.unbiased
    assert "discounted by 0.5" in found.objective


def test_caps_are_said_and_weights_counted():
    toy = Toy.make(drift=1.0)
    batch = toy.batch(torch.arange(len(toy.token)), off_policy=True)
    whole = kl_surrogate(rows(batch), batch.logp, batch.logq, batch.mask, sampler_logp=batch.old)
    assert whole.unbiased
    assert whole.effective_samples[0] == pytest.approx(len(toy.token))
    w = (batch.logp - batch.old).detach()[:, 0].exp() * batch.mask[:, 1]
    assert whole.effective_samples[1] == pytest.approx(float(w.sum() ** 2 / w.square().sum()))
    capped = kl_surrogate(rows(batch), batch.logp, batch.logq, batch.mask, sampler_logp=batch.old, cap=1.0)
    assert not capped.unbiased
    assert "capped at 1" in capped.objective
    assert capped.effective_samples[1] > whole.effective_samples[1]


def test_the_value_is_the_divergence():
    toy = Toy.make()
    law = toy.law(toy.policy.detach().log_softmax(-1))
    report = check_gradient(surrogate(), toy=toy)
    batch = toy.batch(torch.arange(len(law)))
    assert float(law @ kl_surrogate(rows(batch), batch.logp, batch.logq, batch.mask).value) == pytest.approx(report.kl)
    old = toy.law(toy.old)
    batch = toy.batch(torch.arange(len(law)), off_policy=True)
    found = kl_surrogate(rows(batch), batch.logp, batch.logq, batch.mask, sampler_logp=batch.old)
    assert float(old @ found.value) == pytest.approx(report.kl)


def test_from_the_fused_rows():
    """Logits in, through the closed-form gradients: the same as through plain automatic differentiation."""
    toy = Toy.make()
    strings = torch.tensor([0, 7, 100, 200])
    batch = toy.batch(strings)
    plain = toy.gradient(kl_surrogate(rows(batch), batch.logp, batch.logq, batch.mask).loss)
    logits, reference = toy.policy[toy.prefix[strings]], toy.reference[toy.prefix[strings]]
    found = divergences(logits, reference, toy.token[strings])
    fused = toy.gradient(kl_surrogate(found.kl, found.logp, found.logq, batch.mask).loss)
    torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-12)


def test_masks_have_holes_and_padding_holds_anything():
    toy = Toy.make()
    batch = toy.batch(torch.tensor([50, 120]))
    mask = batch.mask.clone()
    mask[0, 1] = False  # a token that a tool wrote: no divergence, no score, and no break in what comes after
    kl, logp, logq = rows(batch), batch.logp, batch.logq
    junk = torch.where(mask, 0.0, torch.nan)
    one = kl_surrogate(kl, logp, logq, mask).loss
    other = kl_surrogate(kl + junk, logp + junk, logq + junk, mask).loss
    assert float(one) == float(other)
    assert torch.equal(toy.gradient(one), toy.gradient(other))
    expected = sum(
        float((kl[i, n] + logp[i, n] * kl[i, n + 1 :].masked_fill(~mask[i, n + 1 :], 0.0).sum()).detach())
        for i in range(2)
        for n in range(4)
        if mask[i, n]
    )
    assert float(one) == pytest.approx(expected / 2)


@pytest.mark.parametrize(("options", "message"), [
    ({"estimator": "k3"}, "expected an estimator among rb, mc"),
    ({"gamma": 1.5}, "from 0 to 1, got 1.5"),
    ({"estimator": "token_local", "gamma": 0.5}, "use rb, mc or hybrid"),
    ({"cap": 2.0}, "positive cap with sampler_logp"),
    ({"estimator": "mc", "mc_share": 0.5}, "mc_share with rb only"),
    ({"baseline": torch.zeros(1, 2), "group": torch.zeros(1, dtype=torch.long)}, "got both"),
])  # fmt: skip
def test_options_that_do_not_go_together(options, message):
    zeros = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=message):
        kl_surrogate(zeros, zeros, zeros, torch.ones(1, 2, dtype=torch.bool), **options)


def test_an_infinite_divergence_is_refused():
    zeros = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="finite kl at every decision"):
        kl_surrogate(torch.tensor([[0.0, math.inf]]), zeros, zeros, torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least two folds"):
        best_share(zeros, zeros, torch.zeros(1, dtype=torch.long))
