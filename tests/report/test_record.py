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


def test_line_separators_within_a_text_do_not_end_the_line(batches, tmp_path):
    folder = RunFolder.create(tmp_path / "run", {"seed": 1}, {})
    lines = [{"text": text} for text in ("a\u2028b", "c\x85d\u2029", "e\r\nf\x0c", "g")]
    folder.append(0, batches[0], lines[:2])
    folder.append(1, batches[1], lines[2:])
    assert folder.samples() == lines
    folder.rewrite_samples(lines)
    assert folder.samples() == lines


@pytest.mark.parametrize("broken", [0, 2, 4])
def test_a_broken_line_costs_itself_only(batches, tmp_path, broken):
    folder = RunFolder.create(tmp_path / "run", {"seed": 1}, {})
    lines = [{"text": f"{i} größer"} for i in range(5)]
    folder.append(0, batches[0], lines)
    path = folder.path / "samples.jsonl"
    raw = path.read_bytes().splitlines(keepends=True)
    raw[broken] = raw[broken][: raw[broken].index("ö".encode()) + 1] + (b"\n" if broken < 4 else b"")
    path.write_bytes(b"".join(raw))
    assert folder.samples() == lines[:broken] + lines[broken + 1 :]


def test_a_broken_line_is_mended_when_the_run_goes_on(tmp_path):
    """Also where the lines before it are as many as the strings that are done."""
    p, q = (random_automaton(2, 4, generator=stream(5, "mended", name)) for name in "pq")
    plan = Plan([p.context(None)], [p.context(None)], 12, 9, seed=1)
    folder = RunFolder.create(tmp_path / "run", {"seed": 1}, {})
    run_strings(p, q, plan, batch_size=4, folder=folder)
    wanted = folder.samples()
    path = folder.path / "samples.jsonl"
    raw = path.read_text().splitlines(keepends=True)
    for broken, shards in ((5, 3), (8, 2)):
        for shard in range(shards, 3):
            next((folder.path / "shards").glob(f"{shard:05d}-*")).unlink()
        path.write_text("".join([*raw[:broken], raw[broken][:9] + "\n", *raw[broken + 1 :]]))
        run_strings(p, q, plan, batch_size=4, folder=folder)
        assert path.read_text() == "".join(raw)
        assert folder.samples() == wanted


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
