"""Texts of ``p`` read by ``p`` as it wrote them, and by ``q`` in the tokens that q's own tokenizer writes them in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from klkit.api.approximation import Approximation, Texts, approximation
from klkit.api.plan import Plan
from klkit.api.prepare import Pair, environment, load_models, make_plan, resolved
from klkit.api.prompts import prompts_of
from klkit.api.settings import Settings
from klkit.api.strings import ALONE, resolve_batch_size
from klkit.models.align import differing
from klkit.models.base import LanguageModel
from klkit.models.canonical import Canonical, canonical, log_texts, read_texts
from klkit.models.token_bytes import token_bytes
from klkit.models.wrap import innermost, temperature
from klkit.sampling.ancestral import sample
from klkit.sequences import Prompts, Sequences
from klkit.train.processes import Processes

Writers = tuple[Canonical, Canonical]
"""The canonical tokenisations of ``p`` and of ``q``."""


def approximate_run(settings: Settings, processes: Processes = ALONE) -> Approximation:
    """Carry out ``settings`` with ``approximate``: load, draw, read, sum up. Nothing is kept on disk.

    Raises:
        ValueError, OSError: as :func:`klkit.api.run.run`, and as :func:`approximate`.
    """
    settings = resolved(settings)
    prompts = prompts_of(settings)
    p, q = load_models(settings, processes)
    return approximate(p, q, settings, prompts, processes)


def approximate(
    p: LanguageModel,
    q: LanguageModel,
    settings: Settings,
    prompts: Prompts | None = None,
    processes: Processes = ALONE,
) -> Approximation:
    """The approximate comparison of two loaded models with different tokenizers.

    Raises:
        ValueError: several processes, one tokenizer (for which the exact comparison exists), texts that ``q`` cannot
            read, or none that it could be given.
        VocabularyMismatch: a model without a tokenizer, or whose tokens do not stand for bytes.
    """
    if processes.count > 1:
        raise ValueError(
            f"expected one process for approximate=True, got {processes.count}: its work is not shared; leave the "
            f"launcher out"
        )
    if p is q or not differing(p.vocabulary.tokens, q.vocabulary.tokens):
        raise ValueError(
            f"expected two tokenizers for approximate=True, got {p.name} and {q.name}, whose tokens agree id by id: "
            f"for those the exact divergence exists; leave approximate (--approximate) out"
        )
    writers = canonical(p), canonical(q)
    notes = [f"{m.name}: {note}" for m in (p, q) for note in getattr(innermost(m), "notes", ())]
    if settings.temperature != 1.0:
        notes.append(f"both models are taken at temperature {settings.temperature:g}")
    env = environment(settings, p=p, q=q)
    p, q = tempered(p, settings.temperature), tempered(q, settings.temperature)
    plan, more = make_plan(Pair(p, p, ()), settings, prompts)
    settings = replace(settings, samples=plan.samples, max_tokens=plan.max_tokens)
    return approximation(
        draw_texts(p, q, plan, contexts_of(q, prompts), writers, settings.batch_size),
        p=p.name,
        q=q.name,
        max_tokens=plan.max_tokens,
        unit=settings.unit,
        notes=(*notes, *more),
        settings=settings.to_dict(),
        provenance=env,
    )


def require_plain(**given: object) -> None:
    """Refuse what an approximate comparison has no use for: it keeps nothing, and draws by itself.

    Raises:
        ValueError: one of ``given`` is not None.
    """
    idle = [name for name, value in given.items() if value is not None]
    if idle:
        raise ValueError(
            f"expected only options that have an effect, got {', '.join(idle)}, but approximate=True keeps nothing on "
            f"disk (--json writes its result) and draws its texts in one go; leave "
            f"{'it' if len(idle) == 1 else 'them'} out"
        )


def tempered(model: LanguageModel, t: float) -> LanguageModel:
    """The model at temperature ``t``; itself at 1."""
    return model if t == 1.0 else temperature(model, t)


def contexts_of(q: LanguageModel, prompts: Prompts | None) -> list[Int[Tensor, " _c"]]:
    """What ``q`` reads before its response to each prompt."""
    return [q.context(content) for content in (prompts.contents if prompts is not None else (None,))]


def draw_texts(
    p: LanguageModel,
    q: LanguageModel,
    plan: Plan,
    contexts_q: Sequence[Int[Tensor, " _c"]],
    writers: Writers,
    batch_size: int | str = "auto",
    *,
    most: int | None = None,
) -> Texts:
    """The plan's responses of ``p``, batch by batch, and what both models make of them.

    Args:
        writers: the canonical tokenisations of ``p`` and of ``q``.
        most: responses to draw, if not all that are planned.

    Raises:
        ValueError: as :func:`read_strings`.
    """
    size, parts = resolve_batch_size(p, plan, batch_size), []
    spelt, total = token_bytes(p), min(plan.total, most or plan.total)
    for start in range(0, total, size):
        draw = plan.draw(sample, p, start, min(start + size, total))
        logp = read_texts(p, draw.hidden, draw.sequences).numpy()
        theirs = [contexts_q[i] for i in draw.sequences.prompt.tolist()]
        parts.append(read_strings(draw.sequences, logp, p.vocabulary.ends, spelt, q, theirs, writers))
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in Texts.__dataclass_fields__
    }
    return Texts(**columns)


def read_strings(
    x: Sequences,
    logp: np.ndarray[Any, np.dtype[np.float64]],
    ends: Sequence[int],
    spelt: Sequence[bytes | None],
    q: LanguageModel,
    contexts_q: Sequence[Int[Tensor, " _c"]],
    writers: Writers,
) -> Texts:
    """What ``q`` makes of the texts of strings ``x`` that ``p`` wrote, in q's canonical tokens behind q's own contexts.

    Args:
        logp: what ``p`` gives the strings as they are, nats, ``(n,)``.
        ends: p's end tokens.
        spelt: the bytes of each token of ``p``.
        contexts_q: what ``q`` reads before each string.
        writers: the canonical tokenisations of ``p`` and of ``q``.

    Raises:
        ValueError: a text is longer than ``q`` can read.
    """
    end_q = list(q.vocabulary.ends[:1])
    n = len(x)
    valid, written, own = (np.zeros(n, dtype=bool) for _ in range(3))
    sizes, logq = np.zeros(n, dtype=np.int64), np.full(n, np.nan)
    rows, completions = [], []
    for i in range(n):
        tokens = [token for token in x.completion(i).tolist() if token not in ends]
        content = b"".join(spelt[token] or b"" for token in tokens)
        sizes[i] = len(content)
        try:
            text = content.decode()
        except UnicodeDecodeError:
            continue
        ids, valid[i], own[i] = writers[1](text), True, writers[0](text) == tokens
        if ids is not None:
            written[i] = True
            rows.append(i)
            completions.append(torch.tensor(ids + (end_q if bool(x.finished[i]) else []), dtype=torch.long))
    if rows:
        theirs = Sequences.pack([contexts_q[i] for i in rows], completions)
        require_window(q, theirs, int(x.lengths.max()))
        logq[rows] = log_texts(q, theirs).numpy()
    return Texts(logp, logq, sizes, x.cluster.numpy(), valid, written, own, x.finished.numpy())


def require_window(q: LanguageModel, x: Sequences, drawn: int) -> None:
    """Refuse texts that ``q`` cannot read whole: what it made of a part would be another number.

    Args:
        x: the texts in tokens of ``q``.
        drawn: how many tokens of ``p`` the longest of them is.

    Raises:
        ValueError: one is longer than q's window.
    """
    longest = int(x.lengths.max())
    room = longest if q.window is None else q.window - int(x.start[x.lengths.argmax()])
    if q.window is not None and int(x.stop.max()) > q.window:
        raise ValueError(
            f"expected texts that {q.name} can read in its window of {q.window} tokens, got one of {longest} tokens "
            f"behind its prompt; lower max_tokens, to about {max(1, drawn * room // longest * 9 // 10)}"
        )
