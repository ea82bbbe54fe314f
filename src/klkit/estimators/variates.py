"""Martingale control variates: what the tokens that were drawn say beyond what the prefix had already said.

An *innovation* is a function of the drawn token minus its mean under ``p`` given the prefix, and so has mean zero
whatever the prefix was. Multiplied by any function of the prefix it still has; a sum of such products can be
subtracted from any estimate without moving its mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from klkit import rng
from klkit.estimators.statistics import TokenStatistics

OUTLYING = 1000.0  # a row of an embedding this many times longer than the typical one was never trained
ROWS = 4096  # rows of an embedding widened at a time
SKETCH = 256  # columns up to which the principal components are exact
ITERATIONS = 4  # of subspace iteration beyond that


def token_features(embedding: Float[Tensor, "v e"], count: int = 16) -> Float[Tensor, "v f"]:
    """First ``min(count, rank)`` principal components ``(W − W̄) V_k`` of a token embedding, scaled to unit variance.

    Equal embeddings give equal features: signs are fixed, and so is the start of the subspace iteration by which
    tables of more than 256 columns are reduced (N. Halko, P.-G. Martinsson and J. Tropp, 2009, arXiv 0909.4061).

    Rows that hold infinities or not-a-numbers, or that are absurdly long, as the unused rows at the end of a padded
    table may be, count as the mean: their features are 0, and they have no part in the components.

    Args:
        embedding: one vector a token.
        count: components wanted.

    Shapes: ``(v, e)`` to ``(v, f)``, single precision.

    Example:
        >>> import torch
        >>> token_features(torch.eye(5), 3).shape
        torch.Size([5, 3])
    """
    table = embedding.detach().cpu()
    length = torch.cat([rows.double().norm(dim=1) for rows in torch.split(table, ROWS)])
    usable = length.isfinite()
    if bool((usable & (length > 0)).any()):
        usable &= length <= OUTLYING * length[usable & (length > 0)].median()
    zero = torch.zeros(table.shape[1], dtype=torch.float64)
    mean = torch.stack([rows.sum(0) for rows in _centred(table, usable, zero)]).sum(0) / usable.sum().clamp(min=1)
    width = table.shape[1]
    # Any table gives valid variates, so of a wide one the leading components need not be exact: subspace iteration.
    axes = torch.eye(width, dtype=torch.float64)
    if width > SKETCH:
        start = torch.randn(width, 2 * count, dtype=torch.float64, generator=rng.stream(0, "token features"))
        axes = torch.linalg.qr(start).Q
        for _ in range(ITERATIONS):
            axes = torch.linalg.qr(_covariance(table, usable, mean, axes)).Q
    variance, inner = torch.linalg.eigh(axes.T @ _covariance(table, usable, mean, axes))
    order = variance.argsort(descending=True)[:count]
    order = order[variance[order] > 1e-10 * variance.max().clamp(min=1e-300)]
    axes = axes @ inner[:, order]
    largest = axes.abs().argmax(0)
    axes = axes * axes[largest, torch.arange(len(order))].sign() / variance[order].sqrt()
    return torch.cat([(centred @ axes).float() for centred in _centred(table, usable, mean)])


def _centred(table: Tensor, usable: Tensor, mean: Tensor) -> Iterator[Tensor]:
    """The rows of ``table`` less their mean, some at a time: no copy of the table is made."""
    for rows, good in zip(torch.split(table, ROWS), torch.split(usable, ROWS), strict=True):
        yield torch.where(good[:, None], rows.double() - mean, 0.0)


def _covariance(table: Tensor, usable: Tensor, mean: Tensor, axes: Tensor) -> Tensor:
    """Covariance of the rows of ``table`` times ``axes``."""
    total = torch.zeros_like(axes)
    for centred in _centred(table, usable, mean):
        total += centred.T @ (centred @ axes)
    return total / len(table)


@dataclass(frozen=True, slots=True, eq=False)
class Variates:
    """Products of innovations and prefix functions, one row a decision, all in double precision.

    With ``B_n = (1, n)`` for the ``n``-th decision of a string, counted from 1, and ``e_n = p(end|prefix)``:

    Attributes:
        end: ``(1[y_n ≠ end] − (1 − e_n)) B_n``, ``(m, b)``.
        other: each of the other innovations times ``B_n``, ``(m, k)``.
        going_on: ``1[y_n ≠ end] B_n``, of which ``end`` is the innovation, ``(m, b)``.
        end_p: ``e_n``, ``(m,)``.
        variance: of the first innovations given the prefix, where statistics tell it: not ending, log-ratio,
            surprisal, ``(m, 3)``.
        basis: ``B_n``, ``(m, b)``.
    """

    end: Float[Tensor, "m b"]
    other: Float[Tensor, "m k"]
    going_on: Float[Tensor, "m b"]
    end_p: Float[Tensor, " m"]
    variance: Float[Tensor, "m 3"]
    basis: Float[Tensor, "m b"]


def variates(statistics: TokenStatistics) -> Variates:
    """Innovations ``f(y_n) − Σ_a p(a|prefix) f(a)``, each times 1 and times the position.

    The functions ``f`` are: not ending; the log-ratio ``log p − log q``; the surprisal ``−log p``; and the token
    features that ``statistics`` carries. A linear function of the position is a linear function of the length that
    remains under any limit, so the limit itself need not be known.

    Example:
        >>> from klkit.estimators.statistics import score
        >>> from klkit.models.automaton import coin
        >>> from klkit.sampling.ancestral import sample
        >>> p, q = coin(end=0.5), coin(end=0.25)
        >>> x = sample(p, [p.context(None)], max_tokens=50, seed=0).sequences
        >>> variates(score(p, q, x)).end[-1].tolist() == [-0.5, -0.5 * int(x.lengths)]
        True
    """
    rows = statistics.rows
    basis = prefix_basis(statistics)
    going_on, end_p = (~ended(statistics)).double(), rows.end_p.double()
    innovations = torch.stack(
        [statistics.log_ratio.double() - rows.kl.double(), -rows.logp.double() - rows.entropy_p.double()], dim=1
    )
    # Of laws that are known in part the variance is not known: the square of what was drawn has it for its mean.
    ratio = rows.variance_ratio.double()
    ratio = torch.where(ratio.isnan(), innovations[:, 0].square(), ratio)
    innovations = torch.cat([innovations, statistics.features.double()], dim=1)
    return Variates(
        end=(going_on - (1 - end_p))[:, None] * basis,
        other=(innovations[:, :, None] * basis[:, None, :]).flatten(1),
        going_on=going_on[:, None] * basis,
        end_p=end_p,
        variance=torch.stack([end_p * (1 - end_p), ratio, rows.variance_logp.double()], dim=1),
        basis=basis,
    )


def prefix_basis(statistics: TokenStatistics) -> Float[Tensor, "m 2"]:
    """``(1, n)`` at the ``n``-th decision of each string, counted from 1."""
    position = statistics.x.position().double() + 1
    return torch.stack([torch.ones_like(position), position], dim=1)


def ended(statistics: TokenStatistics) -> Bool[Tensor, " m"]:
    """Whether the token drawn at a decision ended its string: the last one of each string that was not cut."""
    x = statistics.x
    row = x.row()
    return x.finished[row] & (x.position() == x.lengths[row] - 1)


def later(statistics: TokenStatistics, values: Float[Tensor, "m c"]) -> Float[Tensor, "m c"]:
    """``Σ_{j>n} values_j`` over the later decisions of the same string."""
    row, place, lengths = statistics.x.row(), statistics.x.position(), statistics.x.lengths
    # Padded, so that no string's rounding reaches another one.
    running = values.new_zeros(len(lengths), int(lengths.max()) if len(lengths) else 0, values.shape[1])
    running[row, place] = values
    running = running.cumsum(1)
    return running[row, lengths[row] - 1] - running[row, place]
