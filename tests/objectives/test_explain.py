"""What KL penalties optimise: their losses, their formulas, and parts that do not go together."""

import pytest
import torch

from klkit.objectives.explain import SLOPES, TERMS, WEIGHTED_SLOPES, Penalty, explain
from klkit.objectives.policy import kl_surrogate
from klkit.objectives.toy import Toy


@pytest.mark.parametrize(("penalty", "loss", "gradient"), [
    (Penalty("full", "rb"), "Σ_n [D_n + sg(Σ_{j>n} D_j) log p(y_n)]", "Σ_n [∇D_n + s_n Σ_{j>n} D_j]"),
    (Penalty("full", "rb", "prefix"), "Σ_n [sg(w_n) D_n + sg(Σ_{j>n} w_j D_j) log p(y_n)]",
     "Σ_n [w_n ∇D_n + s_n Σ_{j>n} w_j D_j]"),
    (Penalty("full", "rb", "token"), "Σ_n [D_n + sg(Σ_{j>n} D_j) r_n]", "Σ_n [∇D_n + r_n s_n Σ_{j>n} D_j]"),
    (Penalty("k3", "loss", "token"), "Σ_n r_n (exp(−u_n) − 1 + u_n)", "Σ_n r_n u_n s_n"),
    (Penalty("k3", "loss"), "Σ_n (exp(−u_n) − 1 + u_n)", "Σ_n (1 − exp(−u_n)) s_n"),
    (Penalty("k2", "loss", "token_detached"), "Σ_n sg(r_n) (½ u_n²)", "Σ_n r_n u_n s_n"),
    (Penalty("k2", "loss", "prefix"), "Σ_n w_n (½ u_n²)", "Σ_n w_n [u_n s_n + (½ u_n²) Σ_{i<n} s_i]"),
    (Penalty("k1", "reward"), "sg(Σ_j u_j) Σ_n log p(y_n)", "(Σ_j u_j) Σ_n s_n"),
    (Penalty("k1", "reward_to_go", "token"), "Σ_n sg(Σ_{j≥n} r_j u_j) log p(y_n)", "Σ_n s_n Σ_{j≥n} r_j u_j"),
    (Penalty("full", "reward", detach=False), "sg(Σ_j D_j) Σ_n log p(y_n) + Σ_n D_n",
     "(Σ_j D_j) Σ_n s_n + Σ_n ∇D_n"),
    (Penalty("k1", "advantage", "token"), "Σ_n sg(r_n u_n) log p(y_n)", "Σ_n r_n u_n s_n"),
    (Penalty("k3", "loss", "token", gradient="k2"), "Σ_n r_n (exp(−u_n) − 1 + u_n), with the gradient of ½ u_n²",
     "Σ_n r_n (u_n s_n + (exp(−u_n) − 1 + u_n) s_n)"),
    (Penalty("full", "loss", normalise="length"), "Σ_n D_n, all divided by the response's length",
     "Σ_n ∇D_n, all divided by the response's length"),
])  # fmt: skip
def test_formulas(penalty, loss, gradient):
    assert penalty.formula == f"L = {loss}"
    assert penalty.slope == f"∇L = {gradient}"
    assert set(penalty.symbols) == {x for x in ("u_n", "D_n", "s_n", "r_n", "w_n", "sg") if x in loss + gradient} | {
        x.replace("_j", "_n") for x in ("u_j", "D_j", "r_j", "w_j") if x in loss + gradient
    }


def evaluated(formula, u, r):
    """A coefficient of ``s_n`` as printed, as a number."""
    code = formula.removesuffix("s_n").replace("½", "0.5 *").replace("−", "-").replace("²", "**2")
    code = code.replace("|u_n|", "abs(u_n)").strip().replace("r_n (", "r_n * (").replace("r_n u", "r_n * u")
    names = {"u_n": u, "r_n": r, "exp": torch.exp, "sign": torch.sign, "abs": torch.abs}
    return eval(code or "1.0", {}, names)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_the_slopes_that_formulas_print_are_those_of_the_terms(estimator):
    batch = Toy.make().batch(torch.tensor([40, 90]), off_policy=True)
    u, ratio = (batch.logp - batch.logq).detach(), (batch.logp - batch.old).exp()
    for weight, printed in ((torch.ones_like(u), SLOPES), (ratio, WEIGHTED_SLOPES)):
        term = (weight * TERMS[estimator][1](batch)).masked_fill(~batch.mask, 0.0).sum()
        (wanted,) = torch.autograd.grad(term, batch.logp, retain_graph=True)
        found = torch.ones_like(u) * evaluated(printed[estimator], u, ratio.detach())
        torch.testing.assert_close(found[batch.mask], wanted[batch.mask], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("off_policy", [False, True])
def test_rb_as_a_penalty_is_kl_surrogate(off_policy):
    toy = Toy.make()
    batch = toy.batch(torch.tensor([7, 100, 200]), off_policy=off_policy)
    plain = kl_surrogate(
        TERMS["full"][1](batch), batch.logp, batch.logq, batch.mask, sampler_logp=batch.old if off_policy else None
    ).loss
    found = Penalty("full", "rb", "prefix" if off_policy else "none")(batch)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(toy.gradient(found), toy.gradient(plain))


def test_dividing_by_the_length_is_another_objective():
    assert explain(Penalty("full", "loss")).target == "token_local"
    assert explain(Penalty("full", "loss", normalise="length")).target is None
    assert explain(Penalty("full", "rb", normalise="length")).target is None


@pytest.mark.parametrize(("options", "message"), [
    ({"estimator": "k4"}, "expected estimator to be one of k1, k2, k3, abs, full, got 'k4'"),
    ({"estimator": "k1", "placement": "rb"}, "the estimator full with the placement rb"),
    ({"estimator": "full", "placement": "rb", "weight": "token_detached"}, "weight none, token or prefix"),
    ({"detach": False}, "detach=False with the placement reward only"),
    ({"placement": "reward", "gradient": "k2"}, "straight-through gradient in the loss only"),
])  # fmt: skip
def test_parts_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        Penalty(**options)
