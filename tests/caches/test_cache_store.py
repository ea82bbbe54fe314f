"""A store of caches: found by what they are made of, within its room, the longest unused ones first to go."""

import os
import shutil

import pytest
import torch

from klkit.caches.build import build, size_of
from klkit.caches.recording import Recording
from klkit.caches.source import Data, Teacher
from klkit.caches.store import CacheStore, key_of
from klkit.models.automaton import coin
from klkit.models.wrap import temperature
from klkit.sequences import Sequences

P, RECORDING = coin(end=0.5), Recording("top-k", k=2)
ROOM = 2_000  # a cache takes about 1,750 bytes, most of them its manifest


class Clock:
    def __init__(self):
        self.now = 1e9

    def __call__(self):
        self.now += 10
        return self.now


def strings(number):
    return Sequences.pack([torch.tensor([1])] * 2, [torch.tensor([1] * number + [0]), torch.tensor([0])])


def key(number):
    return key_of(Teacher.of(P), Data.of(strings(number)), RECORDING)


def filled(store, number, **options):
    return build(store.claim(key(number), ROOM), P, strings(number), RECORDING, **options).cache


@pytest.fixture
def store(tmp_path):
    return CacheStore(tmp_path / "store", 3 * ROOM, clock=Clock())


def names(store):
    return {path.name for path in store.folder.iterdir()}


def again(store):
    """As another process sees it."""
    return CacheStore(store.folder, store.most_bytes, clock=store._clock)


def test_a_cache_takes_what_the_tests_say(store):
    cache = filled(store, 1)
    assert 0.8 * ROOM < sum(p.stat().st_size for p in cache.path.rglob("*") if p.is_file()) < ROOM


def test_a_cache_is_found_by_what_it_is_made_of(store):
    assert store.find(key(1)) is None
    cache = filled(store, 1)
    assert store.find(key(1)).path == cache.path == store.folder / key(1)
    assert store.find(key(2)) is None


def test_everything_that_matters_is_in_the_name_and_nothing_else():
    teacher, data = Teacher.of(P), Data.of(strings(1))
    others = [
        key_of(Teacher.of(temperature(P, 2.0)), data, RECORDING),
        key_of(teacher, Data.of(strings(2)), RECORDING),
        key_of(teacher, data, Recording("hybrid", k=2)),
        key_of(teacher, data, Recording("top-k", k=1)),
        key_of(teacher, data, RECORDING, {"temperature": 1.0}),
        key_of(teacher, data, RECORDING, {"temperature": 0.5}),
    ]
    assert len({key(1), *others}) == 7
    renamed = Teacher(**{name: getattr(teacher, name) for name in Teacher.__slots__} | {"name": "another"})
    assert key_of(renamed, Data.of(strings(1), 50), Recording("top-k", k=2, draws=5), {}) == key(1)


def test_the_longest_unused_one_makes_room(store):
    for number in (1, 2, 3):
        filled(store, number)
    later = again(store)
    assert later.find(key(1)) is not None  # so that the second is the oldest
    later.release(key(1))
    filled(later, 4)
    assert names(later) == {name for n in (1, 3, 4) for name in (key(n), f"{key(n)}.used")}
    filled(later, 5)
    assert later.find(key(3)) is None
    assert later.find(key(1)) is not None


def test_what_fits_evicts_nothing(store):
    filled(store, 1)
    again(store).claim(key(2), 2 * ROOM)
    assert store.find(key(1)) is not None


def test_one_in_use_stays_and_no_room_is_said(store):
    for number in (1, 2, 3):
        filled(store, number)
    with pytest.raises(ValueError, match=r"expected room for 2 KB in .* of which caches in use .* take .* KB; give"):
        store.claim(key(4), ROOM)
    store.release(key(2))
    filled(store, 4)
    assert store.find(key(2)) is None
    assert all(store.find(key(n)) is not None for n in (1, 3, 4))


def test_one_larger_than_the_store_evicts_nothing(store):
    filled(store, 1)
    with pytest.raises(ValueError, match=r"expected a cache of at most 6 KB, .* got one of 6 KB; give the folder more"):
        again(store).claim(key(2), 3 * ROOM + 1)
    assert store.find(key(1)) is not None


def interrupted(store, number):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        filled(store, number, batch=1, observe=stop)


def test_an_unfinished_one_is_not_found_not_evicted_and_resumed(store):
    interrupted(store, 1)
    later = again(store)
    assert later.find(key(1)) is None
    for number in (2, 3, 4, 5):
        filled(later, number)
        later.release(key(number))
    assert (store.folder / key(1) / "manifest.json").is_file()
    assert len(filled(later, 1)) == 2
    assert later.find(key(1)) is not None


def test_one_that_lost_a_shard_is_not_found_and_made_whole(store):
    cache = filled(store, 1)
    (cache.path / "shards" / cache.manifest.files[0]).unlink()
    assert store.find(key(1)) is None
    assert filled(store, 1).manifest.files == cache.manifest.files


def test_a_crash_while_evicting_leaves_nothing_to_find_and_is_cleaned_up(store, monkeypatch):
    for number in (1, 2, 3):
        filled(store, number)
    later = again(store)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *a, **k: None)  # as if the process died before
        later.claim(key(4), ROOM)
    assert f"{key(1)}.evicted" in names(store)
    assert later.find(key(1)) is None
    assert f"{key(1)}.evicted" not in names(again(store))


def test_use_is_what_the_clock_says_whatever_order_files_were_written_in(store):
    filled(store, 1), filled(store, 2), filled(store, 3)
    os.utime(store.folder / f"{key(3)}.used", (1.0, 1.0))
    filled(again(store), 4)
    assert store.find(key(3)) is None


def test_the_size_to_claim_is_the_one_that_building_says(store):
    size = size_of(P, strings(1), RECORDING).total
    build(store.claim(key(1), size), P, strings(1), RECORDING)
    assert store.find(key(1)) is not None


def test_a_store_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("a")
    with pytest.raises(ValueError, match="got the file"):
        CacheStore(tmp_path / "file", 10)
    with pytest.raises(ValueError, match="at least 1 byte, got 0"):
        CacheStore(tmp_path, 0)
