"""y = (x - mean) * rstd * weight + bias, rstd = (var + eps)^-1/2, exact two-pass variance.
dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + ds with g = dy * weight, xhat the normalized x.

Forward: a program takes ROWS whole rows into registers; a longer row is walked three times.
Backward: a program takes a chunk of rows, tile by tile, reads each tile twice (again from the L1
cache) and keeps the sums for dweight and dbias in registers, of longer rows in memory. They go to a
row of `partial`, whose rows a second kernel adds.
Bytes: forward reads x and writes y, backward reads dy and x and writes dx, r n each.
Source: Ba, Kiros, Hinton 2016, https://arxiv.org/abs/1607.06450
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.backends.triton._blocks import rounded
from fastgpt.backends.triton._launch import ceil_div, launch
from fastgpt.backends.triton._rows import (
    RowsConfig,
    column_sums,
    partial_tiles,
    split_rows_config,
    unit,
)

READ_AHEAD = 64 * 1024
"""Bytes of shared memory, at most, for the tiles that the backward reads ahead."""


@triton.jit
def _summed(g_x, g_residual, g_s, at, seen, ADD: tl.constexpr):
    """What is normalized: x, or s = x + residual as its dtype holds it, which is stored."""
    x = tl.load(g_x + at, mask=seen, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(g_residual + at, mask=seen, other=0.0).to(tl.float32)
        s = rounded(x, g_s.dtype.element_ty)
        tl.store(g_s + at, s, mask=seen)
        x = s.to(tl.float32)
    return x


@triton.jit
def _store_y(xhat, g_weight, g_bias, g_y, at, inside, n, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    y = xhat
    if WEIGHT:
        y *= tl.load(g_weight + at, mask=at < n, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(g_bias + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(g_y + at, rounded(y, g_y.dtype.element_ty), mask=inside & (at < n))


@triton.jit(do_not_specialize=["r"])
def layer_norm_fwd_kernel(
    g_x,
    g_residual,
    g_weight,
    g_bias,
    g_y,
    g_s,
    g_statistics,
    r,
    n,
    x_stride,
    residual_stride,
    eps,
    ADD: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    UNIT: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    n = n // UNIT * UNIT
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    wide_rows = rows.to(tl.int64)
    g_x += wide_rows * (x_stride // STRIDE_UNIT * STRIDE_UNIT)  # (ROWS, 1)
    g_residual += wide_rows * (residual_stride // STRIDE_UNIT * STRIDE_UNIT)
    g_y += wide_rows * n
    g_s += wide_rows * n
    inside = rows < r
    head = tl.arange(0, BLOCK)[None, :]
    if WHOLE:
        x = _summed(g_x, g_residual, g_s, head, inside & (head < n), ADD)
        total = tl.sum(x, axis=1, keep_dims=True)
        if TAIL:
            tail = BLOCK + tl.arange(0, TAIL)[None, :]
            x_tail = _summed(g_x, g_residual, g_s, tail, inside & (tail < n), ADD)
            total += tl.sum(x_tail, axis=1, keep_dims=True)
        mean = total / n
        x = tl.where(head < n, x - mean, 0.0)
        squares = tl.sum(x * x, axis=1, keep_dims=True)
        if TAIL:
            x_tail = tl.where(tail < n, x_tail - mean, 0.0)
            squares += tl.sum(x_tail * x_tail, axis=1, keep_dims=True)
        rstd = tl.rsqrt(squares / n + eps)
        _store_y(x * rstd, g_weight, g_bias, g_y, head, inside, n, WEIGHT, BIAS)
        if TAIL:
            _store_y(x_tail * rstd, g_weight, g_bias, g_y, tail, inside, n, WEIGHT, BIAS)
    else:
        sums = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, n, BLOCK):
            at = start + head
            sums += _summed(g_x, g_residual, g_s, at, inside & (at < n), ADD)
        mean = tl.sum(sums, axis=1, keep_dims=True) / n
        sums = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, n, BLOCK):
            at = start + head
            x = _summed(g_x, g_residual, g_s, at, inside & (at < n), ADD)
            x = tl.where(at < n, x - mean, 0.0)
            sums += x * x
        rstd = tl.rsqrt(tl.sum(sums, axis=1, keep_dims=True) / n + eps)
        for start in range(0, n, BLOCK):
            at = start + head
            x = _summed(g_x, g_residual, g_s, at, inside & (at < n), ADD)
            _store_y((x - mean) * rstd, g_weight, g_bias, g_y, at, inside, n, WEIGHT, BIAS)
    tl.store(g_statistics + rows, mean, mask=inside)
    tl.store(g_statistics + r + rows, rstd, mask=inside)


@triton.jit
def _xhat_dy(g_x, g_dy, at, seen, mean, rstd, POLICY: tl.constexpr):
    x = tl.load(g_x + at, mask=seen, other=0.0, eviction_policy=POLICY).to(tl.float32)
    dy = tl.load(g_dy + at, mask=seen, other=0.0, eviction_policy=POLICY).to(tl.float32)
    return (x - mean) * rstd, dy


@triton.jit
def _weighted(dy, g_weight, at, n, WEIGHT: tl.constexpr, POLICY: tl.constexpr):
    g = dy
    if WEIGHT:
        w = tl.load(g_weight + at, mask=at < n, other=0.0, eviction_policy=POLICY)
        g = dy * w.to(tl.float32)
    return g


@triton.jit
def _store_dx(xhat, g, mean_g, mean_gx, rstd, g_ds, g_dx, at, seen, DS: tl.constexpr):
    dx = rstd * ((g - mean_g) - xhat * mean_gx)
    if DS:
        dx += tl.load(g_ds + at, mask=seen, other=0.0).to(tl.float32)
    tl.store(g_dx + at, rounded(dx, g_dx.dtype.element_ty), mask=seen)


@triton.jit
def _add_to(g_sum, value, seen, again):
    before = tl.load(g_sum, mask=seen & again, other=0.0)
    tl.store(g_sum, before + value, mask=seen)


@triton.jit(do_not_specialize=["r", "tiles"])
def layer_norm_bwd_kernel(
    g_dy,
    g_x,
    g_weight,
    g_statistics,
    g_ds,
    g_dx,
    g_partial,
    r,
    n,
    dy_stride,
    x_stride,
    ds_stride,
    tiles,
    WEIGHT: tl.constexpr,
    DS: tl.constexpr,
    DWEIGHT: tl.constexpr,
    DBIAS: tl.constexpr,
    UNIT: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    n = n // UNIT * UNIT
    # Of each program first the n sums of dweight, then those of dbias.
    g_dweight = g_partial + tl.program_id(0).to(tl.int64) * (n * (DWEIGHT + DBIAS))
    g_dbias = g_dweight + n * DWEIGHT
    head = tl.arange(0, BLOCK)[None, :]
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    w = tl.full([1, BLOCK], 1.0, tl.float32)
    if TAIL:
        tail = BLOCK + tl.arange(0, TAIL)[None, :]
        dweight_tail = tl.zeros([ROWS, TAIL], tl.float32)
        dbias_tail = tl.zeros([ROWS, TAIL], tl.float32)
    elif WHOLE and WEIGHT:
        w = tl.load(g_weight + head, mask=head < n, other=0.0).to(tl.float32)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        rows = (tl.program_id(0) * tiles + tile) * ROWS + tl.arange(0, ROWS)
        # Loaded as (ROWS, 1), Triton 3.4 would load them once for each element of a thread.
        mean = tl.load(g_statistics + rows, mask=rows < r, other=0.0)[:, None]
        rstd = tl.load(g_statistics + r + rows, mask=rows < r, other=0.0)[:, None]
        inside = rows[:, None] < r
        wide_rows = rows.to(tl.int64)[:, None]
        g_xs = g_x + wide_rows * (x_stride // STRIDE_UNIT * STRIDE_UNIT)
        g_dys = g_dy + wide_rows * (dy_stride // STRIDE_UNIT * STRIDE_UNIT)
        g_dss = g_ds + wide_rows * (ds_stride // STRIDE_UNIT * STRIDE_UNIT)
        g_dxs = g_dx + wide_rows * n
        if WHOLE and TAIL == 0:
            seen = inside & (head < n)
            xhat, dy = _xhat_dy(g_xs, g_dys, head, seen, mean, rstd, "")
            g = dy * w
            mean_g = tl.sum(g, axis=1, keep_dims=True) / n
            mean_gx = tl.sum(g * xhat, axis=1, keep_dims=True) / n
            _store_dx(xhat, g, mean_g, mean_gx, rstd, g_dss, g_dxs, head, seen, DS)
            if DWEIGHT:
                dweight += dy * xhat
            if DBIAS:
                dbias += dy
        elif WHOLE:
            # Read twice, the second time from the L1 cache: there are no registers for x and dy.
            # The policies keep the compiler from merging the two.
            seen = inside & (tail < n)
            xhat, dy = _xhat_dy(g_xs, g_dys, head, inside, mean, rstd, "evict_last")
            g = _weighted(dy, g_weight, head, n, WEIGHT, "evict_last")
            sum_g = tl.sum(g, axis=1, keep_dims=True)
            sum_gx = tl.sum(g * xhat, axis=1, keep_dims=True)
            xhat, dy = _xhat_dy(g_xs, g_dys, tail, seen, mean, rstd, "evict_last")
            g = _weighted(dy, g_weight, tail, n, WEIGHT, "evict_last")
            mean_g = (sum_g + tl.sum(g, axis=1, keep_dims=True)) / n
            mean_gx = (sum_gx + tl.sum(g * xhat, axis=1, keep_dims=True)) / n

            xhat, dy = _xhat_dy(g_xs, g_dys, head, inside, mean, rstd, "evict_first")
            g = _weighted(dy, g_weight, head, n, WEIGHT, "evict_first")
            _store_dx(xhat, g, mean_g, mean_gx, rstd, g_dss, g_dxs, head, inside, DS)
            if DWEIGHT:
                dweight += dy * xhat
            if DBIAS:
                dbias += dy
            xhat, dy = _xhat_dy(g_xs, g_dys, tail, seen, mean, rstd, "evict_first")
            g = _weighted(dy, g_weight, tail, n, WEIGHT, "evict_first")
            _store_dx(xhat, g, mean_g, mean_gx, rstd, g_dss, g_dxs, tail, seen, DS)
            if DWEIGHT:
                dweight_tail += dy * xhat
            if DBIAS:
                dbias_tail += dy
        else:
            sum_g = tl.zeros([ROWS, BLOCK], tl.float32)
            sum_gx = tl.zeros([ROWS, BLOCK], tl.float32)
            for start in range(0, n, BLOCK):
                at = start + head
                xhat, dy = _xhat_dy(g_xs, g_dys, at, inside & (at < n), mean, rstd, "")
                g = _weighted(dy, g_weight, at, n, WEIGHT, "")
                sum_g += g
                sum_gx += g * xhat
            mean_g = tl.sum(sum_g, axis=1, keep_dims=True) / n
            mean_gx = tl.sum(sum_gx, axis=1, keep_dims=True) / n
            for start in range(0, n, BLOCK):
                at = start + head
                seen = inside & (at < n)
                xhat, dy = _xhat_dy(g_xs, g_dys, at, seen, mean, rstd, "")
                g = _weighted(dy, g_weight, at, n, WEIGHT, "")
                _store_dx(xhat, g, mean_g, mean_gx, rstd, g_dss, g_dxs, at, seen, DS)
                if DWEIGHT:
                    _add_to(g_dweight + at, dy * xhat, at < n, tile > 0)
                if DBIAS:
                    _add_to(g_dbias + at, dy, at < n, tile > 0)
    if WHOLE and DWEIGHT:
        tl.store(g_dweight + head, tl.sum(dweight, axis=0, keep_dims=True), mask=head < n)
        if TAIL:
            sums = tl.sum(dweight_tail, axis=0, keep_dims=True)
            tl.store(g_dweight + tail, sums, mask=tail < n)
    if WHOLE and DBIAS:
        tl.store(g_dbias + head, tl.sum(dbias, axis=0, keep_dims=True), mask=head < n)
        if TAIL:
            sums = tl.sum(dbias_tail, axis=0, keep_dims=True)
            tl.store(g_dbias + tail, sums, mask=tail < n)


def layer_norm_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, float_out: bool
) -> tuple[Tensor, Tensor]:
    """x (r, n) -> y (r, n) in its dtype, or in float32, and the mean and rstd of rows (2, r)."""
    y, _, statistics = _forward(x, None, weight, bias, eps, float_out)
    return y, statistics


def add_layer_norm_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    float_out: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """s = x + residual rounded to the dtype of x; y = layer_norm(s)."""
    return _forward(x, residual, weight, bias, eps, float_out)


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    float_out: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    r, n = x.shape
    y = x.new_empty((r, n), dtype=torch.float32 if float_out else x.dtype)
    s = x if residual is None else x.new_empty((r, n))
    statistics = x.new_empty((2, r), dtype=torch.float32)
    added = x if residual is None else residual
    config = split_rows_config(n)
    launch(
        layer_norm_fwd_kernel,
        ceil_div(r, config.rows),
        x,
        added,
        x if weight is None else weight,
        x if bias is None else bias,
        y,
        s,
        statistics,
        r,
        n,
        x.stride(0),
        added.stride(0),
        eps,
        ADD=residual is not None,
        WEIGHT=weight is not None,
        BIAS=bias is not None,
        UNIT=unit(n),
        STRIDE_UNIT=unit(x.stride(0), added.stride(0)),
        **config.constants,
        TAIL=config.tail,
        num_warps=config.num_warps,
    )
    return y, s, statistics


def _stages(config: RowsConfig, bytes_read: int) -> int:
    """1 for no tile read ahead, 2 or 3 for one or two, of that many bytes an element."""
    if config.tail or not config.whole:
        return 1
    return 1 + min(2, READ_AHEAD // (config.rows * config.block * bytes_read))


def layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    ds: Tensor | None,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dy, x (r, n) -> dx (r, n) in the dtype of x, dweight and dbias (n,), empty if not needed."""
    r, n = x.shape
    dx = x.new_empty((r, n))
    config = split_rows_config(n)
    tiles, programs = partial_tiles(r, config.rows)
    partial = statistics.new_empty((programs, (need_dweight + need_dbias) * n))
    added = dy if ds is None else ds
    bytes_read = dy.element_size() + x.element_size() + (0 if ds is None else ds.element_size())
    launch(
        layer_norm_bwd_kernel,
        programs,
        dy,
        x,
        x if weight is None else weight,
        statistics,
        added,
        dx,
        partial,
        r,
        n,
        dy.stride(0),
        x.stride(0),
        added.stride(0),
        tiles,
        WEIGHT=weight is not None,
        DS=ds is not None,
        DWEIGHT=need_dweight,
        DBIAS=need_dbias,
        UNIT=unit(n),
        STRIDE_UNIT=unit(dy.stride(0), x.stride(0), added.stride(0)),
        STAGES=_stages(config, bytes_read),
        **config.constants,
        TAIL=config.tail,
        num_warps=config.num_warps,
    )
    sums = column_sums(partial)
    dweight = sums[:n] if need_dweight else sums[:0]
    dbias = sums[-n:] if need_dbias else sums[:0]
    return dx, dweight, dbias
