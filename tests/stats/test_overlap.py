"""Rouge-L and distinct n-grams: values by hand, the table of dynamic programming, and the cutting into words."""

import math

import numpy as np
import pytest

from klkit.stats.overlap import common_subsequence, distinct_n, rouge_l, self_rouge_l, words


def table(first, second):
    """The textbook recurrence."""
    found = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            found[i + 1, j + 1] = found[i, j] + 1 if a == b else max(found[i, j + 1], found[i + 1, j])
    return int(found[-1, -1])


@pytest.mark.parametrize("symbols", [2, 4, 30])
def test_the_longest_common_subsequence_is_that_of_the_table(symbols):
    random = np.random.default_rng(symbols)
    for _ in range(60):
        first, second = (random.integers(symbols, size=random.integers(0, 90)).tolist() for _ in range(2))
        assert common_subsequence(first, second) == common_subsequence(second, first) == table(first, second)


def test_rouge_by_hand():
    # "police killed the gunman" against the two candidates of Lin (2004): 3 of 4 and 2 of 4 words in order.
    assert rouge_l("police kill the gunman", ["police killed the gunman"]) == pytest.approx(0.75)
    assert rouge_l("the gunman kill police", ["police killed the gunman"]) == pytest.approx(0.5)
    assert rouge_l("a b c d e", ["a c e"]) == pytest.approx(2 * 3 / 8)
    assert rouge_l("a b", ["b a", "a b c"]) == pytest.approx(2 * 2 / 5)  # the better one
    assert rouge_l("same words", ["Same, words!"]) == 1.0
    assert rouge_l([5, 9, 2], [[5, 2]]) == pytest.approx(2 * 2 / 5)


def test_words_are_cut_as_rouge_score_cuts_them():
    assert words("Don't PANIC—42 x_y Été") == ["don", "t", "panic", "42", "x", "y", "t"]
    assert words("   ") == []


def test_texts_without_words_score_nothing():
    assert rouge_l("", ["a"]) == rouge_l("a", [""]) == rouge_l("...", ["..."]) == 0.0
    assert math.isnan(distinct_n(["a"], 2))
    assert math.isnan(distinct_n([], 1))
    assert math.isnan(self_rouge_l(["a"]))


def test_distinct_by_hand():
    texts = ["a b c a b", "c a b"]  # bigrams: ab bc ca ab | ca ab
    assert distinct_n(texts, 1) == 3 / 8
    assert distinct_n(texts, 2) == 3 / 6
    assert distinct_n(texts, 3) == 3 / 4  # abc bca cab | cab
    assert distinct_n([[1, 1], [2]], 1) == 2 / 3


def test_likeness_of_samples_is_the_mean_over_pairs():
    assert self_rouge_l(["a b", "a b", "c"]) == pytest.approx(1 / 3)
    assert self_rouge_l(["x"] * 5) == 1.0


def test_one_text_where_several_are_expected_is_refused():
    for call in (lambda: rouge_l("a", "a"), lambda: rouge_l("a", []), lambda: distinct_n("ab", 1)):
        with pytest.raises(ValueError, match="expected a list"):
            call()
    with pytest.raises(ValueError, match="expected a list of samples"):
        self_rouge_l("ab")
    with pytest.raises(ValueError, match="n of at least 1"):
        distinct_n(["ab"], 0)
