"""All the ways in which a model can have spelt the bytes so far: the sum over tokenisations, one byte at a time.

A hypothesis is a sequence of complete tokens and, behind it, a token that has begun: the bytes that the complete
ones leave over are the beginning of that token. What a hypothesis weighs is the probability of its complete tokens
times that of all tokens with this beginning, so every token string that the bytes allow is counted in exactly one
hypothesis, and their sum is the probability of the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from klkit.models.byte_trie import Array, Node, Trie, log_sums, log_total

END = 256
"""The symbol that ends a response; the symbols below it are bytes."""
SYMBOLS = 257


@dataclass(frozen=True, slots=True, eq=False)
class Law:
    """What follows some complete tokens, conditional on no token without bytes.

    Attributes:
        tokens: log-probability of each token in the order of the trie, nats, ``(n,)``.
        ahead: log-probability that the next token begins with each byte of ``trie.root.following``, ``(c,)``.
        end: log-probability of ending.
        excluded: probability of the tokens that stand for no text, before they were left out.
    """

    tokens: Array
    ahead: Array
    end: float
    excluded: float


@dataclass(frozen=True, slots=True, eq=False)
class Hypothesis:
    """Complete tokens, and the beginning of the next one.

    Attributes:
        tokens: ids of the complete ones.
        weight: their log-probability, nats.
        mass: log-probability of all token strings that the hypothesis stands for, nats.
        node: the tokens that the next one may still be.
        law: log-probability of each of these, given the complete ones, ``(node.count,)``.
        ahead: log-probability that the next token goes on with each of ``node.following``, ``(c,)``.
        end: log-probability of ending here; ``-inf`` inside a token.
        excluded: see :class:`Law`; 0 inside a token.
    """

    tokens: tuple[int, ...]
    weight: float
    mass: float
    node: Node
    law: Array
    ahead: Array
    end: float = -np.inf
    excluded: float = 0.0


@dataclass(frozen=True, slots=True)
class Fresh:
    """Complete tokens that end where the bytes end; what may follow them must still be asked of the model."""

    tokens: tuple[int, ...]
    mass: float


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """The hypotheses about one text.

    Attributes:
        hypotheses: none if the model gives the text probability zero.
        discarded: share of the mass that was dropped at the last byte.
    """

    hypotheses: tuple[Hypothesis, ...]
    discarded: float = 0.0

    def row(self) -> Array:
        """Log-probability of each byte and of ending, ``(257,)``, nats; normalised.

        After a text of probability zero there is no conditional law; the uniform one stands in for it, and no
        divergence depends on that: it is infinite already.
        """
        if not self.hypotheses:
            return np.full(SYMBOLS, -np.log(SYMBOLS))
        rows = np.full((len(self.hypotheses), SYMBOLS), -np.inf)
        for row, h in zip(rows, self.hypotheses, strict=True):
            row[h.node.following] = h.weight + h.ahead
            row[END] = h.weight + h.end
        total = log_total(rows.T)
        return np.asarray(total - log_total(total))

    def excluded(self) -> float:
        """Probability, at this decision, of tokens that stand for no text."""
        masses = np.array([h.mass for h in self.hypotheses])
        shares = np.exp(masses - log_total(masses))
        return float(shares @ np.array([h.excluded for h in self.hypotheses]))


@dataclass(slots=True)
class Ledger:
    """What a byte-level model has cost and left out so far; it grows with every decision.

    Attributes:
        decisions: rows of 257 log-probabilities that were computed.
        laws: next-token laws that the token-level model was asked for.
        seconds: time spent on them.
        discarded: sum over decisions of the share of the mass that the beam dropped just before.
        discarded_most: the largest of these shares.
        excluded: sum over decisions of the probability of tokens that stand for no text.
        excluded_most: the largest of these probabilities.
    """

    decisions: int = 0
    laws: int = 0
    seconds: float = 0.0
    discarded: float = 0.0
    discarded_most: float = 0.0
    excluded: float = 0.0
    excluded_most: float = 0.0

    def add(self, readings: Sequence[Reading], seconds: float) -> None:
        """Count in the decisions of one step."""
        for reading in readings:
            excluded = reading.excluded()
            self.discarded += reading.discarded
            self.excluded += excluded
            self.discarded_most = max(self.discarded_most, reading.discarded)
            self.excluded_most = max(self.excluded_most, excluded)
        self.decisions += len(readings)
        self.seconds += seconds

    def __str__(self) -> str:
        n = max(self.decisions, 1)
        return (
            f"{self.laws / n:.2f} next-token laws and {1e3 * self.seconds / n:.3g} ms a byte; the beam dropped "
            f"{self.discarded / n:.2g} of the mass at a byte on average, {self.discarded_most:.2g} at most; tokens "
            f"without text had {self.excluded / n:.2g} on average, {self.excluded_most:.2g} at most"
        )


def at_boundary(trie: Trie, fresh: Fresh, law: Law) -> Hypothesis:
    """The hypothesis whose complete tokens are followed by ``law``."""
    return Hypothesis(fresh.tokens, fresh.mass, fresh.mass, trie.root, law.tokens, law.ahead, law.end, law.excluded)


def after(trie: Trie, reading: Reading, byte: int) -> tuple[list[Hypothesis], list[Fresh]]:
    """What is left of the hypotheses after one more byte: inside a token, and at the end of one."""
    inside: list[Hypothesis] = []
    fresh: list[Fresh] = []
    for h in reading.hypotheses:
        node = trie.below(h.node, byte)
        if node is None:
            continue
        start = node.first - h.node.first
        law = h.law[start : start + node.count]
        for place in range(node.whole):
            if law[place] > -np.inf:
                token = int(trie.ids[node.first + place])
                fresh.append(Fresh((*h.tokens, token), h.weight + float(law[place])))
        if node.whole < node.count:
            # A copy: a view would keep the law of the whole vocabulary alive.
            law = law.copy()
            ahead = log_sums(law[node.whole :], node.starts)
            mass = h.weight + float(log_total(ahead))
            if mass > -np.inf:
                inside.append(Hypothesis(h.tokens, h.weight, mass, node, law, ahead))
    return inside, fresh


def heaviest(
    masses: NDArray[np.float64], boundary: Sequence[bool], *, beam: int | None, least: float
) -> tuple[list[int], float]:
    """Which hypotheses to keep, and the share of the mass in the others.

    The ``beam`` heaviest, less those below the share ``least`` of the whole; and the heaviest of those at the end of
    a token in any case, because from there every byte that is a token of its own remains possible: without it a
    byte could seem impossible only for what was dropped.

    Example:
        >>> kept, dropped = heaviest(np.log([0.5, 0.3, 0.2]), [False, False, True], beam=1, least=0.0)
        >>> kept, round(dropped, 9)
        ([0, 2], 0.3)
    """
    if not len(masses):
        return [], 0.0
    shares = np.exp(masses - log_total(masses))
    order = np.argsort(-masses, kind="stable").tolist()
    kept = [i for i in order[:beam] if shares[i] >= least]
    first = next((i for i in order if boundary[i]), None)
    if first is not None and first not in kept:
        kept.append(first)
    stay = set(kept)
    return kept, float(sum(shares[i] for i in order if i not in stay))
