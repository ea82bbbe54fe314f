"""One candidate after the other: opened, scored on the strings of ``p``, and let go."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from klkit.api.batches import SHOWN_TOKENS, MostProbable, describe, no_details
from klkit.api.gather import Gathered
from klkit.api.plan import Plan
from klkit.api.prepare import Pair
from klkit.api.reference import Reference, ReferenceBatch
from klkit.api.rounds import in_rounds
from klkit.api.strings import LONG_RUN, stored
from klkit.api.text import Windows
from klkit.caches.recording import HYBRID, law
from klkit.estimators.cached import score_laws
from klkit.estimators.statistics import collect
from klkit.models.base import LanguageModel
from klkit.models.wrap import innermost
from klkit.numerics import give_back_memory
from klkit.report.record import CONFIG, RunFolder, RunFolderError
from klkit.report.shards import Batch
from klkit.train.processes import Processes


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that waits to be compared.

    Attributes:
        name: what tables call it.
        open: gives the model while it is needed, and frees it afterwards.
        size: what its weights take, given the opened model; empty if not known.
        window: tokens that it can read, where that is known before it is opened.
    """

    name: str
    open: Callable[[], AbstractContextManager[LanguageModel]]
    size: Callable[[LanguageModel], dict[str, Any]] = lambda _: {}
    window: int | None = None


def score_batch(
    pair: Pair,
    batch: ReferenceBatch,
    contexts_q: Sequence[Int[Tensor, " _c"]] | None,
    *,
    features: Float[Tensor, "v f"] | None,
    js: bool,
    backend: str,
    shown: int,
    laws_size: int,
) -> Batch:
    """Read ``pair.q`` out over strings of ``pair.p``: the only pass of ``q``, and none of ``p``.

    Args:
        contexts_q: what ``q`` reads before a response to each prompt, where that is not what ``p`` reads.
        shown: how many of the run's first strings are kept in detail.
        laws_size: ids that parts of laws are over.
    """
    x, hidden = batch.x, batch.kept.get("hidden")
    theirs = x if contexts_q is None else x.after([contexts_q[i] for i in x.prompt.tolist()])
    same = innermost(pair.q) is innermost(pair.p) and contexts_q is None
    hidden_q = hidden if same and hidden is not None else pair.q.encode(theirs)
    if hidden is None:
        laws: Any = law(HYBRID, batch.kept, head=None, temperature=1.0, size=laws_size)
        statistics = score_laws(laws, x, pair.q, hidden_q, pair.p.vocabulary.ends)
        return Batch(statistics, no_details(), batch.floor)
    few = torch.arange(max(0, min(len(x), shown - batch.start)))
    best = MostProbable(torch.isin(x.row(), few), min(SHOWN_TOKENS, pair.p.vocabulary.size))
    statistics = collect(pair.p, hidden, pair.q, hidden_q, x, features=features, js=js, backend=backend, watch=best)
    return Batch(statistics, best.details(few), batch.floor)


def score_candidate(
    pair: Pair,
    reference: Reference,
    found: Gathered,
    contexts_q: Sequence[Int[Tensor, " _c"]] | None,
    *,
    features: Float[Tensor, "v f"] | None,
    js: bool,
    shown: int,
    laws_size: int,
    folder: RunFolder | None,
    processes: Processes,
    observe: Callable[[int], None] | None,
) -> None:
    """Sum up ``pair`` over all strings of ``reference`` into ``found``, batch by batch.

    Args:
        folder: where each batch is stored as soon as it is done; those that are there are taken from it.
        processes: that share the batches, whole ones; each of them gets all sums.
        observe: given the strings done.
    """
    if folder is not None:
        for batch in stored(folder, pair.p, processes):
            found.add(batch)
    first, rest = divmod(len(found), reference.size)
    if rest and len(found) != reference.count:
        raise RunFolderError(
            f"expected whole batches of {reference.size} strings of an unfinished candidate, got {len(found)} strings "
            f"in {'memory' if folder is None else folder.path}: they were made from batches of another size; remove "
            f"that folder and repeat the command with --resume"
        )
    first += bool(rest)
    if features is not None and len(features) < pair.p.vocabulary.size:
        # Rows that only the candidate's table has: p never draws them.
        features = torch.nn.functional.pad(features, (0, 0, 0, pair.p.vocabulary.size - len(features)))

    def work(index: int) -> Batch:
        return in_halves(one, reference.store.get(index))

    def one(batch: ReferenceBatch) -> Batch:
        return score_batch(
            pair,
            batch,
            contexts_q,
            features=features,
            js=js,
            backend=reference.backend,
            shown=shown,
            laws_size=laws_size,
        )

    def note(index: int, batch: Batch) -> None:
        if folder is not None:
            folder.append(index, batch, describe(pair.p, batch.statistics))
        if observe is not None:
            observe(len(found))

    for index, batch in enumerate(in_rounds(range(first, len(reference)), work, processes), start=first):
        found.add(batch)
        processes.by_first(lambda index=index, batch=batch: note(index, batch))  # type: ignore[misc]
        if index > LONG_RUN:
            give_back_memory()


def in_halves(work: Callable[[ReferenceBatch], Batch], batch: ReferenceBatch) -> Batch:
    """What ``work`` makes of a batch; of its halves where it does not fit in memory, put together again."""
    try:
        return work(batch)
    except torch.OutOfMemoryError:
        if len(batch.x) == 1:
            raise
    return Batch.cat([in_halves(work, half) for half in batch.halves()])


def contexts_of(q: LanguageModel, contents: Sequence[Any], contexts_p: Sequence[Tensor]) -> list[Tensor] | None:
    """What ``q`` reads before each response, or None if it is what ``p`` reads."""
    own = [q.context(content) for content in contents]
    return None if all(torch.equal(a, b) for a, b in zip(own, contexts_p, strict=True)) else own


def require_room(
    name: str, window: int | None, plan: Plan | None, windows: Windows | None, contexts: Sequence[Tensor] | None = None
) -> None:
    """Refuse a candidate that cannot read ``p``'s strings, or windows of the given text.

    Args:
        name: of the candidate.
        window: tokens that it can read; None for any number, or where that is not known.
        contexts: what it reads before each response; by default what ``p`` does.

    Raises:
        ValueError: its window is too short.
    """
    if window is None:
        return
    if plan is None:
        longest = 0 if windows is None else int(windows.x.stop.max())
        if longest > window:
            raise ValueError(
                f"expected candidates that can read windows of {longest} tokens, got {name} with a window of {window}; "
                f"lower --context to {window}, or leave it out"
            )
        return
    longest = max(map(len, contexts or plan.contexts_p))
    if longest + plan.max_tokens > window:
        remedy = f"lower --max-tokens to {window - longest}" if longest < window else "shorten the prompts"
        raise ValueError(
            f"expected candidates that can read {longest} tokens of prompt and {plan.max_tokens} of response, got "
            f"{name} with a window of {window}; {remedy}, or leave it out"
        )


def candidates_of(run: Path) -> list[str]:
    """Names of the candidates that the run in a folder was asked for; none where no run has begun."""
    return RunFolder(run).config().get("candidates") or [] if (run / CONFIG).is_file() else []


def folder_of(root: Path, name: str) -> Path:
    """Where the pair of ``p`` and a candidate is written below the run's folder: by its name, whatever its place.

    Example:
        >>> folder_of(Path("run"), "org/name@main,dtype=bfloat16").name
        'name-main-dtype-bfloat16-04f4'
    """
    short = name.removeprefix("klkit:").rstrip("/").split("/")[-1]
    plain = "".join(c if c.isalnum() or c in "-_." else "-" for c in short)[:60]
    return root / "candidates" / f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:4]}"
