"""A teacher's text in the student's tokens, and caches that a loss cannot be trained from."""

import json
from dataclasses import replace

import pytest

from klkit.api.distill import distill
from klkit.api.distill_plan import Distillation
from klkit.api.distill_prepare import answered, left_out, prepare, written_by_teacher
from klkit.caches.build import build
from klkit.caches.recording import Recording
from klkit.models.spec import load
from klkit.train.distill_recipe import DistillRecipe
from klkit.train.examples import Example, encode_examples
from klkit.train.processes import Processes

EXAMPLES = [Example(f"the {what} was", " thin .") for what in ("plot", "cast", "music", "ending")]
RECIPE = DistillRecipe(batch=2, max_tokens=10, text="teacher", loss="cross_entropy")
FOREIGN = Distillation("klkit:reviews", "examples", "klkit:docs", steps=1, samples=0, recipe=RECIPE)
LONG = " a superb film and a lovely ending and great music and"


def given(path, answers):
    """Lines as a run keeps them, of answers with whether they came to an end."""
    body = [
        {"example": k, "prompt": EXAMPLES[k].prompt, "response": text, "finished": done, "tokens": [1]}
        for k, (text, done) in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in body))
    return path


def test_only_what_a_foreign_teacher_finished_is_taught_to_end(tmp_path):
    made = prepare(FOREIGN, EXAMPLES)
    student = made.learner.model
    path = given(tmp_path / "text.jsonl", [(" thin .", True), (" thin", False), (LONG, True), (LONG, False)])
    x = written_by_teacher(made, RECIPE, [], Processes(), path)
    whole = encode_examples(student, [Example(EXAMPLES[0].prompt, " thin .")], 10)
    part = encode_examples(student, [Example(EXAMPLES[1].prompt, " thin")], 10)
    assert x.finished.tolist() == [True, False, False, False]
    assert x.completion(0).tolist() == whole.completion(0).tolist()
    assert x.completion(1).tolist() == part.completion(0).tolist()[:-1]
    assert [int(x.completion(i)[-1]) in student.vocabulary.ends for i in range(4)] == [True, False, False, False]
    assert x.completion(2).tolist() == x.completion(3).tolist()
    assert x.lengths.tolist()[2:] == [10, 10]
    assert x.prompt.tolist() == x.cluster.tolist() == [0, 1, 2, 3]
    assert left_out(made, RECIPE, x) == ()


def test_empty_answers_of_a_foreign_teacher_are_counted(tmp_path):
    out = tmp_path / "run"
    distill(FOREIGN, examples=EXAMPLES, out=out)
    given(out / "teacher_text.jsonl", [(" thin .", True), ("", True), (" ", True), (" lovely .", True)])
    run = distill(FOREIGN, examples=EXAMPLES, out=out, resume=True)
    assert run.state.texts.prompt.tolist() == [0, 3]
    assert "2 of the teacher's 4 responses are empty, and left out" in run.notes
    given(out / "teacher_text.jsonl", [("", True)] * 4)
    with pytest.raises(ValueError, match="expected responses of the teacher to train on, got 4 that are empty"):
        distill(FOREIGN, examples=EXAMPLES, out=out, resume=True)


def test_what_a_check_reads_may_be_the_teacher_s_whatever_the_share_of_text():
    recipe = replace(RECIPE, cross_entropy=1.0, max_tokens=6)
    made = prepare(replace(FOREIGN, teacher="klkit:reviews-positive", recipe=recipe), EXAMPLES)
    assert [example.prompt for example in answered(made, recipe)] == [example.prompt for example in EXAMPLES]


def test_a_loss_without_a_bound_is_refused_a_top_k_cache_before_anything_is_written(tmp_path):
    teacher = load("klkit:reviews-positive")
    build(tmp_path / "c", teacher, encode_examples(teacher, EXAMPLES, 10), Recording("top-k", k=8), max_tokens=10)
    recipe = DistillRecipe(batch=2, max_tokens=10, loss="alpha_beta")
    plan = replace(FOREIGN, teacher=None, recipe=recipe, cache=str(tmp_path / "c"))
    with pytest.raises(ValueError, match="expected an f-divergence or the adaptive KL with a top-k cache, got alpha_b"):
        distill(plan, examples=EXAMPLES, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for loss in ("adaptive_kl", "reverse_kl"):
        assert prepare(replace(plan, recipe=replace(recipe, loss=loss)), EXAMPLES).rows is not None
