"""A few numbers for each decision of each string: all that any estimator reads.

Both models' log-probabilities meet here once, chunk by chunk, and leave as scalars. Every estimator
is then a fold over the same :class:`TokenStatistics`, so all of them see the same strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from klkit.divergences.fused import RowStatistics, mixture_kl, row_statistics
from klkit.models.base import LanguageModel, VocabularyMismatch
from klkit.numerics import rows_per_chunk
from klkit.sequences import Sequences


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

    @staticmethod
    def cat(parts: Sequence[TokenStatistics]) -> TokenStatistics:
        """Concatenate the statistics of successive batches."""
        rows = {f.name: torch.cat([getattr(part.rows, f.name) for part in parts]) for f in fields(RowStatistics)}
        mixtures = [part.mixture for part in parts if part.mixture is not None]
        return TokenStatistics(
            x=Sequences.cat([part.x for part in parts]),
            rows=RowStatistics(**rows),
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
) -> TokenStatistics:
    """Read both models out over one batch and reduce each decision to scalars.

    Args:
        hidden_p: trunk vectors of ``p``, from its sampling pass or from ``p.encode(x)``.
        hidden_q: trunk vectors of ``q`` for the same decisions.
        features: one vector a token for the control variates.
        mixture: also compute the terms of the Jensen-Shannon divergence.

    Raises:
        VocabularyMismatch: the two read-outs have different widths.
    """
    targets, row = x.targets(), x.row()
    size = rows_per_chunk(p.vocabulary.size)
    table = features
    parts: list[RowStatistics] = []
    innovations: list[Tensor] = []
    mixtures: list[Tensor] = []
    log_ratio = torch.zeros(len(x), dtype=torch.float64)  # Σ_{i<n} u_i of each string so far
    for h, g, y, r in zip(
        hidden_p.split(size), hidden_q.split(size), targets.split(size), row.split(size), strict=True
    ):
        logp, logq = p.readout(h), q.readout(g)
        if logp.shape != logq.shape:
            raise VocabularyMismatch(
                f"expected two models over one vocabulary, got rows of {logp.shape[-1]} and {logq.shape[-1]} "
                f"log-probabilities; align the models with klkit.models.align first"
            )
        y = y.to(logp.device)
        stats = row_statistics(logp, logq, y, p.vocabulary.ends)
        if table is not None:
            table = table.to(logp)
            innovations.append((table[y] - logp.exp() @ table).cpu())
        if mixture:
            u = (stats.logp - stats.logq).double().cpu()
            before = torch.zeros_like(u)
            # The posterior odds of p against q given the prefix need the log-ratios in order.
            for i in range(len(u)):
                before[i] = log_ratio[r[i]]
                log_ratio[r[i]] += u[i]
            mixtures.append(mixture_kl(logp, logq, before.to(logp)).cpu())
        parts.append(RowStatistics(**{f.name: getattr(stats, f.name).cpu() for f in fields(RowStatistics)}))
    rows = {f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(RowStatistics)}
    m = x.decisions
    return TokenStatistics(
        x=x,
        rows=RowStatistics(**rows),
        features=torch.cat(innovations) if innovations else rows["kl"].new_zeros(m, 0),
        mixture=torch.cat(mixtures) if mixture else None,
    )


def score(
    p: LanguageModel,
    q: LanguageModel,
    x: Sequences,
    *,
    contexts_q: Sequence[Tensor] | None = None,
    batch_size: int = 32,
    features: Float[Tensor, "v f"] | None = None,
    mixture: bool = False,
) -> TokenStatistics:
    """Score given strings with both models: one teacher-forced pass of each, batch by batch.

    Args:
        contexts_q: what ``q`` reads before each string, when it differs from ``p``'s context.
        batch_size: strings a batch; the same batches, and so the same shapes, for both models.

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
    for i in range(0, len(x), batch_size):
        chosen = torch.arange(i, min(i + batch_size, len(x)))
        mine, theirs = x.select(chosen), y.select(chosen)
        parts.append(
            collect(p, p.encode(mine), q, q.encode(theirs), mine, features=features, mixture=mixture)
        )
    return TokenStatistics.cat(parts)
