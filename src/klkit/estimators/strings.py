"""What is left of strings once their decisions are summed: all that most estimators read.

A run may see many millions of decisions, and keeps none of them. Each batch is reduced to a row of sums a string as
soon as it is scored; rows of several batches are simply put one below the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class StringStatistics:
    """Sums over the decisions of each string, in double precision and nats; every field has one entry a string.

    With ``w_{≤n} = Π_{i≤n} p(y_i)/μ(y_i)`` for strings that another law ``μ`` drew, and 1 for those of ``p``:

    Attributes:
        prompt: index of the prompt.
        cluster: the independent unit.
        finished: whether the string ended by itself.
        lengths: decisions.
        identity: 128 bits that equal completions share, and others do not, ``(n, 2)``.
        weight: ``p(y)/μ(y)`` of the whole string.
        logp: ``log p(y)``.
        log_drawn: ``log μ(y)``.
        log_ratio: ``U = Σ u_n``, ``u_n = log p(y_n) − log q(y_n)``.
        kl: ``Σ D_n``, ``D_n`` the divergence of a decision.
        finite_kl: the same over the decisions at which it is finite.
        mc: ``Σ w_{≤n} u_n``.
        k3: ``Σ w_{≤n} (u_n + exp(−u_n) − 1)``.
        rb: ``Σ w_{<n} D_n``.
        decisions: ``Σ w_{<n}``, of the same mean as the length of a string from ``p``.
        mixture: ``Σ w_{<n} KL(p_n ‖ m_n)``, if the Jensen-Shannon divergence was asked for.
        surprise: ``Σ (u_n − D_n)`` where both are finite.
        infinite: decisions at which ``q`` excludes what ``p`` allows.
        reached: those of them that ``p`` ever comes to.
        reverse_kl: sum of the reverse divergences at the same prefixes.
        total_variation: the same of the total variations.
        js: the same of the Jensen-Shannon divergences of the next-token laws, if they were asked for.
        entropy_p: the same of ``p``'s entropies.
        entropy_q: the same of ``q``'s entropies.
        same_top: decisions at which both models hold the same token for the most probable one.
        mismatch: ``Σ (exp(r_n) − 1 − r_n)`` with ``r_n = log p(y_n) − log μ(y_n)``: 0 where ``p`` drew the string.
        own: whether ``p`` itself drew the string.
    """

    prompt: Int[Tensor, " n"]
    cluster: Int[Tensor, " n"]
    finished: Bool[Tensor, " n"]
    lengths: Int[Tensor, " n"]
    identity: Int[Tensor, "n 2"]
    weight: Float[Tensor, " n"]
    logp: Float[Tensor, " n"]
    log_drawn: Float[Tensor, " n"]
    log_ratio: Float[Tensor, " n"]
    kl: Float[Tensor, " n"]
    finite_kl: Float[Tensor, " n"]
    mc: Float[Tensor, " n"]
    k3: Float[Tensor, " n"]
    rb: Float[Tensor, " n"]
    decisions: Float[Tensor, " n"]
    mixture: Float[Tensor, " n"] | None
    surprise: Float[Tensor, " n"]
    infinite: Float[Tensor, " n"]
    reached: Float[Tensor, " n"]
    reverse_kl: Float[Tensor, " n"]
    total_variation: Float[Tensor, " n"]
    js: Float[Tensor, " n"] | None
    entropy_p: Float[Tensor, " n"]
    entropy_q: Float[Tensor, " n"]
    same_top: Float[Tensor, " n"]
    mismatch: Float[Tensor, " n"]
    own: Bool[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def foreign(self) -> bool:
        """Whether any string was drawn by another law than ``p``."""
        return not bool(self.own.all())

    @property
    def truncated(self) -> float:
        """Share of the strings that were cut at the length limit."""
        return 1 - float(self.finished.double().mean())

    @property
    def prompts(self) -> int:
        """How many different prompts there are."""
        return len(torch.unique(self.prompt))

    def select(self, strings: Int[Tensor, " k"]) -> StringStatistics:
        """Those of the strings ``strings``, in that order."""
        columns: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(StringStatistics)}
        columns |= {name: column[strings] for name, column in columns.items() if column is not None}
        return StringStatistics(**columns)

    @staticmethod
    def cat(parts: Sequence[StringStatistics]) -> StringStatistics:
        """Those of several batches, one after the other."""
        columns: dict[str, Any] = {f.name: [getattr(part, f.name) for part in parts] for f in fields(StringStatistics)}
        columns = {name: None if column[0] is None else torch.cat(column) for name, column in columns.items()}
        return StringStatistics(**columns)
