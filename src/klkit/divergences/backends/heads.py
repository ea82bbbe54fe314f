"""The head of a row, found without sorting the row: numba's part of :mod:`klkit.divergences.adaptive`.

At most 1024 tokens have a probability of 1/1024 or more, and these are found by a comparison each. Where a law is
peaked its head ends among them, and only they are sorted. Elsewhere the mass of narrow ranges of logits tells in which
of these the head ends, and only that one is sorted. So heads are exact, and equals come in the order of their ids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from klkit.divergences.backends.kernels import BLOCK, ZERO, _law, _token
from klkit.divergences.backends.lanes import FLAGS, absolute, exp, larger, wide

STEP = 64
"""Entries that are passed over at once where none is likely."""

FEW = 1024
"""Tokens that are sorted at first: those that have at least this part of the mass."""

RANGES = 512
"""Ranges of logits by whose masses the head's end is looked for."""

SLACK = 1e-6
"""Sums of rounded probabilities miss round numbers by a little."""

NARROW = 1e-3
"""Where the likeliest token is the head, how far below its logit others are looked for: only equals matter."""

ALIKE = 1.0 / 8
"""``Σ |p − q|`` from which the difference of two sums gives it; below, the differences are summed."""


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
def _collect(a: Any, least: Any, start: Any, tokens: Any, count: Any) -> Any:
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
def _end(a: Any, tokens: Any, law: Any, depth: Any, limit: Any, cover: Any) -> Any:
    """The head's smallest logit and the last token that has it and is in the head; −2 if more than ``tokens`` are.

    ``tokens`` are all down to ``depth`` below the largest logit, in the order of their ids.
    """
    masses, places = np.zeros(RANGES), np.empty(tokens.shape[0], np.int64)
    scale = np.float32(RANGES / depth)
    for i in range(tokens.shape[0]):
        x = wide(a[tokens[i]]) - law[0]
        places[i] = min(np.int64(-x * scale), RANGES - 1)
        masses[places[i]] += exp(x) * law[3]
    before, place = 0.0, 0
    while before + masses[place] < limit:
        before += masses[place]
        place += 1
        if place == RANGES:
            return ZERO, -2
    few = tokens[places == place]
    values = np.empty(few.shape[0], np.float32)
    for i in range(few.shape[0]):
        values[i] = -wide(a[few[i]])
    order = np.argsort(values, kind="mergesort")  # which keeps the order of equals
    last = -1
    for i in order:
        reached = before + np.float64(exp(-values[i] - law[0]) * law[3])
        if before > 0.0 and (before if cover else reached) >= limit:
            break
        before, last = reached, i
    return (-values[last], few[last]) if last >= 0 else (-values[order[0]], -1)


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


@njit(parallel=True, nogil=True, cache=True)
def head_gaps(a_all: Any, b_all: Any, norms: Any, one: Any, mass: Any, cover: Any, out: Any) -> None:
    """``Σ |p − q|`` over the head of each row, and over all of it; ``one`` is 1."""
    for r in prange(a_all.shape[0]):
        a, b, o = a_all[r], b_all[r], out[r]
        law = _law(norms[r])
        limit = mass - SLACK if cover else mass + SLACK
        depth = max(np.log(FEW) - norms[r, 2], NARROW) if law[3] < limit else NARROW
        tokens, count, union = np.empty(FEW, np.int64), 0, 0.0
        for start in range(0, a.shape[0], BLOCK):
            stop = min(start + BLOCK, a.shape[0])
            union += _union(a[start:stop], b[start:stop], law)
            count = _collect(a[start:stop], np.float32(norms[r, 0] - depth), start, tokens, count)
        value, last = ZERO, -2
        if 0 < count <= FEW:
            value, last = _end(a, tokens[:count], law, depth, limit, cover)
        o[0], o[1] = 0.0, 2.0 * (union - 1.0)
        if last > -2 and o[1] >= ALIKE:
            for i in tokens[:count]:
                x = wide(a[i])
                if x > value or (x == value and i <= last):
                    o[0] += absolute(_token(a[i], b[i], law, one)[4])
            continue
        if last == -2:
            depth = np.log(2.0 * a.shape[0] / (1.0 - mass)) - norms[r, 2]
            every = np.empty(a.shape[0] + 1, np.int64)
            count, least = 0, np.float32(norms[r, 0] - depth)
            for i in range(a.shape[0]):
                every[count] = i
                count += wide(a[i]) >= least
            value, last = _end(a, every[:count], law, depth, limit, cover)
            if last == -2:
                value, last = np.float32(-np.inf), a.shape[0]
        o[1] = 0.0
        for start in range(0, a.shape[0], BLOCK):
            stop = min(start + BLOCK, a.shape[0])
            head, whole = _parts(a[start:stop], b[start:stop], law, one, value, last - start)
            o[0] += head
            o[1] += whole
