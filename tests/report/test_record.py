from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from klkit.api.plan import Plan
from klkit.api.strings import run_strings
from klkit.estimators.statistics import TokenStatistics
from klkit.models.automaton import random_automaton
from klkit.report import shards
from klkit.report.record import RunFolder, RunFolderError
from klkit.report.shards import Batch, Details, flatten, join_shards, read_column, read_shown, unflatten
from klkit.rng import stream


@pytest.fixture(scope="module")
def batches():
    generator = stream(5, "record")
    p, q = (random_automaton(2, 4, generator=generator) for _ in range(2))
    context = p.context(None)
    found = []
    for n in (3, 30, 5):
        run_strings(p, q, Plan([context], [context], n, 12 + n, seed=n), keep=found.append, features=p.embedding())
    return found


def join(batches):
    """All batches as one, in memory."""
    lengths = [len(batch.statistics.x) for batch in batches]
    return Batch(
        TokenStatistics.cat([batch.statistics for batch in batches]),
        Details.cat([batch.details for batch in batches], [sum(lengths[:i]) for i in range(len(lengths))]),
        torch.cat([batch.floor for batch in batches]),
    )


def same(a, b):
    one, two = flatten(a), flatten(b)
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_a_batch_survives_the_disk(batches, tmp_path):
    folder = RunFolder.create(tmp_path / "run", {"seed": 1}, {})
    for i, batch in enumerate(batches):
        folder.append(i, batch, [{"text": "x"}])
    assert all(same(a, b) for a, b in zip(folder.batches(), batches, strict=True))
    assert len(list(folder.samples())) == 3
    folder.finish({"value": 1.0}, {1: "a"})
    assert same(unflatten(load_file(folder.path / "tensors.safetensors")), join(batches))
    assert torch.equal(torch.cat(list(folder.column("rows.kl"))), join(batches).statistics.rows.kl)
    assert folder.tokens() == {1: "a"}
    assert RunFolder.open(tmp_path / "run").result() == {"value": 1.0}


def write(batches, folder):
    paths = [folder / f"{i}" for i in range(len(batches))]
    for path, batch in zip(paths, batches, strict=True):
        save_file(flatten(batch), path)
    return paths


def test_a_joined_file_is_one_that_safetensors_reads_as_its_own(batches, tmp_path):
    """Batches of several widths, one without decisions to show in detail, whose empty tensors have another type."""
    last = batches[2]
    none = torch.zeros(0, dtype=torch.long)
    empty = Details(none, *(x[:0].to(torch.float32 if x.is_floating_point() else x.dtype) for x in details(last)))
    batches = [*batches, replace(last, details=empty)]
    assert len({batch.statistics.x.tokens.shape[1] for batch in batches}) > 1
    join_shards(write(batches, tmp_path), tmp_path / "whole")
    loaded, wanted = load_file(tmp_path / "whole"), flatten(join(batches))
    assert loaded.keys() == wanted.keys()
    for name, values in loaded.items():
        assert values.dtype == wanted[name].dtype, name
        assert torch.equal(values, wanted[name]), name


def details(batch):
    return [getattr(batch.details, f.name) for f in fields(Details)[1:]]


def test_a_run_that_shows_nothing_has_nothing_to_show(batches, tmp_path):
    none = torch.zeros(0, dtype=torch.long)
    batch = replace(batches[0], details=Details(none, *(x[:0] for x in details(batches[0]))))
    join_shards(write([batch], tmp_path), tmp_path / "whole")
    shown = read_shown(tmp_path / "whole")
    assert len(shown.statistics.x) == len(shown.details.string) == 0


def test_columns_come_in_parts(batches, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK", 10)
    join_shards(write(batches, tmp_path), tmp_path / "whole")
    parts = list(read_column(tmp_path / "whole", "rows.kl"))
    assert {len(part) for part in parts[:-1]} == {10}
    assert torch.equal(torch.cat(parts), join(batches).statistics.rows.kl)


def test_joining_keeps_track_of_the_shown_strings(batches, tmp_path):
    paths = write(batches, tmp_path)
    join_shards(paths, tmp_path / "whole")
    shown, whole = read_shown(tmp_path / "whole"), join(batches)
    assert shown.details.string.tolist() == [0, 1, 2, *(3 + i for i in range(24)), *(33 + i for i in range(5))]
    wanted = whole.statistics.select(whole.details.string)
    assert len(shown.details.tokens_p) == shown.statistics.x.decisions
    assert torch.equal(shown.statistics.x.targets(), wanted.x.targets())
    assert torch.equal(shown.statistics.rows.kl, wanted.rows.kl)
    assert torch.equal(shown.statistics.features, wanted.features)


def test_line_separators_within_a_text_do_not_end_the_line(batches, tmp_path):
    folder = RunFolder.create(tmp_path / "run", {"seed": 1}, {})
    lines = [{"text": text} for text in ("a\u2028b", "c\x85d\u2029", "e\r\nf\x0c", "g")]
    folder.append(0, batches[0], lines[:2])
    folder.append(1, batches[1], lines[2:])
    assert list(folder.samples()) == lines
    folder.rewrite_samples(lines)
    assert list(folder.samples()) == lines


@pytest.mark.parametrize("broken", [0, 2, 4])
def test_a_broken_line_costs_itself_only(batches, tmp_path, broken):
    folder = RunFolder.create(tmp_path / "run", {"seed": 1}, {})
    lines = [{"text": f"{i} größer"} for i in range(5)]
    folder.append(0, batches[0], lines)
    path = folder.path / "samples.jsonl"
    raw = path.read_bytes().splitlines(keepends=True)
    raw[broken] = raw[broken][: raw[broken].index("ö".encode()) + 1] + (b"\n" if broken < 4 else b"")
    path.write_bytes(b"".join(raw))
    assert list(folder.samples()) == lines[:broken] + lines[broken + 1 :]


def ignore(batch):
    pass


def test_a_broken_line_is_mended_when_the_run_goes_on(tmp_path):
    """Also where the lines before it are as many as the strings that are done."""
    p, q = (random_automaton(2, 4, generator=stream(5, "mended", name)) for name in "pq")
    plan = Plan([p.context(None)], [p.context(None)], 12, 9, seed=1)
    folder = RunFolder.create(tmp_path / "run", {"seed": 1}, {})
    run_strings(p, q, plan, keep=ignore, batch_size=4, folder=folder)
    wanted = list(folder.samples())
    path = folder.path / "samples.jsonl"
    raw = path.read_text().splitlines(keepends=True)
    for broken, kept in ((5, 3), (8, 2)):
        for shard in range(kept, 3):
            next((folder.path / "shards").glob(f"{shard:05d}-*")).unlink()
        path.write_text("".join([*raw[:broken], raw[broken][:9] + "\n", *raw[broken + 1 :]]))
        run_strings(p, q, plan, keep=ignore, batch_size=4, folder=folder)
        assert path.read_text() == "".join(raw)
        assert list(folder.samples()) == wanted


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
    folder.append(0, batches[0], [])
    with pytest.raises(ValueError, match="JSON"):
        folder.finish({"value": float("nan")}, {})
    assert not (folder.path / "result.json").exists()
    assert not list(folder.path.glob("*.part"))
