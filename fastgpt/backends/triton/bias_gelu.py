"""y = gelu(z), z = x + bias; dx = dy * gelu'(z); dbias = sum of the unrounded dx over the rows.
erf: z Phi(z). tanh: z / (1 + exp(-2u)), u = sqrt(2/pi) (z + 0.044715 z^3), which is
z (1 + tanh u) / 2 without the cancellation; from exp(-|2u|), which does not overflow.

A program takes a tile, backward a chunk of tiles below one another, whose columns it sums in
registers into a row of `partial`; a second kernel adds these rows.
Bytes: forward reads x and writes y, backward reads dy and x and writes dx, r n each.
Source: Hendrycks, Gimpel 2016, https://arxiv.org/abs/1606.08415
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.backends.triton._blocks import LOG2E, rounded
from fastgpt.backends.triton._launch import ceil_div, launch, next_power_of_2
from fastgpt.backends.triton._rows import PARTIALS, column_sums, partial_tiles, unit

TILE = 2048
COLUMNS = 1024
"""Columns of a tile, at most."""
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_2PI = tl.constexpr(0.3989422804014327)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def _decay(z):
    """exp(-|2u|)."""
    slope = -2.0 * SQRT_2_OVER_PI * LOG2E
    return tl.exp2(tl.abs(z) * (z * z * (slope * CUBIC) + slope))


@triton.jit
def _gelu(z, TANH: tl.constexpr):
    if TANH:
        decay = _decay(z)
        y = tl.where(z < 0.0, z * decay, z) / (1.0 + decay)
    else:
        y = z * (0.5 + 0.5 * tl.erf(z * SQRT_HALF))
    return y


@triton.jit
def _gelu_derivative(z, TANH: tl.constexpr):
    if TANH:
        decay = _decay(z)
        high = 1.0 / (1.0 + decay)
        low = decay * high
        slope = 2.0 * SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * (z * z))
        d = z * high * low * slope + tl.where(z < 0.0, low, high)
    else:
        density = tl.exp2(z * z * (-0.5 * LOG2E)) * INVERSE_SQRT_2PI
        d = z * density + (0.5 + 0.5 * tl.erf(z * SQRT_HALF))
    return d


@triton.jit
def _bias(g_bias, columns, n, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    b = tl.zeros([1, BLOCK], tl.float32)
    if BIAS:
        b = tl.load(g_bias + columns, mask=columns < n, other=0.0).to(tl.float32)
    return b


@triton.jit(do_not_specialize=["r", "blocks"])
def bias_gelu_fwd_kernel(
    g_x,
    g_bias,
    g_y,
    r,
    n,
    x_stride,
    blocks,
    BIAS: tl.constexpr,
    TANH: tl.constexpr,
    UNIT: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = n // UNIT * UNIT
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    rows = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)[:, None]
    seen = (rows < r) & (columns < n)
    g_x += rows.to(tl.int64) * (x_stride // STRIDE_UNIT * STRIDE_UNIT)
    z = tl.load(g_x + columns, mask=seen, other=0.0).to(tl.float32)
    z += _bias(g_bias, columns, n, BIAS, BLOCK)
    g_y += rows.to(tl.int64) * n
    tl.store(g_y + columns, rounded(_gelu(z, TANH), g_y.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=["r", "blocks", "tiles"])
def bias_gelu_bwd_kernel(
    g_dy,
    g_x,
    g_bias,
    g_dx,
    g_partial,
    r,
    n,
    dy_stride,
    x_stride,
    blocks,
    tiles,
    BIAS: tl.constexpr,
    TANH: tl.constexpr,
    DBIAS: tl.constexpr,
    UNIT: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = n // UNIT * UNIT
    chunk = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    b = _bias(g_bias, columns, n, BIAS, BLOCK)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tiles):
        rows = ((chunk * tiles + tile) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        seen = (rows < r) & (columns < n)
        g_xs = g_x + rows * (x_stride // STRIDE_UNIT * STRIDE_UNIT)
        g_dys = g_dy + rows * (dy_stride // STRIDE_UNIT * STRIDE_UNIT)
        z = tl.load(g_xs + columns, mask=seen, other=0.0).to(tl.float32) + b
        dy = tl.load(g_dys + columns, mask=seen, other=0.0).to(tl.float32)
        dx = dy * _gelu_derivative(z, TANH)
        g_dxs = g_dx + rows * n
        tl.store(g_dxs + columns, rounded(dx, g_dx.dtype.element_ty), mask=seen)
        if DBIAS:
            dbias += dx
    if DBIAS:
        g_sum = g_partial + chunk.to(tl.int64) * n + columns
        tl.store(g_sum, tl.sum(dbias, axis=0, keep_dims=True), mask=columns < n)


def _tile(n: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and how many of them stand side by side."""
    block = min(next_power_of_2(max(n, 1)), COLUMNS)
    return TILE // block, block, ceil_div(n, block)


def bias_gelu_fwd(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    """x (r, n), bias (n,) -> y (r, n) in the dtype of x; the sum is not rounded in between."""
    r, n = x.shape
    y = x.new_empty((r, n))
    rows, block, blocks = _tile(n)
    launch(
        bias_gelu_fwd_kernel,
        ceil_div(r, rows) * blocks,
        x,
        x if bias is None else bias,
        y,
        r,
        n,
        x.stride(0),
        blocks,
        BIAS=bias is not None,
        TANH=tanh,
        UNIT=unit(n),
        STRIDE_UNIT=unit(x.stride(0)),
        ROWS=rows,
        BLOCK=block,
    )
    return y


def bias_gelu_bwd(
    dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, need_dbias: bool
) -> tuple[Tensor, Tensor]:
    """dx (r, n) in the dtype of x; dbias (n,) of the unrounded dx, empty if not needed."""
    r, n = x.shape
    dx = x.new_empty((r, n))
    rows, block, blocks = _tile(n)
    # Several waves of small programs: more of them fit on a multiprocessor than where each holds a
    # whole row, and how many depends on the GPU.
    tiles, chunks = partial_tiles(r, rows, ceil_div(4 * PARTIALS, max(blocks, 1)))
    partial = x.new_empty((chunks, n if need_dbias else 0), dtype=torch.float32)
    launch(
        bias_gelu_bwd_kernel,
        chunks * blocks,
        dy,
        x,
        x if bias is None else bias,
        dx,
        partial,
        r,
        n,
        dy.stride(0),
        x.stride(0),
        blocks,
        tiles,
        BIAS=bias is not None,
        TANH=tanh,
        DBIAS=need_dbias,
        UNIT=unit(n),
        STRIDE_UNIT=unit(dy.stride(0), x.stride(0)),
        ROWS=rows,
        BLOCK=block,
    )
    return dx, column_sums(partial)
