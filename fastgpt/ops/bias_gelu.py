"""bias_gelu: the addition of a bias fused into gelu, the widest pointwise op of a decoder's MLP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.backends.reference import bias_gelu as reference
from fastgpt.ops._autograd import needs_grad, once, record, without_grad
from fastgpt.ops._checks import check_float, check_parameter, statistics_dtype
from fastgpt.ops._library import define
from fastgpt.ops._rows import from_rows, rows_for


def bias_gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """gelu(x + bias) in one pass over memory, forward and backward.

    Args:
        x: (..., n), float32, bfloat16 or float16 (float64: reference).
        bias: (n,), in the dtype of x or float32; optional. The sum is not rounded before the gelu.
        approximate: "tanh" (as GPT-2) or "none" (erf), as `torch.nn.functional.gelu`.

    Returns:
        A contiguous tensor of the shape and dtype of x.

    Raises:
        ValueError: the shape or device of bias differs, or approximate is another word.
        TypeError: a dtype is not a float, or bias has a third one.

    Source: Hendrycks, Gimpel 2016, https://arxiv.org/abs/1606.08415
    """
    check_float("x", x)
    if approximate not in ("tanh", "none"):
        raise ValueError(f'approximate: expected "tanh" or "none", got {approximate!r}')
    if bias is not None:
        if x.dim() == 0:
            raise ValueError("x: expected (..., n) where there is a bias, got a 0-d tensor")
        check_parameter("bias", bias, "x", x, x.shape[-1:], "(n,)")
        bias = bias.contiguous()
    tanh = approximate == "tanh"
    backend = dispatch.pick("bias_gelu", x, approximate=approximate)
    rows = rows_for(backend, x)
    if backend == "reference":
        y = reference.bias_gelu_fwd(rows, bias, tanh)
    elif needs_grad(x, bias):
        y = record(_BiasGelu, backend, rows, bias, tanh)
    else:
        y = dispatch.kernel("bias_gelu", backend, "bias_gelu_fwd")(rows, bias, tanh)
    return from_rows(y, x)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.backend, ctx.tanh = backend, tanh
        return dispatch.kernel("bias_gelu", backend, "bias_gelu_fwd")(x, bias, tanh)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, bias = ctx.saved_tensors
        need_dbias = ctx.needs_input_grad[2]
        with without_grad():
            run = dispatch.kernel("bias_gelu", ctx.backend, "bias_gelu_bwd")
            dx, dbias = run(rows_for(ctx.backend, dy), x, bias, ctx.tanh, need_dbias)
            dbias = dbias.to(bias.dtype) if need_dbias else None
        return None, *once("bias_gelu", (dy, x, bias), dx, dbias), None


def _bias_gelu_fwd_fake(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    return x.new_empty(x.shape)


def _bias_gelu_bwd_fake(
    dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, need_dbias: bool
) -> tuple[Tensor, Tensor]:
    n = x.shape[-1] if need_dbias else 0
    return x.new_empty(x.shape), x.new_empty(n, dtype=statistics_dtype(x))


define("bias_gelu_fwd", "(Tensor x, Tensor? bias, bool tanh) -> Tensor", _bias_gelu_fwd_fake)
define(
    "bias_gelu_bwd",
    "(Tensor dy, Tensor x, Tensor? bias, bool tanh, bool need_dbias) -> (Tensor dx, Tensor dbias)",
    _bias_gelu_bwd_fake,
)
