"""How much texts share: Rouge-L with references, and how varied samples are, in pure Python.

Words are runs of ASCII letters and digits in lower case, as the ``rouge_score`` package cuts them without stemming, so
numbers agree with its ``rougeL`` to rounding. Text in other scripts therefore has no words; cut it yourself and pass
lists.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from itertools import combinations

WORD = re.compile(r"[a-z0-9]+")

Text = str | Sequence[Hashable]
"""A text, cut into words here, or a list of its words (or token ids)."""


def words(text: Text) -> Sequence[Hashable]:
    """The words of a text; a list of words is left as it is.

    Example:
        >>> words("The film's plot: 2 stars.")
        ['the', 'film', 's', 'plot', '2', 'stars']
    """
    return WORD.findall(text.lower()) if isinstance(text, str) else text


def common_subsequence(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence, by one addition of long integers a word of ``second``.

    Example:
        >>> common_subsequence("abcbdab", "bdcaba")
        4

    Source: H. Hyyrö, Bit-parallel LCS-length computation revisited, Australasian Workshop on Combinatorial Algorithms
    (2004).
    """
    places: dict[Hashable, int] = {}
    for i, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << i
    every = (1 << len(first)) - 1
    unmatched = every  # a bit of 0 for each step up along the column of the usual table
    for word in second:
        met = unmatched & places.get(word, 0)
        unmatched = ((unmatched + met) | (unmatched - met)) & every
    return len(first) - unmatched.bit_count()


def rouge_l(candidate: Text, references: Sequence[Text]) -> float:
    """``2 LCS / (length of candidate + length of reference)`` in words, from 0 to 1; the largest over references.

    This is the F-measure with equal weight of precision and recall. A text without words scores 0.

    Raises:
        ValueError: there is no reference, or one text stands where a list of references is expected.

    Example:
        >>> round(rouge_l("the cat sat", ["the cat is on the mat", "a dog"]), 6)
        0.444444

    Source: C.-Y. Lin, ROUGE: a package for automatic evaluation of summaries (2004); the largest over references as in
    Gu et al. (2023), arXiv 2306.08543.
    """
    if isinstance(references, str) or not references:
        raise ValueError(f"expected a list of at least one reference, got {references!r}; put a single one in a list")
    mine, others = words(candidate), [words(reference) for reference in references]
    return max(
        2 * common_subsequence(mine, other) / (len(mine) + len(other)) if mine and other else 0.0 for other in others
    )


def distinct_n(texts: Sequence[Text], n: int) -> float:
    """Different ``n``-grams over all ``n``-grams of all texts together, from 0 to 1; NaN where there is none.

    It falls as texts are added, so only numbers from as many texts of about one length compare.

    Raises:
        ValueError: ``n`` is below 1, or one text stands where a list of texts is expected.

    Example:
        >>> distinct_n(["a b a b", "a b"], 2)
        0.5

    Source: J. Li et al. (2015), arXiv 1510.03055.
    """
    if isinstance(texts, str) or n < 1:
        raise ValueError(f"expected a list of texts and n of at least 1, got {type(texts).__name__} and {n}")
    cut = [words(text) for text in texts]
    grams = [tuple(text[i : i + n]) for text in cut for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def self_rouge_l(samples: Sequence[Text]) -> float:
    """Mean Rouge-L over all pairs of samples of one prompt, from 0 to 1: how alike they are; NaN below two samples.

    Raises:
        ValueError: one text stands where a list of samples is expected.

    Example:
        >>> self_rouge_l(["a b", "a b", "c d"])
        0.3333333333333333
    """
    if isinstance(samples, str):
        raise ValueError("expected a list of samples of one prompt, got one text; put them in a list")
    cut = [words(sample) for sample in samples]
    scores = [rouge_l(first, [second]) for first, second in combinations(cut, 2)]
    return sum(scores) / len(scores) if scores else float("nan")
