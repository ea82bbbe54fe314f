"""n-grams against counts, and against the same smoothing computed history by history."""

from __future__ import annotations

import itertools

import pytest
import torch

from klkit.estimators.exact import exact
from klkit.models.ngram import ngram

TEXTS = ["abracadabra", "cab", "bad", "dab", "abba", ""]


def row(p, prefix: str) -> torch.Tensor:  # type: ignore[no-untyped-def]
    return p.readout(p.begin([p.context(prefix)])[1])[0].exp()


def by_history(texts: list[str], order: int, smoothing: float, alphabet: str, history: str) -> torch.Tensor:
    """The definition: recursion from the longest context down, no states, counts taken afresh."""
    padded = [f"^{text}$" for text in texts]

    def law(context: str) -> torch.Tensor:
        total = [sum(t.startswith(context + a, i) for t in padded for i in range(len(t))) for a in [*alphabet, "$"]]
        counts = torch.tensor(total, dtype=torch.float64)
        shorter = (
            law(context[1:])
            if context
            else torch.full((len(alphabet) + 1,), 1 / (len(alphabet) + 1), dtype=torch.float64)
        )
        return (counts + smoothing * shorter) / (counts.sum() + smoothing)

    return law(("^" + history)[-(order - 1) :] if order > 1 else "")


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_every_history_reads_its_smoothed_counts(order: int) -> None:
    p = ngram(TEXTS, order, smoothing=0.7)
    alphabet = "abcdr"
    assert "".join(p.vocabulary.tokens[:-1]) == alphabet
    for length in range(5):
        for history in itertools.islice(map("".join, itertools.product(alphabet, repeat=length)), 300):
            torch.testing.assert_close(row(p, history), by_history(TEXTS, order, 0.7, alphabet, history))


def test_little_smoothing_gives_relative_frequencies() -> None:
    p = ngram(["ab", "ab", "ac"], 2, smoothing=1e-12)
    torch.testing.assert_close(row(p, "a"), torch.tensor([0, 2 / 3, 1 / 3, 0], dtype=torch.float64), rtol=0, atol=1e-11)
    assert (row(p, "a") > 0).all()


def test_unseen_contexts_cost_no_states() -> None:
    """5 symbols and order 4 would make 156 contexts; the text has fewer, and the tail is shared."""
    p = ngram(TEXTS, 4)
    assert p.states < 40
    torch.testing.assert_close(row(p, "rrb"), row(p, "ddb"))


def test_words_and_a_shared_alphabet() -> None:
    p = ngram(["the cat sat", "the dog sat"], 2, words=True)
    assert p.vocabulary.tokens == ("cat", "dog", "sat", "the", "<end>")
    assert p.context("the dog").tolist() == [4, 3, 1]
    symbols = ("a", "b", "c", "d", "r")
    q = ngram(["ab", "ba"], 2, symbols=symbols)
    answer = exact(ngram(TEXTS, 3), q)
    assert 0 < answer.value < float("inf")
    assert exact(q, q).value == 0.0


def test_a_higher_order_fits_its_own_text_better() -> None:
    """Cross-entropy of the training text falls with the order: the states carry information."""
    text = TEXTS[:5]
    bits = []
    for order in (1, 2, 3):
        p = ngram(text, order, smoothing=0.1)
        total = 0.0
        for t in text:
            for i in range(len(t) + 1):
                target = p.vocabulary.tokens.index(t[i]) if i < len(t) else p.vocabulary.ends[0]
                total -= float(row(p, t[:i])[target].log())
        bits.append(total)
    assert bits == sorted(bits, reverse=True)


def test_refusals() -> None:
    for texts, order, smoothing in (
        ([], 2, 1.0),
        ([""], 2, 1.0),
        (["a"], 0, 1.0),
        (["a"], 2, 0.0),
        (["a"], 2, float("nan")),
    ):
        with pytest.raises(ValueError, match="expected at least one text"):
            ngram(texts, order, smoothing=smoothing)
    with pytest.raises(ValueError, match="add them"):
        ngram(["abc"], 2, symbols="ab")
