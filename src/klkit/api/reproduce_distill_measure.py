"""What is measured of a student: at the prefixes of held-out text, on what it writes, and between whole responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from klkit.api.reproduce_distill_train import Texts, student_logits
from klkit.divergences.adaptive import head_weight
from klkit.divergences.f import total_variation
from klkit.divergences.kl import entropy, kl, reverse_kl
from klkit.estimators import summarise
from klkit.estimators.statistics import score
from klkit.models.base import head_of
from klkit.models.hf import HuggingFaceModel
from klkit.numerics import log_softmax
from klkit.sampling.ancestral import sample
from klkit.sequences import Sequences
from klkit.stats.overlap import distinct_n, rouge_l, self_rouge_l

FAR = 1e-4
"""Tokens that the teacher gives less are its far tail."""
SCORED = 128


@torch.no_grad()
def on_text(teacher: HuggingFaceModel, student: HuggingFaceModel, text: Texts) -> dict[str, float]:
    """Means over the decisions of given text: both directions, where the laws differ, and what leaks into the far tail.

    ``head_gap`` and ``tail_gap`` are ``Σ |p − q|`` in and outside the likeliest tokens with half of the teacher's mass.
    """
    head = head_of(teacher)
    assert head is not None
    parts: list[dict[str, Tensor]] = []
    for strings in torch.split(torch.arange(len(text.x)), SCORED):
        part = text.select(strings)
        logp, logq = log_softmax(head.logits(part.hidden)), log_softmax(student_logits(student, part.x))
        weight, gap = head_weight(logp, logq), 2 * total_variation(logp, logq)
        far = logp < np.log(FAR)
        parts.append(
            {
                "forward_kl": kl(logp, logq),
                "reverse_kl": reverse_kl(logp, logq),
                "head_gap": weight * gap,
                "tail_gap": (1 - weight) * gap,
                "head_weight": weight,
                "far_tail": (logq.exp() * far).sum(-1),
                "far_tail_p": (logp.exp() * far).sum(-1),
                "entropy": entropy(logq),
                "agreement": (logp.argmax(-1) == logq.argmax(-1)).float(),
                "cross_entropy": -logq.gather(-1, part.x.targets()[:, None])[:, 0],
            }
        )
    return {name: float(torch.cat([part[name] for part in parts]).double().mean()) for name in parts[0]}


@dataclass(frozen=True, eq=False, slots=True)
class Questions:
    """Prompts for free answers.

    Attributes:
        contexts: token ids of each prompt.
        references: answers to hold others against, some for each prompt; empty where there are none.
        answers: what the teacher writes, ``samples`` strings a prompt.
        samples: strings a prompt.
        longest: tokens of an answer.
    """

    contexts: Sequence[Int[Tensor, " _c"]]
    references: Sequence[Sequence[str]]
    answers: Sequences
    samples: int
    longest: int


def answer(model: HuggingFaceModel, contexts: Sequence[Tensor], samples: int, longest: int, seed: int) -> Sequences:
    """Strings of ``model``, ``samples`` for each context."""
    names = [i for i in range(len(contexts)) for _ in range(samples)]
    found = sample(model, [contexts[i] for i in names], max_tokens=longest, seed=seed, prompt=names, settle=False)
    return found.sequences


def on_answers(teacher: HuggingFaceModel, student: HuggingFaceModel, asked: Questions, seed: int) -> dict[str, float]:
    """What a student writes: likeness to references, variety, the teacher's opinion, and KL between response laws.

    The last are per response, each direction by ``rb_cv`` on strings of its first law, with standard errors. All
    students answer with the same random numbers.
    """
    x = answer(student, asked.contexts, asked.samples, asked.longest, seed)
    mine = score(student, teacher, x, batch_size=SCORED)
    theirs = score(teacher, student, asked.answers, batch_size=SCORED)
    reverse, forward = summarise("rb_cv", mine), summarise("rb_cv", theirs)
    found = {
        "teacher_nll": -float(mine.rows.logq.double().mean()),
        "own_reverse_kl": float(mine.rows.kl.double().mean()),
        "own_forward_kl": float(mine.rows.reverse_kl.double().mean()),
        "length": float(x.lengths.double().mean()),
        "finished": float(x.finished.double().mean()),
        "sequence_forward_kl": forward.value,
        "sequence_forward_kl_error": forward.stderr,
        "sequence_reverse_kl": reverse.value,
        "sequence_reverse_kl_error": reverse.stderr,
    }
    return found | written(student, x, asked.references, asked.samples)


def written(
    model: HuggingFaceModel, x: Sequences, references: Sequence[Sequence[str]], samples: int
) -> dict[str, float]:
    """Rouge-L with the best of a prompt's references, distinct bigrams, and how alike its answers are; in percent."""
    tokenizer: Any = model.tokenizer
    texts = [tokenizer.decode(x.completion(i), skip_special_tokens=True).split() for i in range(len(x))]
    groups = [texts[i : i + samples] for i in range(0, len(texts), samples)]
    found = {"distinct_2": 100 * distinct_n(texts, 2)}
    if samples > 1:
        found["self_rouge_l"] = 100 * float(np.mean([self_rouge_l(group) for group in groups]))
    if references:
        pairs = zip(groups, references, strict=True)
        scores = [rouge_l(text, [r.split() for r in known]) for group, known in pairs for text in group]
        found["rouge_l"] = 100 * float(np.mean(scores))
    return found
