"""Estimand F: both models read the same fixed text, and nothing is sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from klkit.sequences import Sequences

ENOUGH_DOCUMENTS = 10  # below this, windows rather than documents are the unit of the interval


@dataclass(frozen=True, slots=True)
class Windows:
    """A text cut into what the models read at once.

    Attributes:
        x: each window's context and scored tokens; the cluster is the unit of the interval.
        notes: what a reader must know about the cutting.
    """

    x: Sequences
    notes: tuple[str, ...]


def cut(documents: Sequence[str], tokenise: Callable[[str], Int[Tensor, " l"]], size: int) -> Windows:
    """Cut documents into windows of at most ``size`` tokens.

    A document that fits is scored whole after its first token. A longer one is cut into windows that
    do not overlap, and the second half of each is scored, so that every scored token has at least
    half a window of context: the convention of llama.cpp's perplexity tool.

    Args:
        tokenise: turns a document into ids, with what the tokenizer puts before a text.
        size: no longer than either model's window.

    Raises:
        ValueError: no document has two tokens.
    """
    if size < 2:
        raise ValueError(f"expected windows of at least two tokens, got {size}; raise --context")
    contexts, completions, document_of = [], [], []
    left_out = 0
    for number, document in enumerate(documents):
        ids = tokenise(document)
        if len(ids) <= size:
            pieces = [(ids[:1], ids[1:])] if len(ids) > 1 else []
        else:
            whole = len(ids) // size
            left_out += len(ids) - whole * size
            half = size // 2
            pieces = [(w[:half], w[half:]) for w in ids[: whole * size].reshape(whole, size)]
        for context, completion in pieces:
            contexts.append(context)
            completions.append(completion)
            document_of.append(number)
    if not completions:
        raise ValueError(
            "expected a document of at least two tokens, got none; there is nothing to predict in this text"
        )
    many = len(set(document_of)) >= ENOUGH_DOCUMENTS
    notes = [f"{len(documents)} document(s), {len(contexts)} window(s) of at most {size} tokens"]
    if left_out:
        notes.append(f"{left_out} tokens at the ends of long documents fill no whole window and are not scored")
    if not many:
        notes.append(
            f"fewer than {ENOUGH_DOCUMENTS} documents: the interval speaks of windows of these documents, "
            f"not of other text"
        )
    x = Sequences.pack(
        contexts,
        completions,
        prompt=document_of,
        cluster=document_of if many else list(range(len(contexts))),
    )
    return Windows(x, tuple(notes))
