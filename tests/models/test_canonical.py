"""Texts in a tokenizer's own tokens: what is given back spells the text, and what cannot be spelt is None."""

from __future__ import annotations

from types import MappingProxyType

import pytest
import torch

import enumeration
import tiny
from klkit.models.automaton import Automaton, coin
from klkit.models.base import Vocabulary, VocabularyMismatch
from klkit.models.canonical import canonical, log_texts
from klkit.models.spec import load
from klkit.models.token_bytes import token_bytes
from klkit.sequences import Sequences

TEXTS = ["", "the film", " the film\n\n", "naïve 日本", "<|endoftext|>", "a<|endoftext|>b", " ", "100%"]


@pytest.mark.parametrize("spec", ["tiny", "klkit:docs"])
@pytest.mark.parametrize("text", TEXTS)
def test_canonical_tokens_spell_the_text_and_end_nothing(spec: str, text: str) -> None:
    model = load(str(tiny.folder("llama")) if spec == "tiny" else spec)
    ids = canonical(model)(text)
    assert ids is not None
    assert b"".join(token_bytes(model)[i] or b"" for i in ids) == text.encode()
    assert not set(ids) & set(model.vocabulary.ends)


def stub(pieces: list[str], *, lower: bool = False) -> Automaton:
    """A tokenizer in the manner of SentencePiece: a space before every text, the longest piece first."""
    vocabulary = {piece: i for i, piece in enumerate(pieces)}

    class Stub:
        all_special_ids = (len(pieces) - 1,)
        added_tokens_decoder = MappingProxyType({})

        def get_vocab(self):
            return vocabulary

        def get_added_vocab(self):
            return {}

        def convert_tokens_to_string(self, tokens):
            return "".join(tokens).replace("▁", " ").removeprefix(" ")

        def decode(self, ids, **_):
            return self.convert_tokens_to_string([pieces[i] for i in ids])

        def __call__(self, text, **_):
            rest, found = "▁" + (text.lower() if lower else text).replace(" ", "▁"), []
            while rest:
                best = max((piece for piece in pieces if rest.startswith(piece)), key=len, default=None)
                if best is None:
                    rest = rest[1:]
                    continue
                found.append(vocabulary[best])
                rest = rest[len(best) :]
            return {"input_ids": found}

    n = len(pieces)
    row = torch.full((1, n), 1 / n, dtype=torch.float64).log()
    model = Automaton(row, torch.zeros(1, n, dtype=torch.long), Vocabulary(tuple(pieces), (n - 1,)))
    object.__setattr__(model, "tokenizer", Stub())
    return model


def test_the_space_that_sentencepiece_puts_before_a_text_has_to_be_the_texts_own() -> None:
    model = stub(["▁a", "a", "b", "▁", "\n", "</s>"])
    write = canonical(model)
    assert write(" ab") == [0, 2]  # not the mark alone, and then "▁a"
    assert write("ab") == [1, 2]  # no space at all, as behind a line that has ended
    assert write("a a") == [1, 0]


def test_a_text_that_the_tokenizer_changes_has_no_canonical_tokens() -> None:
    write = canonical(stub(["▁a", "a", "b", "▁", "\n", "</s>"], lower=True))
    assert write("Ab") is None
    assert write("ab") == [1, 2]


def test_a_model_without_tokenizer_is_refused() -> None:
    with pytest.raises(VocabularyMismatch, match="nothing says in which tokens"):
        canonical(coin(end=0.5))


def test_every_end_stands_for_all_of_them() -> None:
    table = torch.tensor([[0.5, 0.2, 0.3]], dtype=torch.float64)
    model = Automaton(table.log(), torch.zeros(1, 3, dtype=torch.long), Vocabulary(("a", "<1>", "<2>"), (1, 2)))
    ended = [torch.tensor([0, 1]), torch.tensor([0, 2]), torch.tensor([0, 0]), torch.tensor([], dtype=torch.long)]
    x = Sequences.pack([torch.tensor([1])] * 4, ended)
    assert log_texts(model, x).exp().tolist() == pytest.approx([0.25, 0.25, 0.25, 1.0])


def test_the_probability_of_a_networks_tokens() -> None:
    model = load(str(tiny.folder("llama")))
    ids = torch.tensor([*canonical(model)("the film"), 0])
    x = Sequences.pack([model.context(None)] * 2, [ids, ids[:2]])
    wanted = enumeration.per_string(x, enumeration.scores(model, x)[0])
    torch.testing.assert_close(log_texts(model, x), wanted)
