"""How far a student is from its teacher, whatever trained it: whole responses, held-out text, and what it writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from klkit.estimators import summarise
from klkit.estimators.exposure import ExposureBias, exposure_bias
from klkit.estimators.heads import HeadTally
from klkit.estimators.statistics import score, weighted
from klkit.estimators.variates import token_features
from klkit.models.align import align, context_note
from klkit.models.base import LanguageModel
from klkit.results import Estimate, plain
from klkit.rng import derive
from klkit.sequences import Sequences
from klkit.stats.intervals import cluster_totals, ratio_interval, ratio_stderr
from klkit.stats.overlap import distinct_n, rouge_l, self_rouge_l, words
from klkit.train.texts import draw_named

if TYPE_CHECKING:
    from klkit.models.hf import HuggingFaceModel
    from klkit.train.examples import Example

BATCH = 64
FEATURES = 16
COMPARED = 16
"""Responses to a prompt of which all pairs are compared, at most."""


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over strings, or a ratio of two, with its error bar clustered by prompt.

    Attributes:
        value: the mean.
        stderr: its standard error; NaN with one cluster.
        lower: lower bound of the 95 % interval; NaN with fewer than 10 clusters.
        upper: upper bound.
    """

    value: float
    stderr: float
    lower: float
    upper: float


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What students are examined on; nothing in it depends on the student's weights.

    Attributes:
        text: the reference responses, behind the teacher's contexts; None where no prompt has one.
        contexts: each different prompt as the students read it.
        contexts_teacher: the same prompts as the teacher reads them, by a template of its own where it has one.
        references: the reference responses to each, which may be none.
        responses: the teacher's own responses, behind its contexts, ``samples`` a prompt.
        samples: responses a prompt.
        max_tokens: longest response.
        seed: names the strings.
        decode: turns completions into texts.
    """

    text: Sequences | None
    contexts: tuple[Int[Tensor, " _c"], ...]
    contexts_teacher: tuple[Int[Tensor, " _c"], ...]
    references: tuple[tuple[str, ...], ...]
    responses: Sequences
    samples: int
    max_tokens: int
    seed: int
    decode: Callable[[Sequences], list[str]]

    @property
    def note(self) -> str | None:
        """What to say where the teacher and the students read different contexts, else None."""
        return context_note(self.contexts_teacher, self.contexts)


@dataclass(frozen=True, slots=True)
class DistillEvaluation:
    """A student's distance from its teacher; :data:`klkit.report.quantities.QUANTITIES` says what each number is.

    Attributes:
        step: training steps behind the student.
        kl: KL(teacher‖student) between the laws of whole responses, by ``rb_cv`` on the teacher's responses.
        reverse_kl: KL(student‖teacher), by ``rb_cv`` on the student's.
        means: numbers with an error bar, by name.
        numbers: the others, by name.
        exposure: the accumulated errors behind the exposure bias.
        notes: whatever a reader must be told.
    """

    step: int
    kl: Estimate
    reverse_kl: Estimate
    means: dict[str, Mean]
    numbers: dict[str, float]
    exposure: ExposureBias
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for a file, all on one level; those that are not finite as text."""
        found: dict[str, Any] = {"step": self.step, "strings": self.kl.n, "prompts": self.kl.prompts}
        for name, estimate in (("kl", self.kl), ("reverse_kl", self.reverse_kl)):
            interval = estimate.interval()
            bounds = {"lower": interval.lower, "upper": interval.upper}
            found |= _spread(name, estimate.value, {"stderr": estimate.stderr, **bounds})
        for name, mean in self.means.items():
            found |= _spread(name, mean.value, {"stderr": mean.stderr, "lower": mean.lower, "upper": mean.upper})
        bias = {"lower": self.exposure.lower, "upper": self.exposure.upper}
        found |= _spread("exposure_bias", self.exposure.value, bias)
        plain_dict: dict[str, Any] = plain({**found, **self.numbers, "notes": list(self.notes)})
        return plain_dict


def evaluate_student(
    teacher: LanguageModel,
    student: HuggingFaceModel,
    examples: Sequence[Example],
    *,
    samples: int = 4,
    max_tokens: int = 64,
    seed: int = 0,
    step: int = 0,
) -> DistillEvaluation:
    """``KL(p‖q) = Σ p (log p − log q)`` of teacher ``p`` and student ``q`` in both directions, and all beside it.

    Each model reads a prompt by its own template, as in training; where the templates differ, a note says so.
    Examples with one prompt are references of one another. For several students of one teacher, or several steps of
    one run, :func:`held_out` once and :func:`examine` often saves sampling the teacher again.

    Args:
        examples: held-out prompts with reference responses.
        samples: responses a prompt that each model writes.
        max_tokens: longest response.
        seed: names the strings and not the step, so that two students are compared with common random numbers.

    Raises:
        ValueError: there is no example, or a prompt leaves no room for a response.
        VocabularyMismatch: the models do not choose from the same tokens.
    """
    held = held_out(teacher, student, examples, samples=samples, max_tokens=max_tokens, seed=seed)
    return examine(teacher, student, held, step=step)


def held_out(
    teacher: LanguageModel,
    student: HuggingFaceModel,
    examples: Sequence[Example],
    *,
    samples: int = 4,
    max_tokens: int = 64,
    seed: int = 0,
) -> HeldOut:
    """What students of ``teacher`` are examined on: ``examples``, and the teacher's own responses to their prompts.

    Raises:
        ValueError: there is no example, or a prompt leaves no room for a response.
    """
    from klkit.train.examples import encode_examples, without_empty
    from klkit.train.rewards import response_texts

    answered, _ = without_empty(examples)
    asked = [i for i, example in enumerate(examples) if not example.empty]
    p, _, _ = align(teacher, student)  # what no tokenizer names is not drawn
    return assemble(
        p,
        [student.context(example.prompt) for example in examples],
        [teacher.context(example.prompt) for example in examples],
        encode_examples(student, answered, max_tokens) if answered else None,
        [example.response for example in answered],
        asked,
        partial(response_texts, student),
        samples=samples,
        max_tokens=max_tokens,
        seed=seed,
    )


def assemble(
    teacher: LanguageModel,
    contexts: Sequence[Int[Tensor, " _c"]],
    contexts_teacher: Sequence[Int[Tensor, " _c"]],
    text: Sequences | None,
    references: Sequence[str],
    asked: Sequence[int],
    decode: Callable[[Sequences], list[str]],
    *,
    samples: int,
    max_tokens: int,
    seed: int,
) -> HeldOut:
    """The same from contexts and strings that are encoded already.

    Args:
        contexts: prompts as the students read them; one that comes again counts once.
        contexts_teacher: the same prompts as the teacher reads them.
        text: responses to some of them, behind whatever context.
        references: the text of each of these.
        asked: the index of the prompt that each of these answers.

    Raises:
        ValueError: there is no prompt, the models' contexts are not of as many prompts, there are not as many
            references as responses, or no samples are wanted.
    """
    rows = 0 if text is None else len(text)
    if not len(contexts) or not len(references) == len(asked) == rows or samples < 1:
        raise ValueError(
            f"expected at least one held-out prompt, a text and a prompt for each of {rows} responses and at least one "
            f"sample a prompt, got {len(contexts)} prompts, {len(references)} texts to {len(asked)} and "
            f"samples={samples}"
        )
    if len(contexts_teacher) != len(contexts):
        raise ValueError(
            f"expected every prompt as the students and as the teacher read it, got {len(contexts)} contexts of the "
            f"students' and {len(contexts_teacher)} of the teacher's; give one of each a prompt"
        )
    # A template may leave out what the other one reads, so one prompt is what both models read alike.
    number: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    place = []
    for mine, theirs in zip(contexts, contexts_teacher, strict=True):
        pair = (tuple(mine.tolist()), tuple(theirs.tolist()))
        place.append(number.setdefault(pair, len(number)))
    prompts = tuple(torch.tensor(mine) for mine, _ in number)
    prompts_teacher = tuple(torch.tensor(theirs) for _, theirs in number)
    groups: list[list[str]] = [[] for _ in prompts]
    if text is not None:
        answers = [place[i] for i in asked]
        for k, reference in zip(answers, references, strict=True):
            groups[k].append(reference)
        prompt = torch.tensor(answers)
        text = replace(text, prompt=prompt, cluster=prompt if len(prompts) > 1 else torch.arange(rows))
        text = text.after(_behind(prompts_teacher, text))
    return HeldOut(
        text=text,
        contexts=prompts,
        contexts_teacher=prompts_teacher,
        references=tuple(map(tuple, groups)),
        responses=_write(teacher, prompts_teacher, samples, max_tokens, derive(seed, "teacher's responses")),
        samples=samples,
        max_tokens=max_tokens,
        seed=seed,
        decode=decode,
    )


def examine(teacher: LanguageModel, student: LanguageModel, held: HeldOut, *, step: int = 0) -> DistillEvaluation:
    """Everything about one student on what was held out.

    Raises:
        VocabularyMismatch: the models do not choose from the same tokens.
    """
    p, q, notes = align(teacher, student)
    notes = notes if held.note is None else (*notes, held.note)
    embedding = p.embedding()
    # Any function of a token is a fair variate; the teacher's embedding stays the same along a run.
    features: Float[Tensor, "v f"] | None = None if embedding is None else token_features(embedding, FEATURES)
    read = _behind(held.contexts, held.responses)
    given = score(p, q, held.responses, contexts_q=read, batch_size=BATCH, features=features)
    written = _write(q, held.contexts, held.samples, held.max_tokens, derive(held.seed, "student's responses"))
    # The roles are swapped here: own.rows.kl is KL(student‖teacher), and it is the teacher that reads other contexts.
    read = _behind(held.contexts_teacher, written)
    own = score(q, p, written, contexts_q=read, batch_size=BATCH, features=features)
    exposure = exposure_bias(own.rows.reverse_kl, written, given.rows.kl, held.responses, seed=held.seed)
    texts, texts_teacher = held.decode(written), held.decode(held.responses)
    means = {
        **({} if held.text is None else _text_means(p, q, held.text, _behind(held.contexts, held.text))),
        "own_kl": _per_token(own.rows.reverse_kl, written),
        "own_reverse_kl": _per_token(own.rows.kl, written),
        "given_kl": _per_token(given.rows.kl, held.responses),
        "given_reverse_kl": _per_token(given.rows.reverse_kl, held.responses),
        "own_cross_entropy_teacher": _per_token(-own.rows.logq, written),
        **_written_means(texts, written, held),
        **{f"{name}_teacher": mean for name, mean in _written_means(texts_teacher, held.responses, held).items()},
    }
    return DistillEvaluation(
        step=step,
        kl=summarise("rb_cv", given, direction="KL(teacher‖student)", notes=notes),
        reverse_kl=summarise("rb_cv", own, divergence="reverse_kl", direction="KL(student‖teacher)", notes=notes),
        means=means,
        numbers={
            "exposure_reach": float(exposure.reach),
            "distinct_1": distinct_n(texts, 1),
            "distinct_2": distinct_n(texts, 2),
            "distinct_2_teacher": distinct_n(texts_teacher, 2),
        },
        exposure=exposure,
        notes=notes,
    )


def _write(model: LanguageModel, contexts: Sequence[Tensor], samples: int, max_tokens: int, seed: int) -> Sequences:
    """``samples`` responses of ``model`` after each context."""
    names = [(k, r) for k in range(len(contexts)) for r in range(samples)]
    cluster = [k if len(contexts) > 1 else r for k, r in names]
    return Sequences.cat(draw_named(model, contexts, names, max_tokens=max_tokens, seed=seed, cluster=cluster))


def _behind(contexts: Sequence[Tensor], x: Sequences) -> list[Tensor]:
    """The context of each string, of those of the prompts."""
    return [contexts[k] for k in x.prompt.tolist()]


def _text_means(
    p: LanguageModel, q: LanguageModel, text: Sequences, contexts_student: Sequence[Tensor]
) -> dict[str, Mean]:
    """Every number that is a mean over the decisions of the held-out text."""
    tally = HeadTally()
    rows = score(p, q, text, contexts_q=contexts_student, batch_size=BATCH, watch=tally).rows
    heads = tally.statistics()
    weight = heads.weight.double()
    adaptive = weighted(weight, rows.kl.double()) + weighted(1 - weight, rows.reverse_kl.double())
    nats = {
        "kl": rows.kl,
        "reverse_kl": rows.reverse_kl,
        "adaptive_kl": adaptive,
        "entropy": rows.entropy_q,
        "entropy_teacher": rows.entropy_p,
        "cross_entropy": -rows.logq,
        "cross_entropy_teacher": -rows.logp,
    }
    shares = {
        "head_weight": weight,
        "head_gap": heads.head_gap,
        "tail_gap": heads.tail_gap,
        "far_mass": heads.far_q,
        "far_mass_teacher": heads.far_p,
        "single_head": heads.single.double(),
        "same_top": rows.same_top.double(),
    }
    found = {name: _per_token(each, text) for name, each in nats.items()}
    found |= {name: _per_token(each, text, most=2.0 if "gap" in name else 1.0) for name, each in shares.items()}
    return {f"text_{name}": mean for name, mean in found.items()}


def _written_means(texts: list[str], x: Sequences, held: HeldOut) -> dict[str, Mean]:
    """Every number that is a mean over responses, or over prompts."""
    cut = [words(text) for text in texts]
    references = [[words(reference) for reference in group] for group in held.references]
    prompt, cluster, one = x.prompt.tolist(), x.cluster.numpy(), np.ones(len(x))
    found = {
        "length": _mean(x.lengths.double().numpy(), one, cluster, most=float(held.max_tokens)),
        "finished": _mean(x.finished.double().numpy(), one, cluster, most=1.0),
    }
    scored = [i for i, k in enumerate(prompt) if references[k]]
    if scored:
        rouge = np.array([100 * rouge_l(cut[i], references[prompt[i]]) for i in scored])
        found["rouge_l"] = _mean(rouge, one[scored], cluster[scored], most=100.0)
    if held.samples > 1:
        k = len(held.contexts)  # responses to one prompt stand together
        some = min(held.samples, COMPARED)
        alike = [100 * self_rouge_l(cut[i * held.samples : i * held.samples + some]) for i in range(k)]
        found["self_rouge_l"] = _mean(np.array(alike), np.ones(k), np.arange(k), most=100.0)
    return found


def _per_token(values: Float[Tensor, " m"], x: Sequences, most: float = math.inf) -> Mean:
    """Mean over decisions, as a ratio of two means over strings."""
    total = torch.zeros(len(x), dtype=torch.float64).index_add_(0, x.row(), values.double())
    return _mean(total.numpy(), x.lengths.double().numpy(), x.cluster.numpy(), most)


def _mean(
    total: NDArray[np.float64], weight: NDArray[np.float64], cluster: NDArray[np.int64], most: float = math.inf
) -> Mean:
    """``Σ total / Σ weight``, which lies between 0 and ``most``, and so does its interval."""
    totals = cluster_totals(total, weight, cluster)
    found = ratio_interval(*totals)
    lower, upper = (min(max(bound, 0.0), most) if bound == bound else bound for bound in (found.lower, found.upper))
    return Mean(float(totals[0].sum() / totals[1].sum()), ratio_stderr(*totals), lower, upper)


def _spread(name: str, value: float, companions: dict[str, float]) -> dict[str, float]:
    return {name: value, **{f"{name}_{which}": number for which, number in companions.items()}}
