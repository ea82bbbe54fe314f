"""Steps of distillation: they depend on the teacher, do not depend on how they are cut up, and stop in time."""

import itertools
from dataclasses import replace

import pytest
import torch
from tests.tiny import build, tokenizer

from klkit.divergences.kl import kl, reverse_kl
from klkit.divergences.partial import Hidden, Logits
from klkit.models.base import VocabularyMismatch
from klkit.models.hf import HuggingFaceModel
from klkit.models.spec import load
from klkit.sequences import Sequences
from klkit.train.distill import start, step
from klkit.train.distill_gradients import form_gradients, student_laws
from klkit.train.distill_recipe import DistillRecipe
from klkit.train.examples import Example, encode_examples
from klkit.train.learner import full_learner, lora_learner
from klkit.train.rl import TrainingStopped
from klkit.train.teachers import OnlineTeacher, shared_tokens
from klkit.train.texts import step_text, step_units, teacher_text, written_by_student

EXAMPLES = [
    Example("the plot was", " thin ."),
    Example("i thought", " the music was superb and the acting felt lovely ."),
    Example("for me the music", " seemed great ."),
    Example(None, "the final scene kept me guessing ."),
    Example("the acting felt", " clumsy and the direction seemed quite predictable but the music was great ."),
    Example("what a film !", " the plot was superb ."),
    Example("the direction", " seemed tedious ."),
    Example("the whole idea", " was wonderful and the ending was lovely ."),
]


@pytest.fixture(scope="module")
def teacher():
    return load("klkit:reviews-positive")


@pytest.fixture(scope="module")
def student():
    return load("klkit:reviews")


def recipe(**options):
    return DistillRecipe(**{"batch": 8, "max_tokens": 16, "learning_rate": 2e-3, "warmup": 1, **options})


def collected(learner):
    return torch.cat([w.grad.reshape(-1) for _, w in learner.parameters if w.grad is not None])


def weights(model):
    return torch.cat([w.detach().reshape(-1) for w in model.model.parameters()])


def first_gradient(student, teacher, examples=EXAMPLES, **options):
    """Of one step, before it was shortened."""
    state = start(student, teacher, examples, recipe(gradient_norm=1e9, **options), 5)
    state, metrics = step(state)
    return collected(state.student), metrics


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "forward_kl", "temperature": 2.0, "cross_entropy": 0.01},
        {"text": "teacher"},
        {"on_policy": 0.5, "loss": "generalised_js"},
        {"objective": "sequence-fkl"},
        {"objective": "sequence-rkl", "max_tokens": 12},
    ],
    ids=str,
)
def test_a_few_steps_bring_the_student_nearer_and_the_given_models_stay(student, teacher, options):
    before = weights(student), weights(teacher)
    state = start(student, teacher, EXAMPLES, recipe(**options), 12)
    x = state.texts
    if state.recipe.student_share or state.recipe.teacher_writes:
        contexts = [teacher.context(example.prompt) for example in EXAMPLES]
        x = teacher_text(teacher, contexts, recipe(text="teacher", samples=4, seed=1))
    with torch.no_grad():
        logp = teacher.readout(teacher.encode(x))

    def distance():
        with torch.no_grad():
            logq = state.student.model.readout(state.student.model.encode(x))
        return float(kl(logp, logq).mean() + reverse_kl(logp, logq).mean())

    first = distance()
    for _ in range(8):
        state, metrics = step(state)
    assert distance() < 0.8 * first
    assert state.step == metrics.step == 8
    assert torch.equal(weights(student), before[0])
    assert torch.equal(weights(teacher), before[1])


def test_the_loss_is_the_mean_over_all_decisions_by_hand(student, teacher):
    x = encode_examples(student, EXAMPLES, 16)
    with torch.no_grad():
        logp, logq = teacher.readout(teacher.encode(x)), student.readout(student.encode(x))
    _, metrics = step(start(student, teacher, EXAMPLES, recipe(loss="forward_kl"), 5))
    assert metrics.tokens == x.decisions
    assert metrics.loss == pytest.approx(float(kl(logp, logq).mean()), rel=1e-5)
    assert metrics.kl == pytest.approx(metrics.loss, rel=1e-6)
    assert metrics.reverse_kl == pytest.approx(float(reverse_kl(logp, logq).mean()), rel=1e-5)
    chosen = logq.gather(1, x.targets()[:, None])
    assert metrics.cross_entropy == pytest.approx(-float(chosen.mean()), rel=1e-5)


def test_micro_batches_make_one_step_whatever_their_size(student, teacher):
    """Accumulation 1×8, 4×2 and 8×1 weigh tokens alike, although the strings have different lengths."""
    whole, metrics = first_gradient(student, teacher)
    for size in (1, 2, 3):
        parts, cut = first_gradient(student, teacher, micro_batch=size)
        assert torch.allclose(parts, whole, rtol=1e-4, atol=1e-6 * float(whole.abs().max()))
        assert cut.loss == pytest.approx(metrics.loss, rel=1e-5)
        assert cut.tokens == metrics.tokens
    # What a mean of means would have been is another gradient, so the test can fail.
    state = start(student, teacher, EXAMPLES, recipe(), 5)
    x, _ = step_text(state.student.model, state.texts, state.contexts, state.recipe, 0)
    for i in range(len(x)):
        one = x.select([i])
        rows = state.teacher(one, one.prompt.tolist())
        form_gradients(
            state.student.model, rows, one, recipe(), size=None, tokens=float(one.decisions * len(x)), strings=8.0
        )
    assert not torch.allclose(collected(state.student), whole, rtol=0.02, atol=0.02 * float(whole.abs().max()))


def test_micro_batches_of_whole_groups_make_one_step_of_a_sequence_objective(student, teacher):
    options = {"objective": "sequence-rkl", "max_tokens": 8, "samples": 2}
    whole, _ = first_gradient(student, teacher, **options)
    parts, _ = first_gradient(student, teacher, micro_batch=2, **options)
    assert torch.allclose(parts, whole, rtol=1e-3, atol=1e-5 * float(whole.abs().max()))


def test_padding_changes_nothing(student, teacher):
    """A string's gradient is the same alone and beside a longer one."""
    x = encode_examples(student, EXAMPLES[:2], 16)
    wide = x.select([0, 1])
    padded = replace(wide, tokens=torch.nn.functional.pad(wide.tokens, (0, 7), value=3))
    found = []
    for strings in (x, padded):
        learner = full_learner(student)
        rows = OnlineTeacher.of(teacher, EXAMPLES)(strings, [0, 1])
        form_gradients(learner.model, rows, strings, recipe(), size=None, tokens=10.0, strings=2.0)
        found.append(collected(learner))
    assert torch.allclose(*found, rtol=1e-5, atol=1e-7)


def test_the_prompt_has_no_loss(student, teacher):
    """Only what the laws say of responses counts: other laws at the prompt's tokens change nothing."""
    x = encode_examples(student, EXAMPLES[:3], 16)
    laws = student_laws(student, x, None)
    assert len(laws) == x.decisions == int((x.stop - x.start).sum())


def test_distillation_acts_it_depends_on_the_teacher(student, teacher):
    """A branch that never acts would give the gradient of the cross-entropy alone, or none."""
    mine, _ = first_gradient(student, teacher, loss="forward_kl", cross_entropy=0.5)
    other, _ = first_gradient(student, load("klkit:reviews"), loss="forward_kl", cross_entropy=0.5)
    text, _ = first_gradient(student, None, loss="cross_entropy")
    assert not torch.allclose(mine, other, rtol=1e-2)
    assert torch.allclose(other, 0.5 * text, rtol=1e-3, atol=1e-5)  # a teacher that agrees says nothing
    assert float((mine - 0.5 * text).norm()) > 0.01 * float(mine.norm())


@pytest.mark.parametrize("loss", ["adaptive_kl", "forward_kl", "reverse_kl", "generalised_js", "skew_kl", "alpha_beta"])
def test_a_student_that_agrees_has_no_loss_and_no_gradient(student, loss):
    gradient, metrics = first_gradient(student, student, loss=loss)
    assert metrics.loss == pytest.approx(0.0, abs=1e-6)
    assert float(gradient.abs().max()) < 1e-3
    assert metrics.head_weight == (0.5 if loss == "adaptive_kl" else None)


def test_temperature_keeps_the_size_of_gradients_and_leaves_the_cross_entropy_alone(student, teacher):
    cool, _ = first_gradient(student, teacher, loss="forward_kl")
    warm, _ = first_gradient(student, teacher, loss="forward_kl", temperature=4.0)
    assert 0.2 < float(warm.norm() / cool.norm()) < 5
    once, _ = first_gradient(student, teacher, loss="forward_kl", temperature=4.0, cross_entropy=1 - 1e-9)
    text, _ = first_gradient(student, None, loss="cross_entropy")
    assert torch.allclose(once, text, rtol=1e-3, atol=1e-5)


def test_sequence_forward_kl_is_a_mean_over_strings(student, teacher):
    """Its gradient is that of the token loss times the decisions a string: no division by a random number."""
    own, metrics = first_gradient(student, teacher, objective="sequence-fkl")
    token, other = first_gradient(student, teacher, text="teacher", loss="forward_kl")
    ratio = metrics.tokens / metrics.strings
    assert metrics.tokens == other.tokens
    assert torch.allclose(own, ratio * token, rtol=1e-3, atol=1e-5)
    assert metrics.loss == pytest.approx(ratio * other.loss, rel=1e-5)


def test_runs_repeat_by_their_seed(student, teacher):
    def run(**options):
        state = start(student, teacher, EXAMPLES, recipe(on_policy=0.5, batch=4, max_tokens=8, **options), 5)
        for _ in range(2):
            state, _ = step(state)
        return weights(state.student.model)

    assert torch.equal(run(), run())
    assert not torch.equal(run(), run(seed=1))


def test_on_policy_strings_come_one_by_one_at_their_share(student):
    own = [w for t in range(50) for w in written_by_student(t, range(20), recipe(on_policy=0.3))]
    assert 0.25 < sum(own) / len(own) < 0.35
    assert written_by_student(0, [3, 5], recipe(on_policy=0.3)) == [
        written_by_student(0, range(8), recipe(on_policy=0.3))[i] for i in (3, 5)
    ]
    texts = encode_examples(student, EXAMPLES, 16)
    contexts = [student.context(e.prompt) for e in EXAMPLES]
    x, own = step_text(student, texts, contexts, recipe(on_policy=0.5), 0)
    assert 0 < sum(own) < 8
    for i, drawn in enumerate(own):
        k = int(x.prompt[i])
        assert torch.equal(x.context(i), contexts[k])
        given = torch.equal(x.completion(i), texts.completion(k))
        assert given or drawn
    assert sorted(x.prompt.tolist()) == list(range(8))


def test_every_example_comes_once_a_pass():
    seen = [i for t in range(5) for i in step_units(10, t, 4, seed=3)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))


def test_the_teacher_s_text_is_its_own_and_as_many_a_prompt_as_asked(teacher):
    contexts = [teacher.context(e.prompt) for e in EXAMPLES[:3]]
    x = teacher_text(teacher, contexts, recipe(samples=2, text="teacher"))
    assert x.prompt.tolist() == [0, 0, 1, 1, 2, 2]
    assert not torch.equal(x.completion(0), x.completion(1))
    assert all(int(x.completion(i)[-1]) in teacher.vocabulary.ends for i in range(6) if x.finished[i])


def padded(seed, size, **config):
    """A tiny model whose table has rows that no tokenizer defines."""
    return HuggingFaceModel(build("gpt2", seed=seed, vocab_size=size, **config), tokenizer(), name=f"gpt2 of {size}")


def test_padded_vocabularies_are_cut_to_what_both_have():
    texts = [Example("the film", " was a quiet triumph"), Example("a dull", " story")]
    small, large = padded(0, 320, std=0.2), padded(1, 352, std=0.2)
    for teacher, student in ((small, large), (large, small)):
        size, notes = shared_tokens(teacher, student)
        assert size == 320
        assert "left out of both softmaxes" in notes[0]
        x = encode_examples(student, texts, 16)
        with torch.no_grad():
            rows = []
            for model in (teacher, student):
                laws = student_laws(model, x, None)
                assert isinstance(laws, Hidden)
                rows.append(torch.log_softmax(laws.head.logits(laws.hidden)[:, :320].double(), -1))
        for loss, by_hand in (("forward_kl", kl(*rows)), ("reverse_kl", reverse_kl(*rows))):
            _, metrics = first_gradient(student, teacher, texts, loss=loss, batch=2)
            assert metrics.loss == pytest.approx(float(by_hand.mean()), rel=1e-5)
        _, metrics = first_gradient(student, teacher, texts, on_policy=1.0, batch=2, max_tokens=4)
        assert metrics.loss > 0


def test_text_of_tokens_that_one_model_lacks_is_found_before_training():
    small, large = padded(0, 320, std=0.2), padded(1, 352, std=0.2)
    x = encode_examples(large, [Example("the film", " was"), Example("a dull", " story")], 16)
    x.tokens[1, int(x.start[1])] = 330
    with pytest.raises(ValueError, match=r"of the 320 tokens that both models have, got others in 1 examples, .* 2;"):
        start(large, small, [Example("the film", " was"), Example("a dull", " story")], recipe(), texts=x)


def test_other_tokenizers_are_refused_with_what_to_do(teacher):
    with pytest.raises(VocabularyMismatch, match=r"got .* ids with different strings, .* --text teacher --loss"):
        start(load("klkit:docs"), teacher, EXAMPLES, recipe())


def test_a_teacher_with_a_smaller_window_is_found_before_training(student):
    tiny = HuggingFaceModel(build("gpt2", n_positions=8), tokenizer(), name="short")
    own = HuggingFaceModel(build("gpt2"), tokenizer(), name="long")
    texts = [Example("the film was a quiet triumph", " and the cast was superb . the plot was thin")]
    with pytest.raises(ValueError, match="expected examples of at most 8 tokens"):
        start(own, tiny, texts, recipe(max_tokens=12))
    with pytest.raises(ValueError, match="expected examples of at most 8 tokens"):
        start(own, tiny, texts, recipe(max_tokens=12, on_policy=1.0))
    start(own, own, texts, recipe(max_tokens=12))


def test_a_teacher_of_nan_stops_the_run_before_the_weights_change(student):
    broken = load("klkit:reviews-positive")
    state = start(student, broken, EXAMPLES, recipe(), 5)
    state, _ = step(state)
    before = weights(state.student.model)
    with torch.no_grad():
        next(iter(broken.model.parameters())).fill_(float("nan"))
    with pytest.raises(TrainingStopped, match=r"step 2 was not taken: expected finite numbers from the teacher"):
        step(state)
    assert torch.equal(weights(state.student.model), before)


def test_a_loss_that_explodes_stops_the_run_before_the_weights_change(student, teacher):
    state = start(student, teacher, EXAMPLES, recipe(max_loss=1e-4), 5)
    before = weights(state.student.model)
    with pytest.raises(TrainingStopped, match=r"expected a mean divergence of at most 0.0001 nats a token, got"):
        step(state)
    assert torch.equal(weights(state.student.model), before)


def test_an_infinite_loss_stops_the_run_and_says_why(student):
    def excluding(x, indices):
        logits = torch.zeros(x.decisions, student.vocabulary.size)
        logits[:, 5] = -torch.inf
        return Logits(logits)

    state = start(student, excluding, EXAMPLES, recipe(loss="reverse_kl"), 5)
    with pytest.raises(TrainingStopped, match="teacher may exclude tokens that the student does not"):
        step(state)


def test_a_batch_without_a_decision_changes_nothing_and_is_counted(student, teacher):
    nothing = Sequences.pack([student.context("the plot")] * 4, [torch.zeros(0, dtype=torch.long)] * 4)
    state = start(student, teacher, EXAMPLES[:4], recipe(batch=4), 5, texts=nothing)
    before = weights(state.student.model)
    state, metrics = step(state)
    assert (metrics.tokens, metrics.strings, metrics.loss, metrics.divergence) == (0, 4, 0.0, None)
    assert torch.equal(weights(state.student.model), before)


def test_an_adapter_is_all_that_is_trained(student, teacher):
    learner, _ = lora_learner(student, 2, seed=0)
    state = start(learner, teacher, EXAMPLES, recipe(), 5)
    before = {name: w.detach().clone() for name, w in learner.model.model.named_parameters()}
    for _ in range(2):
        state, metrics = step(state)
    moved = {name for name, w in learner.model.model.named_parameters() if not torch.equal(w, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    assert metrics.loss > 0


def test_half_precision_layers_keep_weights_and_loss_in_single(student, teacher):
    single, exact = first_gradient(student, teacher)
    half, rough = first_gradient(student, teacher, precision="bfloat16")
    assert half.dtype == torch.float32
    assert rough.loss == pytest.approx(exact.loss, rel=0.05)
    assert not torch.equal(half, single)
    assert float(torch.nn.functional.cosine_similarity(half, single, 0)) > 0.99


def test_what_a_recipe_needs_and_is_not_there(student, teacher):
    def rows(x, indices):
        raise AssertionError

    with pytest.raises(ValueError, match="expected at least one example"):
        start(student, teacher, [], recipe())
    with pytest.raises(ValueError, match="expected a teacher for adaptive_kl, got none"):
        start(student, None, EXAMPLES, recipe())
    with pytest.raises(ValueError, match="expected a teacher that reads what the student writes, got a cache"):
        start(student, rows, EXAMPLES, recipe(on_policy=0.5))
    with pytest.raises(ValueError, match="got 1 without one, the first of them example 2"):
        start(student, teacher, [EXAMPLES[0], Example("a", "")], recipe())
    # Prompts are enough where the models write.
    start(student, teacher, [Example("the plot", "")], recipe(on_policy=1.0))
    with pytest.raises(ValueError, match="expected weights in float32 to train all of them"):
        start(load("klkit:reviews", dtype="bfloat16"), teacher, EXAMPLES, recipe())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "k4"}, "expected a loss among"),
        ({"objective": "sequence"}, "expected objective among token, sequence-fkl, sequence-rkl"),
        ({"batch": 0}, "expected batch of at least 1"),
        ({"temperature": 0.0}, "expected a positive temperature"),
        ({"on_policy": 1.5}, "expected on_policy from 0 to 1"),
        ({"cross_entropy": -0.1}, "expected cross_entropy from 0 to 1"),
        ({"objective": "sequence-fkl", "loss": "reverse_kl"}, "got loss=reverse_kl, but its gradient"),
        ({"objective": "sequence-fkl", "on_policy": 0.5}, "got on_policy=0.5"),
        ({"objective": "sequence-rkl", "text": "teacher"}, "got text=teacher"),
        ({"objective": "sequence-rkl", "temperature": 2.0}, "got temperature=2, but text comes from the models"),
        ({"objective": "sequence-rkl", "batch": 5}, "a batch of whole prompts, a multiple of 2"),
        ({"loss": "cross_entropy", "on_policy": 0.5}, "got on_policy=0.5 with cross_entropy"),
        ({"cross_entropy": 1.0}, "below 1 with adaptive_kl, got 1, .* take loss=cross_entropy"),
        ({"cross_entropy": 1.0, "objective": "sequence-fkl"}, "take loss=cross_entropy"),
        ({"text": "teacher", "on_policy": 1.0}, "got text=teacher with on_policy=1, where the student writes every"),
        ({"text": "teacher", "on_policy": 1.0, "samples": 2}, "got text=teacher, samples=2 with on_policy=1, .* them"),
        ({"samples": 2}, "expected samples with text=teacher or objective=sequence-rkl"),
        ({"schedule": "linear"}, "expected schedule among cosine, constant"),
        ({"precision": "float16"}, "expected precision among"),
    ],
)
def test_recipes_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DistillRecipe(**options)


def test_the_neighbours_of_refused_recipes_are_none():
    DistillRecipe(loss="cross_entropy", cross_entropy=1.0)
    DistillRecipe(text="teacher", on_policy=0.9, samples=2)
    DistillRecipe(objective="sequence-rkl", on_policy=1.0)


def test_the_learning_rate_rises_and_falls():
    rates = [DistillRecipe(learning_rate=1.0, warmup=4).rate(s, 20) for s in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(a >= b for a, b in itertools.pairwise(rates[3:]))
    assert 0 < rates[-1] < 0.02
    assert DistillRecipe(learning_rate=1.0, warmup=0, schedule="constant").rate(19, 20) == 1.0
