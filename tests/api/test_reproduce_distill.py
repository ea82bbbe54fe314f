import csv
import json
import math
from dataclasses import replace

import pytest
import torch

from klkit.api import reproduce_distill_train
from klkit.api.reproduce_distill import ARMS, SMOKE, Distillation, DistillStudy, Student, reproduce_distill
from klkit.api.reproduce_distill_measure import on_text
from klkit.api.reproduce_distill_report import MEASURES, comparisons, distill_blocks, orderings, pair_words
from klkit.api.reproduce_distill_train import (
    SEQUENCE_REVERSE_KL,
    Texts,
    Training,
    distil,
    warm_up,
)
from klkit.models.hf import HuggingFaceModel
from klkit.report.pages import plain_text
from klkit.rng import stream
from klkit.sequences import Sequences
from klkit.zoo.instructions import draw, tokenizer
from klkit.zoo.training import fresh

WORDS = tokenizer()


def network(width, seed):
    return HuggingFaceModel(fresh(len(WORDS), width=width, layers=1, window=64, seed=seed), WORDS, name=f"net{seed}")


@pytest.fixture(scope="module")
def teacher():
    model = network(24, 1)
    generator = stream(0, "sharpen")
    with torch.no_grad():
        for weight in model.model.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def text(teacher):
    strings = draw(24, seed=0)
    contexts = [teacher.context(x.prompt) for x in strings]
    completions = [torch.tensor([*WORDS(x.response, add_special_tokens=False).input_ids, 0]) for x in strings]
    return Texts.read(teacher, Sequences.pack(contexts, completions))


def test_kept_hidden_states_are_those_of_the_chosen_strings(teacher, text, tmp_path):
    chosen = torch.tensor([17, 3, 3])
    part = text.select(chosen)
    again = teacher.encode(text.x.select(chosen))
    assert torch.allclose(part.hidden, again, atol=1e-5)
    text.save(tmp_path / "text.safetensors")
    loaded = Texts.load(tmp_path / "text.safetensors")
    assert torch.equal(loaded.hidden, text.hidden)
    assert torch.equal(loaded.x.tokens, text.x.tokens)
    assert torch.equal(loaded.x.targets(), text.x.targets())


def by_hand(model, x, i):
    """Log-probabilities of string ``i``'s decisions, from the network alone."""
    tokens = x.tokens[i : i + 1, : int(x.stop[i])]
    return model.model(tokens).logits[0, int(x.start[i]) - 1 : -1].log_softmax(-1)


def test_the_loss_of_a_batch_is_the_mean_over_its_tokens(teacher, text):
    student = network(16, 2)
    part = text.select(torch.tensor([0, 5, 9]))
    total, tokens, likelihood = 0.0, 0, 0.0
    for i in range(3):
        logp, logq = (by_hand(model, part.x, i).detach() for model in (teacher, student))
        total += float((logq.exp() * (logq - logp)).sum())
        drawn = part.x.completion(i)
        likelihood -= float(logq.gather(1, drawn[:, None]).sum())
        tokens += len(drawn)
    loss = reproduce_distill_train._loss
    assert float(loss(part, student, teacher, "reverse_kl")) == pytest.approx(total / tokens, rel=1e-5)
    assert float(loss(part, student)) == pytest.approx(likelihood / tokens, rel=1e-5)


def test_the_sequence_loss_has_the_score_of_later_divergences(teacher, text):
    """Its gradient by a loop over the tokens of each string, with the other answer of the prompt as baseline."""
    student = network(16, 3)
    context = text.x.context(0)
    answers = [torch.tensor([5, 9, 0]), torch.tensor([7, 0])]
    x = Sequences.pack([context, context], answers, prompt=[0, 0])
    part = Texts(x, teacher.encode(x).clone())
    weights = list(student.model.parameters())
    found = torch.autograd.grad(reproduce_distill_train._loss(part, student, teacher, SEQUENCE_REVERSE_KL), weights)
    later, terms = [], []
    for i in range(2):
        logq, logp = by_hand(student, x, i), by_hand(teacher, x, i).detach()
        kl = (logq.exp() * (logq - logp)).sum(-1)
        later.append([float(kl[n + 1 :].sum()) for n in range(len(kl))])
        terms.append((kl, logq.gather(1, x.completion(i)[:, None])[:, 0]))
    wanted = 0.0
    for i, (kl, scores) in enumerate(terms):
        for n in range(len(kl)):
            other = later[1 - i][n] if n < len(later[1 - i]) else 0.0
            alone = n >= len(later[1 - i])
            wanted = wanted + kl[n] + (later[i][n] - (0.0 if alone else other)) * scores[n]
    wanted = torch.autograd.grad(wanted / x.decisions, weights)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def trained(teacher, text, loss, own=None, plan=None):
    plan = plan or Training(steps=6, warm=4, batch=8, longest=6)
    student, seen = network(16, 4), []
    warm_up(student, text, plan, seed=0)
    distil(teacher, student, text, loss, plan, 0, own=own, check=seen.append)
    assert seen == list(range(plan.steps + 1))
    return torch.cat([w.detach().reshape(-1) for w in student.model.parameters()]), student


def test_students_of_a_seed_differ_by_their_loss_alone(teacher, text):
    first, _ = trained(teacher, text, "forward_kl")
    assert torch.equal(first, trained(teacher, text, "forward_kl")[0])
    assert not torch.equal(first, trained(teacher, text, "reverse_kl")[0])
    own = [trained(teacher, text, "reverse_kl", own)[0] for own in ("reverse_kl", SEQUENCE_REVERSE_KL)]
    assert not torch.equal(*own)


def test_measures_on_text_by_hand_and_training_improves_them(teacher, text):
    _, before = trained(teacher, text, "forward_kl", plan=Training(steps=1, warm=1, batch=8))
    _, after = trained(teacher, text, "forward_kl", plan=Training(steps=40, warm=1, batch=8))
    start, end = (on_text(teacher, student, text) for student in (before, after))
    assert end["forward_kl"] < start["forward_kl"]
    rows = [(by_hand(teacher, text.x, i), by_hand(after, text.x, i)) for i in range(len(text.x))]
    logp, logq = (torch.cat(parts).detach() for parts in zip(*rows, strict=True))
    p, q = logp.exp(), logq.exp()
    far = (q * (p < 1e-4)).sum(-1)
    hand = {
        "forward_kl": (p * (logp - logq)).sum(-1), "reverse_kl": (q * (logq - logp)).sum(-1), "far_tail": far,
        "far_tail_p": (p * (p < 1e-4)).sum(-1), "entropy": -(q * logq).sum(-1),
        "agreement": (p.argmax(-1) == q.argmax(-1)).double(),
    }  # fmt: skip
    for name, values in hand.items():
        assert end[name] == pytest.approx(float(values.double().mean()), rel=1e-4, abs=1e-6), name
    gap = float((p - q).abs().sum(-1).mean())
    assert end["head_gap"] + end["tail_gap"] == pytest.approx(gap, rel=1e-4)
    same = on_text(teacher, teacher, text)
    assert same["forward_kl"] == pytest.approx(0, abs=1e-9)
    assert same["agreement"] == 1


def test_every_arm_of_the_full_study_is_a_loss_and_says_what_it_optimises():
    students = made_up(lambda arm, measure, seed: 1.0 + 0.1 * seed + len(arm) / 100, DistillStudy())
    text = plain_text(distill_blocks(students))
    assert max(map(len, text.splitlines())) <= 80
    for arm in ARMS:
        assert f"\n- {arm}: " in text
    flat = " ".join(text.split())
    assert "rkl_sequence: as reverse_kl for half of the steps" in flat
    assert "fkl_teacher: KL(p‖q)" in flat
    assert "the gradient is NOT that quantity's" in flat


def made_up(value, study=None):
    """Students whose measures are given."""
    study = study or replace(SMOKE, seeds=10)
    students = []
    for tier in ("language", "documentation"):
        arms, seeds = study.sets(tier)
        for seed in range(seeds):
            for arm in arms:
                final = {name: value(arm, name, seed) for name in MEASURES}
                if tier == "documentation":
                    final.pop("rouge_l")
                point = final | {"step": 1.0, "head_weight": 0.4, "agreement": 0.5}
                students.append(Student(tier, arm, seed, [point], final, 1.0))
    measured = {"cross_entropy": 0.6, "rouge_l": 70.0, "distinct_2": 20.0}
    teachers = dict.fromkeys(("language", "documentation"), measured)
    return Distillation(study, teachers, students)


def test_orderings_are_held_reversed_or_not_resolved():
    base = {"fkl": 3.0, "rkl": 1.0, "sum": 0.5, "akl": 0.5}

    def value(arm, measure, seed):
        common = 10 + math.sin(7 * seed)  # what a seed does to all its students
        noise = 0.01 * math.sin(13 * seed + len(measure) + 3 * len(arm))
        if measure == "forward_kl" and arm == "rkl":
            return common + 0.0 + noise  # below sum and akl: the wrong way round
        if measure == "distinct_2":
            return common + 5 * math.sin(5 * seed + ord(arm[0]))
        return common + base[arm] + noise

    found = {(x.less, x.more, x.measure): x.word for x in orderings(made_up(value))}
    assert found["rkl", "fkl", "reverse_kl"] == "held"
    assert found["sum", "rkl", "forward_kl"] == "reversed"
    assert found["rkl", "fkl", "distinct_2"] == "not resolved"
    assert len(found) == 7
    compared = comparisons(made_up(value), "language")
    words = {line.split(":")[0]: line for line in pair_words(compared)}
    assert "BETTER" in words["akl against fkl"]
    assert "EQUIVALENT" in words["akl against sum"]
    assert "NOT RESOLVED: distinct-2" in words["akl against sum"]
    assert not any(x.measure == "rouge_l" for x in comparisons(made_up(value), "documentation"))


def test_studies_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="at least two seeds"):
        DistillStudy(seeds=1)
    with pytest.raises(ValueError, match="got mystery"):
        DistillStudy(arms=("mystery",))


def test_the_smoke_run_writes_its_files_and_goes_on_where_it_stopped(tmp_path, run):
    command = ("reproduce", "distill", "--smoke", "--workers", "1", "--out", str(tmp_path / "out"))
    code, _, _ = run(*command)
    assert code == 0
    out = tmp_path / "out"
    record = json.loads((out / "distill.json").read_text())
    students = {(x["tier"], x["arm"], x["seed"]) for x in record["students"]}
    assert len(students) == len(record["students"]) == 4 * 2 + 2 * 2
    assert {x["measure"] for x in record["comparisons"]} == set(MEASURES)
    finals = list(csv.DictReader((out / "finals.csv").open()))
    assert all(math.isfinite(float(row["value"])) for row in finals)
    measures = {row["measure"] for row in finals}
    assert {"sequence_forward_kl", "sequence_forward_kl_error", "self_rouge_l", "head_weight"} <= measures
    page = (out / "distill.html").read_text()
    assert page.count("<img src=") == 5
    assert "expected" not in page
    done = sorted((out / "runs").glob("*.json"))
    assert len(done) == 2 + 12
    # A student is lost; it is trained again, to the same numbers.
    lost = out / "runs" / "language-rkl-1.json"
    before = json.loads(lost.read_text())["result"]
    lost.unlink()
    again = reproduce_distill(SMOKE, out)
    assert again.values("language", "rkl", "forward_kl")[1] == before["final"]["forward_kl"]
    after = json.loads(lost.read_text())["result"]
    assert {**after, "seconds": 0} == {**before, "seconds": 0}
    code, _, error = run(*command, "--steps", "30")
    assert code == 2
    assert "same settings" in error
