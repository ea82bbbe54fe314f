"""All strings of a small model: expectations as plain sums, for every model that can be stepped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from klkit.models.base import LanguageModel
from klkit.sequences import Content, Sequences


@dataclass(frozen=True)
class Strings:
    """Every string of positive probability, cut at a length limit, and its law.

    ``x`` also holds the cut strings (``finished`` False), so ``probability`` sums to one.
    """

    x: Sequences
    logp: Tensor  # (n,), fp64

    @property
    def probability(self) -> Tensor:
        return self.logp.exp()

    def mean(self, values: Tensor) -> float:
        """``E[f]`` of one value a string."""
        return float(self.probability @ values.double())

    def covariance(self, a: Tensor, b: Tensor) -> float:
        """``Cov(f, g)`` of one value a string each."""
        a, b = a.double(), b.double()
        return float(self.probability @ ((a - self.mean(a)) * (b - self.mean(b))))

    def variance(self, values: Tensor) -> float:
        return self.covariance(values, values)


def strings(model: LanguageModel, max_tokens: int, *, prompt: Content | None = None) -> Strings:
    """Enumerate by stepping the model breadth first: shorter strings first, then by token ids."""
    context = model.context(prompt)
    state, hidden = model.begin([context])
    prefixes = torch.zeros(1, 0, dtype=torch.long)
    logp = torch.zeros(1, dtype=torch.float64)
    ends = torch.tensor(model.vocabulary.ends)
    done: list[tuple[Tensor, float, bool]] = []
    for depth in range(1, max_tokens + 1):
        rows = model.readout(hidden).double()
        parent, token = (rows > -torch.inf).nonzero(as_tuple=True)
        logp = logp[parent] + rows[parent, token]
        prefixes = torch.cat([prefixes[parent], token[:, None]], -1)
        ended = torch.isin(token, ends)
        stop = ended | (depth == max_tokens)
        done += [(prefixes[i], float(logp[i]), bool(ended[i])) for i in stop.nonzero()[:, 0].tolist()]
        live = (~stop).nonzero()[:, 0]
        if not len(live):
            break
        prefixes, logp = prefixes[live], logp[live]
        state, hidden = model.advance(model.select(state, parent[live]), token[live])
    n = len(done)
    x = Sequences.pack(
        [context] * n,
        [completion for completion, _, _ in done],
        prompt=[0] * n,
        cluster=list(range(n)),
        finished=[ended for _, _, ended in done],
    )
    return Strings(x, torch.tensor([value for _, value, _ in done], dtype=torch.float64))


def scores(model: LanguageModel, x: Sequences) -> tuple[Tensor, Tensor]:
    """Log-probability of each decision, ``(m,)``, and the rows they come from, ``(m, v)``; fp64."""
    rows = model.readout(model.encode(x)).double()
    return rows.gather(1, x.targets()[:, None])[:, 0], rows


def per_string(x: Sequences, values: Tensor) -> Tensor:
    """Sum one value a decision over each string."""
    return torch.zeros(len(x), dtype=torch.float64).index_add_(0, x.row(), values.double())
