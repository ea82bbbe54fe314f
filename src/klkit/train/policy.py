"""What is trained and what it is held to: a policy and its reference, with all weights or a LoRA adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from klkit.models.base import VocabularyMismatch
from klkit.sequences import Sequences
from klkit.train.learner import ALL_LAYERS, Learner, full_learner, lora_learner

if TYPE_CHECKING:
    from klkit.models.hf import HuggingFaceModel


@dataclass(frozen=True, eq=False, slots=True)
class Policy(Learner):
    """A model under training, the policy ``p``, and the law it is held to.

    Attributes:
        reference: ``q``, which stays as it is.
    """

    reference: HuggingFaceModel = field(kw_only=True)


def full_policy(model: HuggingFaceModel, reference: HuggingFaceModel | None = None) -> Policy:
    """A copy of ``model`` whose weights are all trained, held to ``reference`` (by default ``model`` itself).

    Raises:
        VocabularyMismatch: the reference does not choose from the same tokens.
        ValueError: weights are in half precision, or belong to an adapter.
    """
    reference = model if reference is None else reference
    require_same_vocabulary(model, reference)
    return Policy(full_learner(model).model, reference=reference)


def lora_policy(
    model: HuggingFaceModel,
    rank: int,
    *,
    alpha: float | None = None,
    layers: str | Sequence[str] = ALL_LAYERS,
    seed: int = 0,
    in_place: bool = False,
) -> Policy:
    """A LoRA adapter of ``rank`` on a copy of ``model``; the reference is the same network, adapter off.

    Args, raises and source: as :func:`klkit.train.learner.lora_learner`.
    """
    learner, reference = lora_learner(model, rank, alpha=alpha, layers=layers, seed=seed, in_place=in_place)
    return Policy(learner.model, learner.adapter, reference=reference)


def require_same_vocabulary(p: HuggingFaceModel, q: HuggingFaceModel) -> None:
    """Refuse a reference with other tokens or other ends.

    Raises:
        VocabularyMismatch: they differ.
    """
    if p.vocabulary.fingerprint == q.vocabulary.fingerprint and p.vocabulary.ends == q.vocabulary.ends:
        return
    what = "tokens" if p.vocabulary.fingerprint != q.vocabulary.fingerprint else "end tokens"
    raise VocabularyMismatch(
        f"expected a reference with the policy's vocabulary, got other {what}: {p.vocabulary.size} tokens ending at "
        f"{list(p.vocabulary.ends)} in {p.name}, {q.vocabulary.size} ending at {list(q.vocabulary.ends)} in {q.name}; "
        f"the KL term needs both laws over the same tokens, so start both from one base model"
    )


@dataclass(frozen=True, eq=False, slots=True)
class Decisions:
    """Strings with their decisions side by side: decision ``n`` of every string in column ``n``.

    Attributes:
        x: the strings.
        tokens: what was drawn, ``(n, l)``; 0 outside the mask.
        mask: where a string has a decision.
        column: the column of ``x.tokens`` whose output predicts it.
    """

    x: Sequences
    tokens: Int[Tensor, "n l"]
    mask: Bool[Tensor, "n l"]
    column: Int[Tensor, "n l"]

    @classmethod
    def of(cls, x: Sequences) -> Decisions:
        """Lay out the decisions of ``x``."""
        offset = torch.arange(int(x.lengths.max()))
        mask = offset < x.lengths[:, None]
        place = torch.where(mask, x.start[:, None] + offset, 1)
        return cls(x, x.tokens.gather(1, place).masked_fill(~mask, 0), mask, place - 1)

    def spread(self, values: Float[Tensor, " m"]) -> Float[Tensor, "n l"]:
        """Numbers of flat decisions in this layout; 0 outside the mask."""
        out = values.new_zeros(self.mask.shape)
        out[self.mask] = values
        return out

    def hidden(self, model: HuggingFaceModel) -> Float[Tensor, "n l d"]:
        """What enters the head at every decision; differentiable unless gradients are off."""
        trunk = model.trunk(self.x.tokens[:, : int(self.x.stop.max()) - 1])
        return trunk[torch.arange(len(trunk))[:, None], self.column]
