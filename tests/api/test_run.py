"""A run as a whole, on models whose divergence is known exactly."""

import gc
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import klkit
from klkit.api.breakdown import position_bins
from klkit.api.gather import Gathered
from klkit.api.plan import Plan
from klkit.api.run import measure, run
from klkit.api.settings import Settings
from klkit.api.strings import run_strings
from klkit.estimators.statistics import TokenStatistics
from klkit.models.automaton import coin, random_automaton
from klkit.report.record import RunFolder, RunFolderError
from klkit.rng import stream


@pytest.fixture(scope="module")
def pair():
    generator = stream(3, "pair")
    return tuple(random_automaton(3, 5, generator=generator) for _ in range(2))


def plan(p, samples=60, max_tokens=30):
    context = p.context(None)
    return Plan([context], [context], samples, max_tokens, seed=1)


def test_the_headline_is_near_the_exact_value(pair):
    p, q = pair
    result = klkit.estimate(p, q, samples=600, max_tokens=200)
    truth = klkit.exact(p, q).value
    assert abs(result.headline.value - truth) < 4 * result.headline.stderr
    assert result.audit["passed"]
    for estimate in result.estimates:
        if estimate.estimand == "S" and estimate.method not in ("k3_string", "cv_string"):
            assert abs(estimate.value - truth) < 5 * estimate.stderr, estimate.method
    assert float(result.lower_bound["value"]) < truth


def drawn(p, q, size):
    batches = []
    run_strings(p, q, plan(p), keep=batches.append, batch_size=size)
    return TokenStatistics.cat([batch.statistics for batch in batches])


@pytest.mark.parametrize("size", [1, 7, 64])
def test_batch_size_changes_nothing(pair, size):
    p, q = pair
    one, other = drawn(p, q, 16), drawn(p, q, size)
    assert torch.equal(one.x.targets(), other.x.targets())
    torch.testing.assert_close(one.rows.kl, other.rows.kl, rtol=1e-12, atol=1e-14)


def test_a_model_and_itself(pair):
    result = klkit.estimate(pair[0], pair[0], samples=40, max_tokens=30)
    assert result.headline.value == 0.0
    assert any("one and the same" in note for note in result.notes)


def test_reverse_is_the_forward_of_the_swapped_pair(pair):
    p, q = pair
    reverse = klkit.estimate(p, q, samples=50, max_tokens=40, divergence="reverse_kl")
    forward = klkit.estimate(q, p, samples=50, max_tokens=40)
    assert reverse.headline.value == forward.headline.value
    assert reverse.headline.direction == "KL(q‖p)"


def test_jeffreys_is_the_sum_of_both_directions(pair):
    p, q = pair
    both = klkit.estimate(p, q, samples=50, max_tokens=40, divergence="jeffreys", method="rb")
    one = klkit.estimate(p, q, samples=50, max_tokens=40, method="rb")
    two = klkit.estimate(q, p, samples=50, max_tokens=40, method="rb")
    assert both.headline.value == pytest.approx(one.headline.value + two.headline.value, rel=1e-12)


def test_js_is_between_zero_and_log_two(pair):
    result = klkit.estimate(*pair, samples=50, max_tokens=40, divergence="js")
    assert 0 < result.headline.value < np.log(2)


def test_stopping_at_a_relative_tolerance(pair):
    p, q = pair
    result = klkit.estimate(p, q, rtol=0.2, max_tokens=60, batch_size=16)
    interval = result.headline.interval()
    assert (interval.upper - interval.lower) / 2 <= 0.2 * result.headline.value
    assert 64 <= result.headline.n < 16384


def test_infinite_is_infinite():
    vocabulary = coin(end=0.5)
    # q never ends after the first symbol's chance: it gives the symbol no probability at all.
    from klkit.models.automaton import memoryless

    p, q = memoryless([0.5, 0.5], end=0.3), memoryless([1.0, 0.0], end=0.3)
    assert vocabulary.vocabulary.size == 2
    result = klkit.estimate(p, q, samples=40, max_tokens=50)
    assert result.headline.value == float("inf")
    assert result.headline.infinite > 0
    document = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert document["headline"]["value"] == "inf"


class Interrupter:
    """Interrupts the run after some batches, as Ctrl-C does."""

    def __init__(self, after):
        self.left = after

    def __call__(self, state):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_an_interrupted_run_resumes_to_the_same_result(pair, tmp_path):
    p, q = pair
    settings = Settings(p="p", q="q", samples=60, max_tokens=30, batch_size=8)
    whole = measure(p, q, settings, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        measure(p, q, settings, out=tmp_path / "parts", observe=Interrupter(3))
    lines = (tmp_path / "parts" / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 24
    # A crash may also have cut the last line off; and the batch size may differ in the second half.
    (tmp_path / "parts" / "samples.jsonl").write_text("\n".join(lines)[:-5])
    second = Settings(p="p", q="q", samples=60, max_tokens=30, batch_size=11)
    resumed = measure(p, q, second, out=tmp_path / "parts", resume=True)
    assert resumed.headline.value == pytest.approx(whole.headline.value, rel=1e-12)
    samples = list(RunFolder.open(tmp_path / "parts").samples())
    assert [s["tokens"] for s in samples] == [s["tokens"] for s in RunFolder.open(tmp_path / "whole").samples()]
    assert not (tmp_path / "parts" / "shards").exists()


def test_a_run_folder_is_not_overwritten_and_not_mixed(pair, tmp_path):
    p, q = pair
    settings = Settings(p="p", q="q", samples=20, max_tokens=20)
    with pytest.raises(KeyboardInterrupt):
        measure(p, q, settings, out=tmp_path / "run", observe=Interrupter(1))
    with pytest.raises(RunFolderError, match="--resume"):
        measure(p, q, settings, out=tmp_path / "run")
    other = Settings(p="p", q="q", samples=20, max_tokens=20, seed=5)
    with pytest.raises(RunFolderError, match="seed: 0 then, 5 now"):
        measure(p, q, other, out=tmp_path / "run", resume=True)


def test_a_damaged_folder_is_named(pair, tmp_path):
    p, q = pair
    settings = Settings(p="p", q="q", samples=20, max_tokens=20, batch_size=5)
    for damage in ("shard", "config", "gap", "bit", "copy"):
        folder = tmp_path / damage
        with pytest.raises(KeyboardInterrupt):
            measure(p, q, settings, out=folder, observe=Interrupter(3))
        shard = next((folder / "shards").glob("00001-*"))
        if damage == "shard":
            shard.write_bytes(b"garbage")
        elif damage == "bit":
            content = bytearray(shard.read_bytes())
            content[-1] ^= 1
            shard.write_bytes(content)
        elif damage == "copy":
            shard.rename(shard.with_name(shard.name.replace("00001", "00003")))
        elif damage == "config":
            (folder / "config.yaml").write_text("[not: options")
        else:
            shard.unlink()
        with pytest.raises(RunFolderError, match="expected"):
            measure(p, q, settings, out=folder, resume=True)


def test_a_full_disk_keeps_what_was_done(pair, tmp_path, monkeypatch):
    import klkit.report.record as record

    p, q = pair
    settings = Settings(p="p", q="q", samples=20, max_tokens=20, batch_size=5)
    real, calls = record.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half a sha")
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(record, "save_file", full)
    with pytest.raises(RunFolderError, match="No space left"):
        measure(p, q, settings, out=tmp_path / "run")
    assert sorted(f.name[:5] for f in (tmp_path / "run" / "shards").iterdir()) == ["00000", "00001"]
    monkeypatch.setattr(record, "save_file", real)
    resumed = measure(p, q, settings, out=tmp_path / "run", resume=True)
    assert resumed.headline.value == measure(p, q, settings).headline.value


def test_provenance_and_schema(pair, tmp_path):
    settings = Settings(p="p", q="q", samples=20, max_tokens=20)
    measure(*pair, settings, out=tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["schema"] == "klkit.result/1"
    head = result["headline"]
    assert set(head) >= {"method", "estimand", "direction", "unit", "value", "stderr", "ci", "n_sequences", "n_prompts"}
    assert set(head["ci"]) == {"level", "lower", "upper", "method"}
    for key in ("audit", "floor", "truncated_share", "infinite", "variance_ratio_vs_mc", "provenance", "estimates"):
        assert key in result
    names = {f.name for f in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "result.json", "samples.jsonl", "tensors.safetensors", "env.json", "report.html"} <= names


def test_bits_are_nats_over_log_two(pair):
    nats = klkit.estimate(*pair, samples=30, max_tokens=30).to_dict()["headline"]
    bits = klkit.estimate(*pair, samples=30, max_tokens=30, unit="bits").to_dict()["headline"]
    assert bits["value"] * np.log(2) == pytest.approx(nats["value"])
    assert bits["unit"] == "bits"


def test_the_lower_bound_does_not_trust_the_order_of_a_prompt_file():
    """Hard prompts first, easy ones after: the bound must not keep what the hard half promised."""
    from klkit.models.automaton import automaton
    from klkit.sequences import Prompts

    def law(hard):
        rows = [[0.3, 0.3, 0.4], hard, [0.3, 0.3, 0.4]]
        return automaton(
            torch.tensor(rows, dtype=torch.float64), torch.tensor([[1, 2], [1, 1], [2, 2]]), symbols=["h", "e"]
        )

    p, q = law([0.1, 0.6, 0.3]), law([0.85, 0.05, 0.1])
    prompts = Prompts(("h",) * 60 + ("e",) * 60)
    truth = (klkit.exact(p, q, prompt="h").value + klkit.exact(p, q, prompt="e").value) / 2
    result = klkit.estimate(p, q, prompts, samples=1, max_tokens=300)
    assert float(result.lower_bound["value"]) < truth
    assert result.lower_bound["anytime"]
    assert not klkit.estimate(p, q, prompts, samples=2, max_tokens=300).lower_bound["anytime"]


def test_symmetric_divergences_and_text_bring_no_figures_of_another_quantity(pair):
    for divergence in ("js", "jeffreys"):
        result = klkit.estimate(*pair, samples=50, max_tokens=40, divergence=divergence).to_dict()
        assert result["lower_bound"] == result["tail"] == {}
        assert result["breakdown"]["by_position"] == []
        assert "where" not in result["lines"]


def test_variance_ratios_compare_like_with_like(pair):
    result = klkit.estimate(*pair, samples=80, max_tokens=40, divergence="jeffreys")
    errors = {e.method: e.stderr for e in result.estimates if e.divergence == "jeffreys"}
    assert result.variance_ratio_vs_mc["rb"] == pytest.approx((errors["rb"] / errors["mc"]) ** 2)


def test_a_reverse_run_calls_its_models_by_their_names(pair):
    p, q = pair
    forward = klkit.estimate(q, p, samples=50, max_tokens=40).to_dict()
    reverse = klkit.estimate(p, q, samples=50, max_tokens=40, divergence="reverse_kl").to_dict()
    assert reverse["roles"] == ["q", "p"]
    assert reverse["companions"]["entropy_q"] == forward["companions"]["entropy_p"]
    assert "entropy of q" in reverse["lines"]["per token"]


def test_a_resumed_run_must_have_the_same_prompts_and_models(pair, tmp_path):
    p, q = pair
    options = {"samples": 4, "max_tokens": 20, "batch_size": 8, "out": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt):
        klkit.estimate(p, q, ["a"] * 10, observe=Interrupter(2), **options)
    with pytest.raises(RunFolderError, match="prompts"):
        klkit.estimate(p, q, ["b"] * 10, resume=True, **options)
    settings = Settings.from_mapping(RunFolder(tmp_path / "run").config())
    with pytest.raises(ValueError, match="given in Python"):
        run(settings)


def test_rtol_that_can_never_be_reached_is_refused_or_ends_at_once(pair):
    p, q = pair
    with pytest.raises(ValueError, match="at least 10"):
        klkit.estimate(p, q, ["a"] * 5, rtol=0.1, max_tokens=20)
    from klkit.models.automaton import memoryless

    one, two = memoryless([0.5, 0.5], end=0.3), memoryless([1.0, 0.0], end=0.3)
    assert klkit.estimate(one, two, rtol=0.1, max_tokens=50).headline.n == 64


def test_prompts_are_counted_as_prompts(pair):
    head = klkit.estimate(*pair, samples=50, max_tokens=20).to_dict()["headline"]
    assert (head["n_prompts"], head["n_clusters"], head["n_sequences"]) == (1, 50, 50)


def test_shards_of_other_prompts_and_foreign_files(pair, tmp_path):
    p, q = pair
    options = {"samples": 2, "max_tokens": 20, "batch_size": 8}
    prompts = ["a", "b", "c", "d"] * 10
    with pytest.raises(KeyboardInterrupt):
        klkit.estimate(p, q, prompts, observe=Interrupter(3), out=tmp_path / "run", **options)
    (tmp_path / "run" / "shards" / ".DS_Store").write_bytes(b"not ours")
    first = next((tmp_path / "run" / "shards").glob("00000-*"))
    doubled = first.with_name(first.name.replace("00000", "00003"))
    doubled.write_bytes(first.read_bytes())
    with pytest.raises(RunFolderError, match="shard 00003"):
        klkit.estimate(p, q, prompts, resume=True, out=tmp_path / "run", **options)
    doubled.unlink()
    resumed = klkit.estimate(p, q, prompts, resume=True, out=tmp_path / "run", **options)
    assert resumed.headline.value == klkit.estimate(p, q, prompts, **options).headline.value


def test_a_report_of_a_model_and_itself(pair, tmp_path):
    klkit.estimate(pair[0], pair[0], samples=40, max_tokens=30, out=tmp_path / "run")
    assert "KL(p‖q) = 0" in (tmp_path / "run" / "report.html").read_text()


def test_an_rtol_out_of_reach_is_said(pair):
    result = klkit.estimate(*pair, samples=80, max_tokens=20, rtol=0.0001)
    assert any("rtol=0.0001" in note for note in result.notes)


def test_a_text_run_that_was_cut_off_resumes_to_the_same_result(pair, tmp_path, monkeypatch):
    p, q = pair
    documents = ["".join(p.vocabulary.tokens[i] for i in range(4)) * 10] * 12
    options = {"documents": documents, "out": tmp_path / "parts"}
    settings = Settings(p="p", q="q", text="memory:12 texts", context=10, batch_size=4)
    whole = measure(p, q, settings, **options | {"out": tmp_path / "whole"})
    append, left = RunFolder.append, [2]

    def cut_off(self, *arguments):
        append(self, *arguments)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "append", cut_off)
    with pytest.raises(KeyboardInterrupt):
        measure(p, q, settings, **options)
    resumed = measure(p, q, replace(settings, batch_size=7), resume=True, **options)
    assert resumed.headline.value == pytest.approx(whole.headline.value, rel=1e-12)
    assert resumed.companions["text_rows"] == whole.companions["text_rows"]
    lines = [(tmp_path / name / "samples.jsonl").read_text() for name in ("whole", "parts")]
    assert lines[0] == lines[1]


def test_what_a_run_holds_grows_by_the_string_and_not_by_the_token(pair):
    """Traced allocations of arrays and tensors between one batch and the next."""
    p, q = pair

    def kept(max_tokens):
        found, sizes = Gathered(400), []

        def keep(batch):
            found.add(batch)
            del batch
            gc.collect()
            alive = [x for x in gc.get_objects() if type(x) in (torch.Tensor, np.ndarray)]
            sizes.append(sum(x.nbytes for x in alive))

        context = p.context(None)
        run_strings(p, q, Plan([context], [context], 400, max_tokens, seed=0), keep=keep, batch_size=40)
        return (sizes[-1] - sizes[1]) / 320, float(found.strings.lengths.double().mean())

    (short, few), (long, many) = kept(3), kept(300)
    assert many > 4 * few
    assert short < 400
    table = 16 * (len(position_bins(300)) - 3)  # two numbers for each further bin of positions
    assert long - short < table < 100 * (many - few)
