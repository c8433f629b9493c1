"""softmax over any dimension, as torch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.backends.reference import softmax as reference
from fastgpt.ops._autograd import needs_grad, once, record, without_grad
from fastgpt.ops._checks import FLOAT_DTYPES, autocast_dtype, check_float, check_tensor
from fastgpt.ops._library import define
from fastgpt.ops._rows import from_rows, rows_for


def softmax(input: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """exp(input) / sum(exp(input)) along `dim`, as `torch.nn.functional.softmax`.

    Args:
        input: any shape, float32, bfloat16 or float16 (float64: reference); any dtype that
            converts to `dtype` when that is given.
        dim: the dimension that sums to 1.
        dtype: input is first converted to it, and the result has it. Without it the result has
            the dtype of input (under autocast float32, still reading input in its own dtype).

    Returns:
        A contiguous tensor of input's shape. A slice that is all -inf gives NaN, as torch's.

    Raises:
        ValueError: dim is not a dimension of input.
        TypeError: input is not floating and no dtype is given, or dtype is not floating.
    """
    check_tensor("input", input)
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim: expected an int, got {dim!r}")
    rank = max(input.dim(), 1)
    if not -rank <= dim < rank:
        raise ValueError(f"dim: expected one of {-rank} to {rank - 1}, got {dim}")
    if dtype is None:
        check_float("input", input)
        autocast = autocast_dtype(input) is not None and input.dtype != torch.float64
        dtype = torch.float32 if autocast else input.dtype
    elif dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
    elif not (dtype == torch.float32 and input.dtype in (torch.bfloat16, torch.float16)):
        input = input.to(dtype)

    last = dim in (-1, rank - 1)
    moved = input if last else input.movedim(dim, -1)
    float_out = dtype == torch.float32
    backend = dispatch.pick("softmax", input)
    x = rows_for(backend, moved)
    if backend == "reference":
        y = reference.softmax_fwd(x, float_out)
    elif needs_grad(input):
        y = record(_Softmax, backend, x, float_out)
    else:
        y = dispatch.kernel("softmax", backend, "softmax_fwd")(x, float_out)
    y = from_rows(y, moved)
    return y if last else y.movedim(-1, dim).contiguous()


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, x: Tensor, float_out: bool) -> Tensor:
        y = dispatch.kernel("softmax", backend, "softmax_fwd")(x, float_out)
        ctx.save_for_backward(y)
        ctx.backend, ctx.in_dtype = backend, x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        with without_grad():
            run = dispatch.kernel("softmax", ctx.backend, "softmax_bwd")
            dx = run(rows_for(ctx.backend, dy), y, ctx.in_dtype)
        return None, *once("softmax", (dy, y), dx), None


def _softmax_fwd_fake(x: Tensor, float_out: bool) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32 if float_out else x.dtype)


def _softmax_bwd_fake(dy: Tensor, y: Tensor, in_dtype: torch.dtype) -> Tensor:
    return y.new_empty(y.shape, dtype=in_dtype)


define("softmax_fwd", "(Tensor x, bool float_out) -> Tensor", _softmax_fwd_fake)
define("softmax_bwd", "(Tensor dy, Tensor y, ScalarType in_dtype) -> Tensor", _softmax_bwd_fake)
