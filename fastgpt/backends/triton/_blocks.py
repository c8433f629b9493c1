"""Pieces that the kernels of several ops share."""

from __future__ import annotations

import triton
import triton.language as tl

from fastgpt.backends.triton import interpreted

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(interpreted())


def device(function):
    """A function that kernels call: jitted. The interpreter gets it as it is, for at every call of
    a jitted function it patches the whole language anew, which costs more than a tile."""
    return function if interpreted() else triton.jit(function)


@device
def rounded(x, dtype: tl.constexpr):
    """float32 x in dtype, to nearest even. Every store of a result goes through this: the
    interpreter's own conversion to bfloat16 cuts the bits off instead of rounding."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True).to(tl.uint64)  # for the reason of `index`
        high = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        high = tl.where(x != x, 0x7FC0, high)
        y = high.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(dtype)
    return y


@device
def index(x):
    """An int32 that positions are made of. The interpreter, which checks each sum of int32 for
    overflow at ten times its cost, has it in 64 bits."""
    if INTERPRETED:
        x = x.to(tl.int64)
    return x


@device
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32; acc may be None."""
    if INTERPRETED:  # It would multiply the bits of bfloat16.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)
