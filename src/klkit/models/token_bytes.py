"""The bytes that each token of a vocabulary stands for: what models with different tokenizers have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from klkit.models.automaton import Automaton
from klkit.models.base import LanguageModel, VocabularyMismatch
from klkit.models.tokenization import BYTE_OF, special_ids
from klkit.models.wrap import innermost

WORD_MARK = "▁"
PROBE = "It's 3.50 (naïve – 日本)\n  so it goes, 100%"


def token_bytes(model: LanguageModel) -> tuple[bytes | None, ...]:
    """The bytes of each token id, so that the bytes of a completion are those of its tokens, joined.

    Byte-level BPE tokens are spelt in the printable alphabet of GPT-2; SentencePiece tokens write a space as
    ``▁`` and single bytes as ``<0x..>``; added tokens that are not special, and the symbols of an automaton, are
    their text in UTF-8. End tokens, special tokens, ids that no tokenizer defines and tokens of no bytes have
    none: ``None``.

    Raises:
        VocabularyMismatch: tokens that are joined in another way (word pieces), a tokenizer whose decoder gives
            other bytes, or a model that is neither an automaton nor has a tokenizer.

    Source: A. Radford et al. (2019), Language Models are Unsupervised Multitask Learners (the byte alphabet);
    T. Kudo and J. Richardson (2018), SentencePiece, arXiv 1808.06226.

    Example:
        >>> from klkit.models.automaton import coin
        >>> token_bytes(coin(end=0.5))
        (b'a', None)
    """
    tokenizer = tokenizer_of(model)
    spell = _automaton_spelling(model) if tokenizer is None else _tokenizer_spelling(tokenizer, model.name)
    ends = set(model.vocabulary.ends)
    found = (None if token is None or i in ends else spell(i, token) for i, token in enumerate(model.vocabulary.tokens))
    table = tuple(spelt or None for spelt in found)
    if tokenizer is not None:
        _verify(tokenizer, table, model.name)
    return table


def byte_lengths(model: LanguageModel) -> Int[Tensor, " v"]:
    """How many bytes each token id adds to a text, ``(v,)``; 0 for tokens that stand for no text.

    Raises:
        VocabularyMismatch: as :func:`token_bytes`.

    Example:
        >>> from klkit.models.automaton import coin
        >>> byte_lengths(coin(end=0.5)).tolist()
        [1, 0]
    """
    return torch.tensor([len(spelt or b"") for spelt in token_bytes(model)], dtype=torch.long)


def tokenizer_of(model: LanguageModel) -> Any | None:
    """The tokenizer of a model, or of the one that it transforms; None if there is none."""
    inner: Any = model
    while not hasattr(inner, "tokenizer") and hasattr(inner, "base"):
        inner = inner.base
    return getattr(inner, "tokenizer", None)


def drops_first_space(model: LanguageModel) -> bool:
    """Whether a text's first space is not part of it, as where SentencePiece marks the beginning of every text.

    The first token of such a text does not stand for its usual bytes, unless something was read before it.
    """
    tokenizer = tokenizer_of(model)
    return (
        tokenizer is not None
        and not _is_byte_level(tokenizer)
        and str(tokenizer.convert_tokens_to_string([f"{WORD_MARK}a"])) == "a"
    )


def _is_byte_level(tokenizer: Any) -> bool:
    return str(tokenizer.convert_tokens_to_string(["Ġ"])) == " "


def _automaton_spelling(model: LanguageModel) -> Callable[[int, str], bytes | None]:
    inner = innermost(model)
    if not isinstance(inner, Automaton):
        raise VocabularyMismatch(
            f"expected a model with a tokenizer, or an automaton, got {type(inner).__name__} {model.name!r}: the "
            f"strings of its vocabulary do not say which bytes they stand for; give the model its tokenizer"
        )
    return lambda i, token: token.encode("utf-8", "surrogatepass")


def _tokenizer_spelling(tokenizer: Any, name: str) -> Callable[[int, str], bytes | None]:
    byte_level = _is_byte_level(tokenizer)
    if not byte_level and str(tokenizer.convert_tokens_to_string(["a", f"{WORD_MARK}a"])) != "a a":
        raise VocabularyMismatch(
            f"expected tokens whose texts are joined as they are (byte-level BPE or SentencePiece), got those of "
            f"{name} ({type(tokenizer).__name__}), whose decoder puts spaces between them or takes them away; its "
            f"text has no bytes token by token"
        )
    fallback = not byte_level and str(tokenizer.convert_tokens_to_string(["<0x41>"])) == "A"
    own = tokenizer.get_vocab()
    added = set(tokenizer.get_added_vocab().values())
    special = special_ids(tokenizer)

    def spell(i: int, token: str) -> bytes | None:
        if i in special or own.get(token) != i:
            return None
        if i in added:
            return token.encode()
        if byte_level:
            if not all(c in BYTE_OF for c in token):
                raise VocabularyMismatch(
                    f"expected tokens in the alphabet of byte-level BPE, got {token!r} (id {i}) in {name}; its bytes "
                    f"are not known"
                )
            return bytes(BYTE_OF[c] for c in token)
        if fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace(WORD_MARK, " ").encode()

    return spell


def _verify(tokenizer: Any, table: tuple[bytes | None, ...], name: str) -> None:
    """Whether the table spells what the tokenizer's decoder spells, on a text with something of everything."""
    ids = [i for i in tokenizer(PROBE, add_special_tokens=False)["input_ids"] if i < len(table) and table[i]]
    ours = b"".join(table[i] or b"" for i in ids).decode(errors="replace")
    theirs = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    if ours not in (theirs, " " + theirs):
        raise VocabularyMismatch(
            f"expected tokens whose bytes, joined, are the decoded text, got {ours!r} for what the tokenizer of {name} "
            f"decodes to {theirs!r}; its text has no bytes token by token"
        )
