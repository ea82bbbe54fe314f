"""The laws hold for sound models, and each planted mistake is found by the law it breaks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import bank
from klkit.divergences.linear import Head
from klkit.models.automaton import Automaton, automaton, coin, trunk
from klkit.models.base import LanguageModel, Vocabulary
from klkit.models.laws import check_laws, deviation
from klkit.models.ngram import ngram
from klkit.models.wrap import extend, restrict, temperature, top_k, top_p
from klkit.sequences import Content, Sequences

# Five states that every symbol turns by another amount, each with a law of its own, and long strings.
P = automaton(
    torch.tensor(
        [[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1], [0.3, 0.2, 0.4, 0.1], [0.2, 0.4, 0.3, 0.1]],
        dtype=torch.float64,
    ),
    torch.arange(5)[:, None].add(torch.tensor([1, 2, 4])) % 5,
    name="ring",
)

SOUND = [
    coin(end=0.5),
    P,
    bank.random_pair(3, states=5, symbols=3, spread=2.0)[0],
    bank.A.p,
    bank.A.q,
    bank.INFINITE.q,
    ngram(["abracadabra", "cab", "bad"], 3),
    temperature(P, 0.5),
    top_p(temperature(P, 2.0), 0.8),
    top_k(P, 2),
    restrict(P, [0, 3]),
    extend(P, 9),
    top_k(extend(temperature(P, 3.0), 6), 3),
]


@pytest.mark.parametrize("model", SOUND, ids=lambda model: model.name)
def test_sound_models_pass(model: LanguageModel) -> None:
    outcomes = check_laws(model, [None, torch.tensor([0, 1, 0]), torch.tensor([1])], max_tokens=6, strings=9)
    assert all(outcome.holds for outcome in outcomes)


class Broken(Automaton):
    """A sound automaton, to be spoilt in one place."""


class ShiftedTargets(Broken):
    def encode(self, x: Sequences) -> Tensor:
        # Reads each decision's own token before predicting it.
        longer = torch.nn.functional.pad(x.tokens, (0, 1))
        return super().encode(Sequences(longer, x.start + 1, x.stop + 1, x.prompt, x.cluster, x.finished))


class SelectsInOrder(Broken):
    def select(self, state: Tensor, rows: Tensor) -> Tensor:
        return state[rows.sort().values]


class SelectsTheFirst(Broken):
    def select(self, state: Tensor, rows: Tensor) -> Tensor:
        return state[: len(rows)]


class RawLogits(Broken):
    def readout(self, h: Tensor) -> Tensor:
        return super().readout(h) + 0.01


class ReadsNaN(Broken):
    def readout(self, h: Tensor) -> Tensor:
        rows = super().readout(h).clone()
        rows[:, 0] = torch.nan
        return rows


class ReadsPadding(Broken):
    def encode(self, x: Sequences) -> Tensor:
        # The state at the end of the padded block leaks into every decision.
        states = super().encode(x)[:, 0].long()
        return trunk((states + x.tokens[x.row(), -1].where(x.stop[x.row()] < x.tokens.shape[1], 0)) % self.states)


class CountsTheBatch(Broken):
    def encode(self, x: Sequences) -> Tensor:
        return trunk((super().encode(x)[:, 0].long() + (len(x) > 1)) % self.states)


class ForgetsTheContext(Broken):
    def begin(self, contexts: list[Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().begin([context[:1] for context in contexts])


class NormalisesOverTheBatch(Broken):
    def readout(self, h: Tensor) -> Tensor:
        rows = super().readout(h)
        return (rows - rows.mean(0) * (len(rows) > 1)).log_softmax(-1)


class WrongWidth(Broken):
    @property
    def width(self) -> int:
        return 2


class EmptyContext(Broken):
    def context(self, prompt: Content | None) -> Tensor:
        return torch.tensor([], dtype=torch.long)


class ShortEmbedding(Broken):
    def embedding(self) -> Tensor:
        return torch.eye(2, dtype=torch.float64)


class OnePiece(Broken):
    def pieces(self, tokens: list[int]) -> list[str]:  # type: ignore[override]
        return []


class ChangesItsMind(Broken):
    def context(self, prompt: Content | None) -> Tensor:
        ChangesItsMind.asked = getattr(ChangesItsMind, "asked", 0) + 1  # type: ignore[attr-defined]
        return torch.tensor([3] * (1 + ChangesItsMind.asked % 3))  # type: ignore[attr-defined]


class HandsOverAnotherHead(Broken):
    def head(self) -> Head:
        return Head(torch.linspace(-1, 1, 4, dtype=torch.float64)[:, None])


@pytest.mark.parametrize(
    ("kind", "law"),
    [
        (ShiftedTargets, "teacher forcing agrees with stepping"),
        (SelectsInOrder, "stepping strings together"),
        (SelectsTheFirst, "stepping strings together"),
        (RawLogits, "sum to one"),
        (ReadsNaN, "sum to one"),
        (ReadsPadding, "padding is ignored"),
        (CountsTheBatch, "do not depend on its batch"),
        (ForgetsTheContext, "stepping strings together"),
        (NormalisesOverTheBatch, "row by row"),
        (WrongWidth, "teacher forcing agrees with stepping"),
        (EmptyContext, "context of one id or more"),
        (ShortEmbedding, "one finite vector a token"),
        (OnePiece, "one piece of text"),
        (ChangesItsMind, "always has the same context"),
        (HandsOverAnotherHead, "logits of the output head"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_each_planted_mistake_is_named(kind: type[Automaton], law: str) -> None:
    broken = kind(P.log_probabilities, P.transitions, P.vocabulary, name="broken")
    with pytest.raises(AssertionError, match=f"BROKEN: [^\n]*{law}"):
        check_laws(broken)
    outcomes = check_laws(broken, strict=False)
    assert any(law in outcome.law and not outcome.holds for outcome in outcomes)


def test_end_tokens_outside_the_vocabulary_are_found() -> None:
    class Renamed(Broken):
        pass

    broken = Renamed(P.log_probabilities, P.transitions, P.vocabulary)
    object.__setattr__(broken, "vocabulary", replace(P.vocabulary, ends=(3, 17)))
    assert not check_laws(broken, strict=False)[0].holds
    object.__setattr__(broken, "vocabulary", Vocabulary(P.vocabulary.tokens, ()))
    assert not check_laws(broken, strict=False)[0].holds


def test_the_window_is_respected() -> None:
    class Short(Broken):
        @property
        def window(self) -> int:  # type: ignore[override]
            return 4

    with pytest.raises(ValueError, match="window of 4"):
        check_laws(Short(P.log_probabilities, P.transitions, P.vocabulary))
    assert check_laws(Short(P.log_probabilities, P.transitions, P.vocabulary), max_tokens=1)


def test_deviation() -> None:
    a = torch.tensor([[0.0, -torch.inf]])
    assert deviation(a, a) == 0.0
    assert deviation(a, torch.tensor([[0.0, -1e3]])) == torch.inf
    assert deviation(torch.tensor([[0.0, torch.nan]]), a) == torch.inf
    assert deviation(a, a.repeat(2, 1)) == torch.inf
