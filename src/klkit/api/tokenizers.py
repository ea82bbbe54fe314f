"""Two models with different tokenizers are refused, with what can be compared: bits per byte of the same texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from klkit.api.approximate import contexts_of, draw_texts, tempered
from klkit.api.approximation import approximation
from klkit.api.batches import batches_of
from klkit.api.prepare import Pair, make_plan, prepare
from klkit.api.settings import Settings
from klkit.models.base import LanguageModel, VocabularyMismatch
from klkit.models.canonical import canonical, log_texts
from klkit.results import NATS_PER_BIT
from klkit.sequences import Prompts, Sequences

RESPONSES, TOKENS = 16, 64  # of p, where no text is given: enough to tell how well each model predicts
DOCUMENTS, CHARACTERS = 16, 2000  # of a given text, at most: a refusal should not take minutes
WINDOW, TOGETHER = 512, 16
REMAINING = (
    "Divergences that need no common tokenizer: --bytes (bytes=True), between the laws of texts, byte by byte, exact "
    "up to its beam, and slower; --approximate (approximate=True), from one tokenisation of each text, quick, and off "
    "by two errors of opposite sign"
)


def prepare_or_explain(
    p: LanguageModel,
    q: LanguageModel,
    settings: Settings,
    prompts: Prompts | None = None,
    documents: Sequence[str] | None = None,
) -> Pair:
    """Two models ready to be compared; where their tokenizers differ, the refusal says what can be compared.

    Raises:
        VocabularyMismatch: an id stands for different strings in the two models.
        ValueError: the settings ask for no divergence.
    """
    if settings.approximate:
        raise ValueError(
            "expected settings of a divergence, got approximate=True, which gives a number of another kind; leave it "
            "out, or call klkit estimate with --approximate"
        )
    try:
        return prepare(p, q, settings, prompts)
    except VocabularyMismatch as error:
        if settings.bytes:
            raise
        found = comparable(p, q, settings, prompts, documents)
        if found is None:
            raise
        raise VocabularyMismatch(f"{error}. {found}. {REMAINING}") from None


def comparable(
    p: LanguageModel,
    q: LanguageModel,
    settings: Settings,
    prompts: Prompts | None,
    documents: Sequence[str] | None,
) -> str | None:
    """Bits per byte of both models on the same texts, in words; None where they cannot be had."""
    try:
        p, q = tempered(p, settings.temperature), tempered(q, settings.temperature)
        if documents is not None:
            some = [text[:CHARACTERS] for text in documents[:DOCUMENTS]]
            first, second = document_bits(p, some), document_bits(q, some)
            whole = len(documents) <= DOCUMENTS and max(map(len, documents)) <= CHARACTERS
            what = f"the same text ({'all of it' if whole else 'its beginning'}, {sum(map(_size, some)):,} bytes)"
        else:
            first, second, limit = response_bits(p, q, settings, prompts)
            what = f"the same {RESPONSES} responses of p of at most {limit} tokens, which favour p"
    # Whatever keeps two strangers from being compared so, the refusal itself is the message.
    except (ValueError, TypeError, KeyError, RuntimeError):
        return None
    return f"What can be compared: {p.name} takes {first:.3g} bits per byte and {q.name} {second:.3g} for {what}"


def document_bits(model: LanguageModel, documents: Sequence[str]) -> float:
    """``−Σ log2 p / Σ bytes`` of documents in the model's canonical tokens, all of them scored, ends left out.

    Long documents are read in windows, half of each a context that was scored before.

    Raises:
        ValueError: no text, or one that the model's tokenizer changes.
        VocabularyMismatch: as :func:`klkit.models.canonical.canonical`.
    """
    write, start = canonical(model), model.context(None)
    half = min(WINDOW, model.window or WINDOW) // 2
    contexts, completions, size = [], [], 0
    for text in documents:
        ids = write(text)
        if ids is None:
            raise ValueError(f"expected texts that the tokenizer of {model.name} writes as they are, got {text[:40]!r}")
        tokens = torch.tensor(ids, dtype=torch.long)
        size += _size(text)
        for place in range(0, len(tokens), half):
            contexts.append(tokens[place - half : place] if place else start)
            completions.append(tokens[place : place + half])
    if not size:
        raise ValueError("expected texts with something in them, got none")
    x = Sequences.pack(contexts, completions)
    logs = [float(log_texts(model, x.select(rows)).sum()) for rows in batches_of(len(x), TOGETHER)]
    return -sum(logs) / NATS_PER_BIT / size


def response_bits(
    p: LanguageModel, q: LanguageModel, settings: Settings, prompts: Prompts | None
) -> tuple[float, float, int]:
    """The same of both models for responses of ``p``, and how many tokens they had at most: as ``q`` can read.

    Raises:
        ValueError: texts that ``q`` cannot read, however short.
        VocabularyMismatch: as :func:`klkit.models.canonical.canonical`.
    """
    writers, contexts_q = (canonical(p), canonical(q)), contexts_of(q, prompts)
    limit = min(TOKENS, settings.max_tokens)
    while True:
        few = Settings(
            p=settings.p, q=settings.q, samples=-(-RESPONSES // len(contexts_q)), max_tokens=limit, seed=settings.seed
        )
        plan, _ = make_plan(Pair(p, p, ()), few, prompts)
        try:
            texts = draw_texts(p, q, plan, contexts_q, writers, most=RESPONSES)
        except ValueError:
            if limit == 1:
                raise
            limit = max(1, limit // 2)
            continue
        found = approximation(texts, p=p.name, q=q.name, max_tokens=plan.max_tokens)
        return found.bits_p.value, found.bits_q.value, plan.max_tokens


def _size(text: str) -> int:
    return len(text.encode())
