"""What fitting control variates needs of the strings, summed up by fold as they come: no decision is kept.

Coefficients are fitted on some folds and applied to others. Sums over the decisions of each fold are enough to fit
any candidate on any of its complements, and each string's own sums of the variates are enough to apply the result.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from klkit import rng
from klkit.estimators.statistics import TokenStatistics
from klkit.estimators.variates import later, variates

Array = NDArray[np.float64]
FOLDS = 8


def deal(cluster: NDArray[np.int64], folds: int = FOLDS, seed: int = 0) -> NDArray[np.int64]:
    """A fold for each string, the same for all of a cluster; cluster numbers decide, not the order of the strings."""
    names, index = np.unique(cluster, return_inverse=True)
    order = rng.numpy_stream(seed, "rb_cv", "folds").permutation(len(names))
    return np.argsort(order)[index] % min(folds, len(names))


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Sums over the decisions of some strings: all that fitting and judging coefficients need.

    The variates ``Z_n`` have ``c`` columns, the first ``e`` of them the end token's. ``W_n`` is ``Z_n`` but for those,
    which are ``p(end) 1[y_n ≠ end] B_n``: it correlates with the future exactly as ``Z_n`` does. A string's end is
    worth what it forgoes, and that is seen wherever strings went on; ``Z_n`` would learn it from the few ends alone.

    Every field may have leading axes, for several sets of strings side by side.

    Attributes:
        gram: ``Σ Z_n Z_nᵀ``, ``(c, c)``.
        known: its diagonal blocks of the first innovations, as their variances given the prefixes have them: what
            tokens that were not drawn would have added, ``(3, e, e)``.
        going_on: ``Σ W_n (1[y_n ≠ end] B_n)ᵀ``, of the same mean as the first columns of ``gram``, ``(c, e)``.
        echo: ``Σ W_n (Σ_{j>n} Z_j)ᵀ`` for the first columns, of mean 0: what they will remove later, ``(c, e)``.
        target: ``Σ W_n Σ_{j>n} (D_j, 1)``, ``(c, 2)``.
        total: ``Σ (D_n, 1)``, ``(2,)``.
        strings: how many strings, ``()``.
    """

    gram: Array
    known: Array
    going_on: Array
    echo: Array
    target: Array
    total: Array
    strings: Array

    def __add__(self, other: Moments) -> Moments:
        with np.errstate(invalid="ignore"):  # columns that hold infinities are left out later
            return Moments(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Moments)))

    def __getitem__(self, sets: NDArray[np.int64] | NDArray[np.bool_]) -> Moments:
        """Those of the sets ``sets``, by their numbers along the first axis."""
        return Moments(*(getattr(self, f.name)[sets] for f in fields(Moments)))

    def combined(self, members: NDArray[np.bool_]) -> Moments:
        """Those of several unions of the sets along the first axis; row ``i`` of ``members`` says which make ``i``."""
        return Moments(*(np.tensordot(members.astype(np.float64), getattr(self, f.name), 1) for f in fields(Moments)))

    def columns(self, keep: NDArray[np.bool_]) -> Moments:
        """Those of some columns only, the end token's and the first innovations' among them."""
        return Moments(
            gram=self.gram[..., keep, :][..., keep],
            known=self.known,
            going_on=self.going_on[..., keep, :],
            echo=self.echo[..., keep, :],
            target=self.target[..., keep, :],
            total=self.total,
            strings=self.strings,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Folds:
    """Strings dealt into folds.

    Attributes:
        fold: of each string, ``(n,)``.
        sums: each string's variates ``Σ_n Z_n``, ``(n, c)``.
        moments: of each fold, ``(folds, …)``.
    """

    fold: NDArray[np.int64]
    sums: Array
    moments: Moments

    @classmethod
    def of(cls, statistics: TokenStatistics, fold: NDArray[np.int64], folds: int) -> Folds:
        """Sum up the strings of one batch, which are dealt as ``fold`` says into ``folds``.

        Example:
            >>> from klkit.estimators.statistics import score
            >>> from klkit.models.automaton import coin
            >>> from klkit.sampling.ancestral import sample
            >>> p, q = coin(end=0.5), coin(end=0.25)
            >>> x = sample(p, [p.context(None)] * 4, max_tokens=50, seed=0).sequences
            >>> Folds.of(score(p, q, x), np.array([0, 1, 0, 1]), 2).moments.strings.tolist()
            [2.0, 2.0]
        """
        v, row = variates(statistics), statistics.x.row()
        products = torch.cat([v.end, v.other], dim=1)
        left = torch.cat([v.end_p[:, None] * v.going_on, v.other], dim=1)
        values = torch.stack([statistics.rows.kl.double(), torch.ones_like(v.end_p)], dim=1)
        right = torch.cat([v.going_on, later(statistics, torch.cat([v.end, values], dim=1))], dim=1)
        squares = (v.basis[:, :, None] * v.basis[:, None, :]).flatten(1)
        sums = torch.zeros(len(statistics.x), products.shape[1], dtype=torch.float64).index_add_(0, row, products)
        member = torch.from_numpy(fold)[row]
        order, sizes = member.argsort(stable=True), member.bincount(minlength=folds).tolist()

        def products_of(a: torch.Tensor, b: torch.Tensor) -> Array:
            """``Σ a_n b_nᵀ`` over the decisions of each fold."""
            pairs = zip(torch.split(a[order], sizes), torch.split(b[order], sizes), strict=True)
            return torch.stack([x.T @ y for x, y in pairs]).numpy()

        e, mixed = v.end.shape[1], products_of(left, right)
        moments = Moments(
            gram=products_of(products, products),
            known=products_of(v.variance, squares).reshape(folds, -1, e, e),
            going_on=mixed[:, :, :e],
            echo=mixed[:, :, e : 2 * e],
            target=mixed[:, :, 2 * e :],
            total=np.stack([part.sum(0).numpy() for part in torch.split(values[order], sizes)]),
            strings=np.bincount(fold, minlength=folds).astype(np.float64),
        )
        return cls(fold, sums.numpy(), moments)

    def tidy(self) -> tuple[Folds, int]:
        """Without empty folds, and without the token features that are infinite or undefined somewhere; how many."""
        filled = self.moments.strings > 0
        fold = (np.cumsum(filled) - 1)[self.fold]
        moments = self.moments[filled]
        e, first = moments.echo.shape[-1], moments.known.shape[-3] * moments.echo.shape[-1]
        finite = np.all(np.isfinite(moments.gram.diagonal(axis1=-2, axis2=-1)), axis=0)
        good = np.all(finite[first:].reshape(-1, e), axis=1)
        if good.all():
            return Folds(fold, self.sums, moments), 0
        keep = np.concatenate([np.ones(first, dtype=bool), np.repeat(good, e)])
        return Folds(fold, self.sums[:, keep], moments.columns(keep)), int((~good).sum())

    @property
    def features(self) -> int:
        """How many token features the variates hold."""
        c, e = self.moments.echo.shape[-2:]
        return int(c // e - self.moments.known.shape[-3])
