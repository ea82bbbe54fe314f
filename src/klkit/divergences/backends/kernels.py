"""Kernels that numba compiles for the CPU at hand: rows run on all threads, each stays in a core's cache.

A row is scanned once for its largest logits, which brings it into the cache, and summed from there.
Half formats are widened as they are loaded. No kernel allocates more than two blocks a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from klkit.divergences.backends.lanes import FLAGS, absolute, exp, fma, larger, log1p, narrow, smaller, wide
from klkit.divergences.sums import FARTHEST
from klkit.numerics import FLOOR, LN2, NEAR

BLOCK = 512
"""Entries that are summed in single precision; blocks are added up in double, and are short enough for any lanes."""

ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)
LOWEST, ABSENT = np.float32(FLOOR), np.float32(FLOOR / 2)
FAR, FAR_MIXED, LOG2 = np.float32(NEAR), np.float32(0.5), np.float32(LN2)
# exp(t) - 1 - t = t^2 (E0 + E1 t^2 + E2 t^4) + t^3 (O0 + O1 t^2 + O2 t^4)
E0, E1, E2 = np.float32(1 / 2), np.float32(1 / 24), np.float32(1 / 720)
O0, O1, O2 = np.float32(1 / 6), np.float32(1 / 120), np.float32(1 / 5040)
# t tanh t - log cosh t = P0 t^2 + P1 t^4 + ...; log cosh t = L0 t^2 + L1 t^4 + ...
P0, P1, P2, P3, P4 = (np.float32(c) for c in (1 / 2, -1 / 4, 1 / 9, -17 / 360, 62 / 3150))
L0, L1, L2, L3, L4 = (np.float32(c) for c in (1 / 2, -1 / 12, 1 / 45, -17 / 2520, 31 / 14175))


@njit
def _extremes(a: Any, b: Any) -> Any:
    top_a, top_b = wide(a[0]), wide(b[0])
    low_a, low_b = top_a, top_b
    for i in range(a.shape[0]):
        x, y = wide(a[i]), wide(b[i])
        top_a, low_a = larger(top_a, x), smaller(low_a, x)
        top_b, low_b = larger(top_b, y), smaller(low_b, y)
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


@njit
def sums_of_row(a: Any, b: Any, one: Any, o: Any) -> None:
    """Fill a row of the table of :class:`klkit.divergences.sums.RowSums`."""
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


@njit(parallel=True, nogil=True, cache=True)
def row_sums(a_all: Any, b_all: Any, one: Any, out: Any) -> None:
    """Fill the table of :class:`klkit.divergences.sums.RowSums`; ``one`` is 1."""
    for r in prange(a_all.shape[0]):
        sums_of_row(a_all[r], b_all[r], one, out[r])


@njit(inline="always", fastmath=FLAGS, error_model="numpy")
def _mixed(d: Any) -> Any:
    """``log(p/m)`` of a token, ``m`` the even mixture, and ``h tanh h − log cosh h`` of half its ``log q − log p``."""
    h = HALF * d
    s = h * h
    size = absolute(d)
    t = exp(-size)
    log_sum = log1p(t)
    psi_near = s * fma(fma(fma(fma(P4, s, P3), s, P2), s, P1), s, P0)
    psi_far = LOG2 - size * t / (ONE + t) - log_sum
    log_cosh = s * fma(fma(fma(fma(L4, s, L3), s, L2), s, L1), s, L0)
    above = d if d > ZERO else ZERO
    near = size < FAR_MIXED
    return -h - log_cosh if near else LOG2 - log_sum - above, psi_near if near else psi_far


@njit
def _law(norms: Any) -> Any:
    """A row's norms as the loops use them: single precision, what that takes from the shift, and the laws' factors."""
    shift, norm = np.float32(norms[3]), np.float32(norms[2])
    slack = np.float32(np.float64(shift) - norms[3])
    scale_p, scale_q = np.float32(np.exp(-norms[2])), np.float32(np.exp(-norms[2] - norms[3]))
    return np.float32(norms[0]), np.float32(norms[1]), norm, scale_p, scale_q, shift, slack


@njit(inline="always", fastmath=FLAGS, error_model="numpy")
def _token(a: Any, b: Any, law: Any, one: Any) -> Any:
    """``log p``, ``p``, ``q``, ``d = log q − log p`` and ``q − p`` of one token."""
    reference, paired, norm, scale_p, scale_q, shift, slack = law
    la, lb = wide(a), wide(b)
    la = LOWEST if la < LOWEST else la
    lb = LOWEST if lb < LOWEST else lb
    x = fma(la, one, -reference)
    y = fma(lb, one, -paired)
    d = fma(fma(-x, one, y), one, -shift)
    p, q = exp(x) * scale_p, exp(y) * scale_q
    square = d * d
    even = square * fma(fma(E2, square, E1), square, E0)
    odd = d * fma(square, fma(fma(O2, square, O1), square, O0), ONE)
    gap = p * (even + odd + slack) if absolute(d) < FAR else q - p  # by a series where the difference would cancel
    return fma(x, one, -norm), p, q, d, gap


@njit(fastmath=FLAGS, error_model="numpy")
def _distance(a: Any, b: Any, law: Any, one: Any) -> Any:
    distance = ZERO
    for i in range(a.shape[0]):
        distance += absolute(_token(a[i], b[i], law, one)[4])
    return ZERO, ZERO, HALF * distance


@njit(fastmath=FLAGS, error_model="numpy")
def _mixture(a: Any, b: Any, law: Any, one: Any) -> Any:
    js, kl_p, distance = ZERO, ZERO, ZERO
    for i in range(a.shape[0]):
        _, p, q, d, gap = _token(a[i], b[i], law, one)
        over_p, psi = _mixed(d)
        js += (p + q) * psi
        kl_p += p * over_p
        distance += absolute(gap)
    return HALF * js, kl_p, HALF * distance


@njit(fastmath=FLAGS, error_model="numpy")
def _probabilities(a: Any, law: Any, one: Any) -> None:
    for i in range(a.shape[0]):
        x = wide(a[i])
        x = LOWEST if x < LOWEST else x
        a[i] = narrow(exp(fma(x, one, -law[0])) * law[3], a[i])


@njit(parallel=True, nogil=True, cache=True)
def second_sweep(a_all: Any, b_all: Any, norms: Any, one: Any, mixture: Any, overwrite: Any, out: Any) -> None:
    """Jensen-Shannon divergence, ``KL(p‖½p + ½q)`` and total variation of each row; ``one`` is 1."""
    for r in prange(a_all.shape[0]):
        a, b, o = a_all[r], b_all[r], out[r]
        law = _law(norms[r])
        o[0], o[1], o[2] = 0.0, 0.0, 0.0
        for start in range(0, a.shape[0], BLOCK):
            stop = min(start + BLOCK, a.shape[0])
            few_a, few_b = a[start:stop], b[start:stop]
            js, kl_p, distance = _mixture(few_a, few_b, law, one) if mixture else _distance(few_a, few_b, law, one)
            o[0] += js
            o[1] += kl_p
            o[2] += distance
        if overwrite:
            _probabilities(a, law, one)


def _slopes(gaps: bool, mixtures: bool, in_place: bool) -> Any:
    """The loop that writes ``p (k0 + k1 log p + k2 d) + k3 (q − p) + k4 p log(p/m)``, without the parts not wanted.

    Over the logits ``a`` themselves it must be told so: LLVM would find that ``a`` and ``out`` meet, and go one by one.
    """

    @njit(fastmath=FLAGS, error_model="numpy")
    def write(a: Any, b: Any, out: Any, law: Any, k: Any, one: Any) -> None:
        k0, k1, k2, k3, k4, rest = k[0], k[1], k[2], k[3], k[4], k[6]
        for i in range(a.shape[0]):
            log_p, p, _, d, gap = _token(a[i], b[i], law, one)
            value = p * (fma(k2, d, fma(k1, log_p, k0)) + rest)
            if gaps:
                value += k3 * gap
            if mixtures:
                value += k4 * p * _mixed(d)[0]
            if in_place:
                a[i] = narrow(value, a[i])
            else:
                out[i] = narrow(value, out[i])

    return write


def _chosen(in_place: bool) -> Any:
    """The gradient of a block in the logits ``a`` of the law that comes first in ``law``, by the loop that suffices."""
    plain, gaps, everything = (_slopes(*parts, in_place) for parts in ((False, False), (True, False), (True, True)))

    @njit
    def write(a: Any, b: Any, out: Any, law: Any, k: Any, one: Any) -> None:
        if k[4] != ZERO:
            everything(a, b, out, law, k, one)
        elif k[3] != ZERO:
            gaps(a, b, out, law, k, one)
        else:
            plain(a, b, out, law, k, one)

    return write


_write, _write_over = _chosen(False), _chosen(True)


@njit
def _coefficients(slopes: Any, norm: Any, shift: Any) -> Any:
    """Six slopes in single precision, and what rounding takes from them, from ``norm`` and from ``shift``.

    The last would shift all of a row alike: too little to see in an entry, and plain to see in their sum.
    """
    k = np.empty(7, np.float32)
    k[:6] = slopes
    k[6] = (
        (slopes[0] - np.float64(k[0])) + slopes[1] * (np.float32(norm) - norm) + slopes[2] * (np.float32(shift) - shift)
    )
    return k


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
    in_place: Any,
    out_a: Any,
    out_b: Any,
) -> None:
    """Write the gradients of :class:`klkit.divergences.sums.Slopes` that are wanted; ``one`` is 1.

    ``in_place`` says that an output is the logits whose gradient it takes.
    """
    for r in prange(a_all.shape[0]):
        a, b, token = a_all[r], b_all[r], tokens[r]
        # The law of q comes first when its gradient is formed: d and q − p change their signs.
        turned = slopes[r, 6:].copy()
        turned[2], turned[3] = -turned[2], -turned[3]
        swapped = np.array([norms[r, 1], norms[r, 0], norms[r, 2] + norms[r, 3], -norms[r, 3]])
        law_p, law_q = _law(norms[r]), _law(swapped)
        k_p, k_q = _coefficients(slopes[r, :6], norms[r, 2], norms[r, 3]), _coefficients(turned, swapped[2], swapped[3])
        # Where outputs may be the logits and both are wanted, a block is written when both its gradients are formed.
        held = BLOCK if want_a and want_b else 0
        held_a, held_b = np.empty(held, a.dtype), np.empty(held, b.dtype)
        for start in range(0, a.shape[0], BLOCK):
            stop = min(start + BLOCK, a.shape[0])
            x, y = a[start:stop], b[start:stop]
            if held:
                _write(x, y, held_a[: stop - start], law_p, k_p, one)
                _write(y, x, held_b[: stop - start], law_q, k_q, one)
                out_a[r, start:stop] = held_a[: stop - start]
                out_b[r, start:stop] = held_b[: stop - start]
            elif want_a and in_place:
                _write_over(x, y, x, law_p, k_p, one)
            elif want_a:
                _write(x, y, out_a[r, start:stop], law_p, k_p, one)
            elif in_place:
                _write_over(y, x, y, law_q, k_q, one)
            else:
                _write(y, x, out_b[r, start:stop], law_q, k_q, one)
        if want_a and k_p[5] != ZERO:
            out_a[r, token] = narrow(wide(out_a[r, token]) + k_p[5], out_a[r, token])
        if want_b and k_q[5] != ZERO:
            out_b[r, token] = narrow(wide(out_b[r, token]) + k_q[5], out_b[r, token])
