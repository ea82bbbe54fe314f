"""Exact answers against printed values, closed forms, enumeration, and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import bank
from enumeration import per_string, scores, strings
from klkit import rng
from klkit.estimators.exact import SUMS, ExactDivergence, exact, exact_by_position, exact_gradient
from klkit.estimators.product import LinearSystem, couple
from klkit.models.automaton import Automaton, automaton, coin, memoryless, random_automaton
from klkit.models.base import LanguageModel, NotTractable, VocabularyMismatch
from klkit.models.wrap import extend, restrict, temperature, top_k, top_p


def enumerated(p: LanguageModel, q: LanguageModel, max_tokens: int) -> tuple[Tensor, Tensor, float]:
    """Mean and covariance of SUMS by brute force, and the share of strings that were cut."""
    law = strings(p, max_tokens)
    (logp, rows_p), (logq, rows_q) = scores(p, law.x), scores(q, law.x)
    prob = rows_p.exp()
    safe_p, safe_q = rows_p.masked_fill(prob == 0, 0.0), rows_q.masked_fill(prob == 0, 0.0)
    ends = list(p.vocabulary.ends)
    ended = torch.isin(law.x.targets(), torch.tensor(ends)).double()
    decisions = [
        logp - logq,
        (prob * (safe_p - safe_q)).sum(-1),
        torch.ones_like(logp),
        -logp,
        -(prob * safe_p).sum(-1),
        (1 - ended) - (1 - prob[:, ends].sum(-1)),
    ]
    sums = [per_string(law.x, values) for values in decisions]
    mean = torch.tensor([law.mean(total) for total in sums], dtype=torch.float64)
    covariance = torch.tensor([[law.covariance(a, b) for b in sums] for a in sums], dtype=torch.float64)
    return mean, covariance, law.mean((~law.x.finished).double())


def assert_agrees(answer: ExactDivergence, p: LanguageModel, q: LanguageModel, max_tokens: int) -> None:
    mean, covariance, truncated = enumerated(p, q, max_tokens)
    torch.testing.assert_close(answer.mean, mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(answer.covariance, covariance, rtol=1e-8, atol=1e-8)
    assert answer.truncated == pytest.approx(truncated, abs=1e-12)


@pytest.mark.parametrize("problem", bank.KNOWN, ids=lambda problem: problem.name)
def test_known_answers(problem: bank.Problem) -> None:
    answer = exact(problem.p, problem.q)
    within = 0.51 * 10.0**-problem.digits
    assert answer.value == pytest.approx(problem.kl, abs=min(within, 1e-6))
    assert answer.variance_mc == pytest.approx(problem.variance_mc, abs=within)
    assert answer.variance_rb == pytest.approx(problem.variance_rb, abs=within)
    assert answer.alpha == pytest.approx(problem.alpha, abs=within)
    assert answer.variance_combined == pytest.approx(problem.variance_combined, abs=within)


@pytest.mark.parametrize(("end_p", "end_q"), [(0.5, 0.01), (0.2, 0.02), (0.05, 0.005), (0.5, 0.25), (1e-6, 1e-5)])
def test_coins_to_full_precision(end_p: float, end_q: float) -> None:
    known = bank.memoryless_problem("coin", [1.0], [1.0], end_p, end_q)
    answer = exact(known.p, known.q)
    assert answer.value == pytest.approx(known.kl, rel=1e-9)
    assert answer.variance_mc == pytest.approx(known.variance_mc, rel=1e-8)
    assert answer.variance_rb == pytest.approx(known.variance_rb, rel=1e-8)
    assert answer.decisions == pytest.approx(1 / end_p, rel=1e-10)
    assert answer.moment("decisions", "decisions") == pytest.approx((1 - end_p) / end_p**2, rel=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_whole_strings_match_enumeration(seed: int) -> None:
    p, q = bank.short_pair(seed)
    answer = exact(p, q)
    assert_agrees(answer, p, q, max_tokens=4)
    limited = exact(p, q, max_tokens=9)
    torch.testing.assert_close(limited.covariance, answer.covariance, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
@pytest.mark.parametrize("seed", range(3))
def test_cut_strings_match_enumeration(seed: int, max_tokens: int) -> None:
    p, q = bank.random_pair(seed)
    assert_agrees(exact(p, q, max_tokens=max_tokens), p, q, max_tokens)


def test_different_structures_and_impossible_tokens() -> None:
    for problem in (bank.A, bank.B, bank.SAME_MASK):
        assert_agrees(exact(problem.p, problem.q, max_tokens=6), problem.p, problem.q, max_tokens=6)


def test_whole_strings_are_the_limit_of_cut_ones() -> None:
    p, q = bank.random_pair(4)
    whole, cut = exact(p, q), exact(p, q, max_tokens=400)
    assert cut.truncated < 1e-15
    torch.testing.assert_close(cut.mean, whole.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cut.covariance, whole.covariance, rtol=1e-11, atol=1e-11)
    values = [exact(p, q, max_tokens=t).value for t in (1, 2, 4, 8, 16)]
    assert values == sorted(values)
    assert values[-1] < whole.value


@pytest.mark.parametrize("seed", range(4))
def test_second_moments_solve_their_own_recursion(seed: int) -> None:
    """Raw second moments (not variances) obey linear systems too: another route to the same numbers."""
    p, q = bank.random_pair(seed, states=4, symbols=3)
    answer = exact(p, q)
    chain = couple(p, q, prompt=None, max_tokens=None)
    system = LinearSystem(chain)
    d = (chain.p * chain.ratio).sum(-1)
    value = system.backward(d[:, None])[:, 0]
    later = torch.where(chain.moves, value[chain.after], 0.0)
    moved = (chain.p * later).sum(-1)
    crossed = (chain.p * chain.ratio * later).sum(-1)
    right = torch.stack(
        [(chain.p * chain.ratio**2).sum(-1) + 2 * crossed, d**2 + 2 * d * moved, d**2 + crossed + d * moved], -1
    )
    mc, rb, cross = (system.backward(right)[0] - value[0] ** 2).tolist()
    assert answer.value == pytest.approx(float(value[0]), rel=1e-12)
    assert answer.value == pytest.approx(float(system.visits() @ d), rel=1e-12)
    assert answer.variance_mc == pytest.approx(mc, rel=1e-9)
    assert answer.variance_rb == pytest.approx(rb, rel=1e-9)
    assert answer.moment("log_ratio", "kl") == pytest.approx(cross, rel=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_identities_of_martingales(seed: int) -> None:
    p, q = bank.random_pair(seed)
    answer = exact(p, q)
    assert float(answer.mean[SUMS.index("log_ratio")]) == answer.value
    assert float(answer.mean[SUMS.index("surprisal")]) == pytest.approx(answer.entropy, rel=1e-12)
    assert abs(float(answer.mean[SUMS.index("ending")])) < 1e-14
    # The number of symbols of a string is T − 1 when it ended: the end martingale and T share their noise.
    assert answer.variance_combined <= min(answer.variance_mc, answer.variance_rb) * (1 + 1e-12)
    by_position = exact_by_position(p, q)
    assert by_position.variance <= answer.variance_combined * (1 + 1e-12)


def test_rao_blackwell_can_lose() -> None:
    for problem in bank.RB_LOSES:
        answer = exact(problem.p, problem.q)
        assert answer.variance_rb > answer.variance_mc
    for problem in bank.RB_WINS:
        answer = exact(problem.p, problem.q)
        assert answer.variance_rb < answer.variance_mc


@pytest.mark.parametrize("seed", range(3))
def test_coefficients_by_position_match_enumeration(seed: int) -> None:
    """U regressed on the position-wise noise m_1 … m_H, all jointly: no orthogonality assumed."""
    p, q = bank.random_pair(seed)
    horizon = 5
    law = strings(p, horizon)
    (logp, rows_p), (logq, rows_q) = scores(p, law.x), scores(q, law.x)
    u = logp - logq
    noise = u - (rows_p.exp() * (rows_p - rows_q)).sum(-1)
    m = torch.zeros(len(law.x), horizon, dtype=torch.float64)
    m[law.x.row(), law.x.position()] = noise
    total = per_string(law.x, u)
    weight = law.probability[:, None]
    centred = m - (weight * m).sum(0)
    gram = centred.T @ (weight * centred)
    best = torch.linalg.solve(gram, centred.T @ (law.probability * (total - law.mean(total))))
    found = exact_by_position(p, q, max_tokens=horizon)
    torch.testing.assert_close(found.coefficients, best, rtol=1e-9, atol=1e-9)
    assert found.variance == pytest.approx(law.variance(total - m @ best), rel=1e-8)
    assert found.coefficients[-1] == pytest.approx(1.0)  # nothing follows the last decision


def test_positions_of_endless_strings() -> None:
    found = exact_by_position(bank.C1.p, bank.C1.q)
    assert len(found.coefficients) == 54  # survival halves each time: 2^-54 is the first below 1e-16
    # The remaining law never changes, so neither does the coefficient; and one coefficient suffices.
    torch.testing.assert_close(found.coefficients, torch.full((54,), found.coefficients[0].item(), dtype=torch.float64))
    assert float(found.coefficients[0]) == pytest.approx(exact(bank.C1.p, bank.C1.q).alpha, rel=1e-12)
    assert found.variance < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_gradient_matches_finite_differences(seed: int) -> None:
    p, q = bank.random_pair(seed, states=2, symbols=2)
    gradient = exact_gradient(p, q)
    step = 1e-5

    def shifted(i: int, a: int, by: float) -> float:
        logits = p.log_probabilities.clone()
        logits[i, a] += by
        return exact(automaton(logits.softmax(-1), p.transitions[:, :-1]), q).value

    numeric = torch.tensor(
        [[(shifted(i, a, step) - shifted(i, a, -step)) / (2 * step) for a in range(3)] for i in range(2)],
        dtype=torch.float64,
    )
    torch.testing.assert_close(gradient, numeric, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)


def test_gradient_of_a_coin_in_closed_form() -> None:
    for e, f in ((0.5, 0.01), (0.2, 0.02), (0.7, 0.9)):
        expected = -math.log((1 - e) / (1 - f)) * (1 - e) / e
        assert float(exact_gradient(coin(end=e), coin(end=f))[0, 1]) == pytest.approx(expected, rel=1e-12)


def test_infinite_divergence_stays_infinite() -> None:
    answer = exact(bank.INFINITE.p, bank.INFINITE.q)
    assert answer.value == math.inf
    assert answer.rate == math.inf
    assert math.isnan(answer.variance_mc)
    assert math.isnan(answer.variance_combined)
    assert answer.decisions == pytest.approx(4.0)
    assert answer.entropy == pytest.approx(exact(bank.INFINITE.p, bank.INFINITE.p).entropy)
    assert math.isfinite(exact(bank.INFINITE.q, bank.INFINITE.p).value)
    for call in (exact_by_position, exact_gradient):
        with pytest.raises(ValueError, match="finite"):
            call(bank.INFINITE.p, bank.INFINITE.q)


def test_exclusion_beyond_the_length_limit_does_not_count() -> None:
    """After one symbol q excludes ``b``; a limit of one decision never gets there."""
    table = torch.tensor([[0.25, 0.25, 0.5], [0.25, 0.25, 0.5]], dtype=torch.float64)
    strict = torch.tensor([[0.25, 0.25, 0.5], [0.5, 0.0, 0.5]], dtype=torch.float64)
    moves = torch.tensor([[1, 1], [1, 1]])
    p, q = automaton(table, moves), automaton(strict, moves)
    assert exact(p, q, max_tokens=1).value == 0.0
    assert exact(p, q, max_tokens=2).value == math.inf


def test_a_model_against_itself() -> None:
    p, _ = bank.random_pair(0)
    answer = exact(p, p)
    assert answer.value == answer.variance_mc == answer.variance_rb == answer.variance_combined == 0.0
    assert answer.alpha == 1.0
    assert answer.entropy > 0


def test_tiny_divergence_keeps_its_digits() -> None:
    """At 1e-14 nats the plain form Σ p (log p − log q) has lost every digit."""
    e, shift = 0.25, 1e-7
    answer = exact(coin(end=e), coin(end=e + shift))
    assert answer.value == pytest.approx(shift**2 / (2 * e**2 * (1 - e)), rel=1e-5)


def test_prompts_move_the_start() -> None:
    p, q = bank.random_pair(1)
    after = exact(p, q, prompt="ab")
    law = strings(p, 6, prompt="ab")
    assert exact(p, q, prompt="ab", max_tokens=6).value == pytest.approx(
        law.mean(per_string(law.x, scores(p, law.x)[0] - scores(q, law.x)[0])), rel=1e-10
    )
    assert exact(p, q, prompt=torch.tensor([2, 0, 1])).value == pytest.approx(after.value, rel=1e-12)


def test_variance_of_the_rate() -> None:
    """Per-token and total: the linearised ratio of k T over T has no variance at all."""
    problem = bank.MEMORYLESS[1]
    answer = exact(problem.p, problem.q)
    assert answer.rate == pytest.approx(problem.kl * 0.25)
    assert answer.variance_rate("kl") == pytest.approx(0.0, abs=1e-12)
    assert answer.variance_rate("log_ratio") > 0


def test_transformed_automata_stay_exact() -> None:
    p, q = bank.random_pair(2)
    for model in (temperature(p, 0.7), top_p(temperature(p, 2.0), 0.8), top_k(p, 2), restrict(p, [0, 2])):
        assert_agrees(exact(model, q, max_tokens=6), model, q, max_tokens=6)
    wide_p, wide_q = extend(p, 5), extend(temperature(q, 1.5), 5)
    assert exact(wide_p, wide_q).value == pytest.approx(exact(p, temperature(q, 1.5)).value, rel=1e-12)
    assert exact(p, top_k(q, 1)).value == math.inf


def test_endless_strings_need_a_limit() -> None:
    p, q = bank.random_pair(2)
    endless = restrict(p, [0, 1])
    with pytest.raises(ValueError, match="max_tokens"):
        exact(endless, q)
    assert exact(endless, q, max_tokens=5).truncated == pytest.approx(1.0)
    # A q that need not end is fine: only strings of p are looked at.
    assert exact(p, restrict(q, [0, 1])).value == math.inf


class Opaque:
    """Stands for any neural model."""

    def __init__(self, inner: Automaton) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


def test_refusals() -> None:
    p, q = bank.random_pair(0)
    with pytest.raises(NotTractable, match="expected an automaton"):
        exact(Opaque(p), q)  # type: ignore[arg-type]
    with pytest.raises(VocabularyMismatch, match="expected two automata over the same tokens"):
        exact(p, memoryless([0.2, 0.3, 0.5], end=0.1))
    with pytest.raises(ValueError, match="at least 1"):
        exact(p, q, max_tokens=0)


def test_too_large_a_system_is_refused_and_cut_strings_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("klkit.estimators.product.LARGEST_SYSTEM", 3)
    p, q = bank.random_pair(0, states=3)
    with pytest.raises(NotTractable, match="max_tokens"):
        exact(p, q)
    assert exact(p, q, max_tokens=4).value > 0


def test_strings_too_long_for_double_precision_are_refused() -> None:
    """Two states that hand over to each other with certainty, but for 1e-17."""
    rows = torch.tensor([[1.0, 1e-17], [1.0, 1e-17]], dtype=torch.float64)
    moves = torch.tensor([[1], [0]])
    p = automaton(rows, moves)
    q = automaton(torch.tensor([[0.5, 0.5], [0.5, 0.5]], dtype=torch.float64), moves)
    with pytest.raises(ArithmeticError, match="max_tokens"):
        exact(p, q)


def test_ngrams_of_different_states() -> None:
    p, q = bank.ngram_pair(3)
    assert p.states != q.states
    answer = exact(p, q)
    assert answer.pairs > max(p.states, q.states)
    assert answer.value == pytest.approx(exact(p, q, max_tokens=500).value, rel=1e-10)
    assert_agrees(exact(p, q, max_tokens=3), p, q, max_tokens=3)


@pytest.mark.parametrize("end", [1e-3, 1e-6, 1e-10])
def test_long_strings_keep_their_digits(end: float) -> None:
    """A coin spread over three states that pass the baton: the plain linear system would lose 1/end digits."""
    moves = torch.tensor([[1], [2], [0]])

    def relay(e: float) -> Automaton:
        return automaton(torch.tensor([[1 - e, e]] * 3, dtype=torch.float64), moves)

    known = bank.memoryless_problem("coin", [1.0], [1.0], end, 3 * end)
    answer = exact(relay(end), relay(3 * end))
    assert answer.pairs == 3
    # k of the closed form itself cancels: two terms of size `end` that leave a fraction of it.
    assert answer.value == pytest.approx(known.kl, rel=1e-6 if end < 1e-9 else 1e-9)
    assert answer.decisions == pytest.approx(1 / end, rel=1e-12)
    assert answer.moment("decisions", "decisions") == pytest.approx((1 - end) / end**2, rel=1e-12)


def test_hundreds_of_states() -> None:
    p = random_automaton(25, 3, generator=rng.stream(0, "large", "p"))
    q = random_automaton(25, 3, generator=rng.stream(0, "large", "q"))
    answer = exact(p, q)
    assert answer.pairs > 200
    assert exact(p, q, max_tokens=300).value == pytest.approx(answer.value, rel=1e-10)
