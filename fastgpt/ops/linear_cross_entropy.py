"""linear_cross_entropy: the output projection and its loss, with a bound on the logits held."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.backends.reference import linear_cross_entropy as reference
from fastgpt.ops._autograd import needs_grad, once, record, without_grad
from fastgpt.ops._checks import (
    NARROW_DTYPES,
    autocast_dtype,
    check_float,
    check_parameter,
    check_same_device,
    check_same_dtype,
    statistics_dtype,
)
from fastgpt.ops._library import define
from fastgpt.ops._losses import (
    REDUCTIONS,
    check_options,
    check_target,
    flat_classes,
    loss_dtype,
    loss_outputs,
)
from fastgpt.ops._rows import as_rows, unit_stride


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """cross_entropy(input @ linear_weight.T + linear_bias, target) in blocks of rows and classes.

    Of the (n, v) logits at most 32 MiB exist at a time on a CPU, 64 MiB on a GPU, forward and
    backward. Where a CPU records a loss for its gradient, the gradient mostly comes with it, which
    spares computing the logits a second time: it is held until the backward, which only multiplies
    it by dloss. Evaluate under `torch.no_grad()`, which computes no gradient.

    Args:
        input: hidden states (..., c), float32, bfloat16 or float16 (float64: reference).
        linear_weight: (v, c), in the dtype of input (under autocast both are brought to its dtype).
        target: classes (...), int64 (or uint8).
        linear_bias: (v,), in the dtype of input or float32 (under autocast any narrow one);
            optional.
        ignore_index: rows with this target do not count; their gradient is exactly 0.
        reduction: "mean" (over the targets that count; NaN if there are none), "sum", "none".
        label_smoothing: from 0 to 1, the share of the target that is spread over all classes.

    Returns:
        The loss, 0-d or of the shape of target, in the dtype of input (float32 under autocast).
        Logits are not rounded to the dtype of input in between.

    Raises:
        ValueError: a shape or device differs, a target is neither a class nor ignore_index, or an
            option is out of range.
        TypeError: input is not floating, linear_weight has another dtype, or target is not int64
            or uint8.
    """
    check_float("input", input)
    check_options(ignore_index, reduction, label_smoothing)
    if input.dim() == 0:
        raise ValueError("input: expected hidden states (..., c), got a 0-d tensor")
    check_float("linear_weight", linear_weight)
    if linear_weight.dim() != 2 or linear_weight.shape[1] != input.shape[-1]:
        raise ValueError(
            f"linear_weight: expected shape (v, c) with c = {input.shape[-1]}, the last dimension "
            f"of input, got {tuple(linear_weight.shape)}"
        )
    v = linear_weight.shape[0]
    if v < 1:
        raise ValueError("linear_weight: expected at least one class, got none")
    check_same_device("linear_weight", linear_weight, "input", input)
    check_target(target, input, tuple(input.shape[:-1]), "input's without its last dimension")
    region = autocast_dtype(input)
    out_dtype = loss_dtype(input, region is not None)
    if region is not None and input.dtype != torch.float64:
        input, linear_weight = input.to(region), linear_weight.to(region)
        if isinstance(linear_bias, Tensor) and linear_bias.dtype in NARROW_DTYPES:
            linear_bias = linear_bias.to(region)
    check_same_dtype("linear_weight", linear_weight, "input", input)
    if linear_bias is not None:
        check_parameter("linear_bias", linear_bias, "input", input, (v,), "(v,)")
        linear_bias = linear_bias.contiguous()

    x, weight = as_rows(input), unit_stride(linear_weight)
    classes = flat_classes(target)
    options = (ignore_index, REDUCTIONS[reduction], label_smoothing)
    backend = dispatch.pick("linear_cross_entropy", input)
    if backend == "reference":
        run = reference.linear_cross_entropy_fwd
        loss = run(x, weight, linear_bias, classes, *options)[0]
    elif needs_grad(input, linear_weight, linear_bias):
        loss = record(_LinearCrossEntropy, backend, x, weight, linear_bias, classes, *options)
    else:
        run = dispatch.kernel("linear_cross_entropy", backend, "linear_cross_entropy_fwd")
        loss = run(x, weight, linear_bias, classes, *options)[0]
    loss = loss.to(out_dtype)
    return loss.view(target.shape) if reduction == "none" else loss


_MOST_FLOATS = 1 << 23
"""Logits that give a loss and its gradients at once, and float32 sums of narrow ones: 32 MiB."""
_PADDING = 16
"""Floats between the logits of two rows, as the kernel lays them out."""
_FEWEST_ROWS = 128
"""Fewer rows at a time do not pay for passing over the gradient of the weight."""


def _rows_kept(backend: str, x: Tensor, weight: Tensor, reduction: int) -> int:
    """Of how many rows the logits are kept, at most, to give gradients with the loss; 0: of none.

    Not a function of the number of rows itself, which a compiled graph leaves open.
    """
    if backend != "cpu" or reduction == REDUCTIONS["none"] or x.shape[0] == 0:
        return 0
    narrow = x.dtype != torch.float32
    if narrow and (weight.numel() > _MOST_FLOATS or x.numel() > _MOST_FLOATS):
        return 0
    most = _MOST_FLOATS // (weight.shape[0] + _PADDING)
    if x.shape[0] <= most:
        return most
    return 0 if narrow or most < _FEWEST_ROWS else most // _FEWEST_ROWS * _FEWEST_ROWS


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        ignore_index: int,
        reduction: int,
        label_smoothing: float,
    ) -> Tensor:
        options = (ignore_index, reduction, label_smoothing)
        kept = _rows_kept(backend, x, weight, reduction)
        name = "linear_cross_entropy_fwd_bwd" if kept else "linear_cross_entropy_fwd"
        run = dispatch.kernel("linear_cross_entropy", backend, name)
        more = (kept, *ctx.needs_input_grad[1:4]) if kept else ()
        loss, lse, weight_sum, *grads = run(x, weight, bias, target, *options, *more)
        ctx.kept, ctx.given = kept, None
        if torch.compiler.is_compiling():
            ctx.save_for_backward(x, weight, bias, target, lse, weight_sum, *grads)
        else:
            ctx.save_for_backward(x, weight, bias, target, lse, weight_sum)
            ctx.given = grads
        ctx.backend, ctx.options = backend, options
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> Any:
        saved = ctx.saved_tensors
        x, weight, bias, target = saved[:4]
        needed = ctx.needs_input_grad[1:4]
        with without_grad():
            grads = _gradients(ctx, dloss, saved, needed)
            dx, dweight, dbias = (
                gradient.to(of.dtype) if need else None
                for gradient, of, need in zip(grads, (x, weight, bias), needed, strict=True)
            )
        sources = (dloss, x, weight, bias, target)
        return None, *once("linear_cross_entropy", sources, dx, dweight, dbias), *(None,) * 4


def _gradients(
    ctx: Any, dloss: Tensor, saved: tuple[Tensor, ...], needed: tuple[bool, ...]
) -> Sequence[Tensor]:
    """dloss times those of x (r, c), weight (v, c) and bias (v,), of the op or in float32.

    What came with the loss is given away to the first backward; a second one computes it again.
    """
    if len(saved) > 6:
        return [gradient * dloss for gradient in saved[6:]]
    known = ctx.kept and type(dloss) is Tensor and not torch.compiler.is_compiling()
    factor = _number(dloss) if known else None
    # An infinite factor must not reach the zeros of ignored rows.
    if not ctx.kept or not (factor is None or math.isfinite(factor)):
        run = dispatch.kernel("linear_cross_entropy", ctx.backend, "linear_cross_entropy_bwd")
        gradients: Sequence[Tensor] = run(dloss.contiguous(), *saved, *ctx.options, *needed)
        return gradients
    gradients, ctx.given = ctx.given, None
    if gradients is None:
        run = dispatch.kernel("linear_cross_entropy", ctx.backend, "linear_cross_entropy_fwd_bwd")
        gradients = run(*saved[:4], *ctx.options, ctx.kept, *needed)[3:]
    if factor is None:
        return [gradient * dloss for gradient in gradients]
    if factor != 1.0:
        for gradient in gradients:
            gradient.mul_(dloss)
    return gradients


def _number(dloss: Tensor) -> float | None:
    """The value of dloss; None where it has none to tell, being traced or many at once."""
    try:
        return float(dloss.item())
    except RuntimeError:
        return None


def _linear_cross_entropy_fwd_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return loss_outputs(x, reduction)


def _linear_cross_entropy_bwd_fake(
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
    return _empty_gradients(x, weight, x.dtype, need_dx, need_dweight, need_dbias)


def _linear_cross_entropy_fwd_bwd_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    rows_kept: int,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, ...]:
    needed = (need_dx, need_dweight, need_dbias)
    return *loss_outputs(x, reduction), *_empty_gradients(x, weight, statistics_dtype(x), *needed)


def _empty_gradients(
    x: Tensor, weight: Tensor, dtype: torch.dtype, dx: bool, dweight: bool, dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if dx else (0,), dtype=dtype),
        x.new_empty(weight.shape if dweight else (0,), dtype=dtype),
        x.new_empty(weight.shape[0] if dbias else 0, dtype=statistics_dtype(x)),
    )


define(
    "linear_cross_entropy_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor target, int ignore_index, int reduction,"
    " float label_smoothing) -> (Tensor loss, Tensor lse, Tensor weight_sum)",
    _linear_cross_entropy_fwd_fake,
)
define(
    "linear_cross_entropy_bwd",
    "(Tensor dloss, Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor lse,"
    " Tensor weight_sum, int ignore_index, int reduction, float label_smoothing, bool need_dx,"
    " bool need_dweight, bool need_dbias) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _linear_cross_entropy_bwd_fake,
)
# The loss and its gradients for dloss = 1, these in float32; on a CPU, and not of reduction "none".
define(
    "linear_cross_entropy_fwd_bwd",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor target, int ignore_index, int reduction,"
    " float label_smoothing, SymInt rows_kept, bool need_dx, bool need_dweight, bool need_dbias)"
    " -> (Tensor loss, Tensor lse, Tensor weight_sum, Tensor dx, Tensor dweight, Tensor dbias)",
    _linear_cross_entropy_fwd_bwd_fake,
)
