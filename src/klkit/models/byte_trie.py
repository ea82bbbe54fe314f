"""The tokens of a vocabulary in the order of their bytes: tokens that begin alike lie side by side.

A prefix is then a slice, and what a model gives to all tokens that begin with it is the sum over that slice. It is
summed directly: the difference of two cumulative sums would lose small masses beside large ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(slots=True, eq=False)
class Node:
    """The tokens that begin with some bytes.

    Attributes:
        first: place of the first of them in the sorted order.
        count: how many there are.
        depth: how many bytes they share.
        whole: how many of them, the first ones, consist of these bytes and nothing more.
        following: the bytes that come next in the others, ascending, ``(c,)``.
        starts: where the tokens with each next byte begin, counted from ``first + whole``, ``(c,)``.
    """

    first: int
    count: int
    depth: int
    whole: int
    following: NDArray[np.int64]
    starts: NDArray[np.int64]
    _below: dict[int, Node] = field(default_factory=dict)


class Trie:
    """Tokens sorted by their bytes; nodes are made when they are first asked for.

    Attributes:
        ids: the token at each place of the sorted order; tokens without bytes are not in it.
        root: the node of all tokens.

    Example:
        >>> trie = Trie([b"ab", b"a", None, b"b", b"abc"])
        >>> trie.ids.tolist(), trie.root.following.tolist()
        ([1, 0, 4, 3], [97, 98])
        >>> node = trie.below(trie.root, ord("a"))
        >>> node.count, node.whole
        (3, 1)
    """

    def __init__(self, tokens: Sequence[bytes | None]) -> None:
        pairs = sorted((token, i) for i, token in enumerate(tokens) if token)
        self.ids = np.array([i for _, i in pairs], dtype=np.int64)
        self._tokens = [token for token, _ in pairs]
        self.root = self._node(0, len(pairs), 0)

    def below(self, node: Node, byte: int) -> Node | None:
        """The node with one more byte, or None where no token continues so."""
        if byte in node._below:
            return node._below[byte]
        place = int(np.searchsorted(node.following, byte))
        if place == len(node.following) or int(node.following[place]) != byte:
            return None
        start = node.first + node.whole + int(node.starts[place])
        last = place + 1 == len(node.starts)
        stop = node.first + (node.count if last else node.whole + int(node.starts[place + 1]))
        node._below[byte] = found = self._node(start, stop, node.depth + 1)
        return found

    def _node(self, first: int, stop: int, depth: int) -> Node:
        tokens = self._tokens[first:stop]
        whole = next((n for n, token in enumerate(tokens) if len(token) > depth), len(tokens))
        column = np.array([token[depth] for token in tokens[whole:]], dtype=np.int64)
        starts = np.flatnonzero(np.diff(column, prepend=-1))
        return Node(first, stop - first, depth, whole, column[starts], starts)


def log_sums(values: Array, starts: NDArray[np.int64]) -> Array:
    """``log Σ exp`` of successive segments of the last axis, ``(…, n)`` to ``(…, c)``; nats.

    Args:
        starts: where each segment begins, ascending from 0; none is empty.

    Example:
        >>> log_sums(np.log(np.array([0.25, 0.25, 0.5])), np.array([0, 2])).round(4).tolist()
        [-0.6931, -0.6931]
    """
    if len(starts) in (0, values.shape[-1]):
        return values[..., : len(starts)]  # nothing to add up, as deep in a trie
    top = np.maximum.reduceat(values, starts, axis=-1)
    top[top == -np.inf] = 0.0
    sizes = np.diff(starts, append=values.shape[-1])
    mass = np.add.reduceat(np.exp(values - np.repeat(top, sizes, axis=-1)), starts, axis=-1)
    with np.errstate(divide="ignore"):
        return np.asarray(top + np.log(mass))


def log_total(values: Array) -> Array:
    """``log Σ exp`` over the last axis; ``-inf`` for no values at all.

    Example:
        >>> float(log_total(np.array([-np.inf, 0.0])))
        0.0
    """
    if not values.shape[-1]:
        return np.full(values.shape[:-1], -np.inf)
    return log_sums(values, np.zeros(1, dtype=np.int64))[..., 0]
