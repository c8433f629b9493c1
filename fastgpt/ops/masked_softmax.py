"""masked_softmax: scale, causal or banded mask, and softmax of attention scores in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.backends.reference import masked_softmax as reference
from fastgpt.ops._autograd import needs_grad, once, record, without_grad
from fastgpt.ops._checks import (
    autocast_dtype,
    check_flag,
    check_float,
    check_number,
    check_window,
)
from fastgpt.ops._library import define
from fastgpt.ops._rows import from_rows, matrices_for


def masked_softmax(
    scores: Tensor, *, scale: float = 1.0, causal: bool = True, window: int | None = None
) -> Tensor:
    """softmax(scale * scores) over the keys that each query sees, exactly 0 elsewhere.

    Query i of sq sits at position i' = i + sk - sq (the last query at the last key) and sees key
    j iff (j <= i' when causal) and |i' - j| < window.

    Args:
        scores: (..., sq, sk), float32, bfloat16 or float16 (float64: reference).
        scale: multiplies the scores.
        causal: hide the keys after a query.
        window: how many keys a query looks back on, its own included; None is dense.

    Returns:
        A contiguous tensor of the shape of scores, in their dtype (float32 under autocast). A row
        that sees no key, or only keys of score -inf, is all 0 and has zero gradient. Hidden scores
        are not read: NaN and inf in them never matter.

    Raises:
        ValueError: scores has fewer than two dimensions, or window < 1.
        TypeError: scores is not floating, or scale, causal or window has the wrong type.
    """
    check_float("scores", scores)
    if scores.dim() < 2:
        raise ValueError(
            f"scores: expected at least 2 dimensions (..., sq, sk), got shape {tuple(scores.shape)}"
        )
    check_number("scale", scale)
    check_flag("causal", causal)
    check_window(window)
    float_out = autocast_dtype(scores) is not None and scores.dtype != torch.float64
    backend = dispatch.pick("masked_softmax", scores, causal=causal, window=window)
    x = matrices_for(backend, scores)
    if backend == "reference":
        y = reference.masked_softmax_fwd(x, scale, causal, window, float_out)
    elif needs_grad(scores):
        y = record(_MaskedSoftmax, backend, x, scale, causal, window, float_out)
    else:
        run = dispatch.kernel("masked_softmax", backend, "masked_softmax_fwd")
        y = run(x, scale, causal, window, float_out)
    return from_rows(y, scores)


class _MaskedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        scores: Tensor,
        scale: float,
        causal: bool,
        window: int | None,
        float_out: bool,
    ) -> Tensor:
        run = dispatch.kernel("masked_softmax", backend, "masked_softmax_fwd")
        y = run(scores, scale, causal, window, float_out)
        ctx.save_for_backward(y)
        ctx.backend, ctx.mask, ctx.in_dtype = backend, (scale, causal, window), scores.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        with without_grad():
            run = dispatch.kernel("masked_softmax", ctx.backend, "masked_softmax_bwd")
            dscores = run(matrices_for(ctx.backend, dy), y, *ctx.mask, ctx.in_dtype)
        return None, *once("masked_softmax", (dy, y), dscores), None, None, None, None


def _masked_softmax_fwd_fake(
    scores: Tensor, scale: float, causal: bool, window: int | None, float_out: bool
) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.float32 if float_out else scores.dtype)


def _masked_softmax_bwd_fake(
    dy: Tensor,
    y: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    in_dtype: torch.dtype,
) -> Tensor:
    return y.new_empty(y.shape, dtype=in_dtype)


define(
    "masked_softmax_fwd",
    "(Tensor scores, float scale, bool causal, SymInt? window, bool float_out) -> Tensor",
    _masked_softmax_fwd_fake,
)
define(
    "masked_softmax_bwd",
    "(Tensor dy, Tensor y, float scale, bool causal, SymInt? window, ScalarType in_dtype)"
    " -> Tensor",
    _masked_softmax_bwd_fake,
)
