"""A student learns the same from a cache as from its teacher, and nothing from a cache that is not its own."""

import json

import pytest
import torch
from tests.tiny import folder

from klkit.api.distill import distill
from klkit.api.distill_plan import Distillation
from klkit.caches.build import build
from klkit.caches.cache import StaleCache
from klkit.caches.recording import Recording
from klkit.models.spec import load
from klkit.train.distill import start, step
from klkit.train.distill_recipe import DistillRecipe
from klkit.train.examples import Example, encode_examples
from klkit.train.rl import TrainingStopped
from klkit.train.teachers import CachedTeacher, shared_tokens

EXAMPLES = [
    Example("the film", " was a quiet triumph"),
    Example("the cast", " was superb."),
    Example(None, "a dull, overlong story"),
    Example("we liked the ending", " more than the beginning."),
    Example("nobody", " cared"),
]
RECIPE = DistillRecipe(loss="sum_kl", batch=3, max_tokens=8, learning_rate=1e-3, warmup=0)


def losses(student, teacher, examples=EXAMPLES, recipe=RECIPE, steps=4):
    state, found = start(student, teacher, examples, recipe, steps), []
    for _ in range(steps):
        state, metrics = step(state)
        found.append(metrics.loss)
    return found


@pytest.fixture(scope="module")
def teacher():
    return load(str(folder("llama")))


@pytest.fixture(scope="module")
def student():
    return load(str(folder("llama", seed=1, hidden_size=16)))


def cached(path, teacher, recording=None, examples=EXAMPLES):
    return build(
        path, teacher, encode_examples(teacher, examples, 8), recording, max_tokens=8, batch=2, shard_bytes=800
    ).cache


def test_the_output_head_of_a_cache_moves_to_the_device_once(teacher, tmp_path):
    cache = cached(tmp_path / "c", teacher)
    rows, x = CachedTeacher(cache, range(5), 50, device="meta"), encode_examples(teacher, EXAMPLES, 8)
    first, second = (rows(x.select([i]), [i]) for i in (0, 1))
    assert first.hidden.device.type == first.head.weight.device.type == "meta"
    assert first.head is second.head
    assert first.head.tokens == 50


def test_training_from_a_cache_of_hidden_states_is_training_with_the_teacher(teacher, student, tmp_path):
    cache = cached(tmp_path / "c", teacher)
    online, offline = losses(student, teacher), losses(student, CachedTeacher(cache, range(5)))
    assert offline == pytest.approx(online, rel=1e-6)
    assert online[-1] < online[0]


def test_a_run_on_some_of_the_examples_reads_the_right_ones(teacher, student, tmp_path):
    cache, numbers = cached(tmp_path / "c", teacher), [4, 1, 3]
    some = [EXAMPLES[i] for i in numbers]
    assert losses(student, CachedTeacher(cache, numbers), some) == pytest.approx(
        losses(student, teacher, some), rel=1e-6
    )


@pytest.mark.parametrize("wide", ["teacher", "student"])
def test_padding_rows_of_either_table_are_cut(wide, tmp_path):
    p = load(str(folder("llama", **({"vocab_size": 384} if wide == "teacher" else {}))))
    q = load(str(folder("llama", seed=1, **({"vocab_size": 384} if wide == "student" else {}))))
    size, _ = shared_tokens(p, q)
    from klkit.objectives.distill import distillation_loss
    from klkit.train.distill_gradients import student_laws
    from klkit.train.teachers import OnlineTeacher

    cache = cached(tmp_path / "c", p)
    x = encode_examples(q, EXAMPLES, 8)
    with torch.no_grad():
        ours = student_laws(q, x, size)
        found = [
            distillation_loss(rows(x, range(5)), ours, x.targets(), "sum_kl").divergence
            for rows in (OnlineTeacher.of(p, EXAMPLES, size), CachedTeacher(cache, range(5), size))
        ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-7)


def test_top_k_bounds_and_draws_train_too(teacher, student, tmp_path):
    recipe = DistillRecipe(loss="forward_kl", batch=5, max_tokens=8, learning_rate=3e-3, warmup=0)
    kinds = Recording("top-k", k=32), Recording("sampled"), Recording("hybrid", k=200, draws=16)
    caches = [cached(tmp_path / r.kind, teacher, r) for r in kinds]
    online, bound, drawn, both = (
        losses(student, rows, recipe=recipe) for rows in (teacher, *(CachedTeacher(c, range(5)) for c in caches))
    )
    assert bound[0] < online[0]
    assert bound[-1] < bound[0]
    assert drawn[-1] < drawn[0]
    # Cross-entropy in place of the divergence: the same steps, up to the noise of a small tail.
    falls = [(run[0] - run[-1]) / (online[0] - online[-1]) for run in (drawn, both)]
    assert falls[1] == pytest.approx(1, abs=0.05)
    assert abs(falls[1] - 1) < abs(falls[0] - 1)


def test_a_text_that_the_teacher_never_saw_is_refused_before_a_step(teacher, student, tmp_path):
    cache = cached(tmp_path / "c", teacher)
    other = [*EXAMPLES[:4], Example("nobody", " laughed")]
    with pytest.raises((StaleCache, TrainingStopped), match="expected example 5 to be the one"):
        losses(student, CachedTeacher(cache, range(5)), other, DistillRecipe(loss="sum_kl", batch=5, max_tokens=8))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"teacher": ("llama", 1)}, "other weights"),
        ({"data": EXAMPLES[::-1]}, "in another order"),
        ({"data": EXAMPLES[1:]}, "other examples: 5 of them then, 4 now"),
        ({"max_tokens": 2}, "at most 8 tokens then, 2 now"),
        ({"temperature": 2.0}, "cannot be tempered"),
        ({"student": "klkit:docs"}, "tokens"),
    ],
)
def test_a_run_with_a_stale_cache_is_refused_and_leaves_nothing(teacher, tmp_path, change, what):
    cached(tmp_path / "c", teacher, Recording("top-k", k=8))
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": e.prompt, "response": e.response}) + "\n" for e in change.get("data", EXAMPLES))
    )
    kind, seed = change.get("teacher", ("llama", 0))
    plan = Distillation(
        change.get("student", str(folder("llama", seed=1, hidden_size=16))),
        str(data),
        str(folder(kind, seed=seed)),
        cache=str(tmp_path / "c"),
        held_out=str(data),
        steps=1,
        samples=1,
        recipe=DistillRecipe(
            loss="sum_kl", max_tokens=change.get("max_tokens", 8), temperature=change.get("temperature", 1.0)
        ),
    )
    with pytest.raises(ValueError, match=what):
        distill(plan, out=tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
