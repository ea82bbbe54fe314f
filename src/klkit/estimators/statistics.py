"""A few numbers for each decision of each string: all that any estimator reads.

Both models' log-probabilities meet here once, chunk by chunk, and leave as scalars. Every estimator
is then a fold over the same :class:`TokenStatistics`, so all of them see the same strings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from klkit.divergences import backends
from klkit.divergences.fused import RowStatistics, mixture_kl, row_statistics
from klkit.estimators.strings import StringStatistics
from klkit.models.base import LanguageModel, VocabularyMismatch, read_logits, read_rows
from klkit.numerics import excess, rows_per_chunk
from klkit.sequences import Sequences

CHUNKS_A_VISIT = 4
"""Cache-sized chunks whose rows are reduced together."""


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """Per-decision scalars of strings scored by ``p`` and ``q``, on the CPU.

    Attributes:
        x: the strings (with ``p``'s contexts).
        rows: scalars of each decision, see :class:`klkit.divergences.fused.RowStatistics`.
        features: ``φ(y_n) − Σ_a p(a|prefix) φ(a)`` for each token feature φ, ``(m, f)``; mean zero
            given the prefix, by construction.
        mixture: ``KL(p_n ‖ m_n)`` against the posterior mixture of the two string laws, ``(m,)``,
            when the Jensen-Shannon divergence was asked for.
    """

    x: Sequences
    rows: RowStatistics
    features: Float[Tensor, "m f"]
    mixture: Float[Tensor, " m"] | None = None

    @property
    def log_ratio(self) -> Float[Tensor, " m"]:
        """``u_n = log p(y_n|prefix) − log q(y_n|prefix)`` of the tokens that were drawn."""
        return self.rows.logp - self.rows.logq

    def per_string(self, values: Float[Tensor, " m"]) -> Float[Tensor, " n"]:
        """Sum per-decision ``values`` over each string, in double precision."""
        total = torch.zeros(len(self.x), dtype=torch.float64)
        return total.index_add_(0, self.x.row(), values.double())

    def before(self, values: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Sum per-decision ``values`` over the earlier decisions of the same string, in double precision."""
        return earlier_sums(values.double(), self.x.row(), torch.zeros(len(self.x), dtype=torch.float64))

    def importance_ratio(self) -> Float[Tensor, " m"]:
        """``log p(y_n|prefix) − log μ(y_n|prefix)`` with ``μ`` the law that drew the strings: 0 when that is ``p``."""
        logp, mu = self.rows.logp.double(), self.x.sampler_logp
        return torch.zeros_like(logp) if mu is None else logp - mu.double()

    def prefix_weight(self) -> Float[Tensor, " m"]:
        """``Π_{i<n} p(y_i)/μ(y_i)``: a function of the prefix times this has ``p``'s mean over strings of ``μ``."""
        if self.x.sampler_logp is None:
            return torch.ones(len(self.rows.logp), dtype=torch.float64)
        return self.before(self.importance_ratio()).exp()

    def token_weight(self) -> Float[Tensor, " m"]:
        """``Π_{i≤n} p(y_i)/μ(y_i)``: the same for functions of the prefix and the token drawn after it."""
        return self.prefix_weight() * self.importance_ratio().exp()

    def string_weight(self) -> Float[Tensor, " n"]:
        """``p(y)/μ(y)``: the same for functions of the whole string."""
        return self.per_string(self.importance_ratio()).exp()

    def usable(self) -> Bool[Tensor, " m"]:
        """Decisions whose log-ratio and its mean and variance under ``p`` are finite.

        But for tokens that ``p`` cannot have drawn, or that have no number, the prefix alone decides.
        """
        rows = self.rows
        finite = rows.kl.isfinite() & rows.entropy_p.isfinite() & rows.variance_logp.isfinite() & (rows.lost == 0)
        return finite & self.log_ratio.isfinite()

    def strings(self) -> StringStatistics:
        """The sums over each string's decisions.

        Example:
            >>> from klkit.models.automaton import coin
            >>> from klkit.sampling.ancestral import sample
            >>> p, q = coin(end=0.5), coin(end=0.25)
            >>> x = sample(p, [p.context(None)] * 4, max_tokens=50, seed=0).sequences
            >>> statistics = score(p, q, x)
            >>> bool((statistics.strings().kl == statistics.per_string(statistics.rows.kl)).all())
            True
        """
        rows, x, foreign = self.rows, self.x, self.x.sampler_logp is not None
        ratio, kl = self.log_ratio.double(), rows.kl.double()
        columns = {
            "logp": rows.logp,
            "log_ratio": ratio,
            "kl": kl,
            "finite_kl": kl.where(rows.lost == 0, 0.0),
            "k3": excess(-ratio),
            "surprise": (ratio - kl).where(self.usable(), 0.0),
            "infinite": rows.lost > 0,
            "reverse_kl": rows.reverse_kl,
            "total_variation": rows.total_variation,
            "entropy_p": rows.entropy_p,
            "entropy_q": rows.entropy_q,
            "same_top": rows.same_top,
        }
        if rows.js is not None:
            columns["js"] = rows.js
        if self.mixture is not None:
            columns["mixture"] = self.mixture
        if x.sampler_logp is not None:
            before, after = self.prefix_weight(), self.token_weight()
            columns |= {
                "log_drawn": x.sampler_logp,
                "mc": weighted(after, ratio),
                "k3": weighted(after, columns["k3"]),
                "rb": weighted(before, kl),
                "decisions": before,
                "reached": (rows.lost > 0) & (before > 0),
                "mismatch": excess(self.importance_ratio()),
            }
            if self.mixture is not None:
                columns["mixture"] = weighted(before, self.mixture.double())
        each = torch.stack([values.double() for values in columns.values()])
        total = torch.zeros(len(columns), len(x), dtype=torch.float64).index_add_(1, x.row(), each)
        sums = dict(zip(columns, total, strict=True))
        own = {
            "log_drawn": sums["logp"],
            "mc": sums["log_ratio"],
            "rb": sums["kl"],
            "decisions": x.lengths.double(),
            "reached": sums["infinite"],
            "mixture": None,
            "mismatch": torch.zeros(len(x), dtype=torch.float64),
            "js": None,
        }
        return StringStatistics(
            prompt=x.prompt,
            cluster=x.cluster,
            finished=x.finished,
            lengths=x.lengths,
            identity=identity(x),
            weight=self.string_weight() if foreign else torch.ones(len(x), dtype=torch.float64),
            own=torch.full((len(x),), not foreign),
            **(own | sums),
        )

    def select(self, strings: Int[Tensor, " k"]) -> TokenStatistics:
        """The statistics of the strings ``strings``, in that order."""
        first = self.x.lengths.cumsum(0) - self.x.lengths
        lengths = self.x.lengths[strings]
        starts = torch.repeat_interleave(first[strings] - (lengths.cumsum(0) - lengths), lengths)
        keep = starts + torch.arange(int(lengths.sum()))
        return TokenStatistics(
            x=self.x.select(strings),
            rows=self.rows.select(keep),
            features=self.features[keep],
            mixture=None if self.mixture is None else self.mixture[keep],
        )

    @staticmethod
    def cat(parts: Sequence[TokenStatistics]) -> TokenStatistics:
        """Concatenate the statistics of successive batches."""
        mixtures = [part.mixture for part in parts if part.mixture is not None]
        return TokenStatistics(
            x=Sequences.cat([part.x for part in parts]),
            rows=RowStatistics.cat([part.rows for part in parts]),
            features=torch.cat([part.features for part in parts]),
            mixture=torch.cat(mixtures) if mixtures else None,
        )


def collect(
    p: LanguageModel,
    hidden_p: Float[Tensor, "m d"],
    q: LanguageModel,
    hidden_q: Float[Tensor, "m e"],
    x: Sequences,
    *,
    features: Float[Tensor, "v f"] | None = None,
    mixture: bool = False,
    js: bool = False,
    backend: str | None = None,
    watch: Callable[[Tensor, Tensor], None] | None = None,
) -> TokenStatistics:
    """Read both models out over one batch and reduce each decision to scalars.

    Args:
        hidden_p: trunk vectors of ``p``, from its sampling pass or from ``p.encode(x)``.
        hidden_q: trunk vectors of ``q`` for the same decisions.
        features: one vector a token for the control variates.
        mixture: also compute the terms of the Jensen-Shannon divergence of the two laws over strings.
        js: also compute the Jensen-Shannon divergence of the two next-token laws at each decision.
        backend: kernels for the rows; by default chosen for this batch. Whoever has many batches names one for all, so
            that no number depends on which kernels happened to be loaded in between.
        watch: shown the logits of ``p`` and ``q`` at every decision in order, some rows at a time; they are gone
            afterwards.

    Raises:
        VocabularyMismatch: the two read-outs have different widths.
    """
    # A visit has a fixed price, and the kernels cut raw logits to the size of the cache themselves.
    size = rows_per_chunk(p.vocabulary.size) * (1 if mixture else CHUNKS_A_VISIT)
    table = features
    # The mixture is one of normalised laws; all else is had from raw logits, which cost a pass less.
    read = read_rows if mixture else read_logits
    overwrite = table is not None and not mixture
    # For the whole batch: a chunk alone would never be worth loading kernels for.
    backend = backend or backends.choose(x.decisions * p.vocabulary.size, hidden_p.device, p.dtype)
    parts: list[RowStatistics] = []
    innovations: list[Tensor] = []
    mixtures: list[Tensor] = []
    log_ratio = torch.zeros(len(x), dtype=torch.float64)  # Σ_{i<n} u_i of each string so far
    chunks = zip(
        read(p, hidden_p, rows=size),
        read(q, hidden_q, rows=size),
        torch.split(x.targets(), size),
        torch.split(x.row(), size),
        strict=True,
    )
    for first, second, y, row in chunks:
        if first.shape != second.shape:
            raise VocabularyMismatch(
                f"expected two models over one vocabulary, got rows of {first.shape[-1]} and {second.shape[-1]} "
                f"log-probabilities; align the models with klkit.models.align first"
            )
        y, second = y.to(first.device), second.to(first.device)
        if watch is not None:
            watch(first, second)
        stats = row_statistics(first, second, y, p.vocabulary.ends, overwrite=overwrite, js=js, backend=backend)
        if table is not None:
            table = table.to(first)
            innovations.append(table[y] - (first if overwrite else first.exp()) @ table)
        if mixture:
            # The posterior odds of p against q given the prefix: the log-ratios so far, in order.
            odds = earlier_sums((stats.logp - stats.logq).cpu().double(), row, log_ratio)
            mixtures.append(mixture_kl(first, second, odds.to(first)))
        parts.append(stats)
    # One transfer a field, not one a chunk: each would wait for the accelerator to finish.
    rows = RowStatistics.cat(parts).kept()
    return TokenStatistics(
        x=x,
        rows=rows,
        features=torch.cat(innovations).cpu() if innovations else rows.kl.new_zeros(x.decisions, 0),
        mixture=torch.cat(mixtures).cpu() if mixture else None,
    )


def identity(x: Sequences) -> Int[Tensor, "n 2"]:
    """128 bits for each string that equal completions share: a digest of the completion's ids."""
    ids = x.tokens.numpy()
    bounds = zip(ids, x.start.tolist(), x.stop.tolist(), strict=True)
    digests = [hashlib.blake2b(row[start:stop].tobytes(), digest_size=16).digest() for row, start, stop in bounds]
    return torch.tensor(np.frombuffer(b"".join(digests), dtype=np.int64)).view(-1, 2)


def weighted(weight: Float[Tensor, " b"], value: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """``weight · value`` with ``0 · ∞ = 0``: what ``p`` never does contributes nothing.

    Example:
        >>> import torch
        >>> weighted(torch.tensor([0.0, 0.5]), torch.tensor([torch.inf, 4.0])).tolist()
        [0.0, 2.0]
    """
    return torch.where(weight == 0, 0.0, weight * value)


def earlier_sums(
    values: Float[Tensor, " c"], row: Int[Tensor, " c"], carry: Float[Tensor, " n"]
) -> Float[Tensor, " c"]:
    """``carry[row] + Σ`` of the values that precede each one in its row; ``carry`` then moves past them.

    Rows must be in order, as the decisions of a batch are. Each row is summed on its own, so an
    infinite value reaches nothing but the rest of its row.

    Example:
        >>> import torch
        >>> carry = torch.tensor([0.0, 10.0])
        >>> earlier_sums(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 0, 1, 1]), carry).tolist()
        [0.0, 1.0, 10.0, 13.0]
        >>> carry.tolist()
        [3.0, 17.0]
    """
    if len(values) == 0:
        return values
    first = int(row[0])
    local = row - first
    lengths = local.bincount()
    place = torch.arange(len(values)) - (lengths.cumsum(0) - lengths)[local]
    block = values.new_zeros(len(lengths), int(lengths.max()) + 1)
    block[local, place + 1] = values
    block[:, 0] = carry[first : first + len(lengths)]
    block = block.cumsum(1)
    carry[first : first + len(lengths)] = block.gather(1, lengths[:, None])[:, 0]
    return block[local, place]


def score(
    p: LanguageModel,
    q: LanguageModel,
    x: Sequences,
    *,
    contexts_q: Sequence[Tensor] | None = None,
    batch_size: int = 32,
    features: Float[Tensor, "v f"] | None = None,
    mixture: bool = False,
    js: bool = False,
    watch: Callable[[Tensor, Tensor], None] | None = None,
) -> TokenStatistics:
    """Score given strings with both models: one teacher-forced pass of each, batch by batch.

    Args:
        contexts_q: what ``q`` reads before each string, when it differs from ``p``'s context.
        batch_size: strings a batch; the same batches, and so the same shapes, for both models.
        mixture, js: see :func:`collect`.
        watch: see :func:`collect`; shown the decisions of all batches in order.

    Example:
        >>> from klkit.models.automaton import coin
        >>> from klkit.sampling.ancestral import sample
        >>> p, q = coin(end=0.5), coin(end=0.25)
        >>> x = sample(p, [p.context(None)] * 4, max_tokens=50, seed=0).sequences
        >>> score(p, q, x).per_string(score(p, q, x).rows.kl).shape
        torch.Size([4])
    """
    parts = []
    y = x if contexts_q is None else x.after(contexts_q)
    backend = backends.choose(x.decisions * p.vocabulary.size, dtype=p.dtype)
    for i in range(0, len(x), batch_size):
        chosen = torch.arange(i, min(i + batch_size, len(x)))
        mine, theirs = x.select(chosen), y.select(chosen)
        part = collect(
            p,
            p.encode(mine),
            q,
            q.encode(theirs),
            mine,
            features=features,
            mixture=mixture,
            js=js,
            backend=backend,
            watch=watch,
        )
        parts.append(part)
    return TokenStatistics.cat(parts)
