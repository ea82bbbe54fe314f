"""Heads of rows, found without sorting them: what :mod:`klkit.divergences.adaptive` needs, compiled by numba.

All is done right after a row's sums, while the row is in a core's cache. At most 1024 tokens have a probability of
1/1024 or more, and a comparison each finds them. Where a law is peaked its head ends among them. Elsewhere all tokens
are looked at that could be in a head. Either way the mass in narrow ranges of logits tells in which of these the head
ends, and only that one is sorted: so heads are exact, and equals come in the order of their ids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from klkit.divergences.backends.kernels import ABSENT, BLOCK, ZERO, _law, _token, sums_of_row
from klkit.divergences.backends.lanes import FLAGS, absolute, exp, larger, wide
from klkit.divergences.sums import FARTHEST, NEAREST

STEP = 64
"""Entries that are passed over at once where none is likely."""

FEW, MORE = 128, 1024
"""A head's end is looked for among the tokens that have at least such a part of the mass: at most so many."""

UNKNOWN = -2
"""Stands for the place of a head's last token, which may be −1 for none of several equals."""

RANGES = 512
"""Ranges of logits by whose masses the head's end is looked for."""

SLACK = 1e-6
"""Sums of rounded probabilities miss round numbers by a little."""

NARROW = 1e-3
"""Where the likeliest token is the head, how far below its logit others are looked for: only equals matter."""

ALIKE = 1.0 / 16
"""``Σ |p − q|`` above which the difference of two sums gives it; below, the differences are summed."""


@njit(fastmath=FLAGS, error_model="numpy")
def _union(a: Any, b: Any, law: Any) -> Any:
    """``Σ max(p, q)``: one exponential a token, and the total variation beyond what ``p`` sums up to."""
    reference, paired, _, scale_p, scale_q, shift, _ = law
    total = ZERO
    for i in range(a.shape[0]):
        x, y = wide(a[i]) - reference, wide(b[i]) - paired
        above = y - x > shift  # false where both laws exclude the token
        total += exp(y if above else x) * (scale_q if above else scale_p)
    return total


@njit
def _largest(a: Any) -> Any:
    top = wide(a[0])
    for i in range(a.shape[0]):
        top = larger(top, wide(a[i]))
    return top


@njit
def _rare(a: Any, start: Any, least: Any, tokens: Any, count: Any) -> Any:
    """Add the places at which ``a``, which begins at ``start``, reaches ``least``; counted also if there is no room."""
    for begin in range(0, a.shape[0], STEP):
        few = a[begin : begin + STEP]
        if _largest(few) >= least:
            for i in range(few.shape[0]):
                if wide(few[i]) >= least:
                    if count < tokens.shape[0]:
                        tokens[count] = start + begin + i
                    count += 1
    return count


@njit
def _many(a: Any, least: Any) -> Any:
    """All places at which ``a`` reaches ``least``, where they are no rarity."""
    tokens, count = np.empty(a.shape[0] + 1, np.int32), 0
    for i in range(a.shape[0]):
        tokens[count] = i  # and the next one over it, if this is none
        count += wide(a[i]) >= least
    return tokens[:count]


@njit(fastmath=FLAGS, error_model="numpy")
def _weigh(a: Any, tokens: Any, law: Any, scale: Any, depths: Any, shares: Any) -> None:
    """How far each of the tokens is below the largest logit, in ranges, and its probability."""
    for i in range(tokens.shape[0]):
        x = wide(a[tokens[i]]) - law[0]
        depths[i], shares[i] = -x * scale, exp(x) * law[3]


@njit
def _end(a: Any, tokens: Any, law: Any, depth: Any, limit: Any, cover: Any) -> Any:
    """The head's smallest logit and the last token that has it and is in the head; ``UNKNOWN`` if others are in it.

    ``tokens`` are all down to ``depth`` below the largest logit, in the order of their ids.
    """
    depths, shares = np.empty(tokens.shape[0], np.float32), np.empty(tokens.shape[0], np.float32)
    _weigh(a, tokens, law, np.float32(RANGES / depth), depths, shares)
    masses = np.zeros(RANGES)
    for i in range(tokens.shape[0]):
        masses[min(np.uint32(depths[i]), np.uint32(RANGES - 1))] += shares[i]
    before, place = 0.0, 0
    while before + masses[place] < limit:
        before += masses[place]
        place += 1
        if place == RANGES:
            return np.float32(-np.inf), UNKNOWN
    few, values, count = np.empty(tokens.shape[0], np.int32), np.empty(tokens.shape[0], np.float32), 0
    for i in range(tokens.shape[0]):
        if min(np.uint32(depths[i]), np.uint32(RANGES - 1)) == place:
            few[count], values[count] = i, -wide(a[tokens[i]])
            count += 1
    order = few[np.argsort(values[:count], kind="mergesort")]  # which keeps the order of equals
    last = -1
    for i in order:
        reached = before + shares[i]
        if before > 0.0 and (before if cover else reached) >= limit:
            break
        before, last = reached, tokens[i]
    return (wide(a[last]), last) if last >= 0 else (wide(a[tokens[order[0]]]), -1)


@njit(fastmath=FLAGS, error_model="numpy")
def _parts(a: Any, b: Any, law: Any, one: Any, least: Any, last: Any) -> Any:
    """``Σ |p − q|`` over the logits above ``least``, and those equal to it up to place ``last``; and over all."""
    head, whole = ZERO, ZERO
    for i in range(a.shape[0]):
        gap = absolute(_token(a[i], b[i], law, one)[4])
        x = wide(a[i])
        head += gap if x > least or (x == least and i <= last) else ZERO
        whole += gap
    return head, whole


@njit
def _norms(sums: Any) -> Any:
    """A row's :class:`klkit.divergences.sums.Norms`, by the formulas of that module."""
    norm, ahead = np.log(sums[5]), sums[4] - sums[3]
    y = (sums[11] + sums[7]) / sums[5]
    joint = y > -0.5 and sums[15] > ABSENT and ahead < FARTHEST
    shift = np.log1p(y) if joint else ahead + np.log(sums[6]) - norm
    return (sums[2], sums[4], norm, shift - ahead) if ahead > NEAREST else (sums[2], sums[3], norm, shift)


@njit
def _gaps(a: Any, b: Any, one: Any, norms: Any, mass: Any, cover: Any) -> Any:
    """``Σ |p − q|`` over the head of a row, and over all of it."""
    law, size = _law(norms), a.shape[0]
    limit = np.inf if mass == 1.0 else mass - SLACK if cover else mass + SLACK
    # The head's end is looked for among the tokens that have at least such a part of the mass.
    depth = max(np.log(FEW) - norms[2], NARROW) if law[3] < limit else NARROW
    tokens, count, union = np.empty(FEW, np.int32), 0, 0.0
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        union += _union(a[start:stop], b[start:stop], law)
        count = _rare(a[start:stop], start, np.float32(norms[0] - depth), tokens, count)
    value, last, whole = np.float32(-np.inf), UNKNOWN, 2.0 * (union - 1.0)
    if 0 < count <= FEW:
        tokens = tokens[:count]
        value, last = _end(a, tokens, law, depth, limit, cover)
    if last == UNKNOWN and mass < 1.0:
        depth, tokens = max(np.log(MORE) - norms[2], NARROW), np.empty(MORE, np.int32)
        count = _rare(a, 0, np.float32(norms[0] - depth), tokens, 0)
        if 0 < count <= MORE:
            tokens = tokens[:count]
            value, last = _end(a, tokens, law, depth, limit, cover)
    if last != UNKNOWN and whole > ALIKE:
        head = 0.0
        for i in tokens:
            x = wide(a[i])
            if x > value or (x == value and i <= last):
                head += absolute(_token(a[i], b[i], law, one)[4])
        return head, whole
    if last == UNKNOWN and mass < 1.0:
        # What is less likely than these adds up to less than half of what the head leaves out.
        depth = np.log(2.0 * size / (1.0 - mass)) - norms[2]
        tokens = _many(a, np.float32(norms[0] - depth))
        value, last = _end(a, tokens, law, depth, limit, cover)
    if last == UNKNOWN:
        last = size  # everything
    head, whole = 0.0, 0.0
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        part, rest = _parts(a[start:stop], b[start:stop], law, one, value, last - start)
        head += part
        whole += rest
    return head, whole


@njit(parallel=True, nogil=True, cache=True)
def sums_and_gaps(a_all: Any, b_all: Any, one: Any, mass: Any, cover: Any, out: Any, gaps: Any) -> None:
    """Fill the table of :class:`klkit.divergences.sums.RowSums`, and ``Σ |p − q|`` over heads and rows.

    ``one`` is 1.
    """
    for r in prange(a_all.shape[0]):
        a, b, o = a_all[r], b_all[r], out[r]
        sums_of_row(a, b, one, o)
        gaps[r, 0], gaps[r, 1] = 0.0, 0.0
        # Rows that are no laws are refused by their sums.
        if np.isfinite(o[9]) and np.isfinite(o[10]) and o[2] > ABSENT and o[4] > ABSENT:
            gaps[r, 0], gaps[r, 1] = _gaps(a, b, one, _norms(o), mass, cover)
