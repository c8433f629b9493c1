"""cross_entropy, as torch's, in one pass over the logits each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.backends.reference import cross_entropy as reference
from fastgpt.ops._autograd import needs_grad, once, record, without_grad
from fastgpt.ops._checks import (
    FLOAT_DTYPES,
    autocast_dtype,
    check_float,
    check_parameter,
    check_tensor,
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
from fastgpt.ops._rows import as_rows


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of logits against classes, as `torch.nn.functional.cross_entropy`.

    Args:
        input: logits (n, v), (v,) or (n, v, d1, ...), float32, bfloat16 or float16 (float64:
            reference).
        target: classes of the shape of input without v, int64 (or uint8). A floating target holds
            class probabilities: that form goes to torch, and `explain` says so.
        weight: (v,), one factor per class, in the dtype of input or float32; it has no gradient.
        ignore_index: rows with this target are not read; their gradient is exactly 0.
        reduction: "mean" (over the weights of the targets; NaN if all are ignored), "sum", "none".
        label_smoothing: from 0 to 1, the share of the target that is spread over all classes.

    Returns:
        The loss, 0-d or of the shape of target, in the dtype of input (float32 under autocast).

    Raises:
        ValueError: a shape or device differs, a target is neither a class nor ignore_index, or an
            option is out of range.
        TypeError: input is not floating, or target not int64, uint8 or floating.
    """
    check_float("input", input)
    check_tensor("target", target)
    check_options(ignore_index, reduction, label_smoothing)
    if input.dim() == 0:
        raise ValueError("input: expected logits (n, v), (v,) or (n, v, d1, ...), got a 0-d tensor")
    if target.is_floating_point():
        dispatch.report_fallback("cross_entropy", "target holds class probabilities")
        return torch.nn.functional.cross_entropy(
            input,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    class_dim = min(input.dim() - 1, 1)
    size = input.shape
    v = size[class_dim]
    if v < 1:
        raise ValueError(f"input: expected at least one class, got shape {tuple(size)}")
    shape = (size[0],) if len(size) == 2 else (*size[:class_dim], *size[class_dim + 1 :])
    check_target(target, input, shape, "input's without its classes")
    autocast = autocast_dtype(input) is not None
    if weight is not None:
        if autocast and isinstance(weight, Tensor) and weight.dtype in FLOAT_DTYPES:
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        check_parameter("weight", weight, "input", input, (v,), "(v,)")
        if needs_grad(weight):
            raise ValueError("weight: expected requires_grad=False, there is no gradient for it")
        weight = weight.contiguous()

    last = class_dim == input.dim() - 1
    x = as_rows(input if last else input.movedim(class_dim, -1))
    classes = flat_classes(target)
    options = (ignore_index, REDUCTIONS[reduction], label_smoothing)
    backend = dispatch.pick("cross_entropy", input)
    if backend == "reference":
        loss = reference.cross_entropy_fwd(x, classes, weight, *options)[0]
    elif needs_grad(input):
        loss = record(_CrossEntropy, backend, x, classes, weight, *options)
    else:
        run = dispatch.kernel("cross_entropy", backend, "cross_entropy_fwd")
        loss = run(x, classes, weight, *options)[0]
    dtype = loss_dtype(input, autocast)
    if loss.dtype != dtype:
        loss = loss.to(dtype)
    return loss.view(shape) if reduction == "none" else loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        x: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        reduction: int,
        label_smoothing: float,
    ) -> Tensor:
        options = (ignore_index, reduction, label_smoothing)
        run = dispatch.kernel("cross_entropy", backend, "cross_entropy_fwd")
        loss, lse, weight_sum = run(x, target, weight, *options)
        ctx.save_for_backward(x, target, weight, lse, weight_sum)
        ctx.backend, ctx.options = backend, options
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> Any:
        with without_grad():
            run = dispatch.kernel("cross_entropy", ctx.backend, "cross_entropy_bwd")
            saved = ctx.saved_tensors
            dx = run(dloss.contiguous(), *saved, *ctx.options)
        return None, *once("cross_entropy", (dloss, *saved), dx), None, None, None, None, None


def _cross_entropy_fwd_fake(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return loss_outputs(x, reduction)


def _cross_entropy_bwd_fake(
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
    return x.new_empty(x.shape)


define(
    "cross_entropy_fwd",
    "(Tensor x, Tensor target, Tensor? weight, int ignore_index, int reduction,"
    " float label_smoothing) -> (Tensor loss, Tensor lse, Tensor weight_sum)",
    _cross_entropy_fwd_fake,
)
define(
    "cross_entropy_bwd",
    "(Tensor dloss, Tensor x, Tensor target, Tensor? weight, Tensor lse, Tensor weight_sum,"
    " int ignore_index, int reduction, float label_smoothing) -> Tensor",
    _cross_entropy_bwd_fake,
)
