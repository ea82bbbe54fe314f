"""Scalar single-precision operations that numba's compiler turns into vector instructions.

Loops over a row are written with these so that they stay free of branches and calls. Sums may be
reassociated (``FLAGS``), which is what lets them run in parallel lanes; a *difference* that must not
be is written with :func:`fma` and a factor of one that the compiler cannot see.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

FLAGS = {"reassoc", "contract", "nsz"}
"""Fast-math flags of the kernels; NaN and infinity keep their meaning."""

_F16, _F32 = ir.HalfType(), ir.FloatType()
_I16, _I32 = ir.IntType(16), ir.IntType(32)


def _operation(name: str, arguments: int, flags: tuple[str, ...] = ()) -> Any:
    """An LLVM operation on single-precision numbers."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(_F32, [_F32] * arguments)
        return builder.call(builder.module.declare_intrinsic(name, [_F32], kind), values, fastmath=flags)

    def one(typing: Any, x: Any) -> Any:
        return types.float32(types.float32), generate

    def two(typing: Any, x: Any, y: Any) -> Any:
        return types.float32(types.float32, types.float32), generate

    def three(typing: Any, x: Any, y: Any, z: Any) -> Any:
        return types.float32(types.float32, types.float32, types.float32), generate

    return intrinsic((one, two, three)[arguments - 1])


nearest = _operation("llvm.rint", 1)
absolute = _operation("llvm.fabs", 1)
fma = _operation("llvm.fma", 3)
# The search for a row's largest logit runs in parallel lanes only when it may assume that no NaN comes; a conditional
# expression loses that assumption on its way to LLVM, and then takes almost as long as all the sums.
larger = _operation("llvm.maxnum", 2, ("nnan", "nsz"))
smaller = _operation("llvm.minnum", 2, ("nnan", "nsz"))


@intrinsic
def power_of_two(typing: Any, n: Any) -> Any:
    """``2**n`` of a whole number from -127 (which gives 0) to 127."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        bits = builder.shl(builder.add(builder.fptosi(values[0], _I32), _I32(127)), _I32(23))
        return builder.bitcast(bits, _F32)

    return types.float32(types.float32), generate


@intrinsic
def wide(typing: Any, x: Any) -> Any:
    """A stored value in single precision: bf16 is stored as ``uint16``, fp16 as ``int16``."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if x == types.uint16:
            return builder.bitcast(builder.shl(builder.zext(values[0], _I32), _I32(16)), _F32)
        if x == types.int16:
            return builder.fpext(builder.bitcast(values[0], _F16), _F32)
        return values[0]

    return types.float32(x), generate


@intrinsic
def narrow(typing: Any, x: Any, like: Any) -> Any:
    """A finite single-precision number as it is stored beside ``like``, rounded to nearest, ties to even."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if like == types.uint16:
            bits = builder.bitcast(values[0], _I32)
            odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
            rounded = builder.add(bits, builder.add(odd, _I32(0x7FFF)))
            return builder.trunc(builder.lshr(rounded, _I32(16)), _I16)
        if like == types.int16:
            return builder.bitcast(builder.fptrunc(values[0], _F16), _I16)
        return values[0]

    return like(types.float32, like), generate


# exp on |r| <= ln(2)/2 as 1 + r + r^2 (C2 + C3 r + ...), within 4e-9; ln(2) in two parts, the first of few bits.
C2, C3, C4, C5, C6 = (np.float32(c) for c in (0.49999994, 0.16666521, 0.041668389, 0.00836871, 0.0013814614))
LOG2E, LN2_HIGH, LN2_LOW = (np.float32(c) for c in (1.4426950408889634, -0.693145751953125, -1.428606765330187e-06))
ONE, TWO, UNDERFLOW = np.float32(1), np.float32(2), np.float32(-88)
# atanh(s) = s (1 + A1 s^2 + ...), for s <= 1/3
A1, A2, A3, A4, A5, A6 = (np.float32(1 / k) for k in (3, 5, 7, 9, 11, 13))


@njit(inline="always", fastmath=FLAGS, error_model="numpy")
def exp(x: Any) -> Any:
    """``exp(x)`` for ``x <= 88``, exactly 0 from -88 down."""
    x = x if x > UNDERFLOW else UNDERFLOW
    n = nearest(x * LOG2E)
    r = fma(n, LN2_LOW, fma(n, LN2_HIGH, x))
    s = fma(fma(fma(fma(C6, r, C5), r, C4), r, C3), r, C2)
    return fma(fma(s, r, ONE), r, ONE) * power_of_two(n)


@njit(inline="always", fastmath=FLAGS, error_model="numpy")
def log1p(t: Any) -> Any:
    """``log(1 + t)`` for ``0 <= t <= 1``."""
    s = t / (TWO + t)
    z = s * s
    return TWO * s * fma(fma(fma(fma(fma(fma(A6, z, A5), z, A4), z, A3), z, A2), z, A1), z, ONE)
