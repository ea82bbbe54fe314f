"""Caches on disk: built in pieces, resumed, damaged, stale; each refusal says what is wrong and what to do."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tests.tiny import folder

from klkit.caches import build as building
from klkit.caches import shards
from klkit.caches.build import build
from klkit.caches.cache import StaleCache, TeacherCache
from klkit.caches.recording import KINDS, Recording
from klkit.caches.shards import CacheError, parts_of
from klkit.caches.sizes import cache_size, parse_size, require_room
from klkit.caches.verify import compare
from klkit.models.automaton import coin
from klkit.models.spec import load
from klkit.models.wrap import temperature
from klkit.rng import stream
from klkit.sequences import Sequences

SHARD = 600


def strings(count=12, *, seed=0, low=1):
    random = stream(seed, "cache", "files")

    def ids(length):
        return torch.randint(low, 300, (length,), generator=random)

    return Sequences.pack([ids(1 + i % 3) for i in range(count)], [ids(i % 7) for i in range(count)])


@pytest.fixture(scope="module")
def teacher():
    return load(str(folder("llama")))


def files(path):
    return {file.relative_to(path): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def refused(what, **kinds):
    return pytest.raises(CacheError, match=what, **kinds)


# Interrupted and damaged


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_and_resumed_is_the_same_to_the_bit(kind, teacher, tmp_path):
    recording = Recording(kind, k=7, draws=9)
    whole = build(tmp_path / "whole", teacher, strings(), recording, batch=2, shard_bytes=SHARD)
    assert whole.fresh == len(whole.cache.manifest.parts) > 2
    steps = []

    def interrupt(done, total):
        steps.append(done)
        if len(steps) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "other", teacher, strings(), recording, batch=2, shard_bytes=SHARD, observe=interrupt)
    with refused("shards; repeat the command"):
        TeacherCache.open(tmp_path / "other")
    again = build(tmp_path / "other", teacher, strings(), recording, batch=2, shard_bytes=SHARD)
    assert 0 < again.fresh < whole.fresh
    assert files(tmp_path / "whole") == files(tmp_path / "other")
    assert build(tmp_path / "other", teacher, strings(), recording, batch=2, shard_bytes=SHARD).fresh == 0


def test_a_crash_in_mid_shard_leaves_no_half_shard(teacher, tmp_path, monkeypatch):
    def crash(tensors, path, metadata=None):
        save_file(tensors, path, metadata=metadata)
        path.write_bytes(path.read_bytes()[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr("klkit.caches.shards.save_file", crash)
    with refused("No space left on device.*make room and"):
        build(tmp_path / "c", teacher, strings(), shard_bytes=SHARD)
    assert not list((tmp_path / "c" / "shards").iterdir())
    monkeypatch.undo()
    assert build(tmp_path / "c", teacher, strings(), shard_bytes=SHARD).damaged == ()


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damaged_shards_are_named_refused_and_made_again(damage, teacher, tmp_path):
    cache = build(tmp_path / "c", teacher, strings(), shard_bytes=SHARD).cache
    before = files(tmp_path / "c")
    path = tmp_path / "c" / "shards" / cache.manifest.files[1]
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
        with refused(f"{path.name} is missing; repeat the command"):
            TeacherCache.open(tmp_path / "c")
    else:
        path.write_bytes(content[:-40] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
        opened = TeacherCache.open(tmp_path / "c")
        first = opened.manifest.parts[1].first
        assert len(opened.rows(range(first)))
        with refused(f"expected a whole shard {path}.*not what was written; delete this file"):
            opened.rows([first])
    built = build(tmp_path / "c", teacher, strings(), shard_bytes=SHARD)
    assert built.fresh == 1
    assert [p.name for p in built.damaged] == ([] if damage == "gone" else [path.name + ".damaged"])
    after = files(tmp_path / "c")
    assert {name: after[name] for name in before} == before


def test_a_damaged_head_or_manifest_is_refused(teacher, tmp_path):
    build(tmp_path / "c", teacher, strings())
    head = tmp_path / "c" / "head.safetensors"
    head.write_bytes(head.read_bytes()[:-1] + b"\x00\x01")
    with refused("expected a whole output head .*delete this file and repeat"):
        TeacherCache.open(tmp_path / "c").rows([1])
    manifest = tmp_path / "c" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text[:-30])
    with refused("expected a readable manifest.json"):
        TeacherCache.open(tmp_path / "c")
    manifest.write_text(json.dumps({**json.loads(text), "format": 2, "writer": "klkit 9"}))
    with refused("expected a cache of format 1 or older .*klkit 9; update klkit"):
        TeacherCache.open(tmp_path / "c")


def test_what_is_no_cache_is_refused(teacher, tmp_path):
    with refused("expected the folder of a cache at .*nothing there"):
        TeacherCache.open(tmp_path / "none")
    with refused("no manifest.json in it"):
        TeacherCache.open(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    with refused("got the file"):
        build(tmp_path / "a.txt", teacher, strings())
    with refused("holds other files; choose another folder"):
        build(tmp_path, teacher, strings())
    with pytest.raises(IndexError, match=r"expected examples in 0\.\.11"):
        build(tmp_path / "c", teacher, strings()).cache.rows([12])


def test_many_shards_are_not_all_open_at_once_and_checked_once(teacher, tmp_path, monkeypatch):
    x, digests = strings(40), []
    cache = build(tmp_path / "c", teacher, x, Recording("top-k", k=3), batch=200, shard_bytes=100).cache
    monkeypatch.setattr("klkit.caches.cache.OPEN_SHARDS", 5)
    right = shards.file_digest
    monkeypatch.setattr(shards, "file_digest", lambda path: digests.append(path) or right(path))
    for _ in range(2):
        assert len(cache.rows(range(40), x)) == x.decisions
    assert len(cache._open) == 5
    assert len(digests) == len(cache.manifest.parts) > 20


def test_shards_depend_on_lengths_alone():
    assert parts_of([], 10, 100) == []
    assert [part.count for part in parts_of([500, 1, 1, 500, 0], 10, 100)] == [1, 2, 1, 1]
    assert sum(part.count for part in parts_of(list(range(50)), 7, 300)) == 50


# Stale


@pytest.fixture(scope="module")
def cache(teacher, tmp_path_factory):
    return build(
        tmp_path_factory.mktemp("cache") / "c", teacher, strings(), Recording("top-k", k=4), max_tokens=6
    ).cache


def test_the_right_teacher_and_data_pass(cache, teacher):
    cache.require(strings=strings(), teacher=teacher, vocabulary=teacher.vocabulary, max_tokens=6, temperature=1.0)
    cache.require(strings=strings(), max_tokens=99)  # cuts nothing, so that the strings are the same
    assert cache.strings([3, 0]).completion(0).tolist() == strings().completion(3).tolist()


def stale(what):
    return pytest.raises(StaleCache, match=what)


def test_other_weights_precision_ends_and_templates_are_refused(cache, teacher):
    with stale("other weights: [0-9a-f]+ then, [0-9a-f]+ now.*Build it again"):
        cache.require(teacher=load(str(folder("llama", seed=1))))
    with stale("other weights: .*temperature=2 now"):
        cache.require(teacher=temperature(teacher, 2.0))
    with stale("another precision: float32 then, float64 now"):
        cache.require(teacher=load(str(folder("llama")), dtype="float64"))
    with stale(r"other end tokens: \[0\] then, \[0, 5\] now"):
        cache.require(teacher=load(str(folder("llama")), ends=[0, 5]))
    talking = load(str(folder("llama")))
    talking.tokenizer.chat_template = "{{ messages[0].content }}"
    with stale("another chat template: none then, [0-9a-f]+ now"):
        cache.require(teacher=talking)


def test_another_tokenizer_is_refused(cache, teacher):
    other = load("klkit:docs")
    with stale("another tokenizer: tokens .* then, .* of klkit:docs now"):
        cache.require(teacher=other)
    with stale("a student with another tokenizer"):
        cache.require(vocabulary=other.vocabulary)


def test_padding_rows_do_not_make_another_tokenizer(cache):
    wide = load(str(folder("llama", vocab_size=512)))
    assert wide.vocabulary.size > cache.manifest.size
    cache.require(vocabulary=wide.vocabulary)


def test_other_data_is_refused_by_kind(cache):
    x = strings()
    order = [1, 0, *range(2, 12)]
    with stale("the same 12 examples in another order"):
        cache.require(strings=x.select(order))
    with stale("other examples: 12 of them then, 11 now"):
        cache.require(strings=x.select(list(range(11))))
    changed = x.tokens.clone()
    changed[5, x.start[5]] = 299 - changed[5, x.start[5]]
    with stale("other responses: 1 of 12 differ, the first is example 6"):
        cache.require(strings=replace(x, tokens=changed))
    contexts = [torch.cat([torch.tensor([7]), x.context(i)]) for i in range(12)]
    with stale("other prompts, or another chat template: 12 of 12 differ, the first is example 1"):
        cache.require(strings=x.after(contexts))
    cut = Sequences.pack([x.context(i) for i in range(12)], [x.completion(i)[:3] for i in range(12)])
    with stale(r"other responses \(at most 6 tokens then, 3 now\): 4 of 12 differ"):
        cache.require(strings=cut, max_tokens=3)


def test_another_temperature_is_refused_where_it_matters(cache, teacher, tmp_path):
    with stale("another temperature: 1 then, 2 now, and a part of a law cannot be tempered"):
        cache.require(temperature=2.0)
    build(tmp_path / "h", teacher, strings()).cache.require(temperature=2.0)


def test_every_reason_is_named(cache):
    with stale("other weights: .*; the same 12 examples in another order. Build"):
        cache.require(teacher=load(str(folder("llama", seed=1))), strings=strings().select(list(range(11, -1, -1))))


def test_strings_are_compared_when_they_are_read(cache):
    x = strings()
    assert len(cache.rows([3, 1], x.select([3, 1])))
    with stale("expected example 4 to be the one that .* was built from, got another response"):
        cache.rows([3, 1], x.select([4, 1]))
    with stale("expected one index for each of 1 strings, got 2"):
        cache.rows([3, 1], x.select([3]))


def test_a_cache_of_something_else_is_not_continued(cache, teacher):
    for options, what in (
        ({"recording": Recording("top-k", k=5)}, "k: 4 then, 5 now"),
        ({"strings": strings(seed=1)}, "data's responses"),
        ({"teacher": load(str(folder("llama", seed=1)))}, "teacher's weights"),
    ):
        given = {"teacher": teacher, "strings": strings(), "recording": Recording("top-k", k=4)} | options
        with refused(f"got another one: .*{what}.*choose another --out"):
            build(cache.path, **given)


# Refused before anything is written


def test_no_examples_and_too_long_ones_are_refused(teacher, tmp_path):
    with pytest.raises(ValueError, match="at least one example to build a cache of, got none"):
        build(tmp_path / "c", teacher, Sequences.pack([], []))
    long = Sequences.pack([torch.ones(4).long()], [torch.ones(80).long()])
    with pytest.raises(ValueError, match=r"at most 64 tokens, the window of .*, got 84 \(example 1\); lower"):
        build(tmp_path / "c", teacher, long)
    assert not (tmp_path / "c").exists()


def test_only_empty_responses_make_an_empty_cache(teacher, tmp_path):
    x = Sequences.pack([torch.tensor([5]), torch.tensor([6, 7])], [torch.empty(0).long()] * 2)
    for kind in KINDS:
        found = build(tmp_path / kind, teacher, x, Recording(kind)).cache
        assert len(found.rows([0, 1], x)) == 0
        assert compare(found, teacher).holds


def test_a_teacher_of_no_linear_map_is_not_recorded_as_vectors(tmp_path):
    x = Sequences.pack([torch.tensor([1])], [torch.tensor([1, 0])])
    with pytest.raises(ValueError, match=r"linear map of hidden states .*; use --kind top-k, sampled or hybrid"):
        build(tmp_path / "c", coin(end=0.5), x)
    with pytest.raises(ValueError, match="expected k of at most 2, the vocabulary of coin"):
        build(tmp_path / "c", coin(end=0.5), x, Recording("top-k", k=3))


def test_a_broken_teacher_is_named_with_its_example_and_nothing_is_lost(teacher, tmp_path):
    broken = load(str(folder("llama")))
    right = broken.encode

    def encode(x):
        hidden = right(x).clone()
        hidden[(x.tokens[x.row(), 0] == int(strings().tokens[8, 0]))] = torch.nan
        return hidden

    broken.encode = encode
    with pytest.raises(ValueError, match=r"NaN or infinite ones at .* the first in example 9; .*repeat the command"):
        build(tmp_path / "c", broken, strings(), batch=2, shard_bytes=SHARD)
    built = build(tmp_path / "c", teacher, strings(), batch=2, shard_bytes=SHARD)
    assert 0 < built.fresh < len(built.cache.manifest.parts)


def test_no_room_is_said_before_writing(teacher, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"at most 10 KB, got one of .* KB; record fewer"):
        build(tmp_path / "c", teacher, strings(), most_bytes=parse_size("10KB"))
    assert not (tmp_path / "c").exists()
    size = cache_size(
        Recording(), decisions=10**9, examples=1, tokens=1, width=8192, vocabulary=10, dtype=torch.float64
    )
    usage = type("usage", (), {"free": 10**9})
    monkeypatch.setattr("klkit.caches.sizes.shutil.disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"expected room for 65.5 TB at .*, got a disk with 1 GB left"):
        require_room(size, tmp_path / "c", None)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"kind": "logits"}, "expected a kind among hidden, top-k, sampled, hybrid"),
        ({"kind": "top-k", "k": 0}, "k of at least 1"),
        ({"kind": "sampled", "draws": 40_000}, "draws"),
        ({"kind": "top-k", "temperature": 0.0}, "positive finite temperature"),
        ({"kind": "hidden", "temperature": 2.0}, "vectors can be read at any"),
        ({"kind": "sampled", "temperature": 2.0}, "draws stand for the law itself"),
    ],
)
def test_recordings_that_make_no_sense_are_refused(options, what):
    with pytest.raises(ValueError, match=what):
        Recording(**options)


@pytest.mark.parametrize("text", ["", "GB", "3 apples", "-1GB", "1e9"])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="expected a size such as 20GB"):
        parse_size(text)


# Asked again


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_asked_again_agrees_and_another_does_not(kind, teacher, tmp_path):
    found = build(tmp_path / "c", teacher, strings(), Recording(kind, k=8, draws=64)).cache
    again = compare(found, teacher, count=6)
    assert again.holds
    assert again.examples == 6
    assert not compare(found, load(str(folder("llama", seed=1)))).holds


def test_one_weight_of_another_value_is_found_by_the_digest_and_by_asking_again(teacher, tmp_path):
    x = strings(40)
    found = build(tmp_path / "c", teacher, x).cache
    other = load(str(folder("llama")))
    with torch.no_grad():
        other.model.lm_head.weight[17, 1] += 0.5
    assert other.digest != teacher.digest
    with pytest.raises(StaleCache, match="other weights"):
        found.require(teacher=other)
    assert not compare(found, other, count=40).holds


def test_a_shift_in_the_file_is_found_by_asking_again(teacher, tmp_path, monkeypatch):
    right = building._ask

    def shifted(*arguments):
        kept, coverage = right(*arguments)
        return {name: value.roll(1, 0) for name, value in kept.items()}, coverage

    monkeypatch.setattr(building, "_ask", shifted)
    found = build(tmp_path / "c", teacher, strings()).cache
    assert not compare(found, teacher, count=12).holds


@pytest.mark.parametrize("name", ["logp", "rest", "logp_draws", "text"])
def test_one_column_of_another_decision_is_found_by_asking_again(name, teacher, tmp_path, monkeypatch):
    right = building._ask

    def shifted(*arguments):
        kept, coverage = right(*arguments)
        return {**kept, name: kept[name].roll(1, 0)}, coverage

    monkeypatch.setattr(building, "_ask", shifted)
    found = build(tmp_path / "c", teacher, strings(), Recording("hybrid", k=8, draws=4)).cache
    assert not compare(found, teacher, count=12).holds
