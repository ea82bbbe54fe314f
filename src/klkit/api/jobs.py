"""Work in independent pieces: a process a core, a file a piece, nothing done twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klkit.files import write_text
from klkit.rng import numpy_stream

Work = Callable[[Mapping[str, Any], Path], dict[str, Any]]
"""From a job's settings, and the folder where it may leave files, to a result as JSON has it."""
Watch = Callable[[int, int, float], None]
"""(pieces done, pieces in all, seconds that the rest will take)."""


@dataclass(frozen=True, slots=True)
class Job:
    """A piece of work.

    Attributes:
        name: of its file.
        settings: all that its result depends on, as JSON has it.
    """

    name: str
    settings: dict[str, Any]


def finish(
    work: Work, jobs: Sequence[Job], folder: Path, *, workers: int = 1, observe: Watch | None = None
) -> list[dict[str, Any]]:
    """The results of ``work`` on every job, in order; those found in ``folder`` are taken from there.

    Each result is written when it is there, so an interrupted call goes on where it stopped. With several workers
    ``work`` must be a function of a module, and every process computes with one thread.

    Raises:
        ValueError: ``folder`` cannot be written, or holds a result of other settings under a job's name.
    """
    found: dict[str, dict[str, Any]] = {}
    for job in jobs:
        result = _stored(folder / f"{job.name}.json", job)
        if result is not None:
            found[job.name] = result
    missing = [job for job in jobs if job.name not in found]
    began = time.monotonic()

    def keep(job: Job, result: dict[str, Any]) -> None:
        found[job.name] = result
        try:
            folder.mkdir(parents=True, exist_ok=True)
            record = {"settings": job.settings, "result": result}
            write_text(folder / f"{job.name}.json", json.dumps(record, sort_keys=True))
        except OSError as error:
            raise ValueError(f"expected to write into {folder}, got: {error}; choose another --out") from error
        if observe is not None:
            fresh = len(found) - (len(jobs) - len(missing))
            observe(len(found), len(jobs), (time.monotonic() - began) / fresh * (len(jobs) - len(found)))

    if workers < 2 or len(missing) < 2:
        for job in missing:
            keep(job, work(job.settings, folder))
        return [found[job.name] for job in jobs]
    # Threads of several processes would fight for the same cores.
    previous = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
    os.environ.update(dict.fromkeys(previous, "1"))
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(missing)), mp_context=context, initializer=_one_thread)
    try:
        pending = {pool.submit(work, job.settings, folder): job for job in missing}
        for done in as_completed(pending):
            keep(pending[done], done.result())
    finally:
        pool.shutdown(cancel_futures=True)
        for name, value in previous.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return [found[job.name] for job in jobs]


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def openings(count: int, *, seed: int, without: Sequence[str] = ()) -> list[str]:
    """Openings of fresh film reviews, two to seven words each, all different, none of them in ``without``.

    Example:
        >>> len(openings(5, seed=0)), set(openings(5, seed=0)) & set(openings(5, seed=0, without=openings(5, seed=0)))
        (5, set())
    """
    from klkit.zoo import grammar

    for tries in (2, 8, 32):  # a longer sample begins with the shorter one
        random, known, found = numpy_stream(seed, "openings"), set(without), []
        for text in grammar.sample(grammar.reviews(), tries * count, seed=seed + 2):
            words = text.split()
            opening = " ".join(words[: min(int(random.integers(2, 8)), len(words) // 2)])
            if opening not in known:
                known.add(opening)
                found.append(opening)
        if len(found) >= count:
            return found[:count]
    raise ValueError(f"expected {count} different openings, found {len(found)}; ask for fewer")


def _stored(file: Path, job: Job) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    if record["settings"] != job.settings:
        raise ValueError(
            f"expected {file} to hold the same settings as this call, got others; choose another --out, or remove it"
        )
    result: dict[str, Any] = record["result"]
    return result


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
