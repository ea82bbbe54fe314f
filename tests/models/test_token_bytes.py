from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny
from klkit.models.automaton import Automaton, memoryless
from klkit.models.base import LanguageModel, Vocabulary, VocabularyMismatch
from klkit.models.byte_level import byte_level
from klkit.models.spec import load
from klkit.models.token_bytes import byte_lengths, drops_first_space, token_bytes
from klkit.models.wrap import extend, temperature


def named(tokenizer: Any, *, ends: tuple[int, ...] = (0,)) -> LanguageModel:
    """An automaton that has a tokenizer's vocabulary, two rows of padding, and the tokenizer itself."""
    size = max(tokenizer.get_vocab().values()) + 3
    strings: list[str | None] = [None] * size
    for token, i in tokenizer.get_vocab().items():
        strings[i] = token
    law = torch.full((1, size), 1 / size, dtype=torch.float64).log()
    model = Automaton(law, torch.zeros(1, size, dtype=torch.long), Vocabulary(tuple(strings), ends))
    object.__setattr__(model, "tokenizer", tokenizer)
    return model


TEXTS = ["It's naïve — 日本語, 3.50!", "  two spaces\n\ttab", "the film was good"]


def test_byte_level_tokens_spell_the_text() -> None:
    tokenizer = tiny.tokenizer()
    table = token_bytes(named(tokenizer))
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(table[i] for i in ids) == text.encode()
    assert table[0] is None
    assert table[-1] is None
    assert sum(spelt is not None for spelt in table) == len(tokenizer) - 1
    assert {spelt for spelt in table if spelt and len(spelt) == 1} == {bytes([b]) for b in range(256)}


@pytest.mark.parametrize("name", ["klkit:docs", "klkit:reviews"])
def test_packaged_models(name: str) -> None:
    model: LanguageModel = load(name)
    table = token_bytes(temperature(model, 2.0))
    ids = model.tokenizer("Changed in version 3.", add_special_tokens=False)["input_ids"]
    assert b"".join(table[i] for i in ids) == b"Changed in version 3."
    assert byte_lengths(model)[ids].sum() == 21
    assert byte_lengths(model)[list(model.vocabulary.ends)].tolist() == [0]


def metaspace(*, strip: bool):
    """A SentencePiece-like tokenizer: ▁ for spaces, single bytes for what is not in its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for token in ["▁", *"etfilmhgod'Iswa", "th", "he", "▁t", "▁the"]:
        vocabulary.setdefault(token, len(vocabulary))
    merges = [("t", "h"), ("h", "e"), ("▁", "t")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    steps = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if strip else steps)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("strip", [False, True])
def test_sentencepiece_tokens(strip: bool) -> None:
    tokenizer = metaspace(strip=strip)
    model = named(tokenizer, ends=(1,))
    table = token_bytes(model)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(table[i] for i in ids) == (b" " if strip else b"") + text.encode()
    assert table[:3] == (None, None, None)
    assert table[tokenizer.get_vocab()["<0xE9>"]] == b"\xe9"
    assert drops_first_space(model) is strip


def test_added_tokens_are_their_text_unless_special() -> None:
    from transformers import AddedToken

    tokenizer = metaspace(strip=False)
    tokenizer.add_tokens([AddedToken("é é"), AddedToken("<|tool|>", special=True)])
    table = token_bytes(named(tokenizer, ends=(1,)))
    assert table[tokenizer.convert_tokens_to_ids("é é")] == "é é".encode()
    assert table[tokenizer.convert_tokens_to_ids("<|tool|>")] is None


def test_word_pieces_are_refused() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(VocabularyMismatch, match="no bytes token by token"):
        token_bytes(named(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")))


def test_a_decoder_that_changes_the_text_is_noticed() -> None:
    from tokenizers import decoders

    tokenizer = metaspace(strip=False)
    inner = tokenizer.backend_tokenizer
    inner.decoder = decoders.Sequence([inner.decoder, decoders.Replace("3", "4")])
    with pytest.raises(VocabularyMismatch, match="decodes to"):
        token_bytes(named(tokenizer, ends=(1,)))


def test_automata_and_what_is_neither() -> None:
    model = extend(memoryless([0.5, 0.5], end=0.5), 5)
    assert token_bytes(model) == (b"a", b"b", None, None, None)
    assert byte_lengths(model).dtype == torch.long

    with pytest.raises(VocabularyMismatch, match="ByteLevel"):
        token_bytes(byte_level(model))
