"""The self-check passes on what is right, and each of its checks fails on the mistake it is there for."""

from dataclasses import replace

import pytest
import torch
from tests.tiny import folder

from klkit.api import selfcheck as data
from klkit.api import selfcheck_trials as trials
from klkit.api.selfcheck import selfcheck
from klkit.api.selfcheck_result import FAILED, NOT_APPLICABLE, PASSED
from klkit.caches.build import build
from klkit.caches.recording import Recording
from klkit.divergences.partial import Hidden, Logits
from klkit.models.base import VocabularyMismatch
from klkit.models.spec import load
from klkit.objectives import distill as losses
from klkit.objectives.distill_losses import LOSSES
from klkit.sequences import Sequences
from klkit.train import distill_gradients as training
from klkit.train.distill_recipe import DistillRecipe
from klkit.train.examples import Example, encode_examples
from klkit.train.learner import lora_learner

EXAMPLES = [
    Example("the film", " was a quiet triumph"),
    Example("the cast", " was superb."),
    Example(None, "a dull, overlong story with one good scene"),
    Example("we liked the ending", " more than the beginning."),
    Example("nobody", " cared"),
]
RECIPE = DistillRecipe(loss="sum_kl")


@pytest.fixture(scope="module")
def teacher():
    return load(str(folder("llama")))


@pytest.fixture(scope="module")
def student():
    return load(str(folder("llama", seed=1, hidden_size=16)))


def failed(found):
    return {check.name for check in found.checks if check.outcome == FAILED}


def test_everything_passes_where_nothing_is_wrong(teacher, student):
    before = {name: weight.clone() for name, weight in student.model.named_parameters()}
    found = selfcheck(teacher, student, EXAMPLES, RECIPE)
    assert found.passed, found.notes()
    assert {check.outcome for check in found.checks} == {PASSED}
    assert all(weight.grad is None for weight in student.model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in student.model.named_parameters())
    assert all(max(len(value) for value in row.values()) < 20 for row in found.rows())


@pytest.mark.parametrize("loss", [*LOSSES, "adaptive_kl,head=inside"])
def test_every_loss_passes(teacher, student, loss):
    found = selfcheck(teacher, student, EXAMPLES[:3], DistillRecipe(loss=loss))
    assert found.passed, found.notes()
    idle = {check.name for check in found.checks if check.outcome == NOT_APPLICABLE}
    assert idle == ({"teacher's shift", "teacher acts", "equal models"} if loss == "cross_entropy" else set())


def test_temperature_and_a_share_of_cross_entropy_pass(teacher, student):
    recipe = DistillRecipe(loss="forward_kl", temperature=2.0, cross_entropy=0.25)
    assert selfcheck(teacher, student, EXAMPLES, recipe).passed


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "bloom", "mamba"])
def test_other_architectures_pass(kind):
    model = load(str(folder(kind)))
    found = selfcheck(load(str(folder(kind, seed=1))), model, EXAMPLES, RECIPE)
    assert found.passed, found.notes()


def test_half_precision_passes_with_its_own_tolerance(teacher):
    student = load(str(folder("llama", seed=1)), dtype="bfloat16")
    found = selfcheck(teacher, student, EXAMPLES, RECIPE)
    assert found.passed, found.notes()
    assert found["shift"].tolerance > 0.01


def test_an_adapter_passes(teacher):
    learner, base = lora_learner(load(str(folder("llama", seed=1))), 4)
    found = selfcheck(teacher, learner, EXAMPLES, RECIPE)
    assert found.passed, found.notes()
    assert selfcheck(base, learner, EXAMPLES, RECIPE)["accumulation"].outcome == NOT_APPLICABLE


@pytest.mark.parametrize("kind", ["hidden", "top-k", "sampled"])
def test_a_cache_in_the_teachers_place_passes(kind, teacher, student, tmp_path):
    loss = DistillRecipe(loss="forward_kl", max_tokens=16)
    texts = encode_examples(teacher, EXAMPLES, 16)
    cache = build(tmp_path / "c", teacher, texts, Recording(kind, k=16)).cache
    found = selfcheck(teacher, student, EXAMPLES, loss, rows=lambda x, indices: cache.rows(indices, x))
    assert found.passed, found.notes()
    assert found["teacher's shift"].outcome == (PASSED if kind == "hidden" else NOT_APPLICABLE)


def test_examples_without_responses_are_tried_on_the_teachers_own(teacher, student):
    found = selfcheck(teacher, student, [Example(e.prompt, "") for e in EXAMPLES], replace(RECIPE, max_tokens=6))
    assert failed(found) == {"empty responses"}
    assert found["shift"].outcome == found["mask"].outcome == PASSED
    alone = selfcheck(None, student, [Example("the film", "")], DistillRecipe(loss="cross_entropy"))
    assert failed(alone) == {"empty responses"}


# Each check, broken once


@pytest.mark.parametrize("off", [-1, 1])
def test_a_shifted_row_fails(teacher, student, monkeypatch, off):
    right = Sequences.predictors

    def predictors(self):
        row, column = right(self)
        return row, (column + off).clamp(min=torch.zeros_like(column), max=self.stop[row] - 2)

    monkeypatch.setattr(Sequences, "predictors", predictors)
    found = failed(selfcheck(teacher, student, EXAMPLES, RECIPE))
    assert {"shift", "teacher's shift", "mask"} <= found


def student_laws_with(change):
    """The student's laws, their hidden states changed by ``change(hidden, strings)``."""
    right = training.student_laws

    def student_laws(model, x, size, precision="float32"):
        law = right(model, x, size, precision)
        return Hidden(change(law.hidden, x), law.head)

    return student_laws


def test_padding_that_is_read_fails(teacher, student, monkeypatch):
    def change(hidden, x):
        column = torch.arange(x.tokens.shape[1])
        outside = (x.tokens * (column >= x.stop[:, None])).sum(1).float()
        return hidden * (1 + 1e-3 * outside[x.row(), None])

    monkeypatch.setattr(training, "student_laws", student_laws_with(change))
    assert failed(selfcheck(teacher, student, EXAMPLES, RECIPE)) == {"padding content"}


def test_a_law_that_depends_on_the_width_of_the_batch_fails(teacher, student, monkeypatch):
    monkeypatch.setattr(
        training, "student_laws", student_laws_with(lambda hidden, x: hidden * (1 + 0.1 / x.tokens.shape[1]))
    )
    assert {"padding width", "batch"} <= failed(selfcheck(teacher, student, EXAMPLES, RECIPE))


def test_a_law_that_depends_on_the_other_strings_fails(teacher, student, monkeypatch):
    monkeypatch.setattr(
        training, "student_laws", student_laws_with(lambda hidden, x: hidden + 0.1 * (hidden - hidden.mean(0)))
    )
    assert "batch" in failed(selfcheck(teacher, student, EXAMPLES, RECIPE))


def test_left_padding_that_is_read_fails(teacher, monkeypatch):
    model = load(str(folder("llama", seed=1)))
    right = type(model).begin

    def begin(contexts):
        width = max(map(len, contexts))
        filled = [torch.cat([torch.zeros(width - len(c), dtype=torch.long), c]) for c in contexts]
        return right(model, filled)

    monkeypatch.setattr(model, "begin", begin)
    assert failed(selfcheck(teacher, model, EXAMPLES, RECIPE)) == {"padding side"}


def test_means_over_micro_batches_instead_of_tokens_fail(teacher, student, monkeypatch):
    right = training.form_gradients

    def form_gradients(model, theirs, x, recipe, *, size, tokens, strings):
        share = len(x) / strings
        return right(model, theirs, x, recipe, size=size, tokens=x.decisions / share, strings=strings)

    monkeypatch.setattr(training, "form_gradients", form_gradients)
    assert failed(selfcheck(teacher, student, EXAMPLES, RECIPE)) == {"accumulation"}


def test_an_end_token_without_a_loss_fails(teacher, student, monkeypatch):
    """What masking every padding id does where the padding token is the end token."""
    right = training.form_gradients

    def form_gradients(model, theirs, x, recipe, *, size, tokens, strings):
        keep = x.targets() != model.tokenizer.eos_token_id
        law = training.student_laws(model, x, size)
        found = losses.distillation_loss(
            theirs, law, x.targets(), recipe.divergence, weight=keep.float(), normaliser=float(keep.sum())
        )
        found.loss.backward()
        return replace(
            right(model, theirs, x, recipe, size=size, tokens=tokens, strings=strings), loss=float(found.loss.detach())
        )

    monkeypatch.setattr(training, "form_gradients", form_gradients)
    assert "mask" in failed(selfcheck(teacher, student, EXAMPLES, RECIPE))


def distillation_loss_with(change, monkeypatch):
    right = losses.distillation_loss

    def distillation_loss(*arguments, **options):
        return change(right, arguments, options)

    monkeypatch.setattr(losses, "distillation_loss", distillation_loss)


def test_chunks_that_count_twice_fail(teacher, student, monkeypatch):
    def change(right, arguments, options):
        found = right(*arguments, **options)
        return replace(found, loss=1.01 * found.loss) if options.get("rows") == 7 else found

    distillation_loss_with(change, monkeypatch)
    assert failed(selfcheck(teacher, student, EXAMPLES, RECIPE)) == {"chunks"}


def test_a_dense_form_that_differs_fails(teacher, student, monkeypatch):
    right = trials.differentiable_logits
    monkeypatch.setattr(trials, "differentiable_logits", lambda head, hidden: 1.001 * right(head, hidden))
    assert failed(selfcheck(teacher, student, EXAMPLES, RECIPE)) == {"dense"}


def test_a_temperature_on_one_side_only_fails(teacher, student, monkeypatch):
    def change(right, arguments, options):
        law, *others = arguments
        cooled = Logits(law.logits / 2) if isinstance(law, Logits) else Hidden(law.hidden, law.head.cooled(2.0))
        return right(cooled, *others, **options)

    distillation_loss_with(change, monkeypatch)
    assert "equal models" in failed(selfcheck(teacher, student, EXAMPLES, RECIPE))


def test_a_teacher_without_effect_fails(teacher, student):
    found = selfcheck(teacher, student, EXAMPLES, replace(RECIPE, cross_entropy=1 - 1e-12))
    assert failed(found) == {"teacher acts"}
    assert "--cross-entropy" in found["teacher acts"].note


def test_data_that_teaches_nothing_or_never_ends_fails(teacher, student):
    found = selfcheck(teacher, student, [*EXAMPLES, Example("and", " ")], replace(RECIPE, max_tokens=2))
    assert failed(found) == {"empty responses", "cut responses", "end tokens"}
    assert found["empty responses"].found == 1
    assert "--max-tokens" in found["cut responses"].note


def test_responses_without_an_end_token_fail(teacher, student, monkeypatch):
    def without_end(model, examples, max_tokens, **options):
        x = encode_examples(model, examples, max_tokens, **options)
        return Sequences.pack([x.context(i) for i in range(len(x))], [x.completion(i)[:-1] for i in range(len(x))])

    monkeypatch.setattr(data, "encode_examples", without_end)
    assert {"end tokens", "prompt tokens"} <= failed(selfcheck(teacher, student, EXAMPLES, RECIPE))


def test_prompt_tokens_with_a_loss_fail(teacher, student, monkeypatch):
    def with_prompt(model, examples, max_tokens, **options):
        x = encode_examples(model, examples, max_tokens, **options)
        return replace(x, start=(x.start - 1).clamp(min=1))

    monkeypatch.setattr(data, "encode_examples", with_prompt)
    assert "prompt tokens" in failed(selfcheck(teacher, student, EXAMPLES, RECIPE))


def test_examples_beyond_a_window_are_counted_and_left_out(teacher, student):
    long = Example("the film", " was a quiet triumph and the cast was superb." * 20)
    found = selfcheck(teacher, student, [*EXAMPLES, long], RECIPE)
    assert failed(found) == {"room"}
    assert found["room"].found > 0
    assert found["shift"].outcome == PASSED


def test_other_tokenizers_and_no_examples_are_refused(teacher, student):
    with pytest.raises(VocabularyMismatch):
        selfcheck(teacher, load("klkit:docs"), EXAMPLES, RECIPE)
    with pytest.raises(ValueError, match="at least one example"):
        selfcheck(teacher, student, [], RECIPE)
