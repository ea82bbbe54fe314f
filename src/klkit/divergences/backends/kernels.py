"""Kernels that numba compiles for the CPU at hand: rows run on all threads, each stays in a core's cache.

A row is scanned once for its largest logits, which brings it into the cache, and summed from there.
Half formats are widened as they are loaded. No kernel allocates more than two blocks a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from klkit.divergences.backends.lanes import FLAGS, absolute, exp, fma, log1p, narrow, wide
from klkit.divergences.sums import FARTHEST
from klkit.numerics import FLOOR, LN2, NEAR

BLOCK = 2048
"""Entries that are summed in single precision; blocks are added up in double."""

ZERO, ONE, HALF, TWO = np.float32(0), np.float32(1), np.float32(0.5), np.float32(2)
LOWEST, ABSENT = np.float32(FLOOR), np.float32(FLOOR / 2)
FAR, FAR_MIXED, LOG2 = np.float32(NEAR), np.float32(0.5), np.float32(LN2)
# exp(t) - 1 - t = t^2 (E0 + E1 t^2 + E2 t^4) + t^3 (O0 + O1 t^2 + O2 t^4)
E0, E1, E2 = np.float32(1 / 2), np.float32(1 / 24), np.float32(1 / 720)
O0, O1, O2 = np.float32(1 / 6), np.float32(1 / 120), np.float32(1 / 5040)
# t tanh t - log cosh t = P0 t^2 + P1 t^4 + ...; log cosh t = L0 t^2 + L1 t^4 + ...
P0, P1, P2, P3, P4 = (np.float32(c) for c in (1 / 2, -1 / 4, 1 / 9, -17 / 360, 62 / 3150))
L0, L1, L2, L3, L4 = (np.float32(c) for c in (1 / 2, -1 / 12, 1 / 45, -17 / 2520, 31 / 14175))


@njit(fastmath=FLAGS | {"nnan"})
def _extremes(a: Any, b: Any) -> Any:
    top_a, top_b = wide(a[0]), wide(b[0])
    low_a, low_b = top_a, top_b
    for i in range(a.shape[0]):
        x, y = wide(a[i]), wide(b[i])
        top_a = x if x > top_a else top_a
        top_b = y if y > top_b else top_b
        low_a = x if x < low_a else low_a
        low_b = y if y < low_b else low_b
    return top_a, top_b, low_a, low_b


@njit
def _find(a: Any, value: Any) -> Any:
    for i in range(a.shape[0]):
        if wide(a[i]) == value:
            return i
    return 0


@njit
def _range(a: Any, b: Any, top: Any, paired: Any) -> Any:
    """Smallest and largest ``d``: asked for only where a logit is ``-inf``."""
    least, most = np.inf, -np.inf
    for i in range(a.shape[0]):
        d = (max(wide(b[i]), LOWEST) - paired) - (max(wide(a[i]), LOWEST) - top)
        least, most = min(least, d), max(most, d)
    return least, most


@njit(fastmath=FLAGS, error_model="numpy")
def _sums(a: Any, b: Any, top_a: Any, paired: Any, top_b: Any, kappa: Any, one: Any) -> Any:
    # `one` is 1, but the compiler does not know: no difference is taken apart and put together otherwise.
    inverse = ONE / kappa
    sa, sb, t, u, va, vb, fa, fb, qa, qd = ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO
    for i in range(a.shape[0]):
        la, lb = wide(a[i]), wide(b[i])
        la = LOWEST if la < LOWEST else la  # NaN stays NaN
        lb = LOWEST if lb < LOWEST else lb
        x = fma(la, one, -top_a)
        y = fma(lb, one, -top_b)
        d = fma(-x, one, fma(lb, one, -paired))
        ea, eb = exp(x), exp(y)
        square = d * d
        even = square * fma(fma(E2, square, E1), square, E0)
        odd = square * d * fma(fma(O2, square, O1), square, O0)
        gap = fma(eb, kappa, -ea)
        near = absolute(d) < FAR
        ead, ebd, eax = ea * d, eb * d, ea * x
        sa += ea
        sb += eb
        t += ead
        u += ebd
        va += eax
        vb += eb * y
        fa += ea * (even + odd) if near else gap - ead
        fb += eb * (even - odd) if near else ebd - gap * inverse
        qa += eax * x
        qd += ead * d
    return sa, sb, t, u, va, vb, fa, fb, qa, qd


@njit(parallel=True, nogil=True, cache=True)
def row_sums(a_all: Any, b_all: Any, one: Any, out: Any) -> None:
    """Fill the table of :class:`klkit.divergences.sums.RowSums`; ``one`` is 1."""
    for r in prange(a_all.shape[0]):
        a, b, o = a_all[r], b_all[r], out[r]
        top_a, top_b, low_a, low_b = _extremes(a[:BLOCK], b[:BLOCK])
        token_a, token_b = 0, 0  # so far, where the block begins in which the largest logit is
        for start in range(BLOCK, a.shape[0], BLOCK):
            stop = min(start + BLOCK, a.shape[0])
            block_a, block_b, least_a, least_b = _extremes(a[start:stop], b[start:stop])
            low_a, low_b = min(low_a, least_a), min(low_b, least_b)
            if block_a > top_a:
                top_a, token_a = block_a, start
            if block_b > top_b:
                top_b, token_b = block_b, start
        token_a, token_b = token_a + _find(a[token_a:], top_a), token_b + _find(b[token_b:], top_b)
        top_a, top_b = max(top_a, LOWEST), max(top_b, LOWEST)
        paired = wide(b[token_a])
        if not paired > ABSENT:
            paired = top_b
        kappa = np.float32(np.exp(min(np.float64(top_b) - np.float64(paired), FARTHEST)))
        o[0], o[1], o[2], o[3], o[4] = token_a, token_b, top_a, paired, top_b
        for k in range(5, 17):
            o[k] = 0.0
        for start in range(0, a.shape[0], BLOCK):
            stop = min(start + BLOCK, a.shape[0])
            sums = _sums(a[start:stop], b[start:stop], top_a, paired, top_b, kappa, one)
            for k in range(10):
                o[5 + k] += sums[k]
        if low_a < ABSENT or low_b < ABSENT:
            o[15], o[16] = _range(a, b, top_a, paired)


@njit(inline="always", fastmath=FLAGS, error_model="numpy")
def _mixed(d: Any) -> Any:
    """``log(p/m)`` and ``log(q/m)`` of a token with ``d = log q − log p``, and ``ψ(d/2)``; ``m`` the even mixture."""
    h = HALF * d
    s = h * h
    size = absolute(d)
    t = exp(-size)
    log_sum = log1p(t)
    psi_near = s * fma(fma(fma(fma(P4, s, P3), s, P2), s, P1), s, P0)
    psi_far = LOG2 - size * t / (ONE + t) - log_sum
    log_cosh = s * fma(fma(fma(fma(L4, s, L3), s, L2), s, L1), s, L0)
    rest = LOG2 - log_sum
    above = d if d > ZERO else ZERO
    near = size < FAR_MIXED
    over_p = -h - log_cosh if near else rest - above
    over_q = h - log_cosh if near else rest - (above - d)
    return over_p, over_q, psi_near if near else psi_far


@njit(inline="always", fastmath=FLAGS, error_model="numpy")
def _gap(p: Any, q: Any, d: Any) -> Any:
    """``q − p``, by a series in ``d = log q − log p`` where the difference would cancel."""
    square = d * d
    even = square * fma(fma(E2, square, E1), square, E0)
    odd = d * fma(square, fma(fma(O2, square, O1), square, O0), ONE)
    return p * (even + odd) if absolute(d) < FAR else q - p


@njit(inline="always", fastmath=FLAGS, error_model="numpy")
def _laws(
    la: Any,
    lb: Any,
    reference: Any,
    paired: Any,
    norm_p: Any,
    norm_q: Any,
    scale_p: Any,
    scale_q: Any,
    shift: Any,
    one: Any,
) -> Any:
    """``log p``, ``p``, ``q`` and ``d = log q − log p`` of one token."""
    la = LOWEST if la < LOWEST else la
    lb = LOWEST if lb < LOWEST else lb
    x = fma(la, one, -reference)
    y = fma(lb, one, -paired)
    log_p = fma(x, one, -norm_p)
    d = fma(fma(-x, one, y), one, -shift)
    return log_p, exp(log_p) * scale_p, exp(fma(y, one, -norm_q)) * scale_q, d


@njit(fastmath=FLAGS, error_model="numpy")
def _second(
    a: Any,
    b: Any,
    reference: Any,
    paired: Any,
    norm_p: Any,
    norm_q: Any,
    scale_p: Any,
    scale_q: Any,
    shift: Any,
    one: Any,
) -> Any:
    js, kl_p, distance = ZERO, ZERO, ZERO
    for i in range(a.shape[0]):
        _, p, q, d = _laws(wide(a[i]), wide(b[i]), reference, paired, norm_p, norm_q, scale_p, scale_q, shift, one)
        over_p, _, psi = _mixed(d)
        js += (p + q) * psi
        kl_p += p * over_p
        distance += absolute(_gap(p, q, d))
    return HALF * js, kl_p, HALF * distance


@njit(fastmath=FLAGS, error_model="numpy")
def _probabilities(a: Any, reference: Any, norm: Any, scale: Any, one: Any) -> None:
    for i in range(a.shape[0]):
        la = wide(a[i])
        la = LOWEST if la < LOWEST else la
        a[i] = narrow(exp(fma(fma(la, one, -reference), one, -norm)) * scale, a[i])


@njit(parallel=True, nogil=True, cache=True)
def second_sweep(a_all: Any, b_all: Any, norms: Any, one: Any, overwrite: Any, out: Any) -> None:
    """Jensen-Shannon divergence, ``KL(p‖½p + ½q)`` and total variation of each row; ``one`` is 1."""
    for r in prange(a_all.shape[0]):
        a, b, o = a_all[r], b_all[r], out[r]
        reference, paired, norm_p, norm_q, scale_p, scale_q, shift = _references(norms[r])
        o[0], o[1], o[2] = 0.0, 0.0, 0.0
        for start in range(0, a.shape[0], BLOCK):
            stop = min(start + BLOCK, a.shape[0])
            js, kl_p, distance = _second(
                a[start:stop], b[start:stop], reference, paired, norm_p, norm_q, scale_p, scale_q, shift, one
            )
            o[0] += js
            o[1] += kl_p
            o[2] += distance
        if overwrite:
            _probabilities(a, reference, norm_p, scale_p, one)


def _slopes(gap: bool, mixed: bool) -> Any:
    """The loop that writes ``p (k0 + k1 log p + k2 d) + k3 (q − p) + k4 p log(p/m)``, without the parts not wanted."""

    @njit(fastmath=FLAGS, error_model="numpy")
    def write(
        a: Any,
        b: Any,
        out: Any,
        reference: Any,
        paired: Any,
        norm_p: Any,
        norm_q: Any,
        scale_p: Any,
        scale_q: Any,
        shift: Any,
        k: Any,
        one: Any,
    ) -> None:
        k0, k1, k2, k3, k4 = k[0], k[1], k[2], k[3], k[4]
        for i in range(a.shape[0]):
            log_p, p, q, d = _laws(
                wide(a[i]), wide(b[i]), reference, paired, norm_p, norm_q, scale_p, scale_q, shift, one
            )
            value = p * fma(k2, d, fma(k1, log_p, k0))
            if gap:
                value += k3 * _gap(p, q, d)
            if mixed:
                value += k4 * p * _mixed(d)[0]
            out[i] = narrow(value, out[i])

    return write


_plain, _with_gap, _with_all = _slopes(False, False), _slopes(True, False), _slopes(True, True)


@njit
def _write(a: Any, b: Any, out: Any, references: Any, k: Any, one: Any) -> None:
    """The gradient of one block in the logits ``a`` of the law whose references come first."""
    reference, paired, norm_p, norm_q, scale_p, scale_q, shift = references
    if k[4] != ZERO:
        _with_all(a, b, out, reference, paired, norm_p, norm_q, scale_p, scale_q, shift, k, one)
    elif k[3] != ZERO:
        _with_gap(a, b, out, reference, paired, norm_p, norm_q, scale_p, scale_q, shift, k, one)
    else:
        _plain(a, b, out, reference, paired, norm_p, norm_q, scale_p, scale_q, shift, k, one)


@njit
def _references(norms: Any) -> Any:
    """A row's norms in single precision; what rounding takes from a normaliser comes back as a factor."""
    norm_p, norm_q = np.float32(norms[2]), np.float32(norms[2] + norms[3])
    scale_p = np.float32(np.exp(np.float64(norm_p) - norms[2]))
    scale_q = np.float32(np.exp(np.float64(norm_q) - (norms[2] + norms[3])))
    return np.float32(norms[0]), np.float32(norms[1]), norm_p, norm_q, scale_p, scale_q, np.float32(norms[3])


@njit(parallel=True, nogil=True, cache=True)
def gradients(
    a_all: Any,
    b_all: Any,
    tokens: Any,
    norms: Any,
    slopes: Any,
    one: Any,
    want_a: Any,
    want_b: Any,
    out_a: Any,
    out_b: Any,
) -> None:
    """Write the gradients of :class:`klkit.divergences.sums.Slopes` that are wanted; ``one`` is 1."""
    for r in prange(a_all.shape[0]):
        a, b = a_all[r], b_all[r]
        reference, paired, norm_p, norm_q, scale_p, scale_q, shift = _references(norms[r])
        as_p = (reference, paired, norm_p, norm_q, scale_p, scale_q, shift)
        as_q = (paired, reference, norm_q, norm_p, scale_q, scale_p, -shift)
        k = slopes[r].astype(np.float32)
        turned = k[6:].copy()  # as seen when the laws have changed places
        turned[2], turned[3] = -turned[2], -turned[3]
        # An output may be the logits themselves, so a block is written only when both gradients are formed.
        held_a, held_b = np.empty(BLOCK, a.dtype), np.empty(BLOCK, b.dtype)
        for start in range(0, a.shape[0], BLOCK):
            stop = min(start + BLOCK, a.shape[0])
            if want_a:
                _write(a[start:stop], b[start:stop], held_a[: stop - start], as_p, k, one)
            if want_b:
                _write(b[start:stop], a[start:stop], held_b[: stop - start], as_q, turned, one)
            if want_a:
                out_a[r, start:stop] = held_a[: stop - start]
            if want_b:
                out_b[r, start:stop] = held_b[: stop - start]
        token = tokens[r]
        if want_a and k[5] != ZERO:
            out_a[r, token] = narrow(wide(out_a[r, token]) + k[5], out_a[r, token])
        if want_b and k[11] != ZERO:
            out_b[r, token] = narrow(wide(out_b[r, token]) + k[11], out_b[r, token])
