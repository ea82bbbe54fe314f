"""Kinds of tokens: on packaged tokenizers, on one made for it, and on models without a tokenizer."""

import copy
import unicodedata

import pytest
import torch

from klkit.models.automaton import finite
from klkit.models.spec import load
from klkit.models.token_classes import CLASSES, DECISION_CLASSES, decision_classes, kind_of, token_classes
from klkit.models.wrap import temperature
from klkit.sequences import Sequences
from tiny import build, tokenizer


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("the", "content"), (" The", "content"), ("don't", "content"), ("_x", "content"), ("3d", "content"),
        ("न", "content"), ("\u0941", "content"), ("\\xe2\\x80", "content"), (" 1 2", "content"), ("²", "content"),
        ("7", "digits"), (" 2024", "digits"), ("\u0663", "digits"),
        ("**", "formatting"), (" ##", "formatting"), (".\n\n", "formatting"), ("✅", "formatting"), ("─", "formatting"),
        ("\x00", "formatting"), ("$", "formatting"),
        (" ", "whitespace"), ("\n\t", "whitespace"), ("\u3000", "whitespace"),
    ],
)  # fmt: skip
def test_kinds_of_text(text, kind):
    assert kind_of(text) == kind


@pytest.mark.parametrize("name", ["klkit:docs", "klkit:reviews"])
def test_packaged_tokenizers(name):
    model = load(name)
    classes = token_classes(model)
    assert classes.shape == (model.vocabulary.size,)
    assert [i for i, c in enumerate(classes.tolist()) if CLASSES[c] == "end"] == sorted(model.vocabulary.ends)
    special = set(model.tokenizer.all_special_ids) - set(model.vocabulary.ends)
    for i, (text, c) in enumerate(zip(model.pieces(range(model.vocabulary.size)), classes.tolist(), strict=True)):
        kind = CLASSES[c]
        assert (kind == "special") == (i in special or model.vocabulary.tokens[i] is None), (i, text)
        if kind == "content":
            assert any(unicodedata.category(ch)[0] not in "PSZC" for ch in text)
        if kind in ("formatting", "whitespace"):
            assert not any(ch.isalnum() for ch in text)
        if kind == "digits":
            assert text.strip(" ").isdecimal()
    assert torch.equal(token_classes(temperature(model, 0.7)), classes)


def test_special_added_and_unused_ids(tmp_path):
    words = copy.deepcopy(tokenizer())
    words.add_special_tokens({"pad_token": "<pad>"})
    words.add_tokens(["<think>", "\n\n\n"])
    build("gpt2", vocab_size=len(words) + 3).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    model = load(str(tmp_path))
    kinds = [CLASSES[i] for i in token_classes(model).tolist()]
    ids = words.get_vocab()
    assert kinds[ids["<|endoftext|>"]] == "end"
    assert kinds[ids["<pad>"]] == "special"
    assert kinds[ids["<think>"]] == "content"  # added, but not special: it is text that reads like this
    assert kinds[ids["\n\n\n"]] == "whitespace"
    assert kinds[len(words) :] == ["special"] * 3
    assert kinds[ids["Ġ"]] == "whitespace"
    assert kinds[ids["."]] == "formatting"
    assert kinds[ids["Ġthe"]] == "content"


def test_every_decision_is_of_one_kind():
    p = finite({"a7#": 0.5, "": 0.5}, symbols="a7#")
    end = p.vocabulary.ends[0]
    x = Sequences.pack([torch.tensor([end])] * 2, [torch.tensor([0, 1, 2, end]), torch.tensor([end])])
    kinds = [DECISION_CLASSES[i] for i in decision_classes(x, token_classes(p)).tolist()]
    assert kinds == ["first", "digits", "formatting", "end", "end"]
    plain = [DECISION_CLASSES[i] for i in decision_classes(x, token_classes(p), first=False).tolist()]
    assert plain == ["content", "digits", "formatting", "end", "end"]
