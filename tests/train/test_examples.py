"""Examples from files, and their tokens: nothing shifted, nothing lost, nothing empty by accident."""

import json

import pytest
import torch
from tests.tiny import folder

from klkit.models.spec import load
from klkit.train.examples import Example, encode_examples, end_token, read_examples, require_room, without_empty


@pytest.fixture(scope="module")
def model():
    return load("klkit:reviews")


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_records_of_every_kind(tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    path = write(
        tmp_path / "a.jsonl",
        [
            {"prompt": "the plot", "response": " was thin"},
            {"prompt": chat[:1], "response": "hello"},
            {"prompt": None, "response": "alone"},
            {"prompt": "only a prompt"},
            {"messages": chat},
            {"text": "a document"},
        ],
    )
    assert read_examples(path) == [
        Example("the plot", " was thin"),
        Example(chat[:1], "hello"),
        Example(None, "alone"),
        Example("only a prompt", ""),
        Example(chat[:1], "hello"),
        Example(None, "a document"),
    ]


def test_tables_plain_text_and_other_columns(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\nwhat,that\n")
    assert read_examples(tmp_path / "a.csv", prompt="question", response="answer") == [Example("what", "that")]
    (tmp_path / "a.txt").write_text("one line\n\nanother\n")
    assert read_examples(tmp_path / "a.txt") == [Example(None, "one line"), Example(None, "another")]
    (tmp_path / "a.json").write_text('[{"prompt": "a", "response": "b"}]')
    assert read_examples(tmp_path / "a.json") == [Example("a", "b")]
    packaged = read_examples("klkit:reviews")
    assert len(packaged) == 64
    assert all(example.empty for example in packaged)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "a"}', "expected the fields 'prompt' and 'response', .* in line 2 of .*, got 'question'; name"),
        ('{"prompt": 3, "response": "a"}', "expected the fields"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "ends with the assistant's text in line 2 .*'user'"),
        ("not json", "expected JSON in line 2"),
    ],
)
def test_a_record_that_is_none_is_named_by_its_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_examples(path)


def test_an_empty_file_and_a_missing_one(tmp_path):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ValueError, match="expected at least one example"):
        read_examples(tmp_path / "a.jsonl")
    with pytest.raises(FileNotFoundError):
        read_examples(tmp_path / "b.jsonl")


def test_labels_are_not_shifted_and_the_end_token_is_one_of_them(model):
    x = encode_examples(model, [Example("the plot", " was thin ."), Example(None, "i thought")], 32)
    for i, text in enumerate(["the plot was thin .", "i thought"]):
        assert model.tokenizer.decode(x.tokens[i, : x.stop[i]], skip_special_tokens=True).strip() == text
        assert int(x.completion(i)[-1]) == end_token(model)
    assert x.context(0).tolist() == model.context("the plot").tolist()
    row, column = x.predictors()
    # Each decision is predicted from the token just before it.
    assert torch.equal(x.tokens[row, column + 1], x.targets())
    assert x.finished.all()


def test_the_end_token_is_learnt_even_where_it_is_also_the_padding(model):
    """As in GPT-2, where padding and end share an id, and a mask by id would hide the end from the loss."""
    model.tokenizer.pad_token = model.tokenizer.eos_token
    short, long = Example("the plot", " was thin ."), Example("the plot", " was thin and the music was superb .")
    x = encode_examples(model, [short, long], 64)
    ends = x.targets() == model.tokenizer.eos_token_id
    assert int(ends.sum()) == 2
    assert (
        x.decisions
        == int(x.lengths.sum())
        == sum(len(encode_examples(model, [e], 64).targets()) for e in (short, long))
    )


def test_a_response_that_is_too_long_is_cut_and_not_finished(model):
    whole = encode_examples(model, [Example("the plot", " was thin .")], 99)
    for most in range(1, whole.decisions + 1):
        x = encode_examples(model, [Example("the plot", " was thin .")], most)
        assert x.targets().tolist() == whole.targets().tolist()[:most]
        assert bool(x.finished[0]) == (most == whole.decisions)


def test_empty_completions_are_refused_by_number_or_left_out_and_counted(model):
    examples = [Example("a", "fine"), Example("b", ""), Example("c", "  \n")]
    with pytest.raises(ValueError, match=r"expected a response in every example, got 2 .* example 2; .* --skip-empty"):
        encode_examples(model, examples, 8)
    kept, count = without_empty(examples)
    assert (len(kept), count) == (1, 2)


def test_examples_that_outgrow_the_window_are_refused_with_what_would_do(model):
    long = Example("the plot", " was thin and" * 80)
    with pytest.raises(ValueError, match=r"expected examples of at most 128 tokens, .* 1 that are longer: example 2"):
        encode_examples(model, [Example("the plot", " was thin ."), long], 400)
    with pytest.raises(ValueError, match=r"lower --max-tokens to (\d+)") as caught:
        encode_examples(model, [long], 400)
    most = int(str(caught.value).split("--max-tokens to ")[1].split(",")[0])
    x = encode_examples(model, [long], most)
    assert int(x.stop.max()) == 128
    with pytest.raises(ValueError, match="expected examples of at most 16 tokens"):
        require_room(x, 16, "a small teacher")


def test_conversations_go_through_the_template(model):
    chat = [{"role": "user", "content": "the plot"}]
    x = encode_examples(model, [Example(chat, "thin .")], 32)
    assert x.context(0).tolist() == model.context(chat).tolist() != model.context("the plot").tolist()


def test_text_is_tokenised_with_its_prompt_where_that_keeps_the_prompt():
    model = load(str(folder("gpt2")))
    x = encode_examples(model, [Example("the film", " was a quiet triumph"), Example("the fi", "lm was")], 64)
    # A cut inside a word leaves the prompt's own tokens as they are.
    assert x.context(1).tolist() == model.context("the fi").tolist()
    texts = [model.tokenizer.decode(x.tokens[i, : x.stop[i] - 1]) for i in range(2)]
    assert texts == ["the film was a quiet triumph", "the film was"]
