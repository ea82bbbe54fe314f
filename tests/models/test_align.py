"""Vocabularies: equal ones pass, harmless differences are bridged and said, the rest is refused."""

import copy
import math

import pytest
import torch
from tests.tiny import build, tokenizer

from klkit.models.align import align, context_note, contexts
from klkit.models.automaton import Automaton, automaton, memoryless
from klkit.models.base import Vocabulary, VocabularyMismatch, log_probs
from klkit.models.hf import HuggingFaceModel
from klkit.sequences import Prompts, Sequences

STRINGS = Sequences.pack([torch.tensor([5, 6]), torch.tensor([9])], [torch.tensor([11, 0]), torch.tensor([8, 200, 0])])


def named(model, tokens, ends=None):
    """The same model with other token strings."""
    model = copy.copy(model)
    model.vocabulary = Vocabulary(tuple(tokens), ends or model.vocabulary.ends)
    return model


def tiny(rows=320, *, name="tiny", unlikely=0.0, seed=0):
    """A GPT-2 with ``rows`` rows, those beyond the tokenizer's 320 tokens pushed down by ``unlikely`` nats."""
    network = build("gpt2", vocab_size=rows, seed=seed)
    head = torch.nn.Linear(32, rows)
    head.weight.data = network.lm_head.weight.data.clone()
    head.bias.data = torch.where(torch.arange(rows) < 320, 0.0, -unlikely)
    network.lm_head = head
    return HuggingFaceModel(network, tokenizer(), name=name)


def rows(model):
    return torch.cat(list(log_probs(model, STRINGS)))


def test_equal_vocabularies_pass_untouched():
    p, q = tiny(), tiny(seed=1)
    assert align(p, q) == (p, q, ())
    assert align(p, p)[0] is p


def test_equal_padding_passes_untouched():
    p, q = tiny(328), tiny(328, seed=1)
    assert align(p, q) == (p, q, ())


def test_other_strings_are_refused_with_the_first_that_differ():
    p = tiny(name="one")
    tokens = list(p.vocabulary.tokens)
    tokens[7], tokens[9] = "seven", "nine"
    with pytest.raises(VocabularyMismatch) as error:
        align(p, named(p, tokens))
    assert f"2 ids with different strings: id 7 is {p.vocabulary.tokens[7]!r} in one and 'seven'" in str(error.value)
    assert "id 9 is" in str(error.value)


def test_permuted_vocabularies_are_refused():
    p = tiny()
    with pytest.raises(VocabularyMismatch, match="the same strings in another order"):
        align(p, named(p, reversed(p.vocabulary.tokens)))


def test_size_alone_is_no_agreement():
    one, two = (
        automaton(torch.full((1, 10), 0.1, dtype=torch.float64), torch.zeros(1, 9, dtype=torch.long), symbols=symbols)
        for symbols in ("abcdefghi", "ABCDEFGHI")
    )
    with pytest.raises(VocabularyMismatch, match="9 ids with different strings"):
        align(one, two)


class TestPadding:
    def test_negligible_padding_leaves_both(self):
        p, q = tiny(328, name="p", unlikely=40.0), tiny(324, name="q", unlikely=40.0, seed=1)
        a, b, notes = align(p, q)
        assert a.vocabulary == b.vocabulary
        assert a.vocabulary.size == 328
        (note,) = notes
        assert note.startswith("8 rows from 320 on are defined by no tokenizer: left out of both softmaxes")
        for model, aligned in ((p, a), (q, b)):
            got = rows(aligned)
            assert (got[:, 320:] == -torch.inf).all()
            assert torch.allclose(got[:, :320], torch.log_softmax(rows(model)[:, :320], -1), atol=1e-6)

    def test_padding_that_carries_mass_stays(self):
        p, q = tiny(324, name="p"), tiny(328, name="q", seed=1)
        a, b, notes = align(p, q)
        assert "kept" in notes[0]
        mass = rows(q)[0, 320:].exp().sum()
        assert mass > 1e-6
        assert torch.equal(rows(b), rows(q))
        assert torch.equal(rows(a)[:, :324], rows(p))
        assert (rows(a)[:, 324:] == -torch.inf).all()

    def test_the_mass_is_measured_at_the_prompts(self):
        p, q = tiny(328, name="p"), tiny(name="q")
        prompts = Prompts(("the film", "a dull"))
        masses = [float(p.readout(p.begin([c])[1]).exp()[0, 320:].sum()) for c in contexts(p, prompts)]
        assert f"at most {max(masses):.1e} of p and 0.0e+00 of q" in align(p, q, prompts)[2][0]


class TestAddedTokens:
    def wider(self, **kwargs):
        model = tiny(322, **kwargs)
        return named(model, [*model.vocabulary.tokens[:320], "<think>", "</think>"])

    def test_in_q_only(self):
        p, q = tiny(name="p"), self.wider(name="q", seed=1)
        a, b, notes = align(p, q)
        assert len(notes) == 1
        assert notes[0].startswith("2 tokens from 320 on, such as '<think>', exist in q only: probability zero under p")
        assert a.vocabulary == b.vocabulary == q.vocabulary
        assert (rows(a)[:, 320:] == -torch.inf).all()
        assert torch.equal(rows(a)[:, :320], rows(p))
        assert torch.equal(rows(b), rows(q))

    def test_in_p_only_is_infinite_and_said(self):
        p, q = self.wider(name="p"), tiny(name="q", seed=1)
        a, b, notes = align(p, q)
        assert "exist in p only: KL(p‖q) is infinite" in notes[0]
        assert (rows(b)[:, 320:] == -torch.inf).all()
        assert (rows(a)[:, 320:] > -torch.inf).all()

    def test_conditional_on_the_shared_tokens(self):
        p, q = self.wider(name="p"), tiny(name="q", seed=1)
        a, b, notes = align(p, q, shared_only=True)
        assert "conditional on the 320 tokens that both models have" in notes[-1]
        assert torch.allclose(rows(a)[:, :320], torch.log_softmax(rows(p)[:, :320], -1), atol=1e-6)
        assert torch.equal(rows(b)[:, :320], rows(q))
        assert (rows(a)[:, 320:] == -torch.inf).all()

    def test_shared_only_does_nothing_where_all_is_shared(self):
        p, q = tiny(), tiny(seed=1)
        assert align(p, q, shared_only=True) == (p, q, ())

    def test_a_padding_row_that_the_other_names_is_compared_by_id(self):
        p = tiny(322, name="p")
        q = named(tiny(322, name="q", seed=1), [*p.vocabulary.tokens[:320], "<think>", None])
        a, b, notes = align(p, q)
        assert notes == (
            "1 ids from 320 on are named by one tokenizer only, but both models have rows for them: compared by id",
        )
        assert a.vocabulary == b.vocabulary
        assert torch.equal(rows(a), rows(p))
        assert torch.equal(rows(b), rows(q))


def test_end_tokens_are_those_of_p():
    p, q = tiny(name="p"), tiny(name="q", seed=1)
    q = named(q, q.vocabulary.tokens, ends=(0, 5))
    a, b, notes = align(p, q)
    assert a.vocabulary.ends == b.vocabulary.ends == (0,)
    assert a is p
    assert notes[0].startswith("end tokens differ ('<|endoftext|>' for p, '<|endoftext|>', ")
    assert notes[0].endswith(" for q): responses end at those of p")
    assert torch.equal(rows(b), rows(q))


def test_aligned_models_keep_the_laws():
    from klkit.models.laws import check_laws

    for model in align(tiny(328, unlikely=40.0), tiny(seed=1))[:2]:
        check_laws(model)


def test_the_exact_value_of_an_added_token():
    """``KL(p‖q) = n log(1/(1−a))`` when q spends ``a`` of every decision on a token that p lacks."""
    from klkit.estimators.exact import exact

    p = memoryless([0.5, 0.5], end=0.25)
    share = torch.tensor([[0.1]], dtype=torch.float64)
    q = Automaton(
        log_probabilities=torch.cat([p.log_probabilities + torch.log1p(-share), share.log()], 1),
        transitions=torch.zeros(1, 4, dtype=torch.long),
        vocabulary=Vocabulary((*p.vocabulary.tokens, "new"), p.vocabulary.ends),
    )
    a, b, _ = align(p, q)
    assert exact(a, b).value == pytest.approx(-4 * math.log(0.9), rel=1e-12)
    a, b, notes = align(q, p)
    assert exact(a, b).value == math.inf
    a, b, notes = align(q, p, shared_only=True)
    assert "conditional on the 3 tokens" in notes[-1]
    assert exact(a, b).value == pytest.approx(0.0, abs=1e-12)


class TestContexts:
    def test_one_for_each_prompt(self):
        p = tiny()
        found = contexts(p, Prompts(("the film", torch.tensor([4, 5]))))
        assert torch.equal(found[0], p.context("the film"))
        assert found[1].tolist() == [4, 5]
        assert [c.tolist() for c in contexts(p, None)] == [[0]]

    def test_templates_that_differ_are_noted(self):
        prompts = Prompts(("the film", [{"role": "user", "content": "good?"}]))
        found = []
        for opening in ("USER ", "Q: "):
            words = copy.deepcopy(tokenizer())
            words.chat_template = opening + "{{ messages[0].content }}"
            found.append(contexts(HuggingFaceModel(build("gpt2"), words), prompts))
        assert "different contexts for 1 of 2 prompts" in context_note(*found)
        assert context_note(found[0], found[0]) is None
