"""From the sums of a run to a result: estimates, checks, bounds, breakdowns, and words for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from klkit.api.breakdown import no_breakdown
from klkit.api.bytewise import symbol_of
from klkit.api.companions import bits_per_byte, describe_floor, engine_gaps, per_token, text_rows
from klkit.api.gather import Gathered
from klkit.api.plan import Plan
from klkit.api.prepare import alike
from klkit.api.settings import KLKIT, Settings
from klkit.api.text import Windows
from klkit.api.words import both_audits, lines, renamed, say
from klkit.estimators import mixture, summarise
from klkit.estimators.audit import audit
from klkit.estimators.strings import StringStatistics
from klkit.models.base import LanguageModel, Named
from klkit.results import Comparison, Estimate, jsonable
from klkit.stats.intervals import cluster_totals
from klkit.stats.sequential import final_lower_bound
from klkit.stats.tails import tail

TABLE = ("rb_cv", "rb", "mc", "cv_string", "k3_string", "k3_token", "ht")
OTHER_FLOORS = {
    "dtype": "the model in fp32 against the model as run",
    "noise": "the model with rounding-size noise after every layer against the model as run",
}
TWO_PASSES = "sampling pass against a teacher-forced pass of the same model"
TWO_BATCHES = "two batches of other shapes, by the same model"


def from_strings(
    whole: Gathered,
    p: LanguageModel,
    q: LanguageModel,
    settings: Settings,
    plan: Plan,
    notes: Sequence[str],
    env: Mapping[str, Any],
    other_floor: Float[Tensor, " k"] | None = None,
) -> Comparison:
    """Result of a run that sampled strings from ``p`` (for the reverse divergence: from the run's q)."""
    reverse = settings.divergence == "reverse_kl"
    roles = ("q", "p") if reverse else ("p", "q")
    direction = "KL(q‖p)" if reverse else "KL(p‖q)"

    def estimate(method: str, estimand: str) -> Estimate:
        summary = summarise(method, whole.tally, estimand=estimand, divergence=settings.divergence, direction=direction)
        return replace(summary, unit=settings.unit, symbol=symbol_of(p))

    table = [estimate(method, "S") for method in TABLE]
    headline = next(e for e in table if e.method == settings.method)
    # Per token little is left for variates to explain (a long string's large sum is no surprise), so rb it is.
    rate = estimate("mc" if settings.method == "mc" else "rb", "R")
    engine = settings.sampler != KLKIT
    checks = audit(
        whole.tally, engine=engine, same=p is q, pieces=p.pieces, floor=whole.floor, precision=p.dtype,
        alike=alike(p, q),
    )  # fmt: skip
    floor = describe_floor(whole.floor, TWO_BATCHES if engine else TWO_PASSES, settings.floor)
    if other_floor is not None:
        floor = describe_floor(other_floor, OTHER_FLOORS[settings.floor], settings.floor)
    return put_together(
        headline,
        (*table, rate),
        whole,
        audited=renamed(checks.to_dict(), roles),
        floor=floor,
        settings=settings,
        env=env,
        notes=(*notes, *headline.notes),
        sentence=say(
            headline,
            f"{roles[0]} = {p.name}, {roles[1]} = {q.name}",
            f"from {headline.n} responses of {roles[0]} of at most {plan.max_tokens} {headline.symbol}s",
        ),
        model=p,
        roles=roles,
    )


def from_two_directions(
    forward: Gathered,
    backward: Gathered,
    p: LanguageModel,
    q: LanguageModel,
    settings: Settings,
    plan: Plan,
    notes: Sequence[str],
    env: Mapping[str, Any],
) -> Comparison:
    """Result for a divergence of which half is estimated from strings of ``p`` and half from those of ``q``."""
    one, two = forward.tally, backward.tally
    if settings.divergence == "js":
        estimates = [mixture.jensen_shannon(one, two)]
    else:
        halves = [
            (summarise(m, one), summarise(m, two, divergence="reverse_kl", direction="KL(q‖p)"))
            for m in ("rb_cv", "rb", "mc")
        ]
        estimates = [mixture.jeffreys(*pair) for pair in halves] + [half for pair in halves for half in pair]
    estimates = [replace(e, unit=settings.unit, symbol=symbol_of(p)) for e in estimates]
    headline = next((e for e in estimates if e.method == settings.method), estimates[0])
    if headline.method != settings.method:
        notes = (
            *notes,
            f"the {settings.divergence} divergence is estimated by {headline.method}: it has no variates yet",
        )
    checks = [
        audit(
            whole.tally,
            same=p is q,
            pieces=model.pieces,
            floor=whole.floor,
            precision=model.dtype,
            alike=alike(model, other),
        ).to_dict()
        for whole, model, other in ((forward, p, q), (backward, q, p))
    ]
    return put_together(
        headline,
        tuple(estimates),
        forward,
        audited=both_audits(checks[0], renamed(checks[1], ("q", "p"))),
        floor=describe_floor(forward.floor, TWO_PASSES, settings.floor),
        settings=settings,
        env=env,
        notes=(*notes, *headline.notes),
        sentence=say(
            headline,
            f"p = {p.name}, q = {q.name}",
            f"from {len(forward)} responses of p and {len(backward)} of q of at most {plan.max_tokens} "
            f"{headline.symbol}s",
        ),
        model=p,
    )


def from_text(
    whole: Gathered,
    p: Named,
    q: Named,
    settings: Settings,
    windows: Windows,
    notes: Sequence[str],
    env: Mapping[str, Any],
    *,
    method: str = "exact",
    direction: str = "KL(p‖q)",
) -> Comparison:
    """Result of scoring a fixed text: estimand F, with the quantiles that users of llama.cpp know.

    Args:
        method: how the divergence of each decision was had.
        direction: what it is of the two laws, in words.
    """
    headline = summarise("rb", whole.tally, estimand="F", direction=direction)
    headline = replace(headline, unit=settings.unit, method=method, symbol=symbol_of(p))
    result = put_together(
        headline,
        (headline,),
        whole,
        audited=audit(whole.tally, given=True, same=p is q, pieces=p.pieces, alike=alike(p, q)).to_dict(),
        floor=describe_floor(whole.floor, "", "none"),
        settings=settings,
        env=env,
        notes=(*notes, *windows.notes, *headline.notes),
        sentence=say(
            headline,
            f"p = {p.name}, q = {q.name}",
            f"over {windows.x.decisions} scored {headline.symbol}s of {whole.strings.prompts} document(s)",
        ),
        model=p,
    )
    rows = text_rows(whole.strings, whole.every, headline)
    said = {**{row["name"]: row["text"] for row in rows}, **result.lines}
    companions = {**result.companions, "text_rows": rows}
    return replace(result, lines=said, companions=companions)


def put_together(
    headline: Estimate,
    estimates: tuple[Estimate, ...],
    whole: Gathered,
    *,
    audited: Mapping[str, Any],
    floor: Mapping[str, Any],
    settings: Settings,
    env: Mapping[str, Any],
    notes: Sequence[str],
    sentence: str,
    model: Named,
    roles: tuple[str, str] = ("p", "q"),
) -> Comparison:
    """The parts that all kinds of runs share.

    Args:
        whole: the strings that breakdowns are about.
        model: the model that wrote them, which knows how to spell its tokens.
        roles: what the run calls that model, and the one it is compared with.
    """
    companions = per_token(whole.strings, roles) | bits_per_byte(whole.strings, whole.bytes, roles)
    if settings.sampler != KLKIT:
        companions["engine"] = engine_gaps(whole.tally, roles[0])
    bound, shape = {}, {}
    # Half of a symmetric divergence is not broken down: it would be another quantity under the headline's name.
    parts = no_breakdown() if headline.divergence in ("js", "jeffreys") else whole.parts(model)
    parts["token_classes"] = whole.kinds()
    if headline.divergence in ("kl", "reverse_kl"):
        shape = tail_of(whole.strings)
        bound = lower_bound_of(whole.strings) if headline.estimand == "S" else {}
    return Comparison(
        headline=headline,
        estimates=estimates,
        audit=audited,
        floor=floor,
        lower_bound=bound,
        tail=shape,
        companions=companions,
        breakdown=parts,
        settings=settings.to_dict(),
        provenance=env,
        lines=lines(headline, audited, floor, bound, shape.get("verdict"), companions, parts, roles[0]),
        sentence=sentence,
        notes=tuple(dict.fromkeys(notes)),
        roles=roles,
    )


def cluster_means(strings: StringStatistics) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Mean RB sum of each cluster, in the order in which the run came to them: a file's order may be sorted."""
    sums, cluster = strings.kl.numpy(), strings.cluster.numpy()
    totals, weights = cluster_totals(sums, np.ones(len(sums)), cluster)
    _, first = np.unique(cluster, return_index=True)
    return np.asarray((totals / weights)[np.argsort(first)])


def lower_bound_of(strings: StringStatistics) -> dict[str, Any]:
    """A bound below the divergence that assumes nothing but non-negative terms, in nats."""
    means = cluster_means(strings)
    # Later rounds of strings revise earlier means, so then the bound speaks of the end of the run only.
    anytime = len(means) == len(strings)
    return {
        "level": 0.95,
        "value": jsonable(final_lower_bound(means)),
        "unit": "nats",
        "method": "betting on per-cluster RB sums",
        "anytime": anytime,
    }


def tail_of(strings: StringStatistics) -> dict[str, Any]:
    """Shape of the right tail of the clusters' means; empty if one is infinite."""
    means = cluster_means(strings)
    if not np.isfinite(means).all():
        return {}
    shape = tail(means)
    return {"k_hat": jsonable(shape.khat), "top_share": shape.top_share, "verdict": shape.verdict}
