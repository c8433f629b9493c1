"""Pieces that the kernels of several ops share."""

from __future__ import annotations

import triton
import triton.language as tl

from fastgpt.backends.triton import interpreted

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 x in dtype, to nearest even. Every store of a result goes through this: the
    interpreter's own conversion to bfloat16 cuts the bits off instead of rounding."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        high = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        high = tl.where(x != x, 0x7FC0, high)
        y = high.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(dtype)
    return y
