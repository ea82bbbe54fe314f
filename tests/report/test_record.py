import pytest
import torch

from klkit.api.strings import Plan, run_strings
from klkit.models.automaton import random_automaton
from klkit.report.record import RunFolder, RunFolderError, flatten, join, unflatten
from klkit.rng import stream


@pytest.fixture(scope="module")
def batches():
    generator = stream(5, "record")
    p, q = (random_automaton(2, 4, generator=generator) for _ in range(2))
    context = p.context(None)
    return [run_strings(p, q, Plan([context], [context], n, 12, seed=n), features=p.embedding()) for n in (3, 30, 5)]


def same(a, b):
    one, two = flatten(a), flatten(b)
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_a_batch_survives_the_disk(batches, tmp_path):
    folder = RunFolder.create(tmp_path / "run", {"seed": 1}, {})
    for i, batch in enumerate(batches):
        folder.append(i, batch, [{"text": "x"}])
    assert all(same(a, b) for a, b in zip(folder.batches(), batches, strict=True))
    assert len(folder.samples()) == 3
    folder.finish(join(batches), {"value": 1.0}, {1: "a"})
    assert same(folder.whole(), join(batches))
    assert folder.tokens() == {1: "a"}
    assert RunFolder.open(tmp_path / "run").result() == {"value": 1.0}


def test_joining_keeps_track_of_the_shown_strings(batches):
    whole = join(batches)
    assert whole.details.string.tolist() == [0, 1, 2, *(3 + i for i in range(24)), *(33 + i for i in range(5))]
    shown = whole.statistics.select(whole.details.string)
    assert len(whole.details.tokens_p) == shown.x.decisions


def test_unflatten_is_the_inverse(batches):
    assert same(unflatten(flatten(batches[0])), batches[0])


def test_folders_that_hold_no_run(tmp_path):
    with pytest.raises(RunFolderError, match="no run at all"):
        RunFolder.open(tmp_path / "absent")
    folder = RunFolder.create(tmp_path / "run", {"seed": 1}, {})
    with pytest.raises(RunFolderError, match="unfinished"):
        RunFolder.open(folder.path)
    (folder.path / "result.json").write_text("{")
    with pytest.raises(RunFolderError, match="readable result"):
        RunFolder.open(folder.path).result()


def test_a_result_that_is_not_json_is_not_half_written(batches, tmp_path):
    folder = RunFolder.create(tmp_path / "run", {"seed": 1}, {})
    with pytest.raises(ValueError, match="JSON"):
        folder.finish(batches[0], {"value": float("nan")}, {})
    assert not (folder.path / "result.json").exists()
    assert not list(folder.path.glob("*.part"))
