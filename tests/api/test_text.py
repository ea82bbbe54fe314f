import pytest
import torch

from klkit.api.text import cut


def ids(text):
    return torch.tensor([ord(c) for c in text])


def test_short_documents_are_scored_after_their_first_token():
    windows = cut(["abc", "de"], ids, 10)
    assert [windows.x.completion(i).tolist() for i in range(2)] == [ids("bc").tolist(), ids("e").tolist()]
    assert windows.x.prompt.tolist() == [0, 1]


def test_long_documents_score_the_second_half_of_each_window():
    windows = cut(["abcdefghij"], ids, 4)
    assert ["".join(map(chr, windows.x.context(i))) for i in range(2)] == ["ab", "ef"]
    assert ["".join(map(chr, windows.x.completion(i))) for i in range(2)] == ["cd", "gh"]
    assert any(note.startswith("2 tokens") for note in windows.notes)


@pytest.mark.parametrize(("documents", "distinct"), [(3, 6), (12, 12)])
def test_the_unit_is_the_document_when_there_are_enough(documents, distinct):
    windows = cut(["abcdefgh"] * documents, ids, 4)
    assert len(set(windows.x.cluster.tolist())) == distinct


def test_nothing_to_score():
    with pytest.raises(ValueError, match="two tokens"):
        cut(["a"], ids, 10)
    with pytest.raises(ValueError, match="--context"):
        cut(["abc"], ids, 1)
