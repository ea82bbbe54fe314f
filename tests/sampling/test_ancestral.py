"""Ancestral sampling: the law, the layout, and strings that do not depend on their batch."""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import pytest
import torch
from scipy import stats
from tests.tiny import build, tokenizer

from klkit.models.automaton import Automaton, coin, finite, memoryless, random_automaton
from klkit.models.base import LanguageModel, Vocabulary
from klkit.numerics import log_softmax
from klkit.rng import stream
from klkit.sampling import ancestral
from klkit.sampling.ancestral import Draw, sample
from klkit.sampling.draw import block_masses, block_shape
from klkit.sequences import Sequences


def machine(states: int = 4, symbols: int = 6) -> Automaton:
    return random_automaton(states, symbols, generator=stream(0, "machine"))


@cache
def gpt2() -> LanguageModel:
    from klkit.models.hf import HuggingFaceModel

    return HuggingFaceModel(build("gpt2"), tokenizer())


class Wobbly:
    """An automaton in fp32 whose log-probabilities change with the batch's size, as a GPU's do."""

    window = None
    width = 1
    dtype = torch.float32

    def __init__(self, inner: Automaton, wobble: float) -> None:
        self.inner, self.wobble, self.vocabulary = inner, wobble, inner.vocabulary
        for name in ("name", "context", "pieces", "encode", "begin", "advance", "select", "embedding"):
            setattr(self, name, getattr(inner, name))

    def readout(self, h: torch.Tensor) -> torch.Tensor:
        logp = self.inner.readout(h).float()
        noise = 2 * torch.rand(logp.shape, generator=stream(0, "wobble", len(h))) - 1
        return log_softmax(logp + 0.5 * self.wobble * noise)  # normalising at most doubles the change


def completions(x: Sequences) -> list[list[int]]:
    return [x.completion(i).tolist() for i in range(len(x))]


def in_batches(
    model: LanguageModel,
    size: int,
    *,
    total: int,
    max_tokens: int,
    order: Sequence[int] | None = None,
    settle: bool = True,
) -> list[list[int]]:
    """Strings of two prompts, drawn ``size`` at a time in ``order``; returned in one order."""
    order = list(range(total)) if order is None else order
    strings: dict[int, list[int]] = {}
    for i in range(0, len(order), size):
        chunk = order[i : i + size]
        contexts = [torch.tensor([0] * (1 + k % 2) + [1]) for k in chunk]
        drawn = sample(
            model,
            contexts,
            max_tokens=max_tokens,
            seed=11,
            prompt=[k % 2 for k in chunk],
            replicate=[k // 2 for k in chunk],
            settle=settle,
        )
        strings.update(zip(chunk, completions(drawn.sequences), strict=True))
    return [strings[k] for k in sorted(order)]


# --------------------------------------------------------------------------------------- the law


def test_strings_have_the_law_of_the_model():
    law = {"ab": 0.3, "": 0.2, "b": 0.1, "bba": 0.25, "a": 0.15}
    p = finite(law, symbols="ab")
    n = 4000
    x = sample(p, [p.context(None)] * n, max_tokens=10, seed=0).sequences
    seen = Counter("".join(p.pieces(tokens[:-1])) for tokens in completions(x))
    assert set(seen) == set(law)
    assert stats.chisquare([seen[y] for y in law], [n * mass for mass in law.values()]).pvalue > 1e-3


def test_nothing_is_cut_off():
    # 300 equally likely symbols: a silent top-k of 50 would leave 250 of them out.
    p = memoryless([1 / 300] * 300, end=0.01)
    x = sample(p, [p.context(None)] * 60, max_tokens=200, seed=0).sequences
    assert len(x.targets().unique()) == 301


# ------------------------------------------------------------------------------------ the layout


@pytest.fixture(params=["automaton", "gpt2"])
def drawn(request: pytest.FixtureRequest) -> tuple[LanguageModel, Draw]:
    model = machine() if request.param == "automaton" else gpt2()
    contexts = [torch.tensor([0] + [1 + i % 3] * (i % 3)) for i in range(9)]
    return model, sample(model, contexts, max_tokens=12, seed=4, prompt=[0, 1, 2] * 3)


def test_hidden_vectors_are_those_of_teacher_forcing(drawn):
    model, draw = drawn
    tolerance = {"rtol": 0.0, "atol": 2e-4 if model.dtype == torch.float32 else 0.0}
    torch.testing.assert_close(model.readout(draw.hidden), model.readout(model.encode(draw.sequences)), **tolerance)


def test_logp_is_of_the_drawn_tokens(drawn):
    model, draw = drawn
    expected = model.readout(draw.hidden).gather(1, draw.sequences.targets()[:, None])[:, 0]
    torch.testing.assert_close(draw.logp, expected, rtol=0.0, atol=1e-5)


def test_strings_stop_at_an_end_token_or_at_the_limit(drawn):
    model, draw = drawn
    for i, tokens in enumerate(completions(draw.sequences)):
        ends = [j for j, token in enumerate(tokens) if token in model.vocabulary.ends]
        assert ends == ([len(tokens) - 1] if draw.sequences.finished[i] else [])
        assert bool(draw.sequences.finished[i]) or len(tokens) == 12


def test_an_end_token_at_the_limit_finishes_the_string():
    p = finite({"aaa": 1.0}, symbols="a")
    for limit, finished in ((3, False), (4, True)):
        x = sample(p, [p.context(None)], max_tokens=limit, seed=0).sequences
        assert (x.lengths.tolist(), x.finished.tolist()) == ([limit], [finished])


def test_every_end_token_ends_a_string():
    table = torch.tensor([[0.4, 0.3, 0.3]], dtype=torch.float64)
    p = Automaton(table.log(), torch.zeros(1, 3, dtype=torch.long), Vocabulary(("a", "<end>", "<eot>"), (1, 2)))
    x = sample(p, [p.context(None)] * 200, max_tokens=60, seed=0).sequences
    assert bool(x.finished.all())
    last = [tokens[-1] for tokens in completions(x)]
    assert set(last) == {1, 2}
    assert not any(set(tokens[:-1]) & {1, 2} for tokens in completions(x))


def test_finished_strings_leave_the_batch():
    p = machine()
    advanced: list[int] = []

    class Counting(Wobbly):
        def __init__(self) -> None:
            super().__init__(p, 0.0)
            self.advance = lambda state, tokens: advanced.append(len(tokens)) or p.advance(state, tokens)

    x = sample(Counting(), [p.context(None)] * 50, max_tokens=100, seed=0).sequences
    assert sum(advanced) == x.decisions - len(x)


# ---------------------------------------------------------------------------- one string, any batch


def test_automaton_strings_do_not_depend_on_the_batch():
    shuffled = torch.randperm(64, generator=stream(0, "order")).tolist()
    whole = in_batches(machine(), 64, total=64, max_tokens=40)
    assert len({tuple(s) for s in whole}) > 40
    for size in (1, 3, 17):
        assert in_batches(machine(), size, total=64, max_tokens=40) == whole
    assert in_batches(machine(), 17, total=64, max_tokens=40, order=shuffled) == whole


def test_neural_strings_do_not_depend_on_the_batch():
    shuffled = torch.randperm(64, generator=stream(0, "order")).tolist()
    whole = in_batches(gpt2(), 64, total=64, max_tokens=10)
    for size, order in ((1, shuffled[:8]), (3, shuffled[:24]), (17, range(64)), (17, shuffled)):
        strings = in_batches(gpt2(), size, total=64, max_tokens=10, order=order)
        assert strings == [whole[k] for k in sorted(order)]


def test_settling_undoes_what_the_batch_does_to_close_choices(monkeypatch):
    # Errors and tolerance a thousand times larger than in fp32, so that close choices are common.
    monkeypatch.setitem(ancestral.TOLERANCE, torch.float32, 0.1)
    model = Wobbly(machine(), 0.05)

    def strings(size: int, settle: bool) -> list[list[int]]:
        return in_batches(model, size, total=60, max_tokens=40, settle=settle)

    loose = [strings(size, False) for size in (1, 3, 17, 60)]
    assert any(a != b for a, b in pairwise(loose))
    settled = [strings(size, True) for size in (1, 3, 17, 60)]
    assert all(other == settled[0] for other in settled[1:])


@pytest.mark.parametrize("stage", ["block", "token"])
def test_a_planted_tie_is_settled(stage):
    # The law is made from the string's own noise: two candidates tie up to 1e-8, far inside fp32.
    from klkit import rng
    from klkit.sampling.draw import Noise

    noise = Noise([rng.stream(0, "string", 0, 0)], 4).take(torch.tensor([0]), 0)[0]
    if stage == "block":
        first = torch.sigmoid(noise[1] - noise[0] + 1e-8)  # log mass0 + g0 = log mass1 + g1 + 1e-8
        law = torch.stack([first / 2, first / 2, (1 - first) / 2, (1 - first) / 2])
    else:
        first = torch.sigmoid(noise[3] - noise[2] + 1e-8)
        law = torch.tensor([1.0, 1.0, 1e-9, 1e-9], dtype=torch.float64)
        law[0], law[1] = first, 1 - first
        law /= law.sum()
    p = Automaton(law[None].log(), torch.zeros(1, 4, dtype=torch.long), Vocabulary(("a", "b", "c", "<end>"), (3,)))
    assert block_shape(4) == (2, 2)
    assert block_masses(p.readout(p.begin([p.context(None)])[1])).shape == (1, 2)
    model = Wobbly(p, 1e-6)

    def first_tokens(settle: bool) -> set[int]:
        found = set()
        for size in range(1, 13):
            contexts, names = [p.context(None)] * size, [0] * size
            x = sample(model, contexts, max_tokens=1, seed=0, prompt=names, settle=settle).sequences
            found.add(int(x.completion(0)[0]))
        return found

    assert len(first_tokens(settle=False)) > 1
    assert len(first_tokens(settle=True)) == 1


def test_settling_reads_the_prefix_alone(monkeypatch):
    # With an infinite tolerance every decision is settled: all must come from a batch of one.
    monkeypatch.setitem(ancestral.TOLERANCE, torch.float32, float("inf"))
    p = machine()
    asked: list[list[int]] = []

    class Spy(Wobbly):
        def __init__(self) -> None:
            super().__init__(p, 0.0)
            self.begin = lambda contexts: asked.append([len(c) for c in contexts]) or p.begin(contexts)

    x = sample(Spy(), [p.context(None)] * 3, max_tokens=6, seed=0).sequences
    alone = sorted(length for (length,) in asked[1:])
    assert alone == sorted((x.position() + 1).tolist())
    assert completions(x) == completions(sample(p, [p.context(None)] * 3, max_tokens=6, seed=0).sequences)


def test_the_seed_and_both_names_matter():
    p = machine()

    def string(seed: int, prompt: int, replicate: int) -> list[int]:
        x = sample(p, [p.context(None)], max_tokens=40, seed=seed, prompt=[prompt], replicate=[replicate]).sequences
        return x.completion(0).tolist()

    strings = [string(0, 0, 0), string(1, 0, 0), string(0, 1, 0), string(0, 0, 1)]
    assert len({tuple(s) for s in strings}) == 4
    assert string(0, 0, 0) == strings[0]


def test_global_randomness_is_untouched():
    before = torch.get_rng_state()
    sample(machine(), [torch.tensor([0])], max_tokens=5, seed=0)
    assert torch.equal(before, torch.get_rng_state())


# -------------------------------------------------------------------------------- names and errors


def test_default_names():
    p = coin(end=0.5)
    contexts = [p.context(None)] * 4

    def names(**given: list[int]) -> tuple[list[int], list[int]]:
        x = sample(p, contexts, max_tokens=3, seed=0, **given).sequences
        return x.prompt.tolist(), x.cluster.tolist()

    assert names() == ([0, 1, 2, 3], [0, 1, 2, 3])
    assert names(prompt=[5, 5, 7, 7]) == ([5, 5, 7, 7], [5, 5, 7, 7])
    assert names(prompt=[5, 5, 5, 5]) == ([5, 5, 5, 5], [0, 1, 2, 3])
    assert names(prompt=[5, 5, 5, 5], replicate=[8, 9, 2, 3]) == ([5, 5, 5, 5], [8, 9, 2, 3])
    assert names(prompt=[5, 5, 7, 7], cluster=[1, 2, 3, 4]) == ([5, 5, 7, 7], [1, 2, 3, 4])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"contexts": []}, "got 0 contexts"),
        ({"contexts": [torch.tensor([], dtype=torch.long)]}, "the shortest of 0 tokens"),
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"max_tokens": 63}, r"window of 64 tokens, got a context of 2 and max_tokens 63; lower max_tokens to 62"),
        ({"prompt": [0, 0], "replicate": [1, 1]}, r"\(0, 1\) 2 times"),
        ({"prompt": [0]}, "each of the 2 contexts, got 1, 1 and 1"),
        ({"cluster": [0]}, "got 2, 2 and 1"),
    ],
)
def test_errors_say_what_to_do(given, message):
    arguments = {"contexts": [torch.tensor([0, 1])] * 2, "max_tokens": 4, "seed": 0, **given}
    with pytest.raises(ValueError, match=message):
        sample(gpt2(), arguments.pop("contexts"), **arguments)


def test_a_string_may_fill_the_window():
    x = sample(gpt2(), [torch.tensor([0, 1])], max_tokens=62, seed=0).sequences
    assert x.decisions > 0
