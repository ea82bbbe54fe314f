"""The phrases of the film-review grammar, their weights, and the valence of their words."""

from __future__ import annotations

import math
from itertools import pairwise

START = "opening"

VALENCE = {
    word: value
    for value, words in {
        2: "superb brilliant wonderful unforgettable magnificent",
        1: "great moving charming clever solid fresh delightful elegant guessing won shines happily worth best glad",
        -1: "dull weak clumsy predictable forgettable thin noisy hollow dragged disappoints nearly waste worst sorry",
        -2: "dreadful tedious awful unbearable sleep",
    }.items()
    for word in words.split()
}
"""Words that carry sentiment, and how much."""

NEGATIONS = frozenset({"never", "not"})
"""Words that reverse the valence of the next word."""

ASPECTS = {
    "acting": 9.0, "plot": 9.0, "story": 8.0, "script": 6.0, "dialogue": 6.0, "soundtrack": 5.0, "ending": 6.0,
    "pacing": 4.0, "direction": 4.0, "camera work": 3.0, "lead actor": 3.0, "supporting cast": 4.0, "music": 4.0,
    "first half": 2.0, "second half": 2.0, "humour": 3.0, "villain": 2.0, "romance": 2.0, "editing": 2.0,
    "final scene": 2.0, "costume design": 1.0, "lighting": 1.0, "opening sequence": 1.5, "whole idea": 1.5,
}  # fmt: skip

ADJECTIVES = {
    "superb": 3.0, "brilliant": 3.0, "wonderful": 3.0, "unforgettable": 1.0, "magnificent": 1.0, "great": 5.0,
    "moving": 3.0, "charming": 3.0, "clever": 3.0, "solid": 3.0, "fresh": 2.0, "delightful": 2.0, "elegant": 1.0,
    "fine": 4.0, "ordinary": 3.0, "familiar": 2.0, "simple": 2.0, "strange": 2.0, "quiet": 1.5, "old-fashioned": 1.0,
    "dull": 4.0, "weak": 4.0, "clumsy": 3.0, "predictable": 4.0, "forgettable": 2.0, "thin": 2.0, "noisy": 1.5,
    "hollow": 1.5, "dreadful": 2.0, "tedious": 2.0, "awful": 2.0, "unbearable": 1.0,
}  # fmt: skip

DEGREES = {"very": 4.0, "truly": 2.0, "rather": 3.0, "quite": 3.0, "surprisingly": 2.0, "simply": 2.0, "really": 2.0}

EVENTS = {
    "never dragged": 3.0, "dragged": 2.0, "never disappoints": 1.5, "disappoints": 2.0, "won me over": 2.0,
    "kept me guessing": 2.0, "shines": 2.0, "sent me to sleep": 1.5, "is what you expect": 2.0,
}  # fmt: skip

VERDICTS = {
    "i would happily watch it again .": 4.0, "worth every minute of your time .": 3.0,
    "one of the best films of the year .": 3.0, "i am glad i went .": 2.0, "i nearly left early .": 3.0,
    "what a waste of two hours .": 3.0, "one of the worst films of the year .": 2.0,
    "i am sorry i went .": 2.0, "fans will know what to expect .": 3.0, "my friends did not agree .": 2.0,
}  # fmt: skip

MOODS = {"good": 0.7, "even": 0.0, "bad": -0.7}
"""How strongly each mood prefers words of its own valence: weights are multiplied by exp(mood · valence)."""

OPPOSITE = {"good": "bad", "even": "even", "bad": "good"}

Option = tuple[str, float, str | None]


def valence(phrase: str) -> int:
    """Sum of the words' valences, reversed after a negation."""
    words = ["", *phrase.split()]
    return sum(-VALENCE.get(w, 0) if before in NEGATIONS else VALENCE.get(w, 0) for before, w in pairwise(words))


def rules() -> dict[str, list[Option]]:
    """Every state with its (phrase, weight, next state), each state before those that follow it.

    A review has up to four clauses about an aspect of the film. The first clause sets the mood of
    those joined to it by "and"; "but" turns it round. It ends with a clause or with a verdict.
    """
    states: dict[str, list[Option]] = {
        START: [
            ("the", 60.0, "aspect 1 even"),
            ("overall the", 8.0, "aspect 1 even"),
            ("i thought the", 8.0, "aspect 1 even"),
            ("for me the", 5.0, "aspect 1 even"),
            ("to be honest , the", 5.0, "aspect 1 bad"),
            ("in the end the", 4.0, "aspect 1 even"),
            ("what a film ! the", 5.0, "aspect 1 good"),
        ]
    }
    for clause in (1, 2, 3, 4):
        for mood in MOODS:
            states |= _clause(clause, mood)
        for mood in MOODS:
            states |= _after_clause(clause, mood)
    return states


def _clause(clause: int, mood: str) -> dict[str, list[Option]]:
    """The states of one clause in one mood: an aspect, then an event or a verb and an adjective."""

    def judged(phrases: dict[str, float]) -> list[Option]:
        return [
            (text, weight * math.exp(MOODS[mood] * valence(text)), f"join {clause} {_mood(valence(text))}")
            for text, weight in phrases.items()
        ]

    aspect, verb, degree, adjective = (f"{kind} {clause} {mood}" for kind in ("aspect", "verb", "degree", "adjective"))
    return {
        aspect: [(text, weight, verb) for text, weight in ASPECTS.items()],
        verb: [("was", 60.0, degree), ("felt", 12.0, degree), ("seemed", 6.0, degree), *judged(EVENTS)],
        degree: [(text, 1.5 * weight, adjective) for text, weight in DEGREES.items()]
        + judged(ADJECTIVES | {"never dull": 2.0, "not great": 2.0}),
        adjective: judged(ADJECTIVES),
    }


def _after_clause(clause: int, mood: str) -> dict[str, list[Option]]:
    """What follows a clause of one mood: another clause, or the end of the sentence."""
    join, after, other = f"join {clause} {mood}", f"after {clause} {mood}", OPPOSITE[mood]
    verdicts: list[Option] = [
        (text, weight * math.exp(2 * MOODS[mood] * valence(text)), None) for text, weight in VERDICTS.items()
    ]
    total = math.fsum(weight for _, weight, _ in verdicts)
    if clause == 1:
        going_on: list[Option] = [
            ("and the", 50.0, f"aspect 2 {mood}"),
            ("but the", 20.0, f"aspect 2 {other}"),
            ("while the", 8.0, "aspect 2 even"),
            (".", 22.0, after),
        ]
        return {join: going_on, after: verdicts}
    if clause == 2:
        going_on = [(", and the", 15.0, f"aspect 3 {mood}"), (".", 85.0, after)]
    else:
        going_on = [(".", 1.0, after if clause == 3 else None)]
    if clause == 4:
        return {join: going_on}
    ending: list[Option] = [("", total, None), ("the", 0.4 * total, f"aspect 4 {mood}")]
    return {join: going_on, after: [*verdicts, *ending, ("still , the", 0.2 * total, f"aspect 4 {other}")]}


def _mood(value: int) -> str:
    return "good" if value > 0 else "bad" if value < 0 else "even"
