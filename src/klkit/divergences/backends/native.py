"""Row sums by kernels compiled for this CPU with numba: one visit to each row, block by block.

Each block of a row is scanned for its largest entries and then summed while it is in the first-level
cache, so main memory is read once; rows run on all threads. Where a block raises the largest logit of
``p``, the sums so far are carried over to the new references in double precision.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import torch
from jaxtyping import Float
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic
from torch import Tensor

from klkit.divergences.sums import COLUMNS, FARTHEST
from klkit.numerics import FLOOR, NEAR

BLOCK = 2048
_F32 = ir.FloatType()
_I32 = ir.IntType(32)
_f = np.float32
ZERO, ONE, HALF = _f(0), _f(1), _f(0.5)
LOWEST = _f(FLOOR)
ABSENT = _f(FLOOR / 2)
FAR = _f(NEAR)

# exp(r) on |r| <= ln(2)/2, and ln(2) in two parts of which the first has few bits.
LOG2E, LN2_HIGH, LN2_LOW = _f(1.4426950408889634), _f(-0.693145751953125), _f(-1.428606765330187e-06)
C2, C3, C4, C5, C6 = (_f(c) for c in (0.49999994, 0.16666521, 0.041668389, 0.00836871, 0.0013814614))
UNDERFLOW = _f(-88.0)
# exp(t) - 1 - t = t^2 (E0 + E1 t^2 + ...) + t^3 (O0 + O1 t^2 + ...)
E0, E1, E2 = _f(1 / 2), _f(1 / 24), _f(1 / 720)
O0, O1, O2 = _f(1 / 6), _f(1 / 120), _f(1 / 5040)


def _call(name: str, arguments: int) -> Any:
    """An operation of LLVM's on single-precision numbers, which no fast-math flag rewrites."""
    kinds = [_F32] * arguments

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        function = builder.module.declare_intrinsic(name, [_F32], ir.FunctionType(_F32, kinds))
        return builder.call(function, values)

    @intrinsic
    def one(typing: Any, x: Any) -> Any:
        return types.float32(types.float32), generate

    @intrinsic
    def three(typing: Any, x: Any, y: Any, z: Any) -> Any:
        return types.float32(types.float32, types.float32, types.float32), generate

    return one if arguments == 1 else three


_round = _call("llvm.rint", 1)
_fma = _call("llvm.fma", 3)
_abs = _call("llvm.fabs", 1)


@intrinsic
def _power_of_two(typing: Any, n: Any) -> Any:
    """``2**n`` of a whole number from -127 (which gives 0) to 127."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        bits = builder.shl(builder.add(builder.fptosi(values[0], _I32), _I32(127)), _I32(23))
        return builder.bitcast(bits, _F32)

    return types.float32(types.float32), generate


FLAGS = {"reassoc", "contract", "nsz"}


@njit(inline="always", fastmath=FLAGS)
def _exp(x):
    """``exp(x)`` for ``x <= 0``, exactly 0 from -88 on."""
    x = x if x > UNDERFLOW else UNDERFLOW
    n = _round(x * LOG2E)
    r = _fma(n, LN2_LOW, _fma(n, LN2_HIGH, x))
    s = _fma(_fma(_fma(_fma(C6, r, C5), r, C4), r, C3), r, C2)
    return _fma(_fma(s, r, ONE), r, ONE) * _power_of_two(n)


@njit(fastmath=FLAGS | {"nnan"})
def _extremes(a, b):
    top_a, top_b, low_a, low_b = a[0], b[0], a[0], b[0]
    for i in range(a.shape[0]):
        top_a = a[i] if a[i] > top_a else top_a
        top_b = b[i] if b[i] > top_b else top_b
        low_a = a[i] if a[i] < low_a else low_a
        low_b = b[i] if b[i] < low_b else low_b
    return top_a, top_b, low_a, low_b


@njit(fastmath=FLAGS)
def _sums(a, b, top_a, paired, top_b, kappa, one):
    # `one` is 1, but the compiler does not know: written so, no difference is taken apart and put together otherwise.
    inverse = ONE / kappa
    sa, sb, t, u, va, vb, fa, fb, qa, qd = ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO
    for i in range(a.shape[0]):
        x = _fma(a[i], one, -top_a)
        y = _fma(b[i], one, -top_b)
        d = _fma(-x, one, _fma(b[i], one, -paired))
        ea = _exp(x)
        eb = _exp(y)
        square = d * d
        even = square * _fma(_fma(E2, square, E1), square, E0)
        odd = square * d * _fma(_fma(O2, square, O1), square, O0)
        gap = _fma(eb, kappa, -ea)
        near = _abs(d) < FAR
        ead = ea * d
        ebd = eb * d
        eax = ea * x
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
def _find(a, value):
    for i in range(a.shape[0]):
        if a[i] == value:
            return i
    return 0


@njit(parallel=True, nogil=True)
def _rows(a_all, b_all, one, out):
    for r in prange(a_all.shape[0]):
        a, b, o = a_all[r], b_all[r], out[r]
        top_a, top_b, low_a, low_b = _extremes(a, b)
        token_a, token_b = _find(a, top_a), _find(b, top_b)
        paired = b[token_a]
        kappa = np.float32(math.exp(min(np.float64(top_b) - np.float64(paired), FARTHEST)))
        o[0], o[1], o[2], o[3], o[4] = token_a, token_b, top_a, paired, top_b
        for k in range(5, 17):
            o[k] = 0.0
        for start in range(0, a.shape[0], BLOCK):
            stop = min(start + BLOCK, a.shape[0])
            sums = _sums(a[start:stop], b[start:stop], top_a, paired, top_b, kappa, one)
            for k in range(10):
                o[5 + k] += sums[k]


def row_sums(a: Float[Tensor, "m v"], b: Float[Tensor, "m v"]) -> Float[Tensor, "m _"]:
    """The table of :class:`klkit.divergences.sums.RowSums` of rows of logits on the CPU, in double precision."""
    table = torch.empty(len(a), COLUMNS, dtype=torch.float64)
    _rows(a.numpy(), b.numpy(), ONE, table.numpy())
    return table
