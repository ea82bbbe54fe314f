"""Where q excludes what p says: infinite is infinite, counted, named, and never clamped."""

import json
import math

import pytest
import torch
from tests.bank import INFINITE, SAME_MASK

import klkit
from klkit.divergences.fused import row_statistics
from klkit.models.automaton import automaton, memoryless
from klkit.models.wrap import top_k, top_p

FEW = {"samples": 40, "max_tokens": 40, "floor": "none"}
P = memoryless([0.5, 0.3, 0.2], end=0.25, name="p")
Q = memoryless([0.4, 0.35, 0.25], end=0.25, name="q")


def warning(result, name="infinite_decisions"):
    check = result.audit["checks"][name]
    assert check["verdict"] == "warn"
    return check["advice"]


def test_what_p_never_says_contributes_nothing():
    # p(v) = 0: the term is 0, also where q excludes v as well, and where 0 · (−inf) would be NaN.
    p = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).log()
    q = torch.tensor([[0.25, 0.5, 0.25, 0.0]]).log()
    rows = row_statistics(p, q, torch.tensor([0]), (1,))
    assert float(rows.kl) == pytest.approx(0.5 * math.log(2), rel=1e-6)
    assert float(rows.lost) == 0
    result = klkit.estimate(SAME_MASK.p, SAME_MASK.q, **FEW)
    assert math.isfinite(result.headline.value)
    assert result.headline.infinite == 0
    assert result.audit["checks"]["infinite_decisions"]["advice"] == "q allows whatever p does."


def test_what_only_q_excludes_is_infinite_counted_and_named():
    # q(v) = 0 where p(v) > 0: inf, how many decisions of how many, p's mass on them, and the token.
    result = klkit.estimate(INFINITE.p, INFINITE.q, **FEW)
    decisions = result.headline.infinite
    assert result.headline.value == math.inf
    assert all(e.value == math.inf for e in result.estimates)
    assert "KL(p‖q) = inf nats per response" in result.sentence
    assert warning(result) == (
        f"KL(p‖q) is infinite: at {decisions} of {decisions} decisions q excludes tokens to which p gives 0.38 on "
        f"average, most often 'b'; compare unprocessed models, or use the Jensen-Shannon divergence."
    )
    record = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert record["headline"]["value"] == "inf"
    assert record["infinite"] == decisions


def test_the_finite_part_has_a_name_of_its_own():
    # Two states: q allows all in the first and lacks a symbol in the second.
    moves = torch.tensor([[0, 1], [0, 1]])
    p = automaton(torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.3, 0.3]], dtype=torch.float64), moves, name="p")
    q = automaton(torch.tensor([[0.25, 0.5, 0.25], [0.0, 0.5, 0.5]], dtype=torch.float64), moves, name="q")
    result = klkit.estimate(p, q, **FEW)
    finite = result.companions["kl_of_finite_decisions"]
    first = 0.5 * math.log(2) + 0.3 * math.log(0.6) + 0.2 * math.log(0.8)
    assert result.headline.value == math.inf
    assert finite["value"] == pytest.approx(first, rel=1e-12)
    assert 0 < finite["share"] < 1
    assert finite["share"] == pytest.approx(1 - result.headline.infinite / sum(result.estimates[-1].weights))
    assert result.lines["finite part"] == (
        f"{first:.4g} nats per token at the {finite['share']:.1%} of decisions at which it is finite: not the "
        f"divergence, which is infinite"
    )


@pytest.mark.parametrize("q", [INFINITE.q, memoryless([0.4, 0.6], end=0.25, name="q")])
def test_no_finite_part_where_all_is_finite_or_nothing_is(q):
    result = klkit.estimate(INFINITE.p, q, **FEW)
    assert "kl_of_finite_decisions" not in result.companions
    assert "finite part" not in result.lines


def test_an_excluded_token_is_seen_without_being_drawn():
    # Monte Carlo is infinite only where the token is drawn; Rao-Blackwell sees it at every decision.
    p = memoryless([1 - 1e-7, 1e-7], end=0.25, name="p")
    q = memoryless([1.0, 0.0], end=0.25, name="q")
    result = klkit.estimate(p, q, method="mc", **FEW)
    values = {e.method: e.value for e in result.estimates if e.estimand == "S"}
    assert values["rb"] == values["rb_cv"] == math.inf
    assert math.isfinite(values["mc"])
    assert any("this number is finite only because no such token was drawn" in note for note in result.notes)
    assert "KL(p‖q) is infinite" in warning(result)


def test_monte_carlo_is_infinite_where_the_token_is_drawn():
    result = klkit.estimate(INFINITE.p, INFINITE.q, method="mc", **FEW)
    assert result.headline.method == "mc"
    assert result.headline.value == math.inf


@pytest.mark.parametrize(("q", "lost"), [(top_k(Q, 2), "0.4"), (top_p(Q, 0.5), "0.4")])
def test_a_truncated_q_is_infinite_with_the_mass_it_loses(q, lost):
    # top-k or top-p on q: p's mass outside is reported, and a divergence that stays finite is offered.
    result = klkit.estimate(P, q, **FEW)
    assert result.headline.value == math.inf
    assert f"q excludes tokens to which p gives {lost} on average" in warning(result)
    assert warning(result).endswith("or use the Jensen-Shannon divergence.")
    assert q.name in result.sentence
    finite = klkit.estimate(P, q, divergence="js", **FEW)
    assert 0 < finite.headline.value <= math.log(2)


def test_a_truncation_in_a_specification_is_infinite_too(run):
    code, out, err = run(
        "estimate", "klkit:docs", "klkit:docs,top_k=5", "--samples", "4", "--max-tokens", "2", "--json", "-"
    )
    assert code == 0, err
    record = json.loads(out)
    assert record["headline"]["value"] == "inf"
    assert "KL(p‖q) is infinite" in record["audit"]["checks"]["infinite_decisions"]["advice"]
    assert "klkit:docs,top_k=5" in record["sentence"]


def test_a_truncated_p_against_raw_q_is_finite_and_named():
    # Processed p, raw q: fine, and the sentence says of which law.
    result = klkit.estimate(top_k(P, 2), Q, **FEW)
    assert math.isfinite(result.headline.value)
    assert result.headline.infinite == 0
    assert "p = p|top_k=2, q = q" in result.sentence
    # Its reverse at p's contexts is infinite, and says so, without touching the headline.
    assert result.companions["reverse_kl_at_p"]["value"] == "inf"


def test_a_reverse_run_names_its_own_direction():
    result = klkit.estimate(top_k(Q, 2), P, divergence="reverse_kl", **FEW)
    assert result.headline.value == math.inf
    assert warning(result).startswith("KL(q‖p) is infinite: at")
    assert "p excludes tokens to which q gives" in warning(result)


def test_an_infinite_divergence_fails_any_gate():
    from klkit.api.gate import gate

    assert gate(klkit.estimate(INFINITE.p, INFINITE.q, **FEW), 1e6).verdict == "fail"
