"""Numbers about a student: enumerated and exact on automata, and all there and finite on the packaged models."""

import copy
import json
import math
from collections.abc import Sequence

import pytest
import torch
from tests.bank import random_pair, short_pair
from tests.enumeration import per_string, strings
from tests.tiny import build, tokenizer

from klkit.divergences.adaptive import adaptive_kl, head_weight
from klkit.divergences.kl import entropy, kl, reverse_kl
from klkit.estimators.exact import exact
from klkit.models.automaton import automaton
from klkit.models.hf import HuggingFaceModel
from klkit.models.spec import load
from klkit.report.quantities import QUANTITIES
from klkit.sequences import Sequences
from klkit.stats.overlap import distinct_n, rouge_l, self_rouge_l
from klkit.train.distill import start, step
from klkit.train.distill_evaluate import assemble, evaluate_student, examine, held_out
from klkit.train.distill_recipe import DistillRecipe
from klkit.train.examples import Example

FILM = [
    Example("the film was", " a quiet triumph ."),
    Example("the film was", " dull ."),
    *(Example(f"{what} felt", " rather good .") for what in ("the plot", "the cast", "the music", "it", "a scene")),
    *(Example(f"for me {what}", " worked .") for what in ("the plot", "the cast", "the music", "it", "a scene")),
]


def letters(model):
    def decode(x: Sequences) -> list[str]:
        symbols = [model.pieces(x.completion(i).tolist()) for i in range(len(x))]
        return [" ".join(s for s in each if len(s) == 1) for each in symbols]

    return decode


def exam(p, prompts: Sequence[str | None], text, *, samples=2, max_tokens=6, seed=0):
    decode = letters(p)
    contexts = [p.context(prompt) for prompt in prompts]
    ids = [context.tolist() for context in contexts]
    return assemble(
        p,
        contexts,
        contexts,
        text,
        decode(text) if text is not None else [],
        [] if text is None else [ids.index(text.context(i).tolist()) for i in range(len(text))],
        decode,
        samples=samples,
        max_tokens=max_tokens,
        seed=seed,
    )


@pytest.fixture(scope="module")
def models():
    return load("klkit:docs-tuned"), load("klkit:docs")


def test_token_means_are_those_of_logits_token_after_token():
    p, q = random_pair(3, spread=2.0, symbols=3)
    text = strings(p, 3).x
    found = examine(p, q, exam(p, [None], text, samples=12)).means
    logp, logq = (model.readout(model.encode(text)) for model in (p, q))
    y = text.targets()[:, None]
    single = logp.exp().amax(-1) >= 0.5
    gap = (logp.exp() - logq.exp()).abs().sum(-1)
    weight = head_weight(logp, logq)
    wanted = {
        "kl": kl(logp, logq),
        "reverse_kl": reverse_kl(logp, logq),
        "adaptive_kl": adaptive_kl(logp, logq),
        "head_weight": weight,
        "head_gap": weight * gap,
        "tail_gap": (1 - weight) * gap,
        "single_head": single,
        "same_top": logp.argmax(-1) == logq.argmax(-1),
        "entropy": entropy(logq),
        "entropy_teacher": entropy(logp),
        "cross_entropy": -logq.gather(1, y)[:, 0],
        "cross_entropy_teacher": -logp.gather(1, y)[:, 0],
        "far_mass": torch.zeros(len(logp)),
        "far_mass_teacher": torch.zeros(len(logp)),
    }
    for name, values in wanted.items():
        assert found[f"text_{name}"].value == pytest.approx(float(values.double().mean()), abs=1e-12), name
    assert {name for name in found if name.startswith("text_")} == {f"text_{name}" for name in wanted}


def test_the_mass_in_the_far_tail_is_the_students_own():
    p = random_pair(0)[0]
    rows = torch.tensor([[0.99995, 2e-5, 3e-5], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    leaky = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.0, 0.5], [0.0, 0.0, 1.0]], dtype=torch.float64)
    successors = torch.tensor([[1, 2], [1, 2], [1, 2]])
    p, q = (automaton(table, successors) for table in (rows, leaky))
    text = Sequences.pack([p.context(None)], [torch.tensor([0, 2])])
    found = examine(p, q, exam(p, [None], text, samples=12)).means
    assert found["text_far_mass_teacher"].value == pytest.approx((5e-5 + 0) / 2)
    assert found["text_far_mass"].value == pytest.approx((0.3 + 0.5) / 2)


@pytest.mark.parametrize("seed", [0, 1])
def test_both_sequence_divergences_and_their_prefixes_are_the_exact_ones(seed):
    p, q = short_pair(seed)
    found = examine(p, q, exam(p, [None], None, samples=1500, max_tokens=4, seed=seed))
    for estimate, (first, second) in ((found.kl, (p, q)), (found.reverse_kl, (q, p))):
        interval, wanted = estimate.interval(), exact(first, second).value
        assert estimate.method == "rb_cv"
        assert abs(estimate.value - wanted) < 4.5 * max(estimate.stderr, 1e-9)
        assert interval.upper - interval.lower < 0.3 * wanted
    assert (found.kl.direction, found.reverse_kl.direction) == ("KL(teacher‖student)", "KL(student‖teacher)")
    every = strings(q, 4)
    logp, logq = (model.readout(model.encode(every.x)) for model in (p, q))
    mass = every.probability[every.x.row()]
    for name, divergence in (("own_kl", kl), ("own_reverse_kl", reverse_kl)):
        wanted = float((mass * divergence(logp, logq)).sum() / mass.sum())
        assert abs(found.means[name].value - wanted) < 4.5 * found.means[name].stderr, name
    wanted = float(-(mass * logp.gather(1, every.x.targets()[:, None])[:, 0]).sum() / mass.sum())
    mean = found.means["own_cross_entropy_teacher"]
    assert abs(mean.value - wanted) < 4.5 * mean.stderr
    assert not [name for name in found.means if name.startswith(("text_", "rouge"))]  # there was no text


def test_what_is_written_is_scored_against_the_references_of_its_own_prompt():
    p, q = random_pair(1)
    prompts = ["a", "b", "ab"]
    text = Sequences.pack(
        [p.context(prompt) for prompt in ("b", "a", "b")], [torch.tensor(ids) for ids in ([0, 2], [1, 1, 2], [1, 2])]
    )
    held = exam(p, ["a", "b", "ab", "a"], text, samples=3)
    assert held.references == (("b b",), ("a", "b"), ())
    assert [context.tolist() for context in held.contexts] == [p.context(prompt).tolist() for prompt in prompts]
    assert held.text.prompt.tolist() == [1, 0, 1]
    texts = held.decode(held.responses)
    teacher = examine(p, q, held)
    by_prompt = [texts[3 * k : 3 * k + 3] for k in range(3)]
    scores = [100 * rouge_l(each, held.references[k]) for k in (0, 1) for each in by_prompt[k]]
    assert teacher.means["rouge_l_teacher"].value == pytest.approx(sum(scores) / 6)
    alike = [100 * self_rouge_l(some) for some in by_prompt]
    assert teacher.means["self_rouge_l_teacher"].value == pytest.approx(sum(alike) / 3)
    assert teacher.numbers["distinct_2_teacher"] == pytest.approx(distinct_n(texts, 2), nan_ok=True)


def test_a_student_that_is_the_teacher_shows_no_difference_and_no_nan(models):
    teacher, _ = models
    found = evaluate_student(teacher, teacher, FILM, samples=2, max_tokens=12).to_dict()
    zero = ("kl", "reverse_kl", "text_kl", "text_reverse_kl", "text_adaptive_kl", "text_head_gap", "text_tail_gap")
    for name in (*zero, "own_kl", "own_reverse_kl", "given_kl", "given_reverse_kl", "exposure_bias"):
        assert found[name] == 0.0, name
    assert found["text_same_top"] == 1.0
    assert found["text_head_weight"] == 0.5
    assert found["text_far_mass"] == found["text_far_mass_teacher"]
    assert found["text_entropy"] == pytest.approx(found["text_entropy_teacher"], rel=1e-6)
    assert "nan" not in found.values()


def test_every_number_is_named_with_its_unit_and_survives_a_file(models):
    found = evaluate_student(*models, FILM, samples=2, max_tokens=12, step=7).to_dict()
    again = json.loads(json.dumps(found, allow_nan=False))
    assert again == found
    assert (found["step"], found["prompts"], found["strings"]) == (7, 11, 22)
    named = {name for name in found if name not in ("step", "prompts", "strings", "notes")}
    stems = {name.removesuffix(end) for end in ("_stderr", "_lower", "_upper") for name in named if name.endswith(end)}
    numbers = {name for name in named if not name.endswith(("_stderr", "_lower", "_upper"))}
    assert numbers == set(QUANTITIES)
    assert stems <= numbers
    for name in stems - {"exposure_bias"}:
        assert found[f"{name}_lower"] <= found[name] + 1e-9, name
        assert found[name] <= float(found[f"{name}_upper"]) + 1e-9, name
    assert 0 < found["kl_lower"] < found["kl"] < found["kl_upper"]
    assert all(q.words and q.per for q in QUANTITIES.values())


def test_students_are_compared_on_the_same_strings_of_the_teacher(models):
    teacher, student = models
    held = held_out(teacher, student, FILM, samples=2, max_tokens=12)
    once, again = examine(teacher, student, held).to_dict(), examine(teacher, student, held).to_dict()
    assert once == again == evaluate_student(teacher, student, FILM, samples=2, max_tokens=12).to_dict()
    other = evaluate_student(teacher, student, FILM, samples=2, max_tokens=12, seed=1).to_dict()
    assert other["kl"] != once["kl"]
    assert other["text_kl"] == once["text_kl"]


def test_rows_of_a_vocabulary_that_no_tokenizer_names_are_left_out(models):
    teacher, student = models
    network = copy.deepcopy(student.model)
    network.resize_token_embeddings(student.vocabulary.size + 8, mean_resizing=False)
    padded = HuggingFaceModel(network, student.tokenizer, name="padded")
    found, plain = (evaluate_student(teacher, q, FILM[:3], samples=2, max_tokens=6) for q in (padded, student))
    assert found.kl.value == pytest.approx(
        plain.kl.value, rel=0.05
    )  # the new rows have a little mass, which is taken off
    assert any("8" in note for note in found.notes)


def test_without_samples_to_compare_there_is_no_likeness_between_them(models):
    found = evaluate_student(*models, FILM[:3], samples=1, max_tokens=6)
    assert "self_rouge_l" not in found.means
    assert math.isnan(found.means["rouge_l"].lower)  # two prompts make no interval


def test_nothing_to_be_examined_on_is_refused(models):
    with pytest.raises(ValueError, match="expected at least one held-out prompt"):
        evaluate_student(*models, [])
    with pytest.raises(ValueError, match="samples=0"):
        evaluate_student(*models, FILM[:1], samples=0)


@pytest.mark.parametrize("same", [True, False])
def test_each_model_reads_its_own_contexts_in_both_directions(same):
    p, q = random_pair(3, spread=2.0)
    q = p if same else q
    read_p, read_q = p.context("bb"), q.context("a")
    text = Sequences.pack([read_q] * 3, [torch.tensor(ids) for ids in ([0, 1, 2], [1, 2], [0, 0, 1])])
    options = {"samples": 1500, "max_tokens": 4, "seed": 0}
    decode = letters(p)
    found = examine(p, q, assemble(p, [read_q], [read_p], text, decode(text), [0, 0, 0], decode, **options))

    def laws(x):
        return (m.readout(m.encode(x.after([read] * len(x)))) for m, read in ((p, read_p), (q, read_q)))

    given, own = strings(p, 4, prompt="bb"), strings(q, 4, prompt="a")
    for every, estimate, toward, prefix in ((given, found.kl, kl, "given"), (own, found.reverse_kl, reverse_kl, "own")):
        logp, logq = laws(every.x)
        wanted = every.mean(per_string(every.x, toward(logp, logq)))
        assert wanted > 0.1
        assert estimate.stderr < 0.05 * wanted
        assert abs(estimate.value - wanted) < 4.5 * estimate.stderr
        mass = every.probability[every.x.row()]
        for name, divergence in (("kl", kl), ("reverse_kl", reverse_kl)):
            mean = found.means[f"{prefix}_{name}"]
            wanted = float((mass * divergence(logp, logq)).sum() / mass.sum())
            assert abs(mean.value - wanted) < 4.5 * mean.stderr, (prefix, name)
        if prefix == "own":
            wanted = float(-(mass * logp.gather(1, every.x.targets()[:, None])[:, 0]).sum() / mass.sum())
            mean = found.means["own_cross_entropy_teacher"]
            assert abs(mean.value - wanted) < 4.5 * mean.stderr
    logp, logq = laws(text)
    y = text.targets()[:, None]
    wanted = {
        "kl": kl(logp, logq),
        "reverse_kl": reverse_kl(logp, logq),
        "entropy": entropy(logq),
        "entropy_teacher": entropy(logp),
        "cross_entropy": -logq.gather(1, y)[:, 0],
        "cross_entropy_teacher": -logp.gather(1, y)[:, 0],
        "head_weight": head_weight(logp, logq),
    }
    for name, values in wanted.items():
        assert found.means[f"text_{name}"].value == pytest.approx(float(values.double().mean()), abs=1e-12), name
    assert any("different contexts for 1 of 1 prompts" in note for note in found.notes)


def chat(template):
    """The same small model behind any template."""
    words = copy.deepcopy(tokenizer())
    words.chat_template = template
    return HuggingFaceModel(build("gpt2"), words)


CONVERSATIONS = [
    Example([{"role": "system", "content": rule}, {"role": "user", "content": said}], answer)
    for rule in ("short", "long")
    for said, answer in (("good?", " the plot was thin"), ("the cast?", " superb"), ("music?", " we liked it"))
]
LAST = "{{ messages[-1].content }}"


@pytest.mark.parametrize("opening", ["Q: ", "USER {{ messages[0].content }} "])
def test_the_divergence_of_the_text_is_the_one_that_is_trained_whatever_the_templates(opening):
    student, teacher = chat("Q: " + LAST), chat(opening + LAST)
    recipe = DistillRecipe(loss="forward_kl", batch=len(CONVERSATIONS), max_tokens=12)
    _, trained = step(start(student, teacher, CONVERSATIONS, recipe, 1))
    found = evaluate_student(teacher, student, CONVERSATIONS, samples=2, max_tokens=12)
    for name in ("kl", "reverse_kl", "cross_entropy"):
        assert found.means[f"text_{name}"].value == pytest.approx(getattr(trained, name), rel=1e-5, abs=1e-9), name
    if opening == "Q: ":
        assert (trained.kl, found.kl.value, found.reverse_kl.value, found.notes) == (0.0, 0.0, 0.0, ())
        assert found.kl.prompts == 3  # neither model reads the rule
    else:
        assert min(trained.kl, found.kl.value, found.reverse_kl.value) > 0.5
        assert found.kl.prompts == 6  # the teacher does
        assert [note for note in found.notes if "different contexts for 6 of 6 prompts" in note] == list(found.notes)


def test_strings_and_contexts_that_do_not_belong_together_are_refused():
    p = random_pair(1)[0]
    options = {"samples": 1, "max_tokens": 4, "seed": 0}
    a = p.context("a")
    with pytest.raises(ValueError, match="2 contexts of the students' and 1 of the teacher's"):
        assemble(p, [a, a], [a], None, [], [], letters(p), **options)
    text = Sequences.pack([a], [torch.tensor([0, 2])])
    with pytest.raises(ValueError, match="1 texts to 0"):
        assemble(p, [a], [a], text, ["a"], [], letters(p), **options)
