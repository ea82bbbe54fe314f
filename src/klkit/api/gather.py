"""What a run remembers of its batches: sums of all of them, and the few strings that its report shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from klkit.api.breakdown import PositionSums, TokenSums, breakdown
from klkit.api.bytewise import text_sizes
from klkit.api.facets import FacetSums, finite
from klkit.api.plan import Plan
from klkit.estimators.folds import deal
from klkit.estimators.statistics import TokenStatistics
from klkit.estimators.strings import StringStatistics
from klkit.estimators.tally import Tally
from klkit.models.base import LanguageModel, Named
from klkit.models.token_classes import CLASSES, token_classes
from klkit.report.shards import Batch, Details, Shown


@dataclass(frozen=True, slots=True)
class TokenTables:
    """What each token of a vocabulary is.

    Attributes:
        classes: its kind (``token_classes``).
        sizes: bytes of text that it stands for (``text_sizes``); None where that is not known.
    """

    classes: Int[Tensor, " v"]
    sizes: Int[Tensor, " v"] | None

    @staticmethod
    def of(model: LanguageModel) -> TokenTables:
        """Those of the model's vocabulary: every token is read, so whoever needs them often keeps them."""
        return TokenTables(token_classes(model), text_sizes(model))


class Gathered:
    """The batches of a run, summed up as they come: a few hundred bytes a string, none for a token.

    Args:
        clusters: how many independent units the run may draw, numbered from 0, for the folds of the control
            variates; 0 where none are wanted.
        every: keep the divergence of every decision, four bytes each: for quantiles, which sums do not give.
        tables: of ``p``'s tokens; without, nothing is broken down by kind, and texts have no known size.
        groups: the group of each prompt, if prompts have one.
        first: whether strings begin where responses do.

    Attributes:
        tally: what estimators and checks read.
        floor: ``KL(p‖p)`` between two passes of ``p`` over the first strings.
    """

    def __init__(
        self,
        clusters: int,
        *,
        every: bool = False,
        tables: TokenTables | None = None,
        groups: Sequence[str] | None = None,
        first: bool = True,
    ) -> None:
        self.tally = Tally(deal(np.arange(clusters)) if clusters else None)
        self.floor = torch.zeros(0, dtype=torch.float64)
        self._positions: list[PositionSums] = []
        self._tokens: list[TokenSums] = []
        self._facets: list[FacetSums] = []
        self._classes = None if tables is None else tables.classes
        self._sizes = None if tables is None else tables.sizes
        self._groups, self._first = groups, first
        self._shown: list[tuple[TokenStatistics, Details, int]] = []
        self._every: list[Tensor] | None = [] if every else None
        self._strings = 0
        self._bytes: list[Tensor] = []

    @staticmethod
    def of_plan(plan: Plan, tables: TokenTables) -> Gathered:
        """For strings that are drawn."""
        return Gathered(plan.clusters, tables=tables, groups=plan.groups)

    @staticmethod
    def of_text(tables: TokenTables) -> Gathered:
        """For windows of a given text."""
        return Gathered(0, every=True, tables=tables, first=False)

    def add(self, batch: Batch) -> None:
        """Count in a batch."""
        statistics, details = batch.statistics, batch.details
        self.tally.add(statistics)
        self.floor = torch.cat([self.floor, batch.floor])
        self._positions.append(PositionSums.of(statistics))
        self._facets.append(FacetSums.of(statistics, self._classes, first=self._first))
        kl, ratio = statistics.rows.kl.double().numpy(), statistics.log_ratio.double().numpy()
        tokens = TokenSums.of(statistics.x.targets().numpy(), finite(kl), ratio)
        self._tokens = [TokenSums.cat([*self._tokens, tokens])]
        if not self._shown or len(details.string):
            self._shown.append((statistics.select(details.string), details, self._strings))
        if self._every is not None:
            self._every.append(statistics.rows.kl)
        self._strings += len(statistics.x)
        if self._sizes is not None:
            self._bytes.append(statistics.per_string(self._sizes[statistics.x.targets()].double()))

    def __len__(self) -> int:
        return self._strings

    @property
    def strings(self) -> StringStatistics:
        """The sums of every string."""
        return self.tally.strings()

    @property
    def bytes(self) -> Float[Tensor, " n"] | None:
        """How long the text of every completion is, if that is known; an end adds nothing."""
        return None if self._sizes is None else torch.cat(self._bytes)

    @property
    def shown(self) -> Shown:
        """The strings that the report shows token by token."""
        parts, details, offsets = zip(*self._shown, strict=True)
        return Shown(TokenStatistics.cat(parts), Details.cat(details, offsets))

    @property
    def every(self) -> NDArray[np.float64]:
        """The divergence of every decision, if it was kept, ``(m,)``."""
        return torch.cat(self._every or [torch.zeros(0)]).double().numpy()

    def parts(self, model: Named) -> dict[str, Any]:
        """Where the divergence sits, as the report shows it."""
        self._positions, self._facets = [PositionSums.cat(self._positions)], [FacetSums.cat(self._facets)]
        return breakdown(self.strings, self._positions[0], self._tokens[0], self._facets[0], model.pieces, self._groups)

    def kinds(self) -> dict[str, list[int]]:
        """The drawn tokens that the report shows, by their kind."""
        if self._classes is None:
            return {}
        ids = torch.unique(self.shown.statistics.x.targets())
        return {name: ids[self._classes[ids] == i].tolist() for i, name in enumerate(CLASSES)}
