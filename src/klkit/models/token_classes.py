"""Kinds of tokens: what ends a response, what is markup, digits or white space, and what says something."""

from __future__ import annotations

import unicodedata

import torch
from jaxtyping import Int
from torch import Tensor

from klkit.models.base import LanguageModel
from klkit.models.token_bytes import tokenizer_of
from klkit.models.tokenization import special_ids
from klkit.sequences import Sequences

CLASSES = ("end", "special", "formatting", "digits", "whitespace", "content")
"""Kinds of a token, in the order in which they are asked for: the first that fits is the token's."""

FIRST = "first"
DECISION_CLASSES = (*CLASSES, FIRST)
"""Kinds of a decision: the kind of the token that was drawn, or that it was a response's first."""

NAMES = {
    FIRST: "first tokens",
    "content": "words",
    "formatting": "punctuation and markup",
    "digits": "digits",
    "whitespace": "white space",
    "special": "special tokens",
    "end": "ends",
}
"""The same for readers, in the order in which they are listed."""


def token_classes(model: LanguageModel) -> Int[Tensor, " v"]:
    """The index in ``CLASSES`` of the kind of each token, ``(v,)``.

    - ``end``: ends a response.
    - ``special``: other special tokens of the tokenizer (roles, padding, …), and ids without a string.
    - ``formatting``: only punctuation, symbols (emoji too) and control characters; white space around them is allowed.
    - ``digits``: only decimal digits, after at most one space.
    - ``whitespace``: only white space.
    - ``content``: everything else, words most of all; also pieces of characters, which cannot be read alone.

    Example:
        >>> from klkit.models.automaton import finite
        >>> [CLASSES[i] for i in token_classes(finite({"7": 1.0}, symbols="a7# "))]
        ['content', 'digits', 'formatting', 'whitespace', 'end']
    """
    vocabulary = model.vocabulary
    tokenizer = tokenizer_of(model)
    ends, special = set(vocabulary.ends), set() if tokenizer is None else special_ids(tokenizer)
    texts = model.pieces(range(vocabulary.size))
    kinds = [
        "end" if i in ends else "special" if token is None or i in special or not text else kind_of(text)
        for i, (token, text) in enumerate(zip(vocabulary.tokens, texts, strict=True))
    ]
    return torch.tensor([CLASSES.index(kind) for kind in kinds])


def kind_of(text: str) -> str:
    """The kind of an ordinary token that reads ``text``.

    Example:
        >>> [kind_of(text) for text in (" the", "**", " 1984", "\\n\\n", "x2", ").\\n")]
        ['content', 'formatting', 'digits', 'whitespace', 'content', 'formatting']
    """
    if text.isspace():
        return "whitespace"
    if text.removeprefix(" ").isdecimal():
        return "digits"
    marks = all(c.isspace() or unicodedata.category(c)[0] in "PS" or unicodedata.category(c) == "Cc" for c in text)
    return "formatting" if marks else "content"


def decision_classes(x: Sequences, classes: Int[Tensor, " v"], *, first: bool = True) -> Int[Tensor, " m"]:
    """The index in ``DECISION_CLASSES`` of each decision of ``x``: every decision is of exactly one kind.

    The kind is that of the token that was *drawn*. A string's first decision is of the kind ``first``, whatever was
    drawn, unless it ended the response at once: then it is ``end``.

    Args:
        classes: of each token, see :func:`token_classes`.
        first: whether strings begin where responses do; windows of a given text do not.

    Example:
        >>> import torch
        >>> x = Sequences.pack([torch.tensor([0])] * 2, [torch.tensor([1, 1, 0]), torch.tensor([0])])
        >>> [DECISION_CLASSES[i] for i in decision_classes(x, torch.tensor([0, 5]))]
        ['first', 'content', 'end', 'end']
    """
    kinds = classes[x.targets()]
    if not first:
        return kinds
    opening = (x.position() == 0) & (kinds != CLASSES.index("end"))
    return torch.where(opening, DECISION_CLASSES.index(FIRST), kinds)
