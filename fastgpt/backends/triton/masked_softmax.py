"""y = softmax(scale * scores) over the visible band of each (sq, sk) matrix, 0 outside of it;
dscores = scale * y * (dy - sum(dy * y)) inside, 0 outside.

A program takes ROWS queries, and of each one frame of columns that starts at its band and holds it;
what lies outside of the frame is written only. A band that no frame holds is walked in blocks, with
running maximum and sum, and read twice.
Bytes: forward reads the band and writes sq sk, backward reads it of dy and y and writes as much.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.backends.triton import interpreted
from fastgpt.backends.triton._blocks import LOG2E, rounded
from fastgpt.backends.triton._launch import ceil_div, launch
from fastgpt.backends.triton._rows import RowsConfig, length_unit, rows_config

FRAME_UNIT = tl.constexpr(16)
"""A frame starts at a multiple of it, so that its loads are as wide as the rows permit."""
TILE = 32768 if interpreted() else 1024
"""Elements of the frames that a program takes together."""


@triton.jit
def _band(row, sq, sk, window, CAUSAL: tl.constexpr, BANDED: tl.constexpr):
    """The columns that query `row` of its matrix sees, from the first to before the last."""
    position = row + (sk - sq)
    low = position * 0
    high = low + sk
    if BANDED:
        low = tl.maximum(position - window + 1, 0)
        high = tl.minimum(position + window, sk)
    if CAUSAL:
        high = tl.minimum(position + 1, sk)
    return low, high


@triton.jit
def _load(g_x, columns, low, high, UNIT: tl.constexpr):
    """float32 of the columns from low to high, in groups that a wide load can take: what it takes
    too much is discarded, whatever it is."""
    group = columns // UNIT * UNIT
    x = tl.load(g_x + columns, mask=(group < high) & (group + UNIT > low), other=0.0)
    return tl.where((columns >= low) & (columns < high), x.to(tl.float32), 0.0)


@triton.jit
def _load_scaled(g_x, columns, low, high, scale, UNIT: tl.constexpr):
    x = _load(g_x, columns, low, high, UNIT) * scale
    return tl.where((columns >= low) & (columns < high), x, -float("inf"))


@triton.jit
def _fill(g_y, base, sk, ROWS: tl.constexpr, BLOCK: tl.constexpr, inside):
    """Zeros to the left and to the right of the frame."""
    zeros = tl.zeros([ROWS, BLOCK], g_y.dtype.element_ty)
    for start in range(0, sk, BLOCK):
        columns = start + tl.arange(0, BLOCK)[None, :]
        outside = (columns < base) | (columns >= base + BLOCK)
        tl.store(g_y + columns, zeros, mask=inside & outside & (columns < sk))


@triton.jit(do_not_specialize=["r", "sq", "window"])
def masked_softmax_fwd_kernel(
    g_x,
    g_y,
    r,
    sq,
    sk,
    window,
    x_matrix,
    x_stride,
    scale,
    CAUSAL: tl.constexpr,
    BANDED: tl.constexpr,
    UNIT: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    FILL: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sk = sk // UNIT * UNIT
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = rows < r
    matrix, row = rows // sq, rows % sq
    g_x += matrix.to(tl.int64) * (x_matrix // STRIDE_UNIT * STRIDE_UNIT)
    g_x += row.to(tl.int64) * (x_stride // STRIDE_UNIT * STRIDE_UNIT)
    g_y += rows.to(tl.int64) * sk
    low, high = _band(row, sq, sk, window, CAUSAL, BANDED)
    high = tl.where(inside, high, 0)
    if WHOLE:
        columns = tl.arange(0, BLOCK)[None, :]
        if FILL:
            base = low // FRAME_UNIT * FRAME_UNIT
            columns += base
        x = _load_scaled(g_x, columns, low, high, scale, UNIT)
        peak = tl.max(x, axis=1, keep_dims=True)
        e = tl.exp2((x - tl.where(peak == -float("inf"), 0.0, peak)) * LOG2E)
        total = tl.sum(e, axis=1, keep_dims=True)
        y = e / tl.where(total == 0.0, 1.0, total)
        tl.store(g_y + columns, rounded(y, g_y.dtype.element_ty), mask=inside & (columns < sk))
        if FILL:
            _fill(g_y, base, sk, ROWS, BLOCK, inside)
    else:
        columns = tl.arange(0, BLOCK)[None, :]
        peak = tl.full([ROWS, 1], -float("inf"), tl.float32)
        total = tl.zeros([ROWS, 1], tl.float32)
        for start in range(tl.min(low) // BLOCK * BLOCK, tl.max(high), BLOCK):
            x = _load_scaled(g_x, start + columns, low, high, scale, UNIT)
            higher = tl.maximum(peak, tl.max(x, axis=1, keep_dims=True))
            floor = tl.where(higher == -float("inf"), 0.0, higher)
            total = total * tl.exp2((peak - floor) * LOG2E)
            total += tl.sum(tl.exp2((x - floor) * LOG2E), axis=1, keep_dims=True)
            peak = higher
        peak = tl.where(peak == -float("inf"), 0.0, peak)
        total = tl.where(total == 0.0, 1.0, total)
        for start in range(0, sk, BLOCK):
            at = start + columns
            x = _load_scaled(g_x, at, low, high, scale, UNIT)
            y = tl.exp2((x - peak) * LOG2E) / total
            y = tl.where((at >= low) & (at < high), y, 0.0)
            tl.store(g_y + at, rounded(y, g_y.dtype.element_ty), mask=inside & (at < sk))


@triton.jit(do_not_specialize=["r", "sq", "window"])
def masked_softmax_bwd_kernel(
    g_dy,
    g_y,
    g_dx,
    r,
    sq,
    sk,
    window,
    dy_matrix,
    dy_stride,
    y_matrix,
    y_stride,
    scale,
    CAUSAL: tl.constexpr,
    BANDED: tl.constexpr,
    UNIT: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    FILL: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sk = sk // UNIT * UNIT
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = rows < r
    matrix, row = rows // sq, rows % sq
    g_dy += matrix.to(tl.int64) * (dy_matrix // STRIDE_UNIT * STRIDE_UNIT)
    g_dy += row.to(tl.int64) * (dy_stride // STRIDE_UNIT * STRIDE_UNIT)
    g_y += matrix.to(tl.int64) * (y_matrix // STRIDE_UNIT * STRIDE_UNIT)
    g_y += row.to(tl.int64) * (y_stride // STRIDE_UNIT * STRIDE_UNIT)
    g_dx += rows.to(tl.int64) * sk
    low, high = _band(row, sq, sk, window, CAUSAL, BANDED)
    high = tl.where(inside, high, 0)
    if WHOLE:
        columns = tl.arange(0, BLOCK)[None, :]
        if FILL:
            base = low // FRAME_UNIT * FRAME_UNIT
            columns += base
        dy = _load(g_dy, columns, low, high, UNIT)
        y = _load(g_y, columns, low, high, UNIT)
        dx = scale * y * (dy - tl.sum(dy * y, axis=1, keep_dims=True))
        tl.store(g_dx + columns, rounded(dx, g_dx.dtype.element_ty), mask=inside & (columns < sk))
        if FILL:
            _fill(g_dx, base, sk, ROWS, BLOCK, inside)
    else:
        columns = tl.arange(0, BLOCK)[None, :]
        products = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(tl.min(low) // BLOCK * BLOCK, tl.max(high), BLOCK):
            dy = _load(g_dy, start + columns, low, high, UNIT)
            products += dy * _load(g_y, start + columns, low, high, UNIT)
        mean = tl.sum(products, axis=1, keep_dims=True)
        for start in range(0, sk, BLOCK):
            at = start + columns
            dy = _load(g_dy, at, low, high, UNIT)
            y = _load(g_y, at, low, high, UNIT)
            dx = tl.where((at >= low) & (at < high), scale * y * (dy - mean), 0.0)
            tl.store(g_dx + at, rounded(dx, g_dx.dtype.element_ty), mask=inside & (at < sk))


def _plan(
    sq: int, sk: int, causal: bool, window: int | None
) -> tuple[RowsConfig, int, dict[str, int | bool]]:
    """The frames, the window as the kernel takes it, and the constants of both."""
    widest = sk
    if window is not None:
        widest = min(sk, (window if causal else 2 * window - 1) + FRAME_UNIT.value - 1)
    config = rows_config(widest, TILE)
    constants = {"CAUSAL": causal, "BANDED": window is not None, "FILL": config.block < sk}
    # A larger window sees as much, and does not overflow.
    reach = 1 if window is None else min(window, sq + sk)
    return config, reach, constants | config.constants


def masked_softmax_fwd(
    scores: Tensor, scale: float, causal: bool, window: int | None, float_out: bool
) -> Tensor:
    """scores (r, sq, sk) -> y (r, sq, sk), in float32 if asked; a row that sees nothing is 0."""
    r, sq, sk = scores.shape
    y = scores.new_empty((r, sq, sk), dtype=torch.float32 if float_out else scores.dtype)
    config, reach, constants = _plan(sq, sk, causal, window)
    launch(
        masked_softmax_fwd_kernel,
        ceil_div(r * sq, config.rows),
        scores,
        y,
        r * sq,
        sq,
        sk,
        reach,
        scores.stride(0),
        scores.stride(1),
        float(scale),
        UNIT=length_unit(sk),
        STRIDE_UNIT=length_unit(scores.stride(1), scores.stride(0)),
        **constants,
        num_warps=config.num_warps,
    )
    return y


def masked_softmax_bwd(
    dy: Tensor,
    y: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    in_dtype: torch.dtype,
) -> Tensor:
    """dscores (r, sq, sk) in in_dtype, 0 outside of the band."""
    r, sq, sk = y.shape
    dx = y.new_empty((r, sq, sk), dtype=in_dtype)
    config, reach, constants = _plan(sq, sk, causal, window)
    strides = (dy.stride(0), dy.stride(1), y.stride(0), y.stride(1))
    launch(
        masked_softmax_bwd_kernel,
        ceil_div(r * sq, config.rows),
        dy,
        y,
        dx,
        r * sq,
        sq,
        sk,
        reach,
        *strides,
        float(scale),
        UNIT=length_unit(sk),
        STRIDE_UNIT=length_unit(strides[1], strides[3], strides[0], strides[2]),
        **constants,
        num_warps=config.num_warps,
    )
    return dx
