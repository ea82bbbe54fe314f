"""Distillation with every divergence, on a language whose law is known, and on the Python documentation.

A small teacher is trained once. Students of one seed share their start, a warm-up and all batches, and differ in the
loss alone, so that losses are compared seed by seed. Nothing is downloaded: the first language writes itself, and the
second ships with Python.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from klkit.api.jobs import Job, Watch, finish
from klkit.api.prompts import read_prompts
from klkit.api.reproduce_distill_measure import Questions, answer, on_answers, on_text, written
from klkit.api.reproduce_distill_train import SEQUENCE_REVERSE_KL, Texts, Training, distil, warm_up
from klkit.models.hf import HuggingFaceModel
from klkit.models.spec import load_network
from klkit.sequences import Sequences
from klkit.zoo import corpus, instructions
from klkit.zoo.training import Example, fresh, train

TIERS = ("language", "documentation")
REFERENCES = 4
"""Reference answers of a prompt."""


@dataclass(frozen=True, slots=True)
class Arm:
    """How a student is trained.

    Attributes:
        loss: as :func:`klkit.objectives.distill_losses.token_loss` reads it.
        text: whose: ``"data"`` or ``"teacher"``.
        own: loss at the student's own prefixes in the second half of the steps; None without.
    """

    loss: str
    text: str = "data"
    own: str | None = None


ARMS = {
    "sft": Arm("cross_entropy"),
    "seqkd": Arm("cross_entropy", "teacher"),
    "fkl": Arm("forward_kl"),
    "rkl": Arm("reverse_kl"),
    "jsd": Arm("generalised_js"),
    "sum": Arm("sum_kl"),
    "akl": Arm("adaptive_kl"),
    "akl_inside": Arm("adaptive_kl,head=inside"),
    "akl_r": Arm("adaptive_kl_swapped"),
    "fkl_teacher": Arm("forward_kl", "teacher"),
    "akl_teacher": Arm("adaptive_kl", "teacher"),
    "rkl_own": Arm("reverse_kl", own="reverse_kl"),
    "rkl_sequence": Arm("reverse_kl", own=SEQUENCE_REVERSE_KL),
}


@dataclass(frozen=True, slots=True)
class DistillStudy:
    """What is trained and how it is measured; all but arms and seeds changes single runs.

    Attributes:
        arms: keys of :data:`ARMS` on the instruction language.
        seeds: students of each.
        documentation_arms: the same for the documentation.
        documentation_seeds: likewise.
        teacher_steps: training of the language's teacher.
        steps: of a student's distillation.
        warm: steps on the text's tokens before, shared by all students of a seed.
        strings: that students learn from.
        held_out: other strings, which they are measured on.
        questions: prompts that are answered freely, three times each.
        documentation_steps: distillation on the documentation.
        documentation_strings: paragraphs that its students learn from.
        checks: steps at which the held-out text is read.

    Raises:
        ValueError: an unknown arm, or fewer than two seeds.
    """

    arms: tuple[str, ...] = tuple(ARMS)
    seeds: int = 10
    documentation_arms: tuple[str, ...] = ("fkl", "rkl", "sum", "akl")
    documentation_seeds: int = 5
    teacher_steps: int = 1000
    steps: int = 600
    warm: int = 100
    strings: int = 4000
    held_out: int = 512
    questions: int = 192
    documentation_steps: int = 300
    documentation_strings: int = 800
    checks: tuple[int, ...] = (0, 25, 50, 100, 200, 400)

    def __post_init__(self) -> None:
        unknown = {*self.arms, *self.documentation_arms} - set(ARMS)
        if unknown or self.seeds < 2 or self.documentation_seeds < 2:
            raise ValueError(
                f"expected arms among {', '.join(ARMS)} and at least two seeds, got {', '.join(sorted(unknown))} "
                f"and {self.seeds} and {self.documentation_seeds} seeds; one seed shows no difference"
            )

    def training(self, tier: str) -> Training:
        """How its students are trained."""
        if tier == "language":
            return Training(self.steps, self.warm, batch=32, longest=40)
        return Training(self.documentation_steps, self.warm, batch=8, longest=40)

    def sets(self, tier: str) -> tuple[tuple[str, ...], int]:
        """(arms, seeds) of a tier."""
        if tier == "language":
            return self.arms, self.seeds
        return self.documentation_arms, self.documentation_seeds


SMOKE = DistillStudy(
    arms=("fkl", "rkl", "sum", "akl"), seeds=2, documentation_arms=("fkl", "rkl"), documentation_seeds=2,
    teacher_steps=30, steps=10, warm=5, strings=120, held_out=24, questions=6, documentation_steps=2,
    documentation_strings=10, checks=(0,),
)  # fmt: skip
"""The same in half a minute: it shows that everything works, and nothing else."""


@dataclass(frozen=True, slots=True)
class Student:
    """What became of one student.

    Attributes:
        tier: one of :data:`TIERS`.
        arm: key of :data:`ARMS`.
        seed: of its start, batches and random numbers.
        curve: measures on held-out text (:func:`on_text`), each with its ``step``; the last is the end.
        final: measures at the end, those on its own answers (:func:`on_answers`) included.
        seconds: of training and measuring.
    """

    tier: str
    arm: str
    seed: int
    curve: list[dict[str, float]]
    final: dict[str, float]
    seconds: float


@dataclass(frozen=True, slots=True)
class Distillation:
    """A finished study.

    Attributes:
        study: what was asked for.
        teachers: by tier, what is measured of the teacher itself.
        students: all of them.
    """

    study: DistillStudy
    teachers: dict[str, dict[str, float]]
    students: list[Student]

    def values(self, tier: str, arm: str, measure: str) -> list[float]:
        """A final measure of each seed, in the order of the seeds."""
        return [x.final[measure] for x in self.students if x.tier == tier and x.arm == arm]


def reproduce_distill(
    study: DistillStudy, out: Path, *, workers: int = 1, observe: Watch | None = None
) -> Distillation:
    """Train and measure teachers and students, one process a core; what is in ``out`` is not done again.

    Raises:
        ValueError: ``out`` cannot be written, or holds runs of other settings.
    """
    shared = asdict(study)
    for name in ("arms", "seeds", "documentation_arms", "documentation_seeds"):
        shared.pop(name)
    shared["checks"] = list(study.checks)
    runs = out / "runs"
    prepared = finish(
        prepare, [Job(f"{tier}-teacher", {"tier": tier, "study": shared}) for tier in TIERS], runs, workers=workers
    )
    jobs = [
        Job(f"{tier}-{arm}-{seed}", {"tier": tier, "arm": arm, "seed": seed, "study": shared})
        for tier in TIERS
        for seed in range(study.sets(tier)[1])  # whole repetitions first, so that what there is is balanced
        for arm in study.sets(tier)[0]
    ]
    found = finish(train_and_measure, jobs, runs, workers=workers, observe=observe)
    return Distillation(study, dict(zip(TIERS, prepared, strict=True)), [Student(**result) for result in found])


def prepare(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train or load the teacher of a tier, and write what its students need; measures of the teacher."""
    study, tier = _study(settings), settings["tier"]
    place = folder / tier
    if tier == "language":
        teacher = _language_teacher(study, place)
        data = instructions.draw(study.strings, seed=2)
        text = _pack(teacher, [x.prompt for x in data], [x.response for x in data])
        held = instructions.draw(study.held_out, seed=3)
        test = _pack(teacher, [x.prompt for x in held], [x.response for x in held])
        own = answer(teacher, [text.context(i) for i in range(len(text))], 1, 40, seed=5)
        Texts.read(teacher, own).save(place / "teacher.safetensors")
    else:
        teacher = load_network("klkit:docs")
        training, held_out = corpus.split([text for texts in corpus.paragraphs().values() for text in texts])
        # In an order that has nothing to do with the topics, so that a part of it is a fair sample.
        training, held_out = (sorted(texts, key=_digest) for texts in (training, held_out))
        text = _pack(teacher, [""] * study.documentation_strings, training[: study.documentation_strings])
        count = min(len(held_out), study.held_out // 4)
        test = _pack(teacher, [""] * count, held_out[:count])
    Texts.read(teacher, text).save(place / "data.safetensors")
    Texts.read(teacher, test).save(place / "test.safetensors")
    contexts, references = _questions(study, tier, teacher)
    answers = answer(teacher, contexts, 3, 40, seed=6)
    Texts.read(teacher, answers).save(place / "answers.safetensors")
    own_text = on_text(teacher, teacher, Texts.load(place / "test.safetensors"))
    return own_text | {"length": float(answers.lengths.double().mean())} | written(teacher, answers, references, 3)


def train_and_measure(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """One student."""
    began = time.monotonic()
    study, tier, seed, arm = _study(settings), settings["tier"], settings["seed"], ARMS[settings["arm"]]
    teacher, texts = _material(folder / tier, tier)
    size, window = teacher.vocabulary.size, teacher.window
    assert window is not None
    shape = {"width": 32, "layers": 1} if tier == "language" else {"width": 48, "layers": 1}
    student = HuggingFaceModel(fresh(size, **shape, window=window, seed=seed), teacher.tokenizer, name="student")
    plan, curve = study.training(tier), []

    def check(step: int) -> None:
        if step in study.checks or step == plan.steps:
            curve.append({"step": float(step)} | on_text(teacher, student, texts["test"]))

    warm_up(student, texts["data"], plan, seed)
    distil(teacher, student, texts[arm.text], arm.loss, plan, seed, own=arm.own, check=check)
    contexts, references = _questions(study, tier, teacher)
    asked = Questions(contexts, references, texts["answers"].x, 3, plan.longest)
    return {
        "tier": tier, "arm": settings["arm"], "seed": seed, "curve": curve,
        "final": curve[-1] | on_answers(teacher, student, asked, seed), "seconds": time.monotonic() - began,
    }  # fmt: skip


def _language_teacher(study: DistillStudy, place: Path) -> HuggingFaceModel:
    from klkit.models.checkpoints import quiet

    tokenizer = instructions.tokenizer()
    network = fresh(len(tokenizer), width=96, layers=2, window=64, seed=0)
    strings = []
    for x in instructions.draw(20 * study.teacher_steps, seed=1):
        prompt, response = tokenizer(x.prompt).input_ids, tokenizer(x.response, add_special_tokens=False).input_ids
        strings.append(Example((*prompt, *response, 0), start=len(prompt)))
    train(network, strings, steps=study.teacher_steps, rate=4e-3, seed=0, tokens=1536, decay=0.01)
    with quiet():
        network.save_pretrained(place / "model")
        tokenizer.save_pretrained(place / "model")
    return HuggingFaceModel(network, tokenizer, name="teacher")


def _pack(model: HuggingFaceModel, prompts: list[str], responses: list[str]) -> Sequences:
    """Contexts and whole responses, cut where they do not fit."""
    contexts = [model.context(prompt) for prompt in prompts]
    ids = [[*model.tokenizer(text, add_special_tokens=False)["input_ids"], 0] for text in responses]
    window = model.window or max(map(len, ids))
    cut = [torch.tensor(r[: window - len(c)]) for c, r in zip(contexts, ids, strict=True)]
    return Sequences.pack(contexts, cut)


def _questions(study: DistillStudy, tier: str, teacher: HuggingFaceModel) -> tuple[list[Any], list[list[str]]]:
    """Contexts that are answered freely, and reference answers where the law is known."""
    if tier == "documentation":
        texts = [str(text) for text in read_prompts("klkit:docs").contents]
        return [teacher.context(text) for text in texts[: study.questions]], []
    asked = [x.prompt for x in instructions.draw(study.questions, seed=4)]
    references = [instructions.references(prompt, REFERENCES, seed=4) for prompt in asked]
    return [teacher.context(prompt) for prompt in asked], references


@lru_cache(maxsize=2)
def _material(place: Path, tier: str) -> tuple[HuggingFaceModel, dict[str, Texts]]:
    """A tier's teacher and texts, read once a process."""
    teacher = load_network(str(place / "model")) if tier == "language" else load_network("klkit:docs")
    return teacher, {file.stem: Texts.load(file) for file in sorted(place.glob("*.safetensors"))}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _study(settings: Mapping[str, Any]) -> DistillStudy:
    fields: dict[str, Any] = dict(settings["study"])
    return DistillStudy(**{**fields, "checks": tuple(fields["checks"])})
