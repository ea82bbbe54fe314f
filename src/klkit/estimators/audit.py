"""The self-audit: what the drawn tokens themselves say about whether they came from ``p``.

Under ``p`` the log-ratio and the surprisal of a drawn token have a mean and a variance that the scoring pass
computes exactly. Their standardised sums therefore need no reference: a wrong temperature, top-p left on,
tokens shifted by one or an adapter that is not active show up as scores far outside the normal range.

Language models have heavy tails, so a normal range proves nothing in a small run. The bounds at which
a check fails hold for any law and any number of decisions: a correct pipeline fails with
probability below one in a million.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from klkit.estimators.evidence import Deviation, Evidence
from klkit.estimators.strings import StringStatistics
from klkit.estimators.tally import Statistics, Tally
from klkit.results import jsonable
from klkit.stats.intervals import cluster_totals, ratio_stderr
from klkit.stats.student import student_quantile

FALSE_ALARM = 1e-6  # probability that a correct pipeline fails any of the checks below
TESTS = 3  # checks that share it
SCALES = 10.0 ** np.arange(-12, 9)  # variances (nats²) for which the bound is tuned, one a decade
WARNING = 3.0  # standard errors
TRUNCATED = 0.05  # share of cut strings worth a warning
EFFECTIVE = 0.1  # share of weighted strings that ought to count
# Nats a token that two passes of one model may differ by: well above what is seen, well below what a bug does.
TWO_PASSES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.05}


# Nats a token, KL(engine‖p): more than other kernels explain, and what only another law does.
MISMATCH = {
    torch.float64: (1e-6, 1e-3),
    torch.float32: (1e-6, 1e-3),
    torch.bfloat16: (2e-3, 0.05),
    torch.float16: (5e-4, 0.05),
}


@dataclass(frozen=True, slots=True)
class Check:
    """One question put to the pipeline.

    Attributes:
        name: what was checked.
        value: the statistic.
        threshold: what it was held against.
        verdict: ``"pass"``, ``"warn"`` or ``"fail"``.
        advice: one sentence: what the value means, and what to look at if it is not good.
    """

    name: str
    value: float
    threshold: float
    verdict: str
    advice: str


@dataclass(frozen=True, slots=True)
class Audit:
    """All checks that apply to a run.

    Attributes:
        checks: in the order they were made.
        exempt: why other checks do not apply, if so.
    """

    checks: tuple[Check, ...]
    exempt: str = ""

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.verdict != "fail" for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def to_dict(self) -> dict[str, Any]:
        """The audit as plain JSON values."""
        return {
            "passed": self.passed,
            "exempt": self.exempt,
            "checks": {
                check.name: {
                    "value": jsonable(check.value),
                    "threshold": jsonable(check.threshold),
                    "verdict": check.verdict,
                    "advice": check.advice,
                }
                for check in self.checks
            },
        }


def audit(
    statistics: Statistics,
    *,
    given: bool = False,
    engine: bool = False,
    same: bool = False,
    pieces: Callable[[Sequence[int]], list[str]] | None = None,
    floor: Float[Tensor, " k"] | None = None,
    precision: torch.dtype = torch.float32,
    alike: str = "",
) -> Audit:
    """Check that the strings came from ``p``, and that the numbers computed from them are sound.

    Two of the checks are ``z = Σ (u_n − D_n) / √Σ Var(u_n)`` and ``z = Σ (s_n − H_n) / √Σ Var(s_n)`` over
    decisions, with ``u_n`` the log-ratio and ``s_n = −log p`` the surprisal of the drawn token, and mean and variance
    exact given the prefix. They fail beyond :func:`tail_bound`.

    Args:
        given: the strings are a text from elsewhere, so nothing about ``p``'s draws can be checked.
        engine: the strings were drawn by an engine that is meant to serve ``p``, not by some other law.
        same: ``p`` and ``q`` are meant to be one model, so that a divergence of exactly 0 is no surprise.
        pieces: tokens to text, for the advice on excluded tokens (``model.pieces``).
        floor: ``KL(p‖p)`` between two passes of ``p`` over the first strings, one teacher-forced, ``(k,)``.
        precision: the models' arithmetic, which decides how much two passes may differ.
        alike: what is known of why ``p`` and ``q`` might give the same numbers, a sentence for the advice where they
            do: equal weights, say, or an adapter that is all zero.

    Example:
        >>> from klkit.estimators.statistics import score
        >>> from klkit.models.automaton import coin
        >>> from klkit.sampling.ancestral import sample
        >>> p, q = coin(end=0.5), coin(end=0.25)
        >>> x = sample(p, [p.context(None)] * 200, max_tokens=60, seed=0, prompt=[0] * 200).sequences
        >>> audit(score(p, q, x)).passed, audit(score(q, p, x)).passed
        (True, False)
    """
    strings = statistics.strings()
    evidence = statistics.evidence if isinstance(statistics, Tally) else Evidence.of(statistics)
    checks = [numbers(evidence), impossible(evidence, drawn=not given and not strings.foreign)]
    exempt = ""
    if given:
        exempt = "the text was given, not drawn from p: its tokens cannot be tested against p"
    elif strings.foreign:
        exempt = "the strings were drawn by another law than p: their tokens cannot be tested against p"
        checks.append(weights(strings))
        if engine:
            exempt = "the strings were drawn by an engine: its log-probabilities, not p's, are what they follow"
            checks.append(engine_mismatch(strings, evidence, precision))
    else:
        if math.isnan(evidence.log_ratio.variance):  # which would compare as if all were well
            exempt = "p's laws are known in part: log-ratios have no exact mean and variance to be held against"
        else:
            checks.append(
                standardised(
                    "log_ratio_z",
                    evidence.log_ratio,
                    evidence.noise,
                    "Log-ratios of the drawn tokens against their exact means",
                )
            )
        checks += [
            standardised(
                "surprisal_z",
                evidence.surprisal,
                evidence.noise,
                "Surprisals of the drawn tokens against p's entropy",
            ),
            likelihood(evidence),
            *paired(strings, evidence.noise),
        ]
    if floor is not None and len(floor):
        checks.append(two_passes(strings, floor, precision))
    if not given:
        checks.append(truncation(strings))
    return Audit((*checks, excluded(evidence, pieces), zero(evidence, same, alike)), exempt)


def tail_bound(quadratic: float, variance: float, alarm: float) -> float:
    """How large ``|Σ X_n|`` may be for martingale differences, but for a chance of ``alarm``: nats to nats.

    For any square-integrable ``X_n``, however heavy their tails, ``exp(λS − λ²W/2)`` is a
    supermartingale with ``W = (Σ X_n² + 2 Σ Var X_n)/3``. Mixing it over normal ``λ`` of variance ``1/ρ`` gives
    ``S² ≤ (W + ρ) log((W + ρ)/(ρ alarm²))`` for all run lengths at once; several ``ρ`` make it free of scale. In units
    of ``√W`` the bound is about 6.4 for one in three million.

    Args:
        quadratic: ``Σ X_n²``.
        variance: ``Σ Var(X_n | prefix)``.
        alarm: chance of exceeding the bound.

    Source: B. Delyon (2009), Exponential inequalities for sums of weakly dependent variables; V. H. de la Peña,
    T. L. Lai and Q.-M. Shao (2009), Self-Normalized Processes.

    Example:
        >>> round(tail_bound(2000.0, 2000.0, 1e-6 / 3) / 2000**0.5, 1)
        6.4
    """
    w = (quadratic + 2 * variance) / 3
    return float(np.sqrt((w + SCALES) * np.log((w + SCALES) / SCALES * (len(SCALES) / alarm) ** 2)).min())


def standardised(name: str, deviation: Deviation, slack: float, what: str) -> Check:
    """Hold the sum of mean-zero differences of known variance against the bound for any law, and rounding."""
    total, spread = deviation.total, math.sqrt(deviation.variance)
    bound = tail_bound(deviation.squares, deviation.variance, FALSE_ALARM / TESTS) + slack
    # Without any variance only rounding is left, and more than that is wrong at any odds.
    z = total / spread if spread else math.copysign(math.inf, total) if abs(total) > slack else 0.0
    threshold = bound / spread if spread else 0.0
    verdict = "fail" if abs(z) > threshold else "warn" if abs(total) > WARNING * spread + slack else "pass"
    advice = {
        "pass": f"{what} are as expected.",
        "warn": f"{what} are {z:+.1f} standard errors off, which chance does in few runs; draw more strings.",
        "fail": f"{what} are {z:+.1f} standard errors off: the strings were not drawn from the p that scored them; "
        f"look for a temperature, top-k or top-p, tokens shifted by one, padding read as text, or an inactive adapter.",
    }
    return Check(name, z, threshold, verdict, advice[verdict])


def likelihood(evidence: Evidence) -> Check:
    """``log q(strings)/p(strings)``: under ``p`` its exponential has mean one at most, so it cannot get large."""
    value, threshold = evidence.against, math.log(TESTS / FALSE_ALARM)
    if value > threshold:
        advice = f"The strings are e^{value:.0f} times as probable under q as under p: p and q may be swapped."
        return Check("likelihood_ratio", value, threshold, "fail", advice)
    return Check("likelihood_ratio", value, threshold, "pass", "The strings are no more probable under q.")


def paired(strings: StringStatistics, slack: float) -> list[Check]:
    """Monte Carlo against Rao-Blackwell on the same strings, in clustered standard errors; none below 10 clusters."""
    totals, _ = cluster_totals(strings.surprise.numpy(), np.ones(len(strings)), strings.cluster.numpy())
    if len(totals) < 10:
        return []
    spread = float(totals.std(ddof=1)) * math.sqrt(len(totals))
    z = float(totals.sum()) / spread if spread else 0.0
    # The t quantile of the same tail as three standard errors: few clusters vary more.
    threshold = student_quantile(0.5 * (1 + math.erf(WARNING / math.sqrt(2))), len(totals) - 1)
    if abs(float(totals.sum())) > threshold * spread + slack:
        advice = f"Monte Carlo and Rao-Blackwell disagree by {z:+.1f} clustered standard errors; compare log_ratio_z."
        return [Check("mc_against_rb_z", z, threshold, "warn", advice)]
    return [Check("mc_against_rb_z", z, threshold, "pass", "Monte Carlo and Rao-Blackwell agree on these strings.")]


def two_passes(strings: StringStatistics, floor: Float[Tensor, " k"], precision: torch.dtype) -> Check:
    """``KL(p‖p)`` per decision between ``p`` as it sampled and ``p`` teacher-forced: rounding, or a broken pass.

    What both passes get wrong alike (rows kept from the sampling pass are the law that was sampled, whatever went
    wrong in it) shows nowhere else: padding that is read as text, or an adapter that is active in one pass only.
    """
    decisions = int(strings.lengths[: len(floor)].sum())
    value = float(floor.sum()) / max(decisions, 1)
    threshold = TWO_PASSES[precision]
    if strings.foreign:
        if value > threshold:
            advice = (
                f"p in one batch differs from p in another by {value:.2g} nats a token, far more than rounding: look "
                f"for padding that is read as text."
            )
            return Check("two_passes", value, threshold, "fail", advice)
        return Check("two_passes", value, threshold, "pass", "p in one batch is p in another, up to rounding.")
    if value > threshold:
        advice = (
            f"p as it sampled differs from p reading the same strings by {value:.2g} nats a token, far more than "
            f"rounding: look for padding that is read as text, a cache that goes wrong, or an adapter that is switched "
            f"in one of the two passes only."
        )
        return Check("two_passes", value, threshold, "fail", advice)
    return Check("two_passes", value, threshold, "pass", "p as it sampled is p as it reads, up to rounding.")


def weights(strings: StringStatistics) -> Check:
    """Share of the strings' number that is left once importance weights are counted (Kong, 1992)."""
    weight = strings.weight
    square = float(weight @ weight)
    share = float(weight.sum()) ** 2 / square / len(weight) if square > 0 else 0.0
    if share < EFFECTIVE:
        advice = f"{share:.1%} of the weighted strings count as many as p's own would: draw closer to p."
        return Check("effective_share", share, EFFECTIVE, "warn", advice)
    return Check("effective_share", share, EFFECTIVE, "pass", "Importance weights are spread over many strings.")


def mismatch(strings: StringStatistics) -> tuple[float, float]:
    """``KL(μ‖p)`` per token, ``μ`` the law that drew the strings, and its clustered standard error, in nats.

    From ``exp(r) − 1 − r`` of the drawn tokens, ``r = log p − log μ``: never negative, and of that mean since
    ``E_μ exp(r) = 1``. Infinite where ``p`` excludes what was drawn.

    Source: J. Schulman (2020), Approximating KL Divergence, http://joschu.net/blog/kl-approx.html.
    """
    cluster = strings.cluster.numpy()
    totals, lengths = cluster_totals(strings.mismatch.numpy(), strings.lengths.double().numpy(), cluster)
    value = float(totals.sum() / max(lengths.sum(), 1))
    return value, ratio_stderr(totals, lengths) if math.isfinite(value) else math.nan


def engine_mismatch(strings: StringStatistics, evidence: Evidence, precision: torch.dtype) -> Check:
    """``KL(engine‖p)`` per token: other kernels, or another model, adapter, precision or temperature.

    Estimates weigh the strings, so the first costs precision only. The second is a mistake.
    """
    value, error = mismatch(strings)
    usual, most = MISMATCH[precision]
    share = evidence.gaps.outside / max(evidence.decisions, 1)
    found = (
        f"KL(engine‖p) is {value:.2g} ± {error:.1g} nats a token; log-probabilities differ by at most "
        f"{evidence.gaps.largest:.2g}, and {share:.2%} of the tokens are more than 10 % more or less probable"
    )
    if value - WARNING * (error if math.isfinite(error) else 0.0) > most:
        advice = (
            f"{found}: the engine does not serve the p that scores; look for other weights or another revision, a "
            f"missing adapter, a temperature, logprobs_mode, or the precision of weights and cache."
        )
        return Check("engine_mismatch", value, most, "fail", advice)
    if value > usual:
        advice = (
            f"{found}: more than other kernels explain at this precision; the estimate allows for it by weights, but "
            f"is less precise: serve the engine in the precision of p, without a quantised cache."
        )
        return Check("engine_mismatch", value, usual, "warn", advice)
    return Check("engine_mismatch", value, usual, "pass", f"{found}.")


def numbers(evidence: Evidence) -> Check:
    """Decisions with a statistic that is not a number."""
    count = evidence.undefined
    if count:
        advice = f"{count} decisions gave NaN: look for overflow in half precision, and load the models with float32."
        return Check("not_a_number", float(count), 0.0, "fail", advice)
    return Check("not_a_number", 0.0, 0.0, "pass", "Every decision gave numbers.")


def impossible(evidence: Evidence, *, drawn: bool) -> Check:
    """Tokens of the strings to which ``p`` gives no probability at all."""
    count = evidence.impossible
    if not count:
        return Check("impossible_tokens", 0.0, 0.0, "pass", "p allows every token of the strings.")
    if drawn:
        advice = f"p cannot have drawn {count} of the tokens; were they sampled from another model or vocabulary?"
        return Check("impossible_tokens", float(count), 0.0, "fail", advice)
    advice = f"p excludes {count} tokens of the strings, which it did not write itself; see that this is meant."
    return Check("impossible_tokens", float(count), 0.0, "warn", advice)


def truncation(strings: StringStatistics) -> Check:
    """Share of strings that were cut at the length limit."""
    share = strings.truncated
    if share > TRUNCATED:
        advice = (
            f"{share:.1%} of the strings were cut, so this is the divergence up to the length limit, a lower bound on "
            f"that of whole responses; raise max_tokens if you want the latter."
        )
        return Check("truncated_share", share, TRUNCATED, "warn", advice)
    return Check("truncated_share", share, TRUNCATED, "pass", f"{share:.1%} of the strings were cut.")


def excluded(evidence: Evidence, pieces: Callable[[Sequence[int]], list[str]] | None) -> Check:
    """Decisions at which ``q`` excludes tokens that ``p`` allows, and which tokens."""
    count = evidence.infinite
    if not count:
        return Check("infinite_decisions", 0.0, 0.0, "pass", "q allows whatever p does.")
    common = [token for token, _ in evidence.excluded.most_common(5)]
    named = ", ".join(repr(piece) for piece in pieces(common)) if pieces else ", ".join(map(str, common))
    advice = (
        f"KL(p‖q) is infinite: at {count} of {evidence.decisions} decisions q excludes tokens to which p gives "
        f"{evidence.lost / count:.2g} on average, most often {named}; compare unprocessed models, or "
        f"use the Jensen-Shannon divergence."
    )
    return Check("infinite_decisions", float(count), 0.0, "warn", advice)


def zero(evidence: Evidence, same: bool, alike: str = "") -> Check:
    """Whether no single decision differs by more than rounding, and what is known of the reason."""
    share = evidence.negligible / evidence.decisions if evidence.decisions else 1.0
    if same:
        return Check("no_difference_share", share, 1.0, "pass", "The two sides are said to be one model.")
    if share == 1:
        known = alike or "Are these the same weights? Is the adapter loaded and active?"
        advice = f"No decision differs by more than rounding. {known}"
        return Check("no_difference_share", share, 1.0, "warn", advice)
    return Check("no_difference_share", share, 1.0, "pass", "The two sides differ.")
