"""Jobs that several processes share, with the results of one: in rounds, a job a process, all results to all.

Results are told by their jobs and not by who did them, and every job is the same piece of work as in a single process
(for a model: a batch of the same strings in the same shapes, so the same bits). Any number of processes therefore
yields the same sequence, in every process, and what is computed from it is the same everywhere.

All results go to all processes, rather than sums of them: a merged sum depends on the order of its parts in the last
digit, and control variates, resampling and stopping want strings, not sums. It is cheap. A decision of a batch is 17
numbers and 16 features of 4 bytes and a token of 8, 140 bytes, so a batch of 64 strings of 512 tokens is 4.6 MB; with
8 processes a round moves 37 MB between memories, a small part of a second, for seconds of forward passes. No process
keeps more of a batch than a single one does (:class:`klkit.api.gather.Gathered`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

from klkit.train.processes import Processes

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_rounds(jobs: Iterable[Job], work: Callable[[Job], Result], processes: Processes) -> Iterator[Result]:
    """The results of ``work`` on every job in order, in every process; what any raises is raised in all.

    As with one process, results of the jobs before the one that failed come first. Every process must give the same
    jobs and read on as far as the others do. Jobs may be made while this runs, but may not depend on results that
    are not there yet: as many as there are processes are taken at a time.

    Args:
        jobs: the same in every process.
        work: what one process makes of a job; its result travels between processes, so it lies in memory.
        processes: that share the work.

    Raises:
        BaseException: what ``work`` raised on the first job that failed.

    Example:
        >>> list(in_rounds(range(4), lambda job: job * job, Processes()))
        [0, 1, 4, 9]
    """
    if processes.count == 1:
        for job in jobs:
            yield work(job)
        return
    waiting = iter(jobs)
    while turn := list(islice(waiting, processes.count)):
        own = turn[processes.rank : processes.rank + 1]
        outcomes = processes.outcomes(lambda own=own: [work(job) for job in own])  # type: ignore[misc]
        for outcome in outcomes[: len(turn)]:
            yield from outcome.get()
