"""A small language of instructions and answers whose law is known exactly, for experiments with distillation.

Six tasks span the range of entropies: some answers are certain, some have a handful of forms, a story has thousands.
The answer to every prompt is drawn from a :class:`klkit.zoo.grammar.Grammar`, so references are plentiful, and
entropies and log-probabilities have no error.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from klkit.rng import numpy_stream
from klkit.zoo import grammar
from klkit.zoo.grammar import Choice, Grammar
from klkit.zoo.instruction_words import (
    CATEGORIES,
    COLOURED,
    COLOURS,
    DESCRIBED,
    FEELS,
    LARGEST,
    LOOKS,
    OPPOSITES,
    STORY,
)
from klkit.zoo.tokenizer import END, finished

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WORLD = 0
"""Seed of the facts that the language speaks of: colours of things, and what is said of them."""
COLOUR_SHARES = (0.8, 0.15, 0.05)


Options = dict[str, list[tuple[str, float, str | None]]]
"""Phrases, weights and next states of every state."""


class Instruction(NamedTuple):
    """A prompt and an answer to it."""

    task: str
    prompt: str
    response: str


TASKS = ("opposite", "colour", "addition", "list", "describe", "story")


@cache
def prompts(task: str) -> tuple[str, ...]:
    """Every prompt of a task; all are equally likely.

    Raises:
        ValueError: there is no such task.

    Example:
        >>> [len(prompts(task)) for task in TASKS]
        [80, 40, 2500, 13, 40, 100]
    """
    if task == "opposite":
        found = [f"opposite of {word} :" for pair in OPPOSITES for word in pair]
    elif task == "colour":
        found = [f"colour of {thing} :" for kind in COLOURED for thing in CATEGORIES[kind]]
    elif task == "addition":
        found = [f"add {a} and {b} :" for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    elif task == "list":
        found = [f"list three {kind} :" for kind in CATEGORIES]
    elif task == "describe":
        found = [f"describe {thing} :" for kind in DESCRIBED for thing in CATEGORIES[kind]]
    elif task == "story":
        found = [f"story about a {who} in {city} :" for who in CATEGORIES["animals"] for city in CATEGORIES["cities"]]
    else:
        raise ValueError(f"expected a task among {', '.join(TASKS)}, got {task!r}")
    return tuple(found)


@cache
def law(prompt: str) -> Grammar:
    """The law of the answers to ``prompt``.

    Raises:
        ValueError: the language has no such prompt.

    Example:
        >>> [choice.text for choice in law("opposite of hot :").states["answer"]]
        ['cold .']
    """
    words = tuple(prompt.split())
    task = next((task for task in TASKS if prompt in _known(task)), None)
    if task is None:
        raise ValueError(f"expected a prompt of the instruction language, got {prompt!r}; prompts(task) lists them")
    states: Options
    if task == "opposite":
        other = {a: b for pair in OPPOSITES for a, b in (pair, pair[::-1])}
        states = {"answer": [(f"{other[words[2]]} .", 1.0, None)]}
    elif task == "colour":
        colours = _ordered("colours", words[2], COLOURS)[: len(COLOUR_SHARES)]
        states = {"answer": [(f"{c} .", share, None) for c, share in zip(colours, COLOUR_SHARES, strict=True)]}
    elif task == "addition":
        states = {"answer": [(f"{int(words[1]) + int(words[3])} .", 1.0, None)]}
    elif task == "list":
        states = _three(CATEGORIES[words[2]])
    elif task == "describe":
        states = _description(words[1])
    else:
        states = _story(words[3], words[5])
    return Grammar(
        {
            state: tuple(
                Choice(text, weight / math.fsum(w for _, w, _ in options), after) for text, weight, after in options
            )
            for state, options in states.items()
        },
        name=prompt,
    )


def draw(count: int, *, seed: int) -> list[Instruction]:
    """Independent instructions: a task, one of its prompts, an answer.

    Example:
        >>> draw(2, seed=0) == draw(3, seed=0)[:2]
        True
    """
    random = numpy_stream(seed, "instructions")
    chosen = [(TASKS[int(random.integers(len(TASKS)))], float(random.random())) for _ in range(count)]
    asked = [(task, prompts(task)[int(u * len(prompts(task)))]) for task, u in chosen]
    answers = {p: iter(references(p, n, seed=seed)) for p, n in Counter(p for _, p in asked).items()}
    return [Instruction(task, prompt, next(answers[prompt])) for task, prompt in asked]


def references(prompt: str, count: int, *, seed: int) -> list[str]:
    """Independent answers to one prompt.

    Example:
        >>> references("add 2 and 3 :", 2, seed=0)
        ['5 .', '5 .']
    """
    return grammar.sample(law(prompt), count, seed=seed)


def entropy(tasks: Sequence[str] = TASKS) -> float:
    """``H(answer | prompt)`` in nats per answer: exact, over all prompts of all tasks.

    Example:
        >>> entropy(["opposite", "addition"])
        0.0
        >>> round(entropy(["colour"]), 6) == round(-sum(p * math.log(p) for p in COLOUR_SHARES), 6)
        True
    """
    return _mean(tasks, grammar.entropy)


def mean_length(tasks: Sequence[str] = TASKS) -> float:
    """Mean tokens of an answer, its end included: exact.

    Example:
        >>> mean_length(["opposite"])
        3.0
    """
    return _mean(tasks, lambda p: p.expectation(lambda _, c: float(len(grammar.spelling(c)))))


@cache
def vocabulary() -> tuple[str, ...]:
    """All words of the language, sorted.

    Example:
        >>> len(vocabulary())
        466
    """
    asked = {word for task in TASKS for prompt in prompts(task) for word in prompt.split()}
    answered = {
        word
        for task in TASKS
        for prompt in prompts(task)
        for choices in law(prompt).states.values()
        for choice in choices
        for word in choice.text.split()
    }
    return tuple(sorted(asked | answered))


def tokenizer(*, window: int = 64) -> PreTrainedTokenizerFast:
    """A token for each word, and the end token, which also starts a context, as id 0.

    Text with words that the language does not have raises an exception.

    Example:
        >>> tokenizer().decode(tokenizer()("opposite of hot :").input_ids)
        '<|end|> opposite of hot :'
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate((END, *vocabulary()))}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return finished(words, window)


@cache
def _known(task: str) -> frozenset[str]:
    return frozenset(prompts(task))


def _mean(tasks: Sequence[str], value: Callable[[Grammar], float]) -> float:
    return math.fsum(
        math.fsum(value(law(prompt)) for prompt in prompts(task)) / len(prompts(task)) for task in tasks
    ) / len(tasks)


def _ordered(name: str, thing: str, words: Sequence[str]) -> list[str]:
    """The words in an order of the thing's own."""
    return [words[i] for i in numpy_stream(WORLD, name, thing).permutation(len(words))]


def _three(members: Sequence[str]) -> Options:
    """Three different members, each of weight 1/rank."""
    weight = {word: 1 / (i + 1) for i, word in enumerate(members)}
    states: Options = {"answer": [(f"{a} ,", weight[a], a) for a in members]}
    for a in members:
        states[a] = [(f"{b} and", weight[b], f"{a} {b}") for b in members if b != a]
    for a in members:
        for b in members:
            if b != a:
                states[f"{a} {b}"] = [(f"{c} .", weight[c], None) for c in members if c not in (a, b)]
    return states


def _description(thing: str) -> Options:
    """How it looks and how it feels, the likelier words of an order of its own."""
    looks = [(word, 1 / (i + 1)) for i, word in enumerate(_ordered("looks", thing, LOOKS))]
    feels = [(word, 1 / (i + 1)) for i, word in enumerate(_ordered("feels", thing, FEELS))]
    return {
        "answer": [("it is", 5.0, "look"), (f"the {thing} is", 3.0, "look"), (f"a {thing} looks", 2.0, "only look")],
        "look": [(f"{word} and", weight, "feel") for word, weight in looks],
        "feel": [(f"{word} .", weight, None) for word, weight in feels],
        "only look": [(f"{word} .", weight, None) for word, weight in looks],
    }


def _story(who: str, city: str) -> Options:
    """Two sentences, or three; the animal has its habits, and the city its company."""
    ranked = {
        kind: [(text, 1 / (i + 1)) for i, text in enumerate(_ordered(kind, who, texts))]
        for kind, texts in STORY.items()
    }
    company = _ordered("company", city, [name for name in CATEGORIES["animals"] if name != who])
    return {
        "answer": [(f"{text} a {who}", weight, "deed") for text, weight in ranked["opening"]],
        "deed": [
            (f"{text}{place} .", share * weight, "turn")
            for place, share in (("", 1.0), (f" in {city}", 0.5))
            for text, weight in ranked["deed"]
        ],
        "turn": [(f"{text} a", weight, "company") for text, weight in ranked["turn"]],
        "company": [(text, 1 / (i + 1), "ending") for i, text in enumerate(company)],
        "ending": [(f"{text} .", weight, "more") for text, weight in ranked["ending"]],
        "more": [("", 3.0, None), ("in the end it", 1.0, "last deed")],
        "last deed": [(f"{text} .", weight, None) for text, weight in ranked["deed"]],
    }
