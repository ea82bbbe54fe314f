"""Statistics of strings from what a cache keeps of ``p``, and ``q`` itself: ``p`` is asked once for every ``q``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from klkit.caches.cache import TeacherCache
from klkit.caches.shards import CacheError
from klkit.divergences.fused import RowStatistics, row_statistics
from klkit.divergences.hybrid import hybrid_statistics
from klkit.divergences.partial import Hidden, Hybrid
from klkit.estimators.statistics import TokenStatistics
from klkit.models.base import LanguageModel, VocabularyMismatch, read_logits
from klkit.sequences import Sequences


def score_cached(
    cache: TeacherCache,
    q: LanguageModel,
    indices: Sequence[int] | None = None,
    *,
    x: Sequences | None = None,
    contexts_q: Sequence[Tensor] | None = None,
    batch_size: int = 32,
    plain: bool = False,
) -> TokenStatistics:
    """What :func:`klkit.estimators.statistics.score` gives, with ``p``'s laws from a cache, batch by batch.

    From hidden states all of it, up to the rounding of a product. From a hybrid cache ``kl`` without bias, everything
    of one law alone exactly, and NaN for what needs the whole ``p``
    (:func:`klkit.divergences.hybrid.hybrid_statistics`). Its noise is part of how strings differ, and so of the error
    bars of every estimate; two models scored from one cache share it.

    Args:
        indices: strings of the cache; by default all.
        x: these strings, where more is known of them than the cache keeps, such as the law that drew them.
        contexts_q: what ``q`` reads before each string, when it differs from ``p``'s context.
        batch_size: strings a batch.
        plain: take the hybrid estimate without control variate.

    Raises:
        StaleCache: ``x`` are other strings, or the tokens of ``q`` are others.
        VocabularyMismatch: ``q`` lacks tokens that ``p`` has.
        CacheError: the cache holds parts of laws that no divergence can be had from, or a shard is damaged.

    Example:
        >>> import tempfile
        >>> from klkit.caches.build import build
        >>> from klkit.caches.recording import Recording
        >>> from klkit.estimators import summarise
        >>> from klkit.models.automaton import coin
        >>> from klkit.sampling.ancestral import sample
        >>> p, q = coin(end=0.5), coin(end=0.25)
        >>> strings = sample(p, [p.context(None)] * 50, max_tokens=60, seed=0).sequences
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = build(folder, p, strings, Recording("hybrid", k=1, draws=2)).cache
        ...     round(summarise("rb", score_cached(cache, q), estimand="R").value, 6)
        0.143841
    """
    if cache.kind not in ("hidden", "hybrid"):
        raise CacheError(
            f"expected a cache of hidden states or a hybrid one to measure from, got one of kind {cache.kind}: it "
            f"gives a bound or a gradient, and no divergence; build it with --kind hybrid"
        )
    chosen = list(range(len(cache)) if indices is None else indices)
    cache.require(vocabulary=q.vocabulary)
    if q.vocabulary.size < cache.manifest.size:
        raise VocabularyMismatch(
            f"expected a model over the {cache.manifest.size} ids of {cache.path}, got {q.vocabulary.size} of "
            f"{q.name}; align it with klkit.models.align first"
        )
    if contexts_q is not None and len(contexts_q) != len(chosen):
        raise ValueError(f"expected a context for each of {len(chosen)} strings, got {len(contexts_q)}")
    parts = []
    for i in range(0, len(chosen), batch_size):
        some = chosen[i : i + batch_size]
        mine = cache.strings(some) if x is None else x.select(list(range(i, i + len(some))))
        theirs = mine if contexts_q is None else mine.after(contexts_q[i : i + len(some)])
        laws: Any = cache.rows(some, None if x is None else mine)
        parts.append(score_laws(laws, mine, q, q.encode(theirs), cache.manifest.teacher.ends, plain=plain))
    return TokenStatistics.cat(parts)


def score_laws(
    laws: Hidden | Hybrid,
    x: Sequences,
    q: LanguageModel,
    hidden_q: Float[Tensor, "m e"],
    ends: tuple[int, ...],
    *,
    plain: bool = False,
) -> TokenStatistics:
    """Reduce each decision of the strings ``x`` to scalars, from what was kept of ``p``'s laws there.

    Args:
        laws: one a decision.
        hidden_q: trunk vectors of ``q`` for the same decisions.
        ends: tokens that end a response.
        plain: take the hybrid estimate without control variate.

    Raises:
        VocabularyMismatch: the laws are over other ids than those of ``q``.
    """
    if isinstance(laws, Hybrid):
        laws = laws.to(hidden_q.device)
    tokens, start = x.targets(), 0
    parts: list[RowStatistics] = []
    for logits in read_logits(q, hidden_q):
        rows = slice(start, start + len(logits))
        drawn = tokens[rows].to(logits.device)
        if isinstance(laws, Hybrid):
            parts.append(hybrid_statistics(laws, logits, drawn, ends, rows=rows, plain=plain))
        else:
            found = laws.rows(rows)
            if found.shape != logits.shape:
                raise VocabularyMismatch(
                    f"expected both models over the same ids, got {found.shape[1]} of the cache and {logits.shape[1]} "
                    f"of {q.name}; align the models with klkit.models.align first"
                )
            parts.append(row_statistics(found.to(logits.device), logits, drawn, ends))
        start = rows.stop
    whole = RowStatistics.cat(parts).kept()
    return TokenStatistics(x=x, rows=whole, features=whole.kl.new_zeros(x.decisions, 0))
