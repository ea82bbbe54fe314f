"""The numerical floor: how far a model is from itself when it is computed in another shape of batch."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from klkit.estimators import summarise
from klkit.estimators.statistics import TokenStatistics, collect
from klkit.models.base import LanguageModel
from klkit.sequences import Sequences


@torch.no_grad()
def floor(p: LanguageModel, hidden: Float[Tensor, "m d"], x: Sequences, *, batch_size: int = 32) -> dict[str, Any]:
    """``KL(p as it sampled ‖ p teacher-forced)`` per response, in nats: what rounding alone looks like.

    Both sides are one model reading one text, so anything above zero is noise of the arithmetic. An
    estimate that is not well above it says nothing about the models. Returns ``kind``, ``value``, ``stderr`` and
    ``n``, the number of strings.

    Args:
        hidden: trunk vectors of the sampling pass (``Draw.hidden``).
        x: the strings it drew.
        batch_size: strings a batch of the second pass.

    Raises:
        ValueError: there is not one trunk vector for each decision.

    Example:
        >>> from klkit.models.automaton import coin
        >>> from klkit.sampling.ancestral import sample
        >>> p = coin(end=0.5)
        >>> drawn = sample(p, [p.context(None)] * 20, max_tokens=60, seed=0)
        >>> floor(p, drawn.hidden, drawn.sequences)["value"]
        0.0
    """
    if len(hidden) != x.decisions:
        raise ValueError(
            f"expected one trunk vector for each of {x.decisions} decisions, got {len(hidden)}; pass the strings and "
            f"the trunk vectors of one draw"
        )
    parts, done = [], 0
    for rows in torch.split(torch.arange(len(x)), batch_size):
        batch = x.select(rows)
        parts.append(collect(p, hidden[done : done + batch.decisions], p, p.encode(batch), batch))
        done += batch.decisions
    estimate = summarise("rb", TokenStatistics.cat(parts))
    kind = "sampling pass against teacher forcing"
    return {"kind": kind, "value": estimate.value, "stderr": estimate.stderr, "n": estimate.n}
