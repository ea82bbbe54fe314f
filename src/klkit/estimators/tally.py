"""What a run keeps of its strings: every batch is summed up as it comes, and nothing remembers its decisions.

A :class:`Tally` is read by the same functions that read the statistics of one batch, and they give the same numbers
up to rounding, however the strings came in batches.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from klkit.estimators.evidence import Evidence
from klkit.estimators.folds import Folds, Moments
from klkit.estimators.statistics import TokenStatistics
from klkit.estimators.strings import StringStatistics


class Tally:
    """Sums over the decisions of each string, of each fold and of all strings, batch by batch.

    Args:
        fold: the fold of each cluster, by the cluster's number (see :func:`klkit.estimators.folds.deal`), known
            before the first string is; None where no control variates will be wanted.

    Example:
        >>> from klkit.estimators import summarise
        >>> from klkit.estimators.folds import deal
        >>> from klkit.estimators.statistics import score
        >>> from klkit.models.automaton import coin
        >>> from klkit.sampling.ancestral import sample
        >>> p, q = coin(end=0.5), coin(end=0.25)
        >>> x = sample(p, [p.context(None)] * 50, max_tokens=60, seed=0).sequences
        >>> tally = Tally(deal(np.arange(50)))
        >>> for first in (0, 25):
        ...     tally.add(score(p, q, x.select(range(first, first + 25))))
        >>> bool(np.isclose(summarise("rb_cv", tally).value, summarise("rb_cv", score(p, q, x)).value))
        True
    """

    def __init__(self, fold: NDArray[np.int64] | None = None) -> None:
        self.evidence = Evidence()
        self._fold = fold
        self._strings: list[StringStatistics] = []
        self._dealt: list[tuple[NDArray[np.int64], NDArray[np.float64]]] = []
        self._moments: Moments | None = None

    def add(self, statistics: TokenStatistics) -> None:
        """Count in a batch.

        Raises:
            IndexError: a cluster that was not dealt into a fold.
        """
        self.evidence = self.evidence + Evidence.of(statistics)
        self._strings.append(statistics.strings())
        if self._fold is not None:
            fold = self._fold[statistics.x.cluster.numpy()]
            batch = Folds.of(statistics, fold, int(self._fold.max()) + 1)
            self._dealt.append((batch.fold, batch.sums))
            self._moments = batch.moments if self._moments is None else self._moments + batch.moments

    def strings(self) -> StringStatistics:
        """The sums of all strings so far, in the order in which they came."""
        if len(self._strings) > 1:
            self._strings = [StringStatistics.cat(self._strings)]
        return self._strings[0]

    def folds(self) -> Folds | None:
        """The same by fold, or None."""
        if self._moments is None:
            return None
        if len(self._dealt) > 1:
            fold, sums = zip(*self._dealt, strict=True)
            self._dealt = [(np.concatenate(fold), np.concatenate(sums))]
        return Folds(*self._dealt[0], self._moments)


Statistics = TokenStatistics | Tally
"""What estimators and checks read: the decisions of one batch, or the sums of a run."""
