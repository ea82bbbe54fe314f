"""A run over bytes: models with different tokenizers, compared as laws of texts."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from klkit.api.settings import DEFAULT_BEAM, Settings
from klkit.models.base import LanguageModel, Named, VocabularyMismatch
from klkit.models.byte_level import BYTES, ByteLevel, byte_level
from klkit.models.token_bytes import byte_lengths
from klkit.models.wrap import innermost, temperature


def over_bytes(model: LanguageModel, settings: Settings) -> ByteLevel:
    """The model's law of texts, its choices of tokens at the run's temperature; a byte-level model as it is."""
    if isinstance(model, ByteLevel):
        return model
    if settings.temperature != 1.0:
        model = temperature(model, settings.temperature)
    return byte_level(model, beam=settings.beam or DEFAULT_BEAM)


def symbol_of(model: Named) -> str:
    """What the model chooses at each decision, in a word."""
    return "byte" if getattr(model, "vocabulary", None) == BYTES else "token"


def text_sizes(model: LanguageModel) -> Int[Tensor, " v"] | None:
    """How many bytes of text each symbol of the model's vocabulary adds, ``(v,)``; None where that is not known.

    Ends, and tokens that stand for no text, add none.
    """
    if model.vocabulary == BYTES:
        sizes = torch.ones(BYTES.size, dtype=torch.long)
        sizes[list(BYTES.ends)] = 0
        return sizes
    try:
        return byte_lengths(model)
    except VocabularyMismatch:
        return None


def cost_notes(*models: LanguageModel) -> tuple[str, ...]:
    """What the byte-level ones among the models have cost and left out since they were made, one note each."""
    found = []
    for model in models:
        inner = innermost(model)
        if isinstance(inner, ByteLevel):
            found.append(f"{inner.name}: {inner.ledger}")
    return tuple(dict.fromkeys(found))
