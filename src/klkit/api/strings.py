"""The loop of a run: draw a batch from p, read both models out over it, store it, look whether it is enough."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from klkit.api.settings import MINIMUM_STRINGS
from klkit.divergences import backends
from klkit.estimators.rao_blackwell import rao_blackwell
from klkit.estimators.statistics import TokenStatistics, collect
from klkit.models.base import LanguageModel
from klkit.numerics import give_back_memory
from klkit.report.record import RunFolder, RunFolderError
from klkit.report.shards import Batch, Details
from klkit.results import Estimate
from klkit.rng import numpy_stream
from klkit.sampling.ancestral import sample
from klkit.sequences import Sequences

LARGEST_BATCH = 64
SHOWN_STRINGS = 24  # strings whose every decision is kept in detail, for the report's heat map
SHOWN_TOKENS = 5  # most probable tokens of both models at each of these decisions
FLOOR_STRINGS = 8  # strings on which the numerical floor is measured
LONG_RUN = 8  # batches from which on memory that is free is given back after each: slower, and bounded
KEPT_BYTES = 256 << 20  # trunk vectors of one batch, at most


@dataclass(frozen=True, slots=True)
class Plan:
    """Which strings a run draws: round by round, every prompt once in each, in an order shuffled by the seed.

    The order matters only to a run that stops early, or shows its first strings: these must not be
    the first lines of a file that somebody sorted.

    Attributes:
        contexts_p: what ``p`` reads before responding to each prompt.
        contexts_q: the same for ``q``, which may use a chat template of its own.
        samples: strings a prompt.
        max_tokens: longest response.
        seed: names the draws.
        groups: the group of each prompt, if prompts have one; no string depends on it.
    """

    contexts_p: Sequence[Int[Tensor, " _c"]]
    contexts_q: Sequence[Int[Tensor, " _c"]]
    samples: int
    max_tokens: int
    seed: int
    groups: Sequence[str] | None = None

    def swapped(self) -> Plan:
        """The same plan for the pair seen from ``q``."""
        return replace(self, contexts_p=self.contexts_q, contexts_q=self.contexts_p)

    @property
    def clusters(self) -> int:
        """Independent units that strings may come from, numbered from 0: prompts, or the strings of the only one."""
        return len(self.contexts_p) if len(self.contexts_p) > 1 else self.samples

    @property
    def total(self) -> int:
        """Strings in all."""
        return len(self.contexts_p) * self.samples

    def slice(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(prompt, replicate) of the strings ``start`` to ``stop``."""
        prompts = len(self.contexts_p)
        order = numpy_stream(self.seed, "order").permutation(prompts).tolist()
        return [(order[i % prompts], i // prompts) for i in range(start, min(stop, self.total))]

    def next_look(self, strings: int) -> int:
        """When to ask again whether ``strings`` are enough: a quarter later, and with every prompt equally often."""
        wanted, prompts = max(MINIMUM_STRINGS, math.ceil(1.25 * strings)), len(self.contexts_p)
        return wanted if wanted <= prompts else math.ceil(wanted / prompts) * prompts


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands, for whoever watches it.

    Attributes:
        strings: strings done, and ``total`` planned at most.
        tokens: decisions done.
        value: running RB estimate in nats per response, with ``stderr``.
        seconds: since the loop began, for ``fresh`` strings (not counting resumed ones).
    """

    strings: int
    total: int
    tokens: int
    value: float
    stderr: float
    seconds: float
    fresh: int


Observer = Callable[[Progress], None]


def run_strings(
    p: LanguageModel,
    q: LanguageModel,
    plan: Plan,
    *,
    keep: Callable[[Batch], None],
    batch_size: int | str = "auto",
    features: Float[Tensor, "v f"] | None = None,
    mixture: bool = False,
    js: bool = False,
    rescore: bool | None = None,
    floor: bool = True,
    enough: Callable[[], bool] | None = None,
    folder: RunFolder | None = None,
    observe: Observer | None = None,
) -> None:
    """Draw and score the plan's strings, continuing after those that ``folder`` already holds.

    Args:
        mixture, js: see :func:`klkit.estimators.statistics.collect`.
        keep: given every batch, those in ``folder`` included, in order; nothing else remembers them.
        rescore: run ``p`` once more, teacher-forced in ``q``'s batch shapes, instead of reading out
            the trunk vectors of its sampling pass. By default only in half precision, where the
            difference between batch shapes is not negligible.
        floor: measure the numerical floor on the first strings, which costs another pass of ``p`` over them.
        enough: called at growing numbers of strings; True stops the run.
        folder: where each batch is stored as soon as it is done.
    """
    running, number, count = Running(), 0, 0

    def take(batch: Batch) -> None:
        nonlocal number, count
        keep(batch)
        if observe is not None:
            running.add(batch.statistics)
        number, count = number + 1, count + len(batch.statistics.x)

    if folder is not None:
        for batch in folder.batches():
            x = batch.statistics.x
            if [prompt for prompt, _ in plan.slice(count, count + len(x))] != x.prompt.tolist():
                raise RunFolderError(
                    f"expected the strings of this run's prompts in shard {number:05d}, got those of others; the "
                    f"folder holds shards of several runs, so it cannot be resumed: start again in another --out"
                )
            take(batch)
        mend_samples(folder, p, count)
    if rescore is None:
        rescore = p.dtype not in (torch.float32, torch.float64)
    size = resolve_batch_size(p, plan, batch_size)
    # One choice for the whole run, by what it may come to: half of the responses' room is an average guess.
    backend = backends.choose(plan.total * plan.max_tokens * p.vocabulary.size // 2, dtype=p.dtype)
    resumed, began, look = count, time.monotonic(), plan.next_look(0)
    while count < plan.total:
        while enough is not None and look < count:
            look = plan.next_look(look)  # looks that a resumed run has behind it
        if enough is not None and count == look:
            if enough():
                break
            look = plan.next_look(count)
        try:
            width = size if enough is None else min(size, look - count)
            batch = one_batch(
                p,
                q,
                plan,
                count,
                width,
                features=features,
                mixture=mixture,
                js=js,
                rescore=rescore,
                floor=floor,
                backend=backend,
            )
        except torch.OutOfMemoryError:
            # The strings do not depend on the batch size, so a smaller one continues the same run.
            if batch_size != "auto" or size == 1:
                raise
            size = max(1, size // 2)
            continue
        if folder is not None:
            folder.append(number, batch, describe(p, batch.statistics))
        take(batch)
        if number > LONG_RUN:
            give_back_memory()
        if observe is not None:
            observe(running.progress(plan.total, time.monotonic() - began, count - resumed))


def mend_samples(folder: RunFolder, p: LanguageModel, strings: int) -> None:
    """Write samples.jsonl anew if it does not have a line for each of the ``strings`` that are done."""
    if sum(1 for _ in folder.samples()) != strings:
        folder.rewrite_samples(line for batch in folder.batches() for line in describe(p, batch.statistics))


def resolve_batch_size(p: LanguageModel, plan: Plan, batch_size: int | str) -> int:
    """Strings a batch: as asked, or as many as keep the trunk vectors of a batch small."""
    if isinstance(batch_size, int):
        return batch_size
    fits = KEPT_BYTES // (plan.max_tokens * p.width * 4)
    return int(max(1, min(LARGEST_BATCH, fits)))


def one_batch(
    p: LanguageModel,
    q: LanguageModel,
    plan: Plan,
    start: int,
    size: int,
    *,
    features: Float[Tensor, "v f"] | None,
    mixture: bool,
    js: bool,
    rescore: bool,
    floor: bool,
    backend: str,
) -> Batch:
    """Draw the strings from number ``start`` on and reduce them to their statistics."""
    names = plan.slice(start, start + size)
    prompts = [prompt for prompt, _ in names]
    draw = sample(
        p,
        [plan.contexts_p[i] for i in prompts],
        max_tokens=plan.max_tokens,
        seed=plan.seed,
        prompt=prompts,
        replicate=[replicate for _, replicate in names],
        cluster=prompts if len(plan.contexts_p) > 1 else list(range(start, start + len(names))),
    )
    x = draw.sequences
    hidden_p = p.encode(x) if rescore else draw.hidden
    hidden_q = hidden_p if q is p else q.encode(x.after([plan.contexts_q[i] for i in prompts]))
    shown = torch.arange(max(0, min(len(x), SHOWN_STRINGS - start)))
    checked = torch.arange(max(0, min(len(x), FLOOR_STRINGS - start)) if floor else 0)
    best = MostProbable(torch.isin(x.row(), shown), min(SHOWN_TOKENS, p.vocabulary.size))
    statistics = collect(
        p, hidden_p, q, hidden_q, x, features=features, mixture=mixture, js=js, backend=backend, watch=best
    )
    return Batch(
        statistics,
        best.details(shown),
        batch_floor(p, draw.hidden, x, checked),
    )


def batch_floor(
    p: LanguageModel, hidden: Float[Tensor, "m d"], x: Sequences, rows: Int[Tensor, " k"]
) -> Float[Tensor, " k"]:
    """``KL(p‖p)`` of each string, in nats, between ``p``'s sampling pass and a teacher-forced one.

    The two passes differ only in batch shape and in the use of a cache: what they disagree by is
    numerical noise, and any divergence of that size is noise as well.
    """
    if not len(rows):
        return torch.zeros(0, dtype=torch.float64)
    few = x.select(rows)
    mine = hidden[torch.isin(x.row(), rows).to(hidden.device)]
    return torch.from_numpy(rao_blackwell(collect(p, mine, p, p.encode(few), few)))


def dtype_floor(wide: LanguageModel, p: LanguageModel, x: Sequences) -> Float[Tensor, " k"]:
    """``KL(wide‖p)`` of the first strings, in nats, where ``wide`` is ``p`` in fp32: the cost of ``p``'s precision."""
    few = x.select(torch.arange(min(len(x), FLOOR_STRINGS)))
    return torch.from_numpy(rao_blackwell(collect(wide, wide.encode(few), p, p.encode(few), few)))


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


class Running:
    """The running estimate that a progress line shows: RB, clustered as the final one."""

    def __init__(self) -> None:
        self.parts: list[Estimate] = []
        self.tokens = 0

    def add(self, statistics: TokenStatistics) -> None:
        """Count in one batch."""
        x = statistics.x
        self.tokens += x.decisions
        part = Estimate(
            method="rb",
            divergence="kl",
            direction="KL(p‖q)",
            estimand="S",
            contributions=rao_blackwell(statistics),
            weights=torch.ones(len(x), dtype=torch.float64).numpy(),
            cluster=x.cluster.numpy(),
        )
        self.parts = [self.parts[0].merge(part) if self.parts else part]

    def progress(self, total: int, seconds: float, fresh: int) -> Progress:
        """The state of the run now."""
        estimate = self.parts[0]
        return Progress(estimate.n, total, self.tokens, estimate.value, estimate.stderr, seconds, fresh)


def batches_of(n: int, size: int, *, start: int = 0) -> Iterator[Int[Tensor, " k"]]:
    """Index ranges of at most ``size`` that cover ``start`` to ``n``."""
    for i in range(start, n, size):
        yield torch.arange(i, min(i + size, n))
