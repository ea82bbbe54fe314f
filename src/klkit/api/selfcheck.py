"""Is the loss on *your* models, tokenizer and data what it is said to be? Each claim tried, with what was found.

Most errors that spoil a distillation are none of the divergence: a label is off by one, padding has a loss, the end
token has none, a sum over micro-batches weighs short strings more. None of them raises; every one changes the number.
So the very functions that train are run on some of the user's own examples, and held against the same thing done
another way, without padding, batches, masks or chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from klkit.api.selfcheck_result import NOT_APPLICABLE, PASSED, Check, SelfCheck, outcome
from klkit.api.selfcheck_trials import Trial
from klkit.objectives.distill_losses import CROSS_ENTROPY, token_loss
from klkit.sequences import Sequences
from klkit.train.distill_recipe import DistillRecipe
from klkit.train.examples import Example, encode_examples, without_empty
from klkit.train.learner import Learner
from klkit.train.teachers import OnlineTeacher, TeacherRows, shared_tokens
from klkit.train.texts import teacher_text

if TYPE_CHECKING:
    from klkit.models.hf import HuggingFaceModel

STRINGS, LONGEST = 8, 48  # examples that the models read, and decisions of each
ANY = 1 << 40  # tokens that a model reads whose window is looked at later
FEWEST_FINISHED = 0.5  # share of responses that should have an end token for a student to learn when to stop


def selfcheck(
    teacher: HuggingFaceModel | None,
    student: HuggingFaceModel | Learner,
    examples: Sequence[Example],
    recipe: DistillRecipe | None = None,
    *,
    rows: TeacherRows | None = None,
    strings: int = STRINGS,
) -> SelfCheck:
    """Try what a distillation run relies on, with these models and this data. Weights stay as they are.

    Args:
        teacher: the model; None for the cross-entropy alone, or behind a cache.
        student: the model to be trained.
        examples: prompts and responses.
        recipe: loss, temperature, share of cross-entropy, longest response.
        rows: the teacher's laws from a cache instead of the model.
        strings: how many examples the models read.

    Raises:
        VocabularyMismatch: the two models do not choose from the same tokens.
        ValueError: there is no example, or one is longer than a model can read.

    Example:
        >>> from klkit import load
        >>> model = load("klkit:reviews")
        >>> found = selfcheck(model, model, [Example("a film", " that works"), Example(None, "a dull one")])
        >>> found.passed, found["equal models"].outcome
        (True, 'passed')
    """
    if not examples:
        raise ValueError("expected at least one example, got none; name a file with --data")
    recipe = recipe or DistillRecipe()
    model = student.model if isinstance(student, Learner) else student
    given, empty = without_empty(examples)
    # Whole-response objectives are sums of the same token losses, over other strings.
    plain = replace(recipe, objective="token", loss=recipe.divergence, on_policy=0.0, samples=None, text="data")
    size = None if teacher is None else shared_tokens(teacher, model)[0]
    size = size if rows is None else getattr(rows, "size", size)
    checks = list(_data_checks(model, teacher, given, len(examples), empty, plain))
    if not given and teacher is None:
        return SelfCheck(tuple(checks))
    if given:
        some = _spread(examples, strings)
        longest = plain.max_tokens if rows is not None else min(plain.max_tokens, LONGEST)
        texts = encode_examples(model, [examples[i] for i in some], longest, window=ANY)
        texts = replace(texts, prompt=torch.tensor(some))
        checks.append(_text_check(model, texts, examples))
        over = _excess(texts, [m for m in (model, teacher) if m is not None], [examples[i] for i in some])
        texts = texts.select([i for i, tokens in enumerate(over) if tokens <= 0])
        if not len(texts):
            return SelfCheck(tuple(checks))
    else:
        assert teacher is not None
        asked = [teacher.context(example.prompt) for example in examples[:strings]]
        texts = teacher_text(teacher, asked, plain, size=size)
        texts = texts.after([model.context(examples[i].prompt) for i in texts.prompt.tolist()])
    if rows is None and teacher is not None and token_loss(plain.divergence).key != CROSS_ENTROPY:
        rows = OnlineTeacher.of(teacher, examples, size)
    contexts = None if teacher is None else [teacher.context(examples[i].prompt) for i in texts.prompt.tolist()]
    weights = [w for _, w in student.parameters] if isinstance(student, Learner) else list(model.model.parameters())
    trial = Trial(model, teacher, contexts, rows, texts, plain, size, [w for w in weights if w.requires_grad])
    return SelfCheck((*checks, *trial.checks()))


def _spread(examples: Sequence[Example], count: int) -> list[int]:
    """Indices of examples with responses of all lengths, from short to long."""
    order = sorted((i for i, e in enumerate(examples) if not e.empty), key=lambda i: len(examples[i].response))
    return order[:: max(1, len(order) // count)][:count]


def _data_checks(
    model: HuggingFaceModel,
    teacher: HuggingFaceModel | None,
    given: Sequence[Example],
    count: int,
    empty: int,
    recipe: DistillRecipe,
) -> Iterator[Check]:
    """What the data itself has to offer."""
    yield Check(
        "empty responses",
        "every example has a response",
        empty,
        0,
        outcome(empty == 0),
        "" if not empty else f"{empty} of {count} teach nothing; leave them out with --skip-empty",
    )
    vocabulary = model.vocabulary
    unnamed = sum(token is None for token in vocabulary.tokens)
    sizes = {vocabulary.size} if teacher is None else {vocabulary.size, teacher.vocabulary.size}
    yield Check(
        "padding rows",
        "rows of the student's table that no tokenizer names",
        unnamed,
        None,
        PASSED,
        f"tables of {' and '.join(map(str, sorted(sizes)))} rows: compared over the first {min(sizes)}"
        if len(sizes) > 1
        else "",
    )
    if not given:
        for name in ("end tokens", "cut responses", "room", "prompt tokens"):
            yield Check(name, "read off the responses", None, None, NOT_APPLICABLE, "no example has a response")
        return
    x = encode_examples(model, given, recipe.max_tokens, window=ANY)
    last = x.tokens[torch.arange(len(x)), x.stop - 1].tolist()
    ends = sum(token in vocabulary.ends for token, whole in zip(last, x.finished.tolist(), strict=True) if whole)
    complete = int(x.finished.sum())
    padding = getattr(model.tokenizer, "pad_token_id", None)
    shared = "the padding token is an end token, which does no harm: padding is told by its place, not by its id"
    yield Check(
        "end tokens",
        "every response that is not cut ends with an end token, and that token is predicted",
        ends / max(complete, 1),
        1.0,
        outcome(ends == complete > 0),
        shared if padding in vocabulary.ends else "" if complete else "all are cut: a student never learns to stop",
    )
    cut = 1 - complete / len(x)
    yield Check(
        "cut responses",
        "most responses are shorter than max_tokens, so that their ends are seen",
        cut,
        1 - FEWEST_FINISHED,
        outcome(cut <= 1 - FEWEST_FINISHED),
        "" if not cut else f"{len(x) - complete} of {len(x)} are cut at {recipe.max_tokens} tokens: raise --max-tokens",
    )
    over = _excess(x, [m for m in (model, teacher) if m is not None], given)
    yield Check(
        "room",
        "tokens by which the longest example exceeds what both models can read",
        max(0, *over),
        0,
        outcome(max(over) <= 0),
        "" if max(over) <= 0 else f"{sum(o > 0 for o in over)} examples are too long: lower --max-tokens",
    )


def _excess(x: Sequences, readers: Sequence[HuggingFaceModel], examples: Sequence[Example]) -> list[int]:
    """Tokens by which each string exceeds the narrowest window of those who read it behind their own contexts."""
    return [
        max(len(m.context(example.prompt)) + length - (m.window or ANY) for m in readers)
        for example, length in zip(examples, x.lengths.tolist(), strict=True)
    ]


def _text_check(model: HuggingFaceModel, texts: Sequences, examples: Sequence[Example]) -> Check:
    """The tokens that have a loss, as text again."""
    wrong = tried = 0
    for i, finished in enumerate(texts.finished.tolist()):
        response, tokens = examples[int(texts.prompt[i])].response, texts.completion(i).tolist()
        if _text(model, model.tokenizer(response, add_special_tokens=False)["input_ids"]) != _plain(response):
            continue  # this tokenizer does not give the text back, so that nothing can be told from it
        tried += 1
        text = _text(model, tokens[:-1] if finished else tokens)
        # A cut may fall into a character.
        whole = text == _plain(response) if finished else _plain(response).startswith(text.rstrip("\ufffd"))
        wrong += not whole
    claim = "what has a loss reads as the responses, without any of their prompts"
    if not tried:
        return Check("prompt tokens", claim, None, None, NOT_APPLICABLE, "this tokenizer does not give texts back")
    return Check("prompt tokens", claim, wrong, 0, outcome(wrong == 0))


def _text(model: HuggingFaceModel, tokens: Sequence[int]) -> str:
    return _plain(str(model.tokenizer.decode(list(tokens))))


def _plain(text: str) -> str:
    return "".join(text.split())
