"""loss = (1 - e) w_t (lse - x_t) + e / v sum_j w_j (lse - x_j), lse = log sum_j exp(x_j) per row;
dx_j = g ((1 - e) w_t (p_j - [j = t]) + e / v (p_j sum(w) - w_j)), p = exp(x - lse), g = dloss.

A program takes ROWS rows in blocks of columns. Each group of columns that one thread holds has a
running maximum and sum of its own, so that no barrier stands in the loop. Which columns make a
group depends on v alone, so that a row has the same bits wherever it lies: rows of odd length begin
anywhere, and are read element by element, a warp taking 32 neighbours.
A second kernel adds the losses of the rows, and traps a bad target, in one program.
Bytes: forward reads x, backward reads x and writes dx, r v each.
Source: Milakov, Gimelshein 2018, https://arxiv.org/abs/1805.02867 (the online sum)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.backends.triton._blocks import LOG2E, rounded
from fastgpt.backends.triton._launch import ceil_div, launch, next_power_of_2
from fastgpt.backends.triton._rows import unit
from fastgpt.ops._losses import REDUCTIONS, check_classes, loss_outputs

NONE, MEAN = tl.constexpr(REDUCTIONS["none"]), tl.constexpr(REDUCTIONS["mean"])
BLOCK = 4096
GROUP = 8
TILE = 2048
"""Elements that a program of short rows takes together."""


@triton.jit
def _row_weight(g_weight, target, valid, WEIGHT: tl.constexpr):
    w = tl.where(valid, 1.0, 0.0)
    if WEIGHT:
        w = tl.load(g_weight + target, mask=valid, other=0.0).to(tl.float32)
    return w


@triton.jit
def _all_weights(g_total, classes, WEIGHT: tl.constexpr):
    return tl.load(g_total) if WEIGHT else classes.to(tl.float32)


@triton.jit
def _grouped(x, GROUP: tl.constexpr, WIDE: tl.constexpr):
    """x (rows, columns) with the columns that a thread holds along an axis of their own: the
    neighbours that it reads together, or those that lie a number of threads apart."""
    if WIDE:
        y = tl.reshape(x, [x.shape[0], x.shape[1] // GROUP, GROUP])
    else:
        y = tl.reshape(x, [x.shape[0], GROUP, x.shape[1] // GROUP])
    return y


@triton.jit(do_not_specialize=["r", "v", "x_stride", "ignore_index", "first", "classes"])
def cross_entropy_fwd_kernel(
    g_x,
    g_target,
    g_weight,
    g_total,
    g_loss,
    g_lse,
    g_state,
    r,
    v,
    x_stride,
    ignore_index,
    first,
    classes,
    hard,
    soft,
    WEIGHT: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCKED: tl.constexpr,
    LATER: tl.constexpr,
    UNIT: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    v = v // UNIT * UNIT
    axis: tl.constexpr = 2 if WIDE else 1
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < r
    target = tl.load(g_target + rows, mask=inside, other=0)
    kept = inside & (target != ignore_index)
    valid = kept & (target >= 0) & (target < classes)
    row_weight = _row_weight(g_weight, target, valid, WEIGHT)
    g_row = g_x + rows.to(tl.int64) * (x_stride // STRIDE_UNIT * STRIDE_UNIT)
    here = valid & (target >= first) & (target < first + v)
    picked = tl.load(g_row + target - first, mask=here, other=0.0).to(tl.float32)
    # Sums of x are taken relative to it, so that logits far from 0 lose no digits.
    shift = tl.load(g_row, mask=kept, other=0.0).to(tl.float32)
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
    old_top = tl.full([ROWS], -float("inf"), tl.float32)
    old_sum = tl.zeros([ROWS], tl.float32)
    relative = tl.zeros([ROWS], tl.float32)
    if LATER:
        old_top = tl.load(g_state + rows, mask=inside, other=0.0)
        old_sum = tl.load(g_state + r + rows, mask=inside, other=0.0)
        picked += tl.load(g_state + 2 * r + rows, mask=inside, other=0.0)
        relative = tl.load(g_state + 3 * r + rows, mask=inside, other=0.0)
        shift = tl.load(g_state + 4 * r + rows, mask=inside, other=0.0)

    columns = tl.arange(0, BLOCK)[None, :]
    peak = tl.full([ROWS, BLOCK // GROUP], -float("inf"), tl.float32)
    total = tl.zeros([ROWS, BLOCK // GROUP], tl.float32)
    smooth = tl.zeros([ROWS, BLOCK // GROUP], tl.float32)
    for start in range(0, v, BLOCK):
        at = start + columns
        seen = kept[:, None] & (at < v)
        x = tl.load(g_row[:, None] + at, mask=seen, other=-float("inf")).to(tl.float32)
        if SMOOTH:
            part = tl.where(seen, x - shift[:, None], 0.0)
            if WEIGHT:
                part *= tl.load(g_weight + at, mask=seen, other=0.0).to(tl.float32)
            smooth += tl.sum(_grouped(part, GROUP, WIDE), axis=axis)
        x = _grouped(x, GROUP, WIDE)
        higher = tl.maximum(peak, tl.max(x, axis=axis))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        total *= tl.exp2((peak - base) * LOG2E)
        total += tl.sum(tl.exp2((x - tl.expand_dims(base, axis)) * LOG2E), axis=axis)
        peak = higher

    top = tl.maximum(tl.max(peak, axis=1), old_top)
    base = tl.where(top == -float("inf"), 0.0, top)
    sum_exp = old_sum * tl.exp2((old_top - base) * LOG2E)
    sum_exp += tl.sum(total * tl.exp2((peak - base[:, None]) * LOG2E), axis=1)
    if SMOOTH:
        relative += tl.sum(smooth, axis=1)

    if BLOCKED:
        tl.store(g_state + rows, top, mask=inside)
        tl.store(g_state + r + rows, sum_exp, mask=inside)
        tl.store(g_state + 2 * r + rows, picked, mask=inside)
        tl.store(g_state + 3 * r + rows, relative, mask=inside)
        tl.store(g_state + 4 * r + rows, shift, mask=inside)
    # Of the classes so far: the last block's is the one that stays.
    log_sum = tl.log(sum_exp.to(tl.float64))
    loss = (top.to(tl.float64) - picked + log_sum) * row_weight
    if SMOOTH:
        distance = top.to(tl.float64) - shift + log_sum
        loss = hard * loss + soft * (_all_weights(g_total, classes, WEIGHT) * distance - relative)
    loss = tl.where(valid, loss, tl.where(kept, float("nan"), 0.0))
    tl.store(g_loss + rows, loss.to(tl.float32), mask=inside)
    tl.store(g_lse + rows, tl.where(kept, top + log_sum, 0.0), mask=inside)


@triton.jit(do_not_specialize=["r", "v", "ignore_index"], debug=True)
def cross_entropy_sum_kernel(
    g_row_loss,
    g_target,
    g_weight,
    g_loss,
    g_weight_sum,
    r,
    v,
    ignore_index,
    WEIGHT: tl.constexpr,
    REDUCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    losses = tl.zeros([BLOCK], tl.float64)
    weights = tl.zeros([BLOCK], tl.float64)
    for start in range(0, r, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside = rows < r
        target = tl.load(g_target + rows, mask=inside, other=0)
        kept = inside & (target != ignore_index)
        valid = kept & (target >= 0) & (target < v)
        tl.device_assert(valid | ~kept, "target: expected a class or ignore_index")
        losses += tl.load(g_row_loss + rows, mask=inside, other=0.0)
        weights += _row_weight(g_weight, target, valid, WEIGHT)
    loss, weight_sum = tl.sum(losses, axis=0), tl.sum(weights, axis=0)
    if REDUCTION == MEAN:
        loss = loss / weight_sum
    if REDUCTION != NONE:
        tl.store(g_loss, loss.to(tl.float32))
    tl.store(g_weight_sum, weight_sum.to(tl.float32))


@triton.jit(
    do_not_specialize=["r", "v", "x_stride", "dx_stride", "ignore_index", "first", "classes"]
)
def cross_entropy_bwd_kernel(
    g_dloss,
    g_x,
    g_target,
    g_weight,
    g_total,
    g_lse,
    g_weight_sum,
    g_dx,
    r,
    v,
    x_stride,
    dx_stride,
    ignore_index,
    first,
    classes,
    hard,
    soft,
    REDUCTION: tl.constexpr,
    WEIGHT: tl.constexpr,
    SMOOTH: tl.constexpr,
    UNIT: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    v = v // UNIT * UNIT
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < r
    target = tl.load(g_target + rows, mask=inside, other=0)
    kept = inside & (target != ignore_index)
    valid = kept & (target >= 0) & (target < classes)
    row_weight = _row_weight(g_weight, target, valid, WEIGHT)
    g = tl.load(g_dloss + (rows if REDUCTION == NONE else rows * 0), mask=inside, other=0.0)
    if REDUCTION == MEAN:
        g /= tl.load(g_weight_sum)
    lse = tl.load(g_lse + rows, mask=inside, other=0.0)
    # In two floats: what x is near to, and the rest.
    high = lse.to(tl.float32)
    low = (lse - high.to(tl.float64)).to(tl.float32)
    picked = g * hard * row_weight
    of_p = picked
    of_weight = g * soft
    if SMOOTH:
        of_p += of_weight * _all_weights(g_total, classes, WEIGHT)
    of_p = tl.where(kept & ~valid, float("nan"), of_p)[:, None]
    of_weight, picked = of_weight[:, None], picked[:, None]
    high, low, inside, kept = high[:, None], low[:, None], inside[:, None], kept[:, None]
    target = (target - first)[:, None]

    wide_rows = rows.to(tl.int64)[:, None]
    g_row = g_x + wide_rows * (x_stride // STRIDE_UNIT * STRIDE_UNIT)
    g_row_dx = g_dx + wide_rows * (dx_stride // STRIDE_UNIT * STRIDE_UNIT)
    columns = tl.arange(0, BLOCK)[None, :]
    for start in range(0, v, BLOCK):
        at = start + columns
        seen = at < v
        x = tl.load(g_row + at, mask=seen & kept, other=0.0)
        d = tl.exp2(((x.to(tl.float32) - high) - low) * LOG2E) * of_p
        if SMOOTH and WEIGHT:
            d -= of_weight * tl.load(g_weight + at, mask=seen, other=0.0).to(tl.float32)
        elif SMOOTH:
            d -= of_weight
        d = tl.where(at == target, d - picked, d)
        d = rounded(tl.where(kept, d, 0.0), g_dx.dtype.element_ty)
        tl.store(g_row_dx + at, d, mask=seen & inside)


def _tile(v: int) -> tuple[int, int]:
    block = min(next_power_of_2(max(v, 16)), BLOCK)
    return max(1, TILE // block), block


def _total(weight: Tensor | None, smooth: bool, other: Tensor) -> Tensor:
    """The sum of the class weights where it is needed."""
    return other if weight is None or not smooth else weight.sum(dtype=torch.float32)


def row_losses(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    loss: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    state: Tensor | None = None,
    first: int = 0,
    classes: int | None = None,
) -> None:
    """Write loss and lse (r,) of the logits x (r, v).

    x may also hold v of `classes` classes, from `first` on: blocks of them in ascending order, with
    `state` (5, r) float32 kept in between. Loss and lse are right after the last one.
    """
    r, v = x.shape
    rows, block = _tile(v)
    classes = v if classes is None else classes
    smooth = label_smoothing > 0
    launch(
        cross_entropy_fwd_kernel,
        ceil_div(r, rows),
        x,
        target,
        x if weight is None else weight,
        _total(weight, smooth, x),
        loss,
        lse,
        loss if state is None else state,
        r,
        v,
        x.stride(0),
        ignore_index,
        first,
        classes,
        1.0 - label_smoothing,
        label_smoothing / classes,
        WEIGHT=weight is not None,
        SMOOTH=smooth,
        BLOCKED=state is not None,
        LATER=first > 0,
        UNIT=unit(v),
        STRIDE_UNIT=unit(x.stride(0)),
        GROUP=GROUP,
        WIDE=v % GROUP == 0,
        ROWS=rows,
        BLOCK=block,
        num_warps=rows * block // 512,
    )


def reduce_losses(
    row_loss: Tensor,
    target: Tensor,
    weight: Tensor | None,
    v: int,
    loss: Tensor,
    weight_sum: Tensor,
    ignore_index: int,
    reduction: int,
) -> None:
    """Write the reduced loss, if there is one, and the sum of the weights of the targets."""
    launch(
        cross_entropy_sum_kernel,
        1,
        row_loss,
        target,
        row_loss if weight is None else weight,
        loss,
        weight_sum,
        row_loss.shape[0],
        v,
        ignore_index,
        WEIGHT=weight is not None,
        REDUCTION=reduction,
        BLOCK=1024,
    )


def logit_gradients(
    dloss: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    weight_sum: Tensor,
    dx: Tensor,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    first: int = 0,
    classes: int | None = None,
) -> None:
    """Write dx (r, v), which may be x, of the logits x of v of the classes from `first` on."""
    r, v = x.shape
    rows, block = _tile(v)
    classes = v if classes is None else classes
    smooth = label_smoothing > 0
    launch(
        cross_entropy_bwd_kernel,
        ceil_div(r, rows),
        dloss,
        x,
        target,
        x if weight is None else weight,
        _total(weight, smooth, dloss),
        lse,
        weight_sum,
        dx,
        r,
        v,
        x.stride(0),
        dx.stride(0),
        ignore_index,
        first,
        classes,
        1.0 - label_smoothing,
        label_smoothing / classes,
        REDUCTION=reduction,
        WEIGHT=weight is not None,
        SMOOTH=smooth,
        UNIT=unit(v),
        STRIDE_UNIT=unit(x.stride(0), dx.stride(0)),
        ROWS=rows,
        BLOCK=block,
        num_warps=rows * block // 512,
    )


def cross_entropy_fwd(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (r, v), target (r,) -> loss (r,) or (), lse (r,) float64 and the sum of w_t ()."""
    check_classes("triton", target, x.shape[1], ignore_index)
    loss, lse, weight_sum = loss_outputs(x, reduction)
    row_loss = (
        loss if reduction == REDUCTIONS["none"] else x.new_empty(x.shape[0], dtype=loss.dtype)
    )
    row_losses(x, target, weight, row_loss, lse, ignore_index, label_smoothing)
    v = x.shape[1]
    reduce_losses(row_loss, target, weight, v, loss, weight_sum, ignore_index, reduction)
    return loss, lse, weight_sum


def cross_entropy_bwd(
    dloss: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    weight_sum: Tensor,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
) -> Tensor:
    """dx (r, v) in the dtype of x, 0 in rows that do not count."""
    dx = x.new_empty(x.shape)
    options = (ignore_index, reduction, label_smoothing)
    logit_gradients(dloss, x, target, weight, lse, weight_sum, dx, *options)
    return dx
