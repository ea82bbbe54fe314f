"""The self-audit: passes on correct pipelines whatever their laws, fails on planted faults."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import bank
import tiny
from klkit import rng
from klkit.divergences.fused import row_statistics
from klkit.estimators.audit import Audit, audit, standardised, tail_bound
from klkit.estimators.evidence import Deviation
from klkit.estimators.statistics import TokenStatistics, collect, score
from klkit.models.automaton import Automaton, memoryless, random_automaton
from klkit.models.base import LanguageModel
from klkit.models.spec import load
from klkit.models.wrap import restrict, temperature, top_k, top_p
from klkit.sampling.ancestral import sample
from klkit.sampling.importance import from_policy
from klkit.sequences import Sequences


def machine(name: str, *, symbols: int = 30, spread: float = 1.5) -> Automaton:
    return random_automaton(6, symbols, generator=rng.stream(0, "audit", name), spread=spread, name=name)


def draw(model: LanguageModel, n: int = 250, *, seed: int = 0, max_tokens: int = 40) -> Sequences:
    return sample(model, [model.context(None)] * n, max_tokens=max_tokens, seed=seed, prompt=[0] * n).sequences


P, Q = machine("p"), machine("q")
RIGHT = draw(P)


def failing(outcome: Audit) -> set[str]:
    return {check.name for check in outcome.checks if check.verdict == "fail"}


def test_a_correct_run_passes_every_check():
    outcome = audit(score(P, Q, RIGHT), pieces=P.pieces)
    assert outcome.passed
    assert {check.name: check.verdict for check in outcome.checks if check.verdict != "pass"} in (
        {},
        {"truncated_share": "warn"},
    )
    assert [check.name for check in outcome.checks][:4] == [
        "not_a_number",
        "impossible_tokens",
        "log_ratio_z",
        "surprisal_z",
    ]
    assert abs(outcome["surprisal_z"].value) < 3


@pytest.mark.parametrize("spread", [0.3, 2.0, 5.0])
def test_two_hundred_seeds_pass_however_skewed_the_laws(spread):
    """Small runs of ever more deterministic models, where a normal approximation would be at its worst."""
    scores = []
    for seed in range(67):
        p, q = (
            random_automaton(4, 8, generator=rng.stream(seed, "skew", side), spread=spread, name=side) for side in "pq"
        )
        outcome = audit(score(p, q, draw(p, 10, seed=seed, max_tokens=8)))
        assert outcome.passed, outcome
        scores.append((outcome["log_ratio_z"].value, outcome["surprisal_z"].value))
    assert np.std(scores, axis=0) == pytest.approx(np.ones(2), abs=0.35)


def test_no_difference_at_all_is_questioned_with_what_is_known():
    again = replace(P, name="again")
    found = score(P, again, RIGHT)
    check = audit(found)["no_difference_share"]
    assert (check.verdict, check.value) == ("warn", 1.0)
    assert check.advice.endswith("Are these the same weights? Is the adapter loaded and active?")
    check = audit(found, alike="The weights are equal.")["no_difference_share"]
    assert check.advice == "No decision differs by more than rounding. The weights are equal."
    assert audit(found, same=True, alike="The weights are equal.")["no_difference_share"].verdict == "pass"
    assert audit(score(P, Q, RIGHT), alike="The weights are equal.")["no_difference_share"].verdict == "pass"


def test_one_rare_token_in_a_short_run_is_bad_luck_and_not_a_failure():
    p, q = memoryless([1 - 1e-7, 1e-7], end=0.5), memoryless([0.9, 0.1], end=0.5)
    unlucky = Sequences.pack([p.context(None)] * 3, [torch.tensor(t) for t in ([0, 2], [1, 2], [0, 2])])
    outcome = audit(score(p, q, unlucky))
    assert outcome.passed
    assert outcome["surprisal_z"].value > 1000
    assert outcome["surprisal_z"].verdict == "warn"
    # Three of them in three strings are no luck at all.
    cursed = Sequences.pack([p.context(None)] * 3, [torch.tensor([1, 2])] * 3)
    assert not audit(score(p, q, cursed)).passed


def test_the_bound_holds_for_tails_of_any_weight():
    """Martingale differences that are almost always tiny and rarely huge, judged at a level that can be simulated."""
    generator = rng.numpy_stream(0, "tails")
    for chance in (0.5, 0.01, 0.001):
        hits = generator.random((4000, 200)) < chance
        x = np.where(hits, 1 - chance, -chance)
        total, square, variance = x.sum(1), (x**2).sum(1), 200 * chance * (1 - chance)
        exceed = np.mean([abs(t) > tail_bound(s, variance, 0.05) for t, s in zip(total, square, strict=True)])
        assert exceed <= 0.05
    normal = abs(np.random.default_rng(0).normal(size=4000)) * math.sqrt(200)
    assert np.mean(normal > 5 * math.sqrt(200)) == 0
    assert 6 < tail_bound(200.0, 200.0, 1e-6 / 3) / math.sqrt(200) < 6.6
    # Free of scale over many decades.
    for scale in (1e-8, 1e-4, 1.0, 1e5):
        assert tail_bound(scale, scale, 1e-6) / math.sqrt(scale) < 6.7


@pytest.mark.parametrize(
    ("fault", "model"),
    [
        ("temperature 0.9", temperature(P, 0.9)),
        ("temperature 1.1", temperature(P, 1.1)),
        ("top-p 0.95", top_p(P, 0.95)),
        ("top-k 20", top_k(P, 20)),
        ("other model", Q),
    ],
)
def test_strings_of_another_law_passed_off_as_those_of_p(fault, model):
    x = draw(model, 500)
    assert failing(audit(score(P, Q, x))) & {"log_ratio_z", "surprisal_z"}, fault
    assert audit(score(model, machine("third"), x)).passed  # declared for what they are, they are right


def test_rows_shifted_by_one_against_their_tokens():
    hidden = P.encode(RIGHT)
    statistics = collect(P, hidden.roll(1, 0), Q, Q.encode(RIGHT).roll(1, 0), RIGHT)
    assert failing(audit(statistics)) >= {"log_ratio_z", "surprisal_z"}


def test_padding_on_the_wrong_side_read_as_text():
    p, q = machine("p", symbols=5), machine("q", symbols=5)
    x = draw(p)
    assert audit(score(p, q, x)).passed
    tokens = x.tokens.clone()
    for i, stop in enumerate(x.stop.tolist()):  # tokens to the right, offsets as if they were to the left
        tokens[i] = tokens[i].roll(tokens.shape[1] - stop)
    assert failing(audit(score(p, q, replace(x, tokens=tokens)))) >= {"surprisal_z"}


def test_p_and_q_swapped():
    outcome = audit(score(Q, P, RIGHT))
    assert "likelihood_ratio" in failing(outcome)
    assert "swapped" in outcome["likelihood_ratio"].advice


def test_tokens_that_p_cannot_have_drawn():
    p = restrict(P, [0, 1, 2, 3, 30])
    assert "impossible_tokens" in failing(audit(score(p, Q, RIGHT)))


def test_a_given_text_is_exempt_from_what_only_draws_can_answer():
    x = draw(Q)
    outcome = audit(score(P, machine("third"), x), given=True)
    assert outcome.passed
    assert "given" in outcome.exempt
    assert not {"log_ratio_z", "surprisal_z", "likelihood_ratio", "truncated_share"} & {c.name for c in outcome.checks}
    assert audit(score(restrict(P, [0, 30]), Q, x), given=True)["impossible_tokens"].verdict == "warn"


def test_strings_of_a_declared_other_law_are_exempt_and_told_what_they_are_worth():
    far, near = machine("q"), temperature(P, 1.02)
    outcomes = [
        audit(score(P, Q, from_policy(mu, [mu.context(None)] * 200, max_tokens=40, seed=0))) for mu in (far, near)
    ]
    assert all(outcome.passed and "another law" in outcome.exempt for outcome in outcomes)
    assert [outcome["effective_share"].verdict for outcome in outcomes] == ["warn", "pass"]


def test_exact_zeros_are_reported_unless_meant():
    statistics = score(P, P, RIGHT)
    assert audit(statistics)["no_difference_share"].verdict == "warn"
    assert "adapter" in audit(statistics)["no_difference_share"].advice
    assert audit(statistics, same=True)["no_difference_share"].verdict == "pass"
    assert audit(statistics).passed
    assert audit(statistics)["log_ratio_z"].value == 0


def test_infinite_decisions_name_their_tokens():
    p, q = bank.INFINITE.p, bank.INFINITE.q
    check = audit(score(p, q, draw(p)), pieces=p.pieces)["infinite_decisions"]
    assert check.verdict == "warn"
    assert "'b'" in check.advice
    assert "0.38 on average" in check.advice
    assert audit(score(p, q, draw(p))).passed


def test_cut_strings_are_reported():
    outcome = audit(score(P, Q, draw(P, 50, max_tokens=2)))
    assert (outcome["truncated_share"].verdict, outcome.passed) == ("warn", True)


def test_numbers_that_are_none_fail():
    statistics = score(P, Q, RIGHT)
    logq, kl = statistics.rows.logq.clone(), statistics.rows.kl.clone()
    logq[3] = kl[3] = torch.nan
    outcome = audit(replace(statistics, rows=replace(statistics.rows, logq=logq, kl=kl)))
    assert failing(outcome) == {"not_a_number"}
    assert outcome["not_a_number"].value == 1


@pytest.mark.parametrize("shift", [0.0, 1e-7])
def test_rounding_alone_never_fails(shift):
    """q is p up to the last place of single precision, at random or always to one side, at very many decisions."""
    m, v = 20_000, 50
    generator = rng.stream(0, "rounding")
    logits = 3 * torch.randn(m, v, generator=generator)
    logp = logits.log_softmax(-1)
    noise = 1e-7 * torch.randn(m, v, generator=generator)
    logq = logp + shift if shift else (logits * (1 + noise)).log_softmax(-1)
    drawn = torch.multinomial(logp.exp(), 1, generator=generator)[:, 0]
    x = Sequences.pack([torch.tensor([0])] * 200, list(drawn.view(200, -1)))
    rows = row_statistics(logp, logq, x.targets(), ends=(0,))
    statistics = TokenStatistics(x, rows, features=torch.zeros(m, 0))
    assert rows.logp.dtype == torch.float32
    assert audit(statistics).passed


def test_without_variance_any_difference_fails():
    assert standardised("x", Deviation(), 3e-15, "Nothing").verdict == "pass"
    assert standardised("x", Deviation(total=0.3, squares=0.03), 3e-15, "Something").verdict == "fail"


def test_it_is_plain_json():
    record = audit(score(P, Q, RIGHT)).to_dict()
    assert record["passed"] is True
    assert set(record["checks"]["surprisal_z"]) == {"value", "threshold", "verdict", "advice"}


# A neural model: padding, cache and read-out of the real code path.


@pytest.fixture(scope="module")
def pair() -> tuple[LanguageModel, LanguageModel]:
    return load(str(tiny.folder("gpt2"))), load(str(tiny.folder("gpt2", seed=1)))


@pytest.fixture(scope="module")
def responses(pair) -> Sequences:
    return draw(pair[0], 100, max_tokens=24)


def test_a_neural_model_passes_on_its_own_strings(pair, responses):
    assert audit(score(*pair, responses)).passed


@pytest.mark.parametrize("fault", ["temperature", "other weights", "padding"])
def test_a_neural_model_fails_on_planted_faults(pair, responses, fault):
    p, q = pair
    if fault == "temperature":
        statistics = score(p, q, draw(temperature(p, 0.9), 150, max_tokens=24))
    elif fault == "other weights":
        statistics = score(q, load(str(tiny.folder("gpt2", seed=2))), responses)
    else:
        shifted = replace(responses, tokens=responses.tokens.roll(1, 1), stop=responses.stop.clamp(max=25))
        statistics = score(p, q, shifted)
    assert not audit(statistics).passed
