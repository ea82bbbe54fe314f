"""The loop of a run: draw a batch from p, read both models out over it, store it, look whether it is enough.

Several processes take turns at the batches of one and the same sequence (:mod:`klkit.api.rounds`). No batch reaches
beyond the next look, so they stop where one process does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from klkit.api.batches import describe, one_batch
from klkit.api.drawn import Drawn, Sampler
from klkit.api.plan import Plan
from klkit.api.rounds import in_rounds
from klkit.divergences import backends
from klkit.estimators.rao_blackwell import rao_blackwell
from klkit.estimators.statistics import TokenStatistics
from klkit.models.base import LanguageModel
from klkit.numerics import give_back_memory
from klkit.report.record import RunFolder, RunFolderError
from klkit.report.shards import Batch
from klkit.results import Estimate
from klkit.train.processes import Processes

ALONE = Processes()
LARGEST_BATCH = 64
LONG_RUN = 8  # batches from which on memory that is free is given back after each: slower, and bounded
KEPT_BYTES = 256 << 20  # trunk vectors of one batch, at most


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
    sampler: Sampler | None = None,
    processes: Processes = ALONE,
) -> None:
    """Draw and score the plan's strings, continuing after those that ``folder`` already holds.

    Processes that share the work all call this, and all are given every batch; ``folder`` and ``observe`` are the
    first's alone.

    Args:
        mixture, js: see :func:`klkit.estimators.statistics.collect`.
        keep: given every batch, those in ``folder`` included, in order; nothing else remembers them.
        rescore: run ``p`` once more, teacher-forced in ``q``'s batch shapes, instead of reading out
            the trunk vectors of its sampling pass. By default only in half precision, where the
            difference between batch shapes is not negligible.
        floor: measure the numerical floor on the first strings, which costs another pass of ``p`` over them.
        enough: called at growing numbers of strings; True stops the run.
        folder: where each batch is stored as soon as it is done.
        sampler: draws the strings; by default ``p`` does, here.
    """
    running, number, count = Running(), 0, 0

    def take(batch: Batch) -> None:
        nonlocal number, count
        keep(batch)
        if observe is not None:
            running.add(batch.statistics)
        number, count = number + 1, count + len(batch.statistics.x)

    if folder is not None:
        for batch in stored(folder, p, processes):
            x = batch.statistics.x
            if [prompt for prompt, _ in plan.slice(count, count + len(x))] != x.prompt.tolist():
                raise RunFolderError(
                    f"expected the strings of this run's prompts in shard {number:05d}, got those of others; the "
                    f"folder holds shards of several runs, so it cannot be resumed: start again in another --out"
                )
            take(batch)
    if rescore is None:
        rescore = p.dtype not in (torch.float32, torch.float64)
    size = resolve_batch_size(p, plan, batch_size)
    # One choice for the whole run, by what it may come to: half of the responses' room is an average guess. And one
    # for all processes: what has been compiled before may differ between machines.
    room = plan.total * plan.max_tokens * p.vocabulary.size // 2
    backend = processes.by_first(lambda: backends.choose(room, dtype=p.dtype))
    drawn = None
    if sampler is not None:
        drawn = Drawn(lambda start, stop: plan.draw(sampler, p, start, stop), plan.total, processes)

    def work(job: tuple[int, int]) -> Batch:
        start, width = job
        return one_batch(
            p,
            q,
            plan,
            start,
            width,
            given=None if drawn is None else drawn.strings(start, width),
            features=features,
            mixture=mixture,
            js=js,
            rescore=rescore,
            floor=floor,
            backend=backend,
        )

    def note(batch: Batch) -> None:
        if folder is not None:
            folder.append(number - 1, batch, describe(p, batch.statistics))
        if observe is not None:
            observe(running.progress(plan.total, time.monotonic() - began, count - resumed))

    resumed, began, look = count, time.monotonic(), plan.next_look(0)
    while count < plan.total:
        while enough is not None and look < count:
            look = plan.next_look(look)  # looks that a resumed run has behind it
        if enough is not None and count == look:
            if processes.by_first(enough):
                break
            look = plan.next_look(count)
        stop = plan.total if enough is None else min(look, plan.total)
        stop = stop if drawn is None else drawn.reach(count, stop)
        jobs = [(start, min(size, stop - start)) for start in range(count, stop, size)]
        try:
            for batch in in_rounds(jobs, work, processes):
                take(batch)
                processes.by_first(lambda batch=batch: note(batch))  # type: ignore[misc]
                if number > LONG_RUN:
                    give_back_memory()
        except torch.OutOfMemoryError:
            # The strings do not depend on the batch size, so a smaller one continues the same run.
            if batch_size != "auto" or size == 1:
                raise
            size = max(1, size // 2)


def stored(folder: RunFolder, p: LanguageModel, processes: Processes) -> Iterator[Batch]:
    """The batches that ``folder`` holds, in every process; only the first reads its files, and mends its samples."""
    batches, strings = folder.batches(), 0
    while (batch := processes.by_first(lambda: next(batches, None))) is not None:
        yield batch
        strings += len(batch.statistics.x)
    processes.by_first(lambda: mend_samples(folder, p, strings))


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
