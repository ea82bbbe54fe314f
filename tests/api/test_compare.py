"""Many candidates against one: the same numbers as pair by pair, ``p`` asked once, ties called ties."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.api.test_run import Interrupter
from tests.bank import INFINITE
from tests.tiny import folder as tiny

from klkit import exact, rng
from klkit.api import candidates, material
from klkit.api.candidates import Candidate
from klkit.api.compare import compare_models
from klkit.api.compare_settings import CompareSettings
from klkit.api.rank import said
from klkit.api.run import measure
from klkit.api.settings import Settings
from klkit.caches.recorded import RecordedModel
from klkit.models.automaton import Automaton, memoryless, random_automaton
from klkit.models.base import NotTractable, Vocabulary, VocabularyMismatch
from klkit.models.spec import load
from klkit.models.wrap import renamed, temperature
from klkit.report.record import RunFolder, RunFolderError
from klkit.sequences import Prompts


def automata(count=3):
    p, *qs = (random_automaton(3, 3, generator=rng.stream(i, "compare"), name=f"m{i}") for i in range(count + 1))
    return p, qs


def waiting(models):
    return [Candidate(model.name, lambda model=model: nullcontext(model)) for model in models]


def settings(models, **options):
    given = {"p": "p", "candidates": [model.name for model in models], "samples": 120, "max_tokens": 30, **options}
    return CompareSettings.from_mapping(given)


def values(ranking):
    return {entry.name: entry.result.headline.value for entry in ranking.entries}


class Counting:
    """A model that counts how often it is asked."""

    def __init__(self, model):
        self.model, self.encoded, self.begun = model, 0, 0

    def __getattr__(self, name):
        return getattr(self.model, name)

    def encode(self, x):
        self.encoded += x.decisions
        return self.model.encode(x)

    def begin(self, contexts):
        self.begun += len(contexts)
        return self.model.begin(contexts)

    def head(self):
        return self.model.head() if hasattr(self.model, "head") else None


def test_every_candidate_gets_the_numbers_of_its_own_run():
    p, qs = automata()
    ranking = compare_models(p, waiting(qs), settings(qs))
    for q, entry in zip(qs, ranking.entries, strict=True):
        alone = measure(p, q, Settings("p", q.name, samples=120, max_tokens=30))
        assert entry.result.headline.value == alone.headline.value
        assert [e.to_dict() for e in entry.result.estimates] == [e.to_dict() for e in alone.estimates]
        assert entry.result.breakdown == alone.breakdown


def test_the_order_is_that_of_the_exact_divergences():
    p, qs = automata(4)
    ranking = compare_models(p, waiting(qs), settings(qs, samples=400))
    truth = [exact(p, q, max_tokens=30).value for q in qs]
    assert [ranking.entries[i].name for i in ranking.ranked] == [qs[i].name for i in np.argsort(truth)]
    places = {name: i + 1 for i, name in enumerate(qs[i].name for i in np.argsort(truth))}
    record = ranking.to_dict()
    assert all(row["rank_first"] <= places[row["name"]] <= row["rank_last"] for row in record["candidates"])
    assert {p["verdict"] for p in record["pairs"]} == {"closer", "tied"}  # two of the four are close
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_models_that_cannot_be_told_apart_are_tied():
    p = memoryless([0.5, 0.5], end=0.2, name="p")
    up, down = (memoryless(law, end=0.2, name=name) for name, law in (("up", [0.6, 0.4]), ("down", [0.4, 0.6])))
    far = memoryless([0.9, 0.1], end=0.2, name="far")
    ranking = compare_models(p, waiting([up, far, down]), settings([up, far, down], max_tokens=60))
    places = {entry.name: ranking.rank(i) for i, entry in enumerate(ranking.entries)}
    assert places == {"up": (1, 2), "down": (1, 2), "far": (3, 3)}
    assert "not resolved from" in ranking.sentence


def test_p_draws_once_and_each_candidate_reads_once():
    p, *qs = (load(str(tiny("gpt2", seed=seed))) for seed in range(3))
    p, *qs = map(Counting, (p, *qs))
    warm = temperature(p, 1.5)
    models = [*qs, warm]
    few = settings(models, samples=24, max_tokens=10, floor="none", batch_size=8)
    ranking = compare_models(p, waiting(models), few)
    decisions = int(ranking.entries[0].result.headline.n and sum(ranking.entries[0].per_token.weights))
    assert p.begun >= 24  # drawing; close calls are settled alone
    assert p.encoded == 0
    assert [q.encoded for q in qs] == [decisions, decisions]


def test_resumed_with_further_candidates(tmp_path):
    p, qs = automata()
    first = compare_models(p, waiting(qs[:2]), settings(qs[:2], batch_size=50), out=tmp_path / "run")
    asked = Counting(p)
    more = compare_models(asked, waiting(qs), settings(qs, batch_size=50), out=tmp_path / "run", resume=True)
    whole = compare_models(p, waiting(qs), settings(qs, batch_size=50))
    assert asked.begun == asked.encoded == 0
    # A finished candidate is read back as one batch, so its sums may differ in the last bit.
    assert values(more) == pytest.approx(values(whole), rel=1e-13)
    assert {name: values(more)[name] for name in values(first)} == pytest.approx(values(first), rel=1e-13)
    assert [p["verdict"] for p in more.to_dict()["pairs"]] == [p["verdict"] for p in whole.to_dict()["pairs"]]


@pytest.mark.parametrize("left", [1, 3])
def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path, left):
    p, qs = automata(2)
    whole = compare_models(p, waiting(qs), settings(qs, batch_size=30))
    options = {"out": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt):
        compare_models(p, waiting(qs), settings(qs, batch_size=30), observe=Interrupter(4 + left), **options)
    again = compare_models(p, waiting(qs), settings(qs, batch_size=30), resume=True, **options)
    assert values(again) == values(whole)
    assert again.to_dict()["pairs"] == whole.to_dict()["pairs"]


def test_other_models_or_prompts_do_not_resume(tmp_path):
    p, qs = automata(2)
    compare_models(p, waiting(qs), settings(qs), out=tmp_path / "run")
    with pytest.raises(RunFolderError, match="other"):
        compare_models(qs[0], waiting(qs), settings(qs), out=tmp_path / "run", resume=True)
    with pytest.raises(RunFolderError, match="seed"):
        compare_models(p, waiting(qs), settings(qs, seed=1), out=tmp_path / "run", resume=True)
    with pytest.raises(RunFolderError, match="holds files"):
        compare_models(p, waiting(qs), settings(qs), out=tmp_path / "run")


def test_both_directions_are_those_of_their_own_runs(tmp_path):
    p, qs = automata(2)
    ranking = compare_models(p, waiting(qs), settings(qs, both=True), out=tmp_path / "run")
    for q, entry in zip(qs, ranking.entries, strict=True):
        alone = measure(p, q, Settings("p", q.name, samples=120, max_tokens=30, divergence="reverse_kl"))
        assert entry.reverse.headline.value == alone.headline.value
        assert entry.reverse.headline.direction == "KL(q‖p)"
    again = compare_models(p, waiting(qs), settings(qs, both=True), out=tmp_path / "run", resume=True)
    assert [e.reverse.headline.value for e in again.entries] == pytest.approx(
        [e.reverse.headline.value for e in ranking.entries], rel=1e-12
    )


def test_fixed_text_is_that_of_its_own_runs(tmp_path):
    p, *qs = (load(str(tiny("gpt2", seed=seed))) for seed in range(3))
    documents = ["the film was a quiet triumph", "a dull, overlong story " * 9] * 6
    ranking = text_run(p, qs, documents, tmp_path)
    for q, entry in zip(qs, ranking.entries, strict=True):
        alone = measure(p, q, Settings("p", q.name, text=str(tmp_path / "t.txt"), context=16), documents=documents)
        assert entry.result.headline.value == pytest.approx(alone.headline.value, rel=1e-6)
        assert entry.result.headline.estimand == "F"
    assert "windows of the given text" in ranking.sentence


def text_run(p, qs, documents, tmp_path):
    (tmp_path / "t.txt").write_text("\n".join(documents))
    given = {"p": "p", "candidates": [q.name for q in qs], "text": str(tmp_path / "t.txt"), "context": 16}
    return compare_models(
        p, waiting(qs), CompareSettings.from_mapping(given), documents=documents, out=tmp_path / "run"
    )


def test_infinite_candidates_are_last_and_named():
    p = INFINITE.p
    near = memoryless([0.4, 0.6], end=0.25, name="near")
    models = [INFINITE.q, near]
    ranking = compare_models(p, waiting(models), settings(models))
    assert [ranking.entries[i].name for i in ranking.ranked] == ["near", INFINITE.q.name]
    assert math.isinf(ranking.entries[0].result.headline.value)
    assert any("excludes tokens" in note for note in ranking.notes)
    assert json.dumps(ranking.to_dict(), allow_nan=False)


def test_what_p_said_is_enough_without_p(tmp_path):
    p, *qs = (load(str(tiny("gpt2", seed=seed))) for seed in range(3))
    prompts = Prompts(("the film", "a dull"))
    few = {"samples": 12, "max_tokens": 8, "batch_size": 8}
    with_p = compare_models(p, waiting(qs), settings(qs, **few), prompts=prompts, out=tmp_path / "run")
    kept = RecordedModel.open(tmp_path / "run" / "reference")
    without = compare_models(kept, waiting(qs), settings(qs))
    for one, other in zip(with_p.entries, without.entries, strict=True):
        assert other.result.headline.value == pytest.approx(one.result.headline.value, rel=1e-6)
        assert other.result.audit["passed"]
    assert any("not asked again" in note for note in without.notes)
    with pytest.raises(NotTractable, match="name the model itself"):
        kept.encode(kept.cache.strings([0]))


def test_parts_of_laws_give_the_same_number_without_bias(tmp_path):
    """On automata of few symbols all tokens are kept, so parts are the whole; with fewer, draws scatter around it."""
    p, qs = automata(2)
    whole = compare_models(p, waiting(qs), settings(qs))
    parts = compare_models(p, waiting(qs), settings(qs, keep="hybrid"), out=tmp_path / "run")
    for one, other in zip(whole.entries, parts.entries, strict=True):
        rb, again = (next(e for e in x.result.estimates if e.method == "rb") for x in (one, other))
        assert again.value == pytest.approx(rb.value, rel=1e-6)
        assert other.result.companions["total_variation"]["value"] == "nan"  # needs the whole law of p
    kept = RecordedModel.open(tmp_path / "run" / "reference")
    assert kept.cache.kind == "hybrid"
    coverage, strings = kept.cache.manifest.coverage, kept.cache.strings(range(len(kept.cache)))
    laws = p.readout(p.encode(strings)).log_softmax(-1)
    assert coverage["mean_mass"] == pytest.approx(1.0)  # all tokens were kept
    assert coverage["heads_covered"] == 1.0
    assert coverage["mean_entropy"] == pytest.approx(float(torch.special.entr(laws.exp()).sum(-1).mean()), rel=1e-9)
    without = compare_models(kept, waiting(qs), settings(qs))
    assert values(without) == pytest.approx(values(parts), rel=1e-12)


def test_a_reference_is_found_again_by_what_it_is_made_of(tmp_path):
    p, qs = automata(2)
    store = {"cache": str(tmp_path / "store"), "keep": "hybrid"}
    first = compare_models(p, waiting(qs[:1]), settings(qs[:1], **store))
    asked = Counting(p)
    again = compare_models(asked, waiting(qs), settings(qs, **store))
    assert asked.begun == asked.encoded == 0
    assert values(again)[qs[0].name] == values(first)[qs[0].name]
    assert len([path for path in (tmp_path / "store").iterdir() if path.is_dir()]) == 1
    compare_models(asked, waiting(qs), settings(qs, seed=1, **store))
    assert asked.begun > 0
    with pytest.raises(ValueError, match="head can be kept for --cache"):
        compare_models(p, waiting(qs), settings(qs, cache=store["cache"]))
    with pytest.raises(ValueError, match="expected a cache of at most 1 KB"):
        compare_models(p, waiting(qs), settings(qs, seed=2, cache_limit="1KB", **store))


class OwnTemplate(Counting):
    """A model that reads one token more before it responds."""

    def context(self, prompt):
        return torch.cat([self.model.context(prompt), torch.tensor([0])])


def padded(model, rows):
    """The same model with further rows in its table, which no tokenizer names and which carry next to no mass."""
    table = model.log_probabilities
    wide = torch.cat([table, torch.full((len(table), rows), -20.0, dtype=table.dtype)], 1).log_softmax(1)
    onward = torch.nn.functional.pad(model.transitions, (0, rows))
    names = (*model.vocabulary.tokens, *[None] * rows)
    return Automaton(wide, onward, Vocabulary(names, model.vocabulary.ends), name=f"{model.name} padded")


@pytest.mark.parametrize("kept", ["hidden", "hybrid"])
def test_tables_of_other_sizes(kept, monkeypatch):
    monkeypatch.setattr("klkit.api.compare_settings.HYBRID_TOKENS", 2)
    p, qs = automata(2)
    for one, models in ((p, [padded(qs[0], 5), qs[1]]), (padded(p, 5), qs)):
        found = compare_models(one, waiting(models), settings(models, keep=kept))
        for model, entry in zip(models, found.entries, strict=True):
            alone = measure(one, model, Settings("p", model.name, samples=120, max_tokens=30))
            rb, again = (next(e for e in r.estimates if e.method == "rb") for r in (alone, entry.result))
            # A table of another size is drawn from by other random numbers, so the strings are others.
            assert abs(again.value - rb.value) <= 4 * math.hypot(again.stderr, rb.stderr)


def test_the_manifest_says_over_how_many_ids_parts_of_laws_are(tmp_path, monkeypatch):
    monkeypatch.setattr("klkit.api.compare_settings.HYBRID_TOKENS", 2)
    p, qs = automata(1)
    wide, out = padded(p, 5), tmp_path / "run"
    compare_models(wide, waiting(qs), settings(qs, keep="hybrid"), out=out)
    manifest = RecordedModel.open(out / "reference").cache.manifest
    assert manifest.size == p.vocabulary.size == wide.vocabulary.size - 5


def test_a_reference_is_kept_with_its_temperature_prompts_and_groups(tmp_path):
    p, *qs = (load(str(tiny("gpt2", seed=seed))) for seed in range(3))
    models = [qs[0], OwnTemplate(qs[1])]
    prompts = Prompts(("the film", "a dull"), groups=("one", "other"))
    few = {"samples": 12, "max_tokens": 8, "temperature": 1.5}
    with_p = compare_models(p, waiting(models), settings(models, **few), prompts=prompts, out=tmp_path / "run")
    kept = RecordedModel.open(tmp_path / "run" / "reference")
    without = compare_models(kept, waiting(models), settings(models, samples=None, max_tokens=128))
    assert values(without) == pytest.approx(values(with_p), rel=1e-6)
    for ranking in (with_p, without):
        assert [row["group"] for row in ranking.entries[0].result.breakdown["by_group"]] == ["one", "other"]
        assert any("different contexts" in note for note in ranking.entries[1].result.notes)
    assert any("temperature 1.5" in note for note in without.entries[0].result.notes)


def test_vectors_and_head_of_a_reference_are_found_again(tmp_path):
    p, *qs = (load(str(tiny("gpt2", seed=seed))) for seed in range(3))
    few = {"samples": 12, "max_tokens": 8, "cache": str(tmp_path / "store")}
    first = compare_models(p, waiting(qs[:1]), settings(qs[:1], **few))
    asked = Counting(p)
    again = compare_models(asked, waiting(qs), settings(qs, **few))
    assert asked.begun == asked.encoded == 0
    assert values(again)[qs[0].name] == values(first)[qs[0].name]


def test_models_of_one_name_are_told_apart_by_what_they_say(tmp_path):
    p, qs = automata(2)
    store = {"cache": str(tmp_path / "store")}
    for model in (p, renamed(qs[1], p.name), renamed(temperature(p, 0.7), p.name)):
        cached = compare_models(model, waiting(qs[:1]), settings(qs[:1], keep="hybrid", **store))
        assert values(cached) == pytest.approx(
            values(compare_models(model, waiting(qs[:1]), settings(qs[:1], keep="hybrid"))), rel=1e-12
        )


def test_batches_of_another_size_do_not_shorten_a_resumed_run(tmp_path):
    p, qs = automata(1)
    whole = compare_models(p, waiting(qs), settings(qs, batch_size=30))
    with pytest.raises(KeyboardInterrupt):
        compare_models(p, waiting(qs), settings(qs, batch_size=30), out=tmp_path / "run", observe=Interrupter(6))
    again = compare_models(p, waiting(qs), settings(qs, batch_size=50), out=tmp_path / "run", resume=True)
    assert again.entries[0].result.headline.n == 120
    assert values(again) == values(whole)


def test_batches_that_do_not_fit_in_memory_are_halved(monkeypatch):
    p, qs = automata(2)
    whole = compare_models(p, waiting(qs), settings(qs, batch_size=64))
    scored, drawn = candidates.score_batch, material.sampled_batch

    def small_score(pair, batch, *arguments, **options):
        if len(batch.x) > 20:
            raise torch.OutOfMemoryError("full")
        return scored(pair, batch, *arguments, **options)

    def small_draw(model, plan, start, size, *arguments, **options):
        if size > 30:
            raise torch.OutOfMemoryError("full")
        return drawn(model, plan, start, size, *arguments, **options)

    monkeypatch.setattr(candidates, "score_batch", small_score)
    monkeypatch.setattr(material, "sampled_batch", small_draw)
    halved = compare_models(p, waiting(qs), settings(qs, batch_size=64))
    assert values(halved) == pytest.approx(values(whole), rel=1e-12)
    assert halved.entries[0].result.breakdown == whole.entries[0].result.breakdown


def test_a_run_is_not_continued_without_its_candidates(tmp_path):
    p, qs = automata(2)
    compare_models(p, waiting(qs[:1]), settings(qs[:1]), out=tmp_path / "run")
    with pytest.raises(ValueError, match=r"got none of m1; name them again"):
        compare_models(p, waiting(qs[1:]), settings(qs[1:]), out=tmp_path / "run", resume=True)


def test_a_crash_at_the_very_beginning_leaves_nothing_in_the_way(tmp_path):
    p, qs = automata(1)
    (tmp_path / "run" / "shards").mkdir(parents=True)
    (tmp_path / "run" / "env.json").write_text("{}")
    compare_models(p, waiting(qs), settings(qs), out=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "result.json").is_file()


def test_a_damaged_reference_is_not_read(tmp_path):
    p, qs = automata(1)
    compare_models(p, waiting(qs), settings(qs, batch_size=60), out=tmp_path / "run")
    shard = sorted((tmp_path / "run" / "reference" / "shards").iterdir())[0]
    shard.write_bytes(shard.read_bytes()[:-8] + b"\0" * 8)
    for path in (tmp_path / "run" / "candidates").iterdir():
        (path / "result.json").unlink()
        (path / "tensors.safetensors").unlink()
    with pytest.raises(ValueError, match="not what was written"):
        compare_models(p, waiting(qs), settings(qs, batch_size=60), out=tmp_path / "run", resume=True)


def test_candidates_with_other_tokens_are_refused():
    p, _ = automata(1)
    other = random_automaton(3, 3, generator=rng.stream(9, "compare"), name="other")
    renamed = type(other)(
        other.log_probabilities, other.transitions, type(other.vocabulary)(("x", "y", "z", "<end>"), (3,)), name="other"
    )
    with pytest.raises(VocabularyMismatch, match="different strings"):
        compare_models(p, waiting([renamed]), settings([renamed]))


def test_each_candidate_has_a_page_and_the_run_a_table(tmp_path):
    p, qs = automata(2)
    ranking = compare_models(p, waiting(qs), settings(qs, unit="bits"), out=tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    for entry in ranking.entries:
        own = next((tmp_path / "run" / "candidates").glob(f"{entry.name}-*"))
        assert f'href="candidates/{own.name}/report.html"' in page
        assert RunFolder.open(own).result()["headline"]["unit"] == "bits"
    assert "| rank | candidate | KL(p‖q), bits per response |" in (tmp_path / "run" / "table.md").read_text()
    assert not (tmp_path / "run" / "shards").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"candidates": []}, "list of models"),
        ({"candidates": ["a", "a"]}, "a twice"),
        ({"candidates": "a"}, "list of models"),
        ({"candidates": ["a"], "q": "b"}, "name it there"),
        ({"candidates": ["a"], "divergence": "js"}, "same strings of p"),
        ({"candidates": ["a"], "rtol": 0.1}, "same strings of p"),
        ({"candidates": ["a"], "sampler": "vllm"}, "same strings of p"),
        ({"candidates": ["a"], "shared_only": True}, "same strings of p"),
        ({"candidates": ["a"], "both": True, "text": "t.txt"}, "neither model wrote"),
        ({"candidates": ["a"], "cache_limit": "1GB"}, "--cache FOLDER"),
        ({"candidates": ["a"], "both": "yes"}, "true or false"),
        ({"candidates": ["a"], "keep": "logits"}, "hidden, hybrid"),
        ({"candidates": ["a"], "cache": "c", "cache_limit": "much"}, "a size such as"),
        ({"candidates": ["a"], "sample": 3}, "did you mean 'samples'"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, expected):
    with pytest.raises(ValueError, match=expected):
        CompareSettings.from_mapping({"p": "p", **options})


def test_settings_survive_a_round_trip():
    one = CompareSettings.from_mapping({"p": "p", "candidates": ["a", "b"], "both": True, "seed": 4})
    assert CompareSettings.from_mapping(one.to_dict()) == one


def test_notes_of_some_candidates_are_told_with_their_names():
    p, qs = automata(3)
    given = [("all", "two"), ("all", "two", f"{qs[1].name}: one"), ("all",)]
    ranking = compare_models(p, waiting(qs), settings(qs, samples=20))
    entries = [
        replace(entry, result=replace(entry.result, notes=notes))
        for entry, notes in zip(ranking.entries, given, strict=True)
    ]
    first, second, _ = (q.name for q in qs)
    assert said(entries) == ["all", f"{first}: two", f"{second}: two", f"{second}: one"]
    assert said(entries[1:2]) == [f"{second}: all", f"{second}: two", f"{second}: one"]
