"""cross_entropy(x @ weight.T + bias, target) in blocks of float32 logits.

Blocks of classes outside, blocks of rows inside: a matrix product of torch makes a block of logits,
the kernels of cross_entropy absorb it, or turn it into its gradient, whose products with weight and
x are added in float32 and rounded once. A factor that all rows share waits until then, so that
dlogits have the size of p, and not of p / r, which float16 could not hold.
Flops: 2 r v c forward, 6 r v c backward (the logits are computed again).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.backends.triton._launch import ceil_div
from fastgpt.backends.triton._rows import column_sums
from fastgpt.backends.triton.cross_entropy import logit_gradients, reduce_losses, row_losses
from fastgpt.ops._checks import without_autocast
from fastgpt.ops._losses import REDUCTIONS, check_classes, loss_outputs

BLOCK_ROWS = 4096
BLOCK_CLASSES = 8192
BLOCK_ELEMENTS = 1 << 25
"""Of a float32 block of the gradient of weight: 128 MiB, as of one of the logits."""
ALIGNED = 8
"""Classes of which a row of bfloat16 is one that the matrix products take at full speed."""

NONE, MEAN, SUM = REDUCTIONS["none"], REDUCTIONS["mean"], REDUCTIONS["sum"]


def _blocks(count: int, size: int) -> list[tuple[int, int]]:
    """(first, how many) of each block; the few beyond a multiple of ALIGNED have their own."""
    even = count // ALIGNED * ALIGNED
    blocks = [(i * size, min(size, even - i * size)) for i in range(ceil_div(even, size))]
    return blocks if even == count else [*blocks, (even, count - even)]


def _class_blocks(weight: Tensor) -> list[tuple[int, int]]:
    v, c = weight.shape
    size = BLOCK_ELEMENTS // max(c, 1) // 128 * 128
    return _blocks(v, max(128, min(BLOCK_CLASSES, size)))


def _row_blocks(x: Tensor) -> list[slice]:
    r = x.shape[0]
    firsts = [i * BLOCK_ROWS for i in range(ceil_div(r, BLOCK_ROWS))]
    return [slice(first, min(first + BLOCK_ROWS, r)) for first in firsts]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32: of low precision only the factors are."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.to(torch.float32), b.to(torch.float32))


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = _product(x, weight.T)
    return logits if bias is None else logits.add_(bias)


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (r, c), weight (v, c), target (r,) -> loss (r,) or (), lse (r,) float64, their count ()."""
    r, v = x.shape[0], weight.shape[0]
    check_classes("triton", target, v, ignore_index)
    loss, lse, weight_sum = loss_outputs(x, reduction)
    row_loss = loss if reduction == NONE else x.new_empty(r, dtype=torch.float32)
    with without_autocast(x):
        for rows in _row_blocks(x):
            state = x.new_empty((5, rows.stop - rows.start), dtype=torch.float32)
            for first, count in _class_blocks(weight):
                at = slice(first, first + count)
                row_losses(
                    _logits(x[rows], weight[at], None if bias is None else bias[at]),
                    target[rows],
                    None,
                    row_loss[rows],
                    lse[rows],
                    ignore_index,
                    label_smoothing,
                    state,
                    first,
                    v,
                )
    reduce_losses(row_loss, target, None, v, loss, weight_sum, ignore_index, reduction)
    return loss, lse, weight_sum


def linear_cross_entropy_bwd(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    weight_sum: Tensor,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx = dlogits @ weight, dweight = dlogits.T @ x, dbias = sum of dlogits over the rows."""
    v = weight.shape[0]
    dx = x.new_empty(x.shape if need_dx else (0,))
    dweight = weight.new_zeros(weight.shape if need_dweight else (0,))
    dbias = x.new_zeros(v if need_dbias else 0, dtype=torch.float32)
    each = reduction == NONE
    inner, factor = dloss, None
    if not each:
        inner, factor = torch.ones_like(dloss), dloss
    if reduction == MEAN:
        # No target that counts: every dlogits is 0 and must stay so.
        factor = torch.where(weight_sum > 0, dloss / weight_sum, 0.0)
    options = (ignore_index, NONE if each else SUM, label_smoothing)
    row_blocks = _row_blocks(x)
    dx_sums: list[Tensor | None] = [None] * len(row_blocks)
    with without_autocast(x):
        for first, count in _class_blocks(weight):
            at = slice(first, first + count)
            own_bias = None if bias is None else bias[at]
            dweight_sum: Tensor | None = None
            for i, rows in enumerate(row_blocks):
                logits = _logits(x[rows], weight[at], own_bias)
                d = logits if need_dbias else x.new_empty(logits.shape)
                logit_gradients(
                    inner[rows] if each else inner,
                    logits,
                    target[rows],
                    None,
                    lse[rows],
                    weight_sum,
                    d,
                    *options,
                    first,
                    v,
                )
                if need_dbias:
                    dbias[at] += column_sums(d)
                d = d.to(x.dtype)
                if need_dx:
                    dx_sums[i] = _added(dx_sums[i], _product(d, weight[at]))
                if need_dweight:
                    dweight_sum = _added(dweight_sum, _product(d.T, x[rows]))
            if dweight_sum is not None:
                dweight[at] = dweight_sum if factor is None else dweight_sum.mul_(factor)
    for rows, dx_sum in zip(row_blocks, dx_sums, strict=True):
        if dx_sum is not None:
            dx[rows] = dx_sum if factor is None else dx_sum.mul_(factor)
    return dx, dweight, dbias if factor is None else dbias.mul_(factor)
