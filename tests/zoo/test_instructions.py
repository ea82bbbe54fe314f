import math
from collections import Counter

import pytest
import torch

from klkit.models.hf import HuggingFaceModel
from klkit.zoo import grammar, instructions
from klkit.zoo.instructions import TASKS, draw, entropy, law, mean_length, prompts, references, tokenizer, vocabulary
from klkit.zoo.training import fresh


def test_the_language_is_what_it_says():
    drawn = draw(6000, seed=0)
    share = Counter(x.task for x in drawn)
    assert all(abs(share[task] / 6000 - 1 / 6) < 4 * math.sqrt(5 / 36 / 6000) for task in TASKS)
    assert all(x.prompt in prompts(x.task) for x in drawn)
    assert all(math.isfinite(grammar.log_probability(law(x.prompt), x.response)) for x in drawn[:500])
    assert {word for x in drawn for word in f"{x.prompt} {x.response}".split()} <= set(vocabulary())
    assert len(vocabulary()) == 466


def test_exact_entropy_and_length_are_those_of_draws():
    drawn = draw(4000, seed=1)
    surprise = [-grammar.log_probability(law(x.prompt), x.response) for x in drawn]
    lengths = [len(x.response.split()) + 1 for x in drawn]
    for values, exact in ((surprise, entropy()), (lengths, mean_length())):
        mean = sum(values) / len(values)
        error = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) / len(values))
        assert abs(mean - exact) < 4 * error
    # The tasks span the range: certain answers, a few forms, thousands.
    by_task = [entropy([task]) for task in TASKS]
    assert by_task[0] == by_task[2] == 0
    assert 0.5 < by_task[1] < 1 < by_task[3] < by_task[5]


def test_the_law_of_an_answer_token_by_token():
    """The automaton of one prompt gives every answer the grammar's probability, and sums to one."""
    p = law("list three birds :")
    model = grammar.automaton(p)
    answers = {a: grammar.log_probability(p, a) for a in references("list three birds :", 50, seed=0)}
    symbols = {word: i for i, word in enumerate(model.vocabulary.tokens) if word}
    for text, wanted in list(answers.items())[:10]:
        state, h = model.begin([model.context(None)])
        total = 0.0
        for word in [*text.split(), None]:
            token = model.vocabulary.ends[0] if word is None else symbols[word]
            total += float(model.readout(h)[0, token])
            if word is not None:
                state, h = model.advance(state, torch.tensor([token]))
        assert total == pytest.approx(wanted, abs=1e-9)


def test_draws_do_not_depend_on_how_many():
    assert draw(50, seed=3) == draw(80, seed=3)[:50]
    assert draw(50, seed=3) != draw(50, seed=4)


def test_what_is_no_prompt_is_refused():
    for prompt in ("opposite of paris :", "hello", "add 50 and 1 :"):
        with pytest.raises(ValueError, match="prompt of the instruction language"):
            law(prompt)
    with pytest.raises(ValueError, match="expected a task"):
        prompts("poem")


def test_models_read_the_language_as_words():
    words = tokenizer()
    model = HuggingFaceModel(fresh(len(words), width=16, layers=1, window=64, seed=0), words, name="student")
    assert model.vocabulary.size == 467
    assert model.vocabulary.ends == (0,)
    context = model.context("describe oak :")
    assert context.tolist()[0] == 0
    assert [model.vocabulary.tokens[i] for i in context.tolist()[1:]] == ["describe", "oak", ":"]
    assert words.decode(context[1:]) == "describe oak :"
    assert model.vocabulary.tokens[0] == instructions.END
    with pytest.raises(Exception, match="UNK"):
        words("a word that is not in it")


def test_entropies_in_closed_form():
    def surprise(weights):
        total = sum(weights)
        return -sum(w / total * math.log(w / total) for w in weights)

    def zipf(count):
        return [1 / (i + 1) for i in range(count)]

    described = surprise([5, 3, 2]) + 0.8 * 2 * surprise(zipf(25)) + 0.2 * surprise(zipf(25))
    assert entropy(["describe"]) == pytest.approx(described, rel=1e-12)
    weights, total = zipf(10), sum(zipf(10))
    triples = [
        a / total * b / (total - a) * c / (total - a - b)
        for i, a in enumerate(weights)
        for j, b in enumerate(weights)
        for k, c in enumerate(weights)
        if len({i, j, k}) == 3
    ]
    assert math.fsum(triples) == pytest.approx(1, rel=1e-12)
    assert entropy(["list"]) == pytest.approx(surprise(triples), rel=1e-12)
    deed = surprise([share * w for share in (1, 0.5) for w in zipf(14)])
    sentences = surprise(zipf(6)) + deed + surprise(zipf(4)) + surprise(zipf(9)) + surprise(zipf(8))
    assert entropy(["story"]) == pytest.approx(sentences + surprise([3, 1]) + surprise(zipf(14)) / 4, rel=1e-12)
