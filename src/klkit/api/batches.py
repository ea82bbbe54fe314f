"""One batch of a run: drawn, read by both models, and reduced to what estimators and reports need of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from klkit.api.plan import Plan
from klkit.estimators.rao_blackwell import rao_blackwell
from klkit.estimators.statistics import TokenStatistics, collect
from klkit.models.base import LanguageModel
from klkit.report.shards import Batch, Details
from klkit.sampling.ancestral import sample
from klkit.sequences import Sequences

SHOWN_STRINGS = 24  # strings whose every decision is kept in detail, for the report's heat map
SHOWN_TOKENS = 5  # most probable tokens of both models at each of these decisions
FLOOR_STRINGS = 8  # strings on which the numerical floor is measured


def one_batch(
    p: LanguageModel,
    q: LanguageModel,
    plan: Plan,
    start: int,
    size: int,
    *,
    given: Sequences | None = None,
    features: Float[Tensor, "v f"] | None,
    mixture: bool,
    js: bool,
    rescore: bool,
    floor: bool,
    backend: str,
) -> Batch:
    """Draw the strings from number ``start`` on, if they are not ``given``, and reduce them to their statistics."""
    if given is None:
        draw = plan.draw(sample, p, start, start + size)
        x, first = draw.sequences, draw.hidden
        hidden_p = p.encode(x) if rescore else first
    else:
        x, first = given, p.encode(given)
        hidden_p = first
    # By the plan: whoever else drew the strings may have named them otherwise.
    theirs = [plan.contexts_q[prompt] for prompt, _ in plan.slice(start, start + size)]
    hidden_q = hidden_p if q is p else q.encode(x.after(theirs))
    shown = torch.arange(max(0, min(len(x), SHOWN_STRINGS - start)))
    checked = torch.arange(max(0, min(len(x), FLOOR_STRINGS - start)) if floor else 0)
    best = MostProbable(torch.isin(x.row(), shown), min(SHOWN_TOKENS, p.vocabulary.size))
    statistics = collect(
        p, hidden_p, q, hidden_q, x, features=features, mixture=mixture, js=js, backend=backend, watch=best
    )
    return Batch(
        statistics,
        best.details(shown),
        batch_floor(p, first, x, checked, backend),
    )


def batch_floor(
    p: LanguageModel, hidden: Float[Tensor, "m d"], x: Sequences, rows: Int[Tensor, " k"], backend: str
) -> Float[Tensor, " k"]:
    """``KL(p‖p)`` of each string, in nats, between ``p``'s first pass, as a rule the sampling one, and another.

    The second is teacher-forced. The two differ only in batch shape and in the use of a cache: what they disagree by
    is numerical noise, and any divergence of that size is noise as well.
    """
    if not len(rows):
        return torch.zeros(0, dtype=torch.float64)
    few = x.select(rows)
    mine = hidden[torch.isin(x.row(), rows).to(hidden.device)]
    return torch.from_numpy(rao_blackwell(collect(p, mine, p, p.encode(few), few, backend=backend)))


def floor_of(other: LanguageModel, p: LanguageModel, x: Sequences) -> Float[Tensor, " k"]:
    """``KL(other‖p)`` of each string, in nats, where ``other`` is ``p`` rounded otherwise: in fp32, or with noise."""
    return torch.from_numpy(rao_blackwell(collect(other, other.encode(x), p, p.encode(x), x)))


class MostProbable:
    """Both models' most probable tokens at the decisions ``wanted``, noted while :func:`collect` reads their logits."""

    def __init__(self, wanted: Bool[Tensor, " m"], count: int) -> None:
        self.wanted, self.count, self.seen = wanted, count, 0
        self.found: tuple[list[tuple[Tensor, Tensor]], ...] = ([], [])

    def __call__(self, logits_p: Tensor, logits_q: Tensor) -> None:
        """Note the tokens of the next rows."""
        chosen = self.wanted[self.seen : self.seen + len(logits_p)]
        self.seen += len(logits_p)
        if bool(chosen.any()):
            for found, logits in zip(self.found, (logits_p, logits_q), strict=True):
                rows = logits if bool(chosen.all()) else logits[chosen.to(logits.device)]
                best = rows.topk(self.count)
                found.append((best.indices.cpu(), (best.values - rows.logsumexp(1, keepdim=True)).cpu()))

    def details(self, strings: Int[Tensor, " k"]) -> Details:
        """What was noted, for the strings whose decisions were wanted."""
        none = (torch.zeros(0, self.count, dtype=torch.long), torch.zeros(0, self.count))
        return Details(strings, *(torch.cat(part) for found in self.found for part in zip(none, *found, strict=True)))


def no_details() -> Details:
    """Details of no string, for text that the report does not show token by token."""
    none = torch.zeros(0, 5)
    ids = torch.zeros(0, 5, dtype=torch.long)
    return Details(torch.zeros(0, dtype=torch.long), ids, none, ids, none)


def describe(p: LanguageModel, statistics: TokenStatistics) -> list[Mapping[str, Any]]:
    """One readable line a string, for samples.jsonl."""
    x = statistics.x
    kl, ratio = statistics.per_string(statistics.rows.kl), statistics.per_string(statistics.log_ratio)
    return [
        {
            "prompt": int(x.prompt[i]),
            "text": "".join(p.pieces(x.completion(i).tolist())),
            "tokens": x.completion(i).tolist(),
            "finished": bool(x.finished[i]),
            "kl_nats": finite_or_text(float(kl[i])),
            "log_ratio_nats": finite_or_text(float(ratio[i])),
        }
        for i in range(len(x))
    ]


def finite_or_text(value: float) -> float | str:
    """``value``, or its name if JSON has no number for it."""
    return value if math.isfinite(value) else str(value)


def batches_of(n: int, size: int, *, start: int = 0) -> Iterator[Int[Tensor, " k"]]:
    """Index ranges of at most ``size`` that cover ``start`` to ``n``."""
    for i in range(start, n, size):
        yield torch.arange(i, min(i + size, n))
