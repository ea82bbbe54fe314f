"""Ragged strings: packing, the shift between targets and predictors, selection and concatenation."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klkit.sequences import Prompts, Sequences

token_lists = st.lists(st.integers(0, 9), max_size=5)
strings = st.lists(st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=4), token_lists), min_size=1, max_size=6)


def pack(pairs, *, sampler: bool = False) -> Sequences:
    """Strings with distinguishable prompts, clusters and flags; sampler log-probabilities number the decisions."""
    n = len(pairs)
    x = Sequences.pack(
        [torch.tensor(context) for context, _ in pairs],
        [torch.tensor(completion, dtype=torch.long) for _, completion in pairs],
        prompt=[i // 2 for i in range(n)],
        cluster=[10 + i for i in range(n)],
        finished=[i % 3 > 0 for i in range(n)],
    )
    return dataclasses.replace(x, sampler_logp=-torch.arange(x.decisions).double()) if sampler else x


def unpack(x: Sequences) -> list:
    logps = (
        [None] * len(x) if x.sampler_logp is None else [p.tolist() for p in x.sampler_logp.split(x.lengths.tolist())]
    )
    return [
        (
            x.context(i).tolist(),
            x.completion(i).tolist(),
            int(x.prompt[i]),
            int(x.cluster[i]),
            bool(x.finished[i]),
            logps[i],
        )
        for i in range(len(x))
    ]


@given(strings)
def test_packing_round_trip(pairs):
    x = pack(pairs)
    assert [(context, completion) for context, completion, *_ in unpack(x)] == pairs
    assert x.lengths.tolist() == [len(completion) for _, completion in pairs]
    assert x.decisions == sum(len(completion) for _, completion in pairs)
    assert x.tokens.shape[1] == max(len(a) + len(b) for a, b in pairs)


@given(strings)
def test_flat_decisions(pairs):
    x = pack(pairs)
    expected = [(i, t, token) for i, (_, completion) in enumerate(pairs) for t, token in enumerate(completion)]
    flat = zip(x.row().tolist(), x.position().tolist(), x.targets().tolist(), strict=True)
    assert list(flat) == expected


@given(strings)
def test_a_decision_is_predicted_by_the_token_before_it(pairs):
    x = pack(pairs)
    row, column = x.predictors()
    assert torch.equal(x.tokens[row, column + 1], x.targets())
    before = [
        (context + completion)[len(context) + t - 1] for context, completion in pairs for t in range(len(completion))
    ]
    assert x.tokens[row, column].tolist() == before


@given(strings, st.data())
def test_selection(pairs, data):
    x = pack(pairs, sampler=True)
    rows = data.draw(st.lists(st.integers(0, len(pairs) - 1), max_size=8))
    chosen = x.select(rows)
    assert unpack(chosen) == [unpack(x)[i] for i in rows]
    assert chosen.tokens.shape[1] == max((len(pairs[i][0]) + len(pairs[i][1]) for i in rows), default=0)
    assert chosen.sampler_logp is not None
    assert len(chosen.sampler_logp) == chosen.decisions


@given(strings, strings, st.booleans())
def test_concatenation(first, second, sampler):
    parts = [pack(first, sampler=sampler), pack(second, sampler=sampler)]
    assert unpack(Sequences.cat(parts)) == unpack(parts[0]) + unpack(parts[1])


@given(strings)
def test_splitting_and_concatenating_is_the_identity(pairs):
    x = pack(pairs, sampler=True)
    whole = Sequences.cat([x.select([i]) for i in range(len(x))])
    for field in dataclasses.fields(Sequences):
        assert torch.equal(getattr(whole, field.name), getattr(x, field.name)), field.name


@given(strings, st.data())
def test_other_contexts_leave_everything_else(pairs, data):
    x = pack(pairs, sampler=True)
    contexts = data.draw(
        st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=len(pairs), max_size=len(pairs))
    )
    y = x.after([torch.tensor(context) for context in contexts])
    assert [a for a, *_ in unpack(y)] == contexts
    assert [rest for _, *rest in unpack(y)] == [rest for _, *rest in unpack(x)]
    assert torch.equal(y.targets(), x.targets())


def test_defaults_of_packing():
    x = Sequences.pack([torch.tensor([1]), torch.tensor([2])], [torch.tensor([3]), torch.tensor([4])])
    assert x.prompt.tolist() == x.cluster.tolist() == [0, 1]
    assert x.finished.all()
    y = Sequences.pack([torch.tensor([1])] * 2, [torch.tensor([3])] * 2, prompt=[5, 5])
    assert y.cluster.tolist() == [5, 5]


def test_no_strings_at_all():
    x = Sequences.pack([], [])
    assert (len(x), x.decisions, x.targets().tolist()) == (0, 0, [])
    assert len(pack([([1], [2])]).select([])) == 0


def test_a_string_needs_a_context():
    with pytest.raises(ValueError, match="at least one context token"):
        Sequences.pack([torch.tensor([], dtype=torch.long)], [torch.tensor([1])])


def test_stop_before_start_is_refused():
    x = pack([([1, 2], [3])])
    with pytest.raises(ValueError, match="start <= stop"):
        dataclasses.replace(x, stop=torch.tensor([1]))
    with pytest.raises(ValueError, match="<= 3 for every string"):
        dataclasses.replace(x, stop=torch.tensor([4]))


def test_one_sampler_probability_a_decision():
    x = pack([([1, 2], [3, 4])])
    with pytest.raises(ValueError, match="each of 2 decisions, got 3"):
        dataclasses.replace(x, sampler_logp=torch.zeros(3))


def test_mixing_parts_with_and_without_sampler_probabilities_is_refused():
    with pytest.raises(ValueError, match="all parts or on none"):
        Sequences.cat([pack([([1], [2])], sampler=True), pack([([1], [2])])])


def test_after_needs_one_context_a_string():
    with pytest.raises(ValueError, match="each of 2 strings, got 1"):
        pack([([1], [2]), ([1], [3])]).after([torch.tensor([1])])


def test_packing_needs_as_many_contexts_as_completions():
    with pytest.raises(ValueError, match="each of 1 contexts, got 0"):
        Sequences.pack([torch.tensor([1])], [])


def test_prompts():
    assert len(Prompts(("a", "b"))) == 2
    with pytest.raises(ValueError, match="at least one prompt"):
        Prompts(())
    assert Prompts(("a", "b"), ("x", "y")).groups == ("x", "y")
    with pytest.raises(ValueError, match="each of 2 prompts, got 1"):
        Prompts(("a", "b"), ("x",))
