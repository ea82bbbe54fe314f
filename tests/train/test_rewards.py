"""Rewards from functions, classifiers and the grammar, and what happens when they misbehave."""

import sys

import pytest
import torch
from tests.tiny import tokenizer
from transformers import GPT2Config, GPT2ForSequenceClassification

from klkit.models.spec import load
from klkit.sequences import Sequences
from klkit.train.rewards import RewardError, classifier_reward, grammar_reward, read_reward, response_texts, rewarded
from klkit.zoo.grammar import reward


@pytest.fixture(scope="module")
def model():
    return load("klkit:reviews")


@pytest.fixture(scope="module")
def strings(model):
    texts = [" superb .", " dull and the music was lovely ."]
    end = torch.tensor([model.vocabulary.ends[0]])
    completions = [torch.cat([model.context(text), end]) for text in texts]
    return Sequences.pack([model.context("the plot was")] * 2, completions)


def test_responses_are_texts_without_their_end(model, strings):
    assert response_texts(model, strings) == [" superb .", " dull and the music was lovely ."]


def test_the_grammar_s_reward_is_that_of_prompt_and_response(model, strings):
    found = rewarded(grammar_reward, model, ["the plot was"] * 2, strings)
    wanted = [reward("the plot was superb ."), reward("the plot was dull and the music was lovely .")]
    assert found.tolist() == wanted
    assert wanted[0] > 0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda prompts, responses: 1 / 0, "got ZeroDivisionError: division by zero; it was called with 2"),
        (lambda prompts, responses: [0.0], "expected 2 rewards from .*, one a response, got 1"),
        (lambda prompts, responses: [0.0, float("nan")], "expected finite rewards from .*, got nan for 1 of 2 .* dull"),
        (lambda prompts, responses: [float("-inf")] * 2, "got -inf for 2 of 2 responses"),
        (lambda prompts, responses: None, "expected a list of numbers from the reward .*, got TypeError"),
        (lambda prompts, responses: ["good", "bad"], "got ValueError: could not convert string to float"),
        (lambda responses: [0.0, 0.0], "got TypeError: .* takes 1 positional argument"),
    ],
)
def test_functions_that_misbehave_are_named(model, strings, function, message):
    with pytest.raises(RewardError, match=message):
        rewarded(function, model, ["the plot was"] * 2, strings)


def test_tensors_are_numbers_too(model, strings):
    found = rewarded(lambda prompts, responses: torch.tensor([1.0, 2.0]), model, ["a", "b"], strings)
    assert found.tolist() == [1.0, 2.0]


def test_functions_are_found_where_one_works(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_of_this_test.py").write_text(
        "def short(prompts, responses):\n    return [0.0]\nnumber = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert read_reward("my_rewards_of_this_test:short")([], []) == [0.0]
    for name, message in (
        ("my_rewards_of_this_test:long", "expected a function 'long' in the module 'my_rewards_of_this_test'"),
        ("my_rewards_of_this_test:number", "expected a function at .*, got int"),
        ("no_such_module:short", "expected a function 'short' in the module 'no_such_module'"),
        ("short", "expected a reward of the form module:function"),
        ("klkit:docs", "expected a reward of the form module:function"),
    ):
        with pytest.raises(ValueError, match=message):
            read_reward(name)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier")
    words = tokenizer()
    config = GPT2Config(
        vocab_size=len(words), n_embd=16, n_layer=1, n_head=2, n_positions=64,
        id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={"NEGATIVE": 0, "POSITIVE": 1},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = GPT2ForSequenceClassification(config).eval()
    network.save_pretrained(path)
    words.save_pretrained(path)
    return path, network


def test_a_classifier_gives_the_logit_that_is_asked_for(classifier):
    path, network = classifier
    texts = ["the film was superb", "a"]
    wanted = []
    for text in texts:  # one at a time, without padding
        ids = torch.tensor([tokenizer()(text)["input_ids"]])
        with torch.inference_mode():
            wanted.append(network(input_ids=ids).logits[0].tolist())
    for label, column in ((None, 1), ("POSITIVE", 1), ("NEGATIVE", 0), ("0", 0)):
        found = classifier_reward(str(path), label)(["the film", ""], [" was superb", "a"])
        assert found == pytest.approx([row[column] for row in wanted], abs=1e-5)
    named = read_reward(f"classifier:{path}#NEGATIVE")(["the film", ""], [" was superb", "a"])
    assert named == pytest.approx([row[0] for row in wanted], abs=1e-5)


def test_classifiers_that_cannot_score_are_refused(classifier, tmp_path):
    with pytest.raises(ValueError, match="expected one of the logits NEGATIVE, POSITIVE"):
        classifier_reward(str(classifier[0]), "HAPPY")
    with pytest.raises(ValueError, match="expected a sequence classifier in transformers format"):
        classifier_reward(str(tmp_path))
    from tests.tiny import folder

    with pytest.raises(ValueError, match=r"which lacks score.weight: its head would be random numbers"):
        classifier_reward(str(folder("gpt2")))
