"""Whole distillation runs: what they leave, how they go on exactly, what they refuse before anything is written."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.tiny import build as tiny
from tests.tiny import tokenizer

from klkit.api import distill as module
from klkit.api.distill import distill
from klkit.api.distill_plan import Distillation
from klkit.api.distill_prepare import label, prepare, split
from klkit.caches.build import build
from klkit.caches.cache import StaleCache
from klkit.caches.recording import Recording
from klkit.models.base import VocabularyMismatch
from klkit.models.spec import load, load_pair
from klkit.report.record import RunFolderError
from klkit.train.checkpoints import checkpoints
from klkit.train.distill_recipe import DistillRecipe
from klkit.train.examples import Example, encode_examples
from klkit.train.rl import TrainingStopped

WORDS = ["thin", "superb", "tedious", "lovely", "great", "clumsy"]
EXAMPLES = [
    Example(prompt, f" {word} and the {thing} was {other} .")
    for prompt, word, thing, other in zip(
        ["the plot was", "the acting felt", "the music seemed", "i thought"] * 6,
        WORDS * 4,
        ["music", "ending", "direction"] * 8,
        WORDS[::-1] * 4,
        strict=True,
    )
]
RECIPE = DistillRecipe(batch=4, max_tokens=10, learning_rate=2e-3, warmup=1, schedule="constant")
SMALL = Distillation("klkit:reviews", "examples", "klkit:reviews-positive", steps=4, every=2, samples=1, recipe=RECIPE)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(path):
    return [{k: v for k, v in line.items() if "seconds" not in k} for line in lines(path)]


def same_files(one, two):
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert names == sorted(path.name for path in two.glob("*.safetensors"))
    for name in names:
        a, b = load_file(one / name), load_file(two / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "hidden"
    teacher = load("klkit:reviews-positive")
    build(folder, teacher, encode_examples(teacher, EXAMPLES, 10), max_tokens=10)
    return str(folder)


@pytest.mark.parametrize("kind", ["given", "on-policy", "teacher-text", "adapter", "cache"])
def test_a_run_goes_on_exactly_where_it_stopped(tmp_path, kind, cache):
    plan = {
        "given": replace(SMALL, recipe=replace(RECIPE, schedule="cosine", micro_batch=3)),
        "on-policy": replace(SMALL, recipe=replace(RECIPE, on_policy=0.5)),
        "teacher-text": replace(SMALL, recipe=replace(RECIPE, objective="sequence-fkl")),
        "adapter": replace(SMALL, lora=2, recipe=replace(RECIPE, objective="sequence-rkl")),
        "cache": replace(SMALL, cache=cache),
    }[kind]
    plan = replace(plan, samples=1 if kind == "on-policy" else 0)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    distill(plan, examples=EXAMPLES, out=whole)

    class Crash(Exception):
        pass

    def crash(report):
        if report.step == 3 and report.metrics is not None:
            raise Crash

    with pytest.raises(Crash):
        distill(plan, examples=EXAMPLES, out=halves, observe=crash)
    assert [path.name for path in checkpoints(halves / "checkpoints")] == ["step-000002"]
    assert len(lines(halves / "metrics.jsonl")) == 3
    written = (halves / "teacher_text.jsonl").stat().st_mtime_ns if kind == "teacher-text" else 0
    run = distill(plan, examples=EXAMPLES, out=halves, resume=True)
    assert run.state.step == 4
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert untimed(whole / name) == untimed(halves / name)
    for folder in ("checkpoints/step-000004", "student"):
        same_files(whole / folder, halves / folder)
    if kind == "teacher-text":
        assert (halves / "teacher_text.jsonl").stat().st_mtime_ns == written  # read, not drawn again


def test_the_folder_holds_a_student_in_common_format_and_all_numbers(tmp_path):
    run = distill(SMALL, examples=EXAMPLES, out=tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "config.yaml", "env.json", "metrics.jsonl", "evaluations.jsonl", "checkpoints", "student", "report.html",
    }  # fmt: skip
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["recipe"]["batch"] == 4
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    wanted = {"loss", "divergence", "kl", "reverse_kl", "head_weight", "tokens", "learning_rate", "gradient_norm"}
    assert wanted <= metrics[0].keys()
    evaluations = lines(tmp_path / "run" / "evaluations.jsonl")
    assert [line["step"] for line in evaluations] == [0, 2, 4]
    assert evaluations[-1]["kl"] < evaluations[0]["kl"]
    assert {"kl_stderr", "kl_lower", "reverse_kl", "text_kl", "text_head_gap", "rouge_l"} <= evaluations[0].keys()
    env = json.loads((tmp_path / "run" / "env.json").read_text())
    assert env["objective"][0] == str(run.claim)
    assert "adaptive_kl" in (tmp_path / "run" / "report.html").read_text()
    again = load(str(run.student))
    for a, b in zip(again.model.parameters(), run.state.student.model.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_adapter_s_folder_is_a_specification_of_its_own(tmp_path):
    run = distill(replace(SMALL, lora=2, steps=1, samples=0), examples=EXAMPLES, out=tmp_path / "run")
    p, q = load_pair(str(run.student), "klkit:reviews")
    assert p.model is q.model
    mine = run.state.student.model
    context = mine.context("the plot was")
    assert torch.allclose(p.readout(p.begin([context])[1]), mine.readout(mine.begin([context])[1]), atol=1e-6)


def test_a_cache_trains_the_student_that_its_teacher_trains(tmp_path, cache):
    plan = replace(SMALL, samples=0)
    online, cached = (distill(p, examples=EXAMPLES) for p in (plan, replace(plan, cache=cache)))
    alone = distill(replace(plan, cache=cache, teacher=None), examples=EXAMPLES)
    for run in (cached, alone):
        for a, b in zip(
            online.state.student.model.model.parameters(), run.state.student.model.model.parameters(), strict=True
        ):
            assert torch.allclose(a, b, atol=2e-5)
    assert "not evaluated" in " ".join(alone.notes)


def test_a_cache_that_is_not_of_this_run_is_refused_before_anything_is_written(tmp_path, cache):
    out = tmp_path / "run"
    plan = replace(SMALL, cache=cache)
    with pytest.raises(StaleCache, match="other responses"):
        distill(plan, examples=[replace(EXAMPLES[0], response=" dull ."), *EXAMPLES[1:]], out=out)
    with pytest.raises(StaleCache, match="the same 24 examples in another order"):
        distill(plan, examples=EXAMPLES[::-1], out=out)
    with pytest.raises(StaleCache, match="other weights"):
        distill(replace(plan, teacher="klkit:reviews"), examples=EXAMPLES, out=out)
    with pytest.raises(StaleCache, match="10 tokens then, 8 now"):
        distill(replace(plan, recipe=replace(RECIPE, max_tokens=8)), examples=EXAMPLES, out=out)
    with pytest.raises(ValueError, match="expected a teacher that reads what the student writes, got a cache"):
        replace(plan, recipe=replace(RECIPE, on_policy=0.5))
    with pytest.raises(ValueError, match="expected a teacher that reads what the teacher writes, got a cache"):
        replace(plan, recipe=replace(RECIPE, text="teacher"))
    assert not out.exists()


def test_parts_of_laws_say_what_they_are_and_draws_serve_the_forward_kl_only(tmp_path):
    teacher = load("klkit:reviews-positive")
    strings = encode_examples(teacher, EXAMPLES, 10)
    for kind in ("top-k", "sampled", "hybrid"):
        build(tmp_path / kind, teacher, strings, Recording(kind, k=8, draws=32), max_tokens=10)
    plan = replace(SMALL, teacher=None, samples=0, steps=1, cache=str(tmp_path / "top-k"))
    run = distill(plan, examples=EXAMPLES)
    assert "neither above nor below" in run.claim.objective
    bound = replace(plan, recipe=replace(RECIPE, loss="reverse_kl"))
    assert "a lower bound of" in distill(bound, examples=EXAMPLES).claim.objective
    with pytest.raises(StaleCache, match="another temperature: 1 then, 2 now"):
        distill(replace(plan, recipe=replace(RECIPE, temperature=2.0)), examples=EXAMPLES)
    for kind in ("sampled", "hybrid"):
        drawn = replace(plan, cache=str(tmp_path / kind))
        with pytest.raises(ValueError, match=f"expected forward_kl with a {kind} cache, got adaptive_kl"):
            distill(drawn, examples=EXAMPLES)
        run = distill(replace(drawn, recipe=replace(RECIPE, loss="forward_kl")), examples=EXAMPLES)
        assert "with more noise" in " ".join(run.claim.notes)


def test_other_settings_cannot_go_on_in_the_same_folder(tmp_path):
    plan = replace(SMALL, steps=1, every=1, samples=0)
    distill(plan, examples=EXAMPLES, out=tmp_path / "run")
    for changed, message in (
        (replace(plan, recipe=replace(RECIPE, temperature=2.0)), "recipe.temperature: 1.0 then, 2.0 now"),
        (replace(plan, student="klkit:reviews-positive"), "student: 'klkit:reviews' then"),
    ):
        with pytest.raises(RunFolderError, match=message):
            distill(changed, examples=EXAMPLES, out=tmp_path / "run", resume=True)
    with pytest.raises(RunFolderError, match="got other data and held-out data under the same names"):
        distill(plan, examples=EXAMPLES[::-1], out=tmp_path / "run", resume=True)
    with pytest.raises(RunFolderError, match="add --resume to continue it"):
        distill(plan, examples=EXAMPLES, out=tmp_path / "run")
    run = distill(replace(plan, steps=2), examples=EXAMPLES, out=tmp_path / "run", resume=True)
    assert run.state.step == 2


def test_a_rate_that_falls_to_the_last_step_fixes_that_step(tmp_path):
    plan = replace(SMALL, steps=1, samples=0, recipe=replace(RECIPE, schedule="cosine"))
    distill(plan, examples=EXAMPLES, out=tmp_path / "run")
    with pytest.raises(RunFolderError, match="steps: 1 then, 2 now"):
        distill(replace(plan, steps=2), examples=EXAMPLES, out=tmp_path / "run", resume=True)


def test_a_teacher_of_nan_stops_the_run_and_the_last_checkpoint_is_kept(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(module, "prepare", lambda *given: made.append(prepare(*given)) or made[-1])

    def spoil(report):
        if report.step == 2 and report.metrics is None:
            with torch.no_grad():
                next(iter(made[0].teacher.model.parameters())).fill_(float("nan"))

    with pytest.raises(TrainingStopped, match=r"step 3 was not taken: expected finite numbers from the teacher"):
        distill(SMALL, examples=EXAMPLES, out=tmp_path / "run", observe=spoil)
    kept = checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in kept] == ["step-000002"]
    assert load(str(kept[0])).vocabulary.size > 0
    assert (tmp_path / "run" / "report.html").is_file()
    assert not (tmp_path / "run" / "student").exists()


def test_a_teacher_with_another_tokenizer_is_learnt_from_by_its_text_alone(tmp_path):
    plan = replace(SMALL, teacher="klkit:docs", steps=2, recipe=replace(RECIPE, text="teacher", loss="cross_entropy"))
    run = distill(plan, examples=EXAMPLES, out=tmp_path / "run")
    assert not run.evaluations
    assert "another tokenizer" in " ".join(run.notes)
    written = lines(tmp_path / "run" / "teacher_text.jsonl")
    assert len(written) == 14  # ten are kept apart
    texts = run.state.texts
    first = run.state.student.model.tokenizer.decode(texts.completion(0), skip_special_tokens=True)
    assert first.split()[:1] == written[0]["response"].split()[:1] or len(texts) < 14
    with pytest.raises(VocabularyMismatch, match="--text teacher --loss cross_entropy"):
        distill(replace(plan, recipe=RECIPE), examples=EXAMPLES)


def test_the_student_stops_where_its_teacher_does_and_says_so_when_it_is_loaded(tmp_path):
    plan = replace(SMALL, teacher="klkit:reviews-positive,ends=0+5", steps=1, samples=0)
    run = distill(plan, examples=EXAMPLES, out=tmp_path / "run")
    assert "responses end where the teacher's do" in " ".join(run.notes)
    assert load(str(run.student)).vocabulary.ends == (0, 5)


def test_held_out_examples_are_not_trained_on_and_prompts_alone_are_enough_for_what_models_write():
    chosen, note = split(100, SMALL)
    assert (len(chosen), note) == (20, "evaluated on 20 of the 100 examples, which are not trained on")
    assert "too few to keep some apart" in split(12, SMALL)[1]
    made = prepare(SMALL, EXAMPLES)
    assert len(made.training) + len(made.held_out) == len(EXAMPLES)
    asked = [Example(f"the plot was {word}", "") for word in WORDS]
    run = distill(replace(SMALL, steps=1, recipe=replace(RECIPE, on_policy=1.0)), examples=asked)
    assert run.state.texts is None
    with pytest.raises(ValueError, match="got 6 without one"):
        distill(SMALL, examples=asked)
    mixed = [*EXAMPLES, *asked]
    assert "6 examples without a response are left out" in prepare(replace(SMALL, skip_empty=True), mixed).notes


@pytest.mark.parametrize(
    ("options", "words", "gradient"),
    [
        ({}, "mean adaptive_kl of next-token laws along the given texts", True),
        ({"objective": "sequence-fkl"}, "KL(teacher‖student) between the laws of whole responses", True),
        ({"objective": "sequence-rkl"}, "KL(student‖teacher) between the laws of whole responses", True),
        ({"on_policy": 1.0}, "KL(student‖teacher) between the laws of whole responses", False),
        ({"on_policy": 1.0, "loss": "forward_kl"}, "along the student's own texts", False),
        ({"text": "teacher"}, "KL(teacher‖student) between the laws of whole responses", True),
        ({"on_policy": 0.25}, "0.25 × [", False),
    ],
)
def test_labels_say_which_objective_it_is_and_whether_its_gradient_is_followed(options, words, gradient):
    found = label(DistillRecipe(**options))
    assert words in found.objective
    assert found.gradient == gradient


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": None}, "expected a teacher, got none"),
        ({"teacher": None, "recipe": replace(RECIPE, text="teacher", loss="cross_entropy")}, "that writes the text"),
        ({"steps": 0}, "expected steps of at least 1"),
        ({"samples": -1}, "expected samples of at least 0"),
    ],
)
def test_plans_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **options)


def test_the_student_of_a_half_precision_checkpoint_is_trained_in_single(tmp_path):
    half = load("klkit:reviews", dtype="bfloat16")
    half.model.save_pretrained(tmp_path / "half")
    half.tokenizer.save_pretrained(tmp_path / "half")
    plan = replace(SMALL, student=str(tmp_path / "half"), samples=0, steps=1)
    assert distill(plan, examples=EXAMPLES).state.student.model.dtype == torch.float32
    with pytest.raises(ValueError, match="expected weights in float32"):
        distill(replace(plan, student=f"{tmp_path}/half,dtype=bfloat16"), examples=EXAMPLES)


@pytest.mark.parametrize("samples", [0, 1])
@pytest.mark.parametrize("loss", ["forward_kl", "cross_entropy"])
def test_templates_that_differ_are_named_by_the_run_and_by_its_evaluations(tmp_path, loss, samples):
    for name, opening in (("one", "Q: "), ("two", "USER ")):
        words = copy.deepcopy(tokenizer())
        words.chat_template = opening + "{{ messages[0].content }}"
        words.save_pretrained(tmp_path / name)
        tiny("gpt2").save_pretrained(tmp_path / name)
    data = [Example([{"role": "user", "content": f"{what}?"}], " superb") for what in ("plot", "cast", "music")]
    recipe = replace(RECIPE, batch=2, loss=loss, max_tokens=6)

    def notes(teacher):
        plan = replace(SMALL, student=str(tmp_path / "one"), teacher=str(tmp_path / teacher), steps=1, samples=samples)
        run = distill(replace(plan, recipe=recipe), examples=data)
        return [run.notes, *(line["notes"] for line in run.evaluations)]

    told = [sum("different contexts for 3 of 3 prompts" in note for note in some) for some in notes("two")]
    # Nothing reads the teacher where the tokens' own cross-entropy is all that is trained, and nothing evaluated.
    assert told == [int(samples > 0 or loss == "forward_kl"), *[1] * (2 * samples)]
    assert not any("different contexts" in note for some in notes("one") for note in some)
