"""y_j = exp(x_j - max x) / sum_k exp(x_k - max x) over the last axis; dx = y (dy - sum(dy y)).

A program takes ROWS whole rows into registers where a row fits, so each is read and written once:
2 and 3 passes of n elements. A longer row is walked in blocks, with running maximum and sum, and
read twice. ROWS and BLOCK depend on n alone, so a row's bits do not depend on its neighbours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.backends.triton._blocks import LOG2E, rounded
from fastgpt.backends.triton._launch import ceil_div, launch
from fastgpt.backends.triton._rows import rows_config


@triton.jit(do_not_specialize=["r"])
def softmax_fwd_kernel(
    g_x,
    g_y,
    r,
    n,
    x_stride,
    y_stride,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    g_x += rows.to(tl.int64)[:, None] * x_stride  # (ROWS, 1)
    g_y += rows.to(tl.int64)[:, None] * y_stride
    inside = rows[:, None] < r
    columns = tl.arange(0, BLOCK)[None, :]
    if WHOLE:
        seen = inside & (columns < n)
        x = tl.load(g_x + columns, mask=seen, other=-float("inf")).to(tl.float32)
        peak = tl.max(x, axis=1, keep_dims=True)
        # A row of -inf alone gives NaN, as torch's does.
        e = tl.exp2((x - peak) * LOG2E)
        y = e / tl.sum(e, axis=1, keep_dims=True)
        tl.store(g_y + columns, rounded(y, g_y.dtype.element_ty), mask=seen)
    else:
        peak = tl.full([ROWS, 1], -float("inf"), tl.float32)
        total = tl.zeros([ROWS, 1], tl.float32)
        for start in range(0, n, BLOCK):
            seen = inside & (start + columns < n)
            x = tl.load(g_x + start + columns, mask=seen, other=-float("inf")).to(tl.float32)
            higher = tl.maximum(peak, tl.max(x, axis=1, keep_dims=True))
            base = tl.where(higher == -float("inf"), 0.0, higher)
            total = total * tl.exp2((peak - base) * LOG2E)
            total += tl.sum(tl.exp2((x - base) * LOG2E), axis=1, keep_dims=True)
            peak = higher
        for start in range(0, n, BLOCK):
            seen = inside & (start + columns < n)
            x = tl.load(g_x + start + columns, mask=seen, other=-float("inf")).to(tl.float32)
            y = tl.exp2((x - peak) * LOG2E) / total
            tl.store(g_y + start + columns, rounded(y, g_y.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=["r"])
def softmax_bwd_kernel(
    g_dy,
    g_y,
    g_dx,
    r,
    n,
    dy_stride,
    y_stride,
    dx_stride,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    g_dy += rows.to(tl.int64)[:, None] * dy_stride  # (ROWS, 1)
    g_y += rows.to(tl.int64)[:, None] * y_stride
    g_dx += rows.to(tl.int64)[:, None] * dx_stride
    inside = rows[:, None] < r
    columns = tl.arange(0, BLOCK)[None, :]
    if WHOLE:
        seen = inside & (columns < n)
        dy = tl.load(g_dy + columns, mask=seen, other=0.0).to(tl.float32)
        y = tl.load(g_y + columns, mask=seen, other=0.0).to(tl.float32)
        dx = y * (dy - tl.sum(dy * y, axis=1, keep_dims=True))
        tl.store(g_dx + columns, rounded(dx, g_dx.dtype.element_ty), mask=seen)
    else:
        products = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, n, BLOCK):
            seen = inside & (start + columns < n)
            dy = tl.load(g_dy + start + columns, mask=seen, other=0.0).to(tl.float32)
            y = tl.load(g_y + start + columns, mask=seen, other=0.0).to(tl.float32)
            products += dy * y
        mean = tl.sum(products, axis=1, keep_dims=True)
        for start in range(0, n, BLOCK):
            seen = inside & (start + columns < n)
            dy = tl.load(g_dy + start + columns, mask=seen, other=0.0).to(tl.float32)
            y = tl.load(g_y + start + columns, mask=seen, other=0.0).to(tl.float32)
            dx = y * (dy - mean)
            tl.store(g_dx + start + columns, rounded(dx, g_dx.dtype.element_ty), mask=seen)


def softmax_fwd(x: Tensor, float_out: bool) -> Tensor:
    """x (r, n) -> y (r, n) in its dtype, or in float32."""
    r, n = x.shape
    y = x.new_empty((r, n), dtype=torch.float32 if float_out else x.dtype)
    config = rows_config(n)
    launch(
        softmax_fwd_kernel,
        ceil_div(r, config.rows),
        x,
        y,
        r,
        n,
        x.stride(0),
        y.stride(0),
        **config.constants,
        num_warps=config.num_warps,
    )
    return y


def softmax_bwd(dy: Tensor, y: Tensor, in_dtype: torch.dtype) -> Tensor:
    """dy, y (r, n) -> dx (r, n) in in_dtype."""
    r, n = y.shape
    dx = y.new_empty((r, n), dtype=in_dtype)
    config = rows_config(n)
    launch(
        softmax_bwd_kernel,
        ceil_div(r, config.rows),
        dy,
        y,
        dx,
        r,
        n,
        dy.stride(0),
        y.stride(0),
        dx.stride(0),
        **config.constants,
        num_warps=config.num_warps,
    )
    return dx
