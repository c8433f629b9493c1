"""layer_norm, and add_layer_norm: the residual addition fused into it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.backends.reference import layer_norm as reference
from fastgpt.ops._autograd import needs_grad, once, record, without_grad
from fastgpt.ops._checks import (
    autocast_dtype,
    check_float,
    check_number,
    check_parameter,
    check_same_device,
    check_same_dtype,
    check_shape,
    statistics_dtype,
)
from fastgpt.ops._library import define
from fastgpt.ops._rows import as_rows, from_rows, rows_for, unit_stride


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer normalization over the trailing dimensions, as `torch.nn.functional.layer_norm`.

    Args:
        input: (..., *normalized_shape), float32, bfloat16, float16 (float64: reference).
        normalized_shape: the trailing shape that is normalized together.
        weight: `normalized_shape`, in the dtype of input or float32; optional.
        bias: the same; optional, independently of weight.
        eps: added to the variance.

    Returns:
        A contiguous tensor of input's shape, in its dtype (float32 under autocast).

    Raises:
        ValueError: normalized_shape is not input's trailing shape, or a shape or device differs.
        TypeError: a dtype is not a float, weight or bias has a third one, or normalized_shape or
            eps has the wrong type.

    Source: Ba, Kiros, Hinton 2016, https://arxiv.org/abs/1607.06450
    """
    shape = _check(input, normalized_shape, weight, bias, eps)
    float_out = _makes_floats(input)
    w, b = _flat(weight, shape), _flat(bias, shape)
    backend = dispatch.pick("layer_norm", input)
    x = _rows(backend, input, shape)
    if backend == "reference":
        y = reference.layer_norm_fwd(x, w, b, eps, float_out)[0]
    elif needs_grad(input, weight, bias):
        y = record(_LayerNorm, backend, x, w, b, eps, float_out)
    else:
        y = dispatch.kernel("layer_norm", backend, "layer_norm_fwd")(x, w, b, eps, float_out)[0]
    return from_rows(y, input)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """`s = x + residual` and `y = layer_norm(s)` in one pass over memory.

    Args:
        x, residual: (..., *normalized_shape), one dtype (under autocast they are brought to the
            wider one).
        normalized_shape, weight, bias, eps: as for `layer_norm`.

    Returns:
        (y, s): s is rounded to the dtype of x, and y is bit for bit `layer_norm(s)`. Both are
        differentiable.

    Raises:
        ValueError, TypeError: as `layer_norm`, and if x and residual differ in shape, device or
            dtype.
    """
    shape = _check(x, normalized_shape, weight, bias, eps, "x")
    float_out = _makes_floats(x)
    check_float("residual", residual)
    check_shape("residual", residual, x.shape, "that of x")
    check_same_device("residual", residual, "x", x)
    if float_out:
        wider = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(wider), residual.to(wider)
    check_same_dtype("residual", residual, "x", x)
    w, b = _flat(weight, shape), _flat(bias, shape)
    backend = dispatch.pick("add_layer_norm", x)
    rows, residual_rows = _rows(backend, x, shape), _rows(backend, residual, shape)
    if rows.dim() != residual_rows.dim():  # one gradient is for both
        rows, residual_rows = as_rows(x), as_rows(residual)
    if backend == "reference":
        y, s = reference.add_layer_norm_fwd(rows, residual_rows, w, b, eps, float_out)[:2]
    elif needs_grad(x, residual, weight, bias):
        y, s = record(_AddLayerNorm, backend, rows, residual_rows, w, b, eps, float_out)
    else:
        run = dispatch.kernel("add_layer_norm", backend, "add_layer_norm_fwd")
        y, s = run(rows, residual_rows, w, b, eps, float_out)[:2]
    return from_rows(y, x), from_rows(s, x)


def _makes_floats(input: Tensor) -> bool:
    """Whether autocast makes the result float32: as torch's, not that of float64."""
    return autocast_dtype(input) is not None and input.dtype != torch.float64


def _check(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    name: str = "input",
) -> tuple[int, ...]:
    check_float(name, input)
    check_number("eps", eps)
    shape: tuple[int, ...]
    if isinstance(normalized_shape, tuple):
        shape = normalized_shape
    elif isinstance(normalized_shape, (int, torch.SymInt)):
        shape = (normalized_shape,)
    elif isinstance(normalized_shape, Iterable):
        shape = tuple(normalized_shape)
    else:
        raise TypeError(
            f"normalized_shape: expected an int or a sequence of ints, got {normalized_shape!r}"
        )
    size = input.shape
    # A slice of a torch.Size costs as much as the other checks of a call.
    simple = len(shape) == 1 and len(size) > 0
    if not (size[-1] == shape[0] if simple else shape and size[-len(shape) :] == shape):
        raise ValueError(
            f"normalized_shape: expected the trailing dimensions of {name}, whose shape is "
            f"{tuple(input.shape)}, got {shape}"
        )
    if weight is not None:
        check_parameter("weight", weight, name, input, shape, "normalized_shape")
    if bias is not None:
        check_parameter("bias", bias, name, input, shape, "normalized_shape")
    return shape


def _rows(backend: str, input: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The rows of (..., *shape), each of all of `shape`, as the kernels of `backend` take them."""
    if len(shape) == 1:
        return rows_for(backend, input)
    n = math.prod(shape)
    return unit_stride(input.reshape(math.prod(input.shape[: input.dim() - len(shape)]), n))


def _flat(parameter: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    if parameter is None or (len(shape) == 1 and parameter.is_contiguous()):
        return parameter
    return parameter.reshape(-1).contiguous()


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        float_out: bool,
    ) -> Tensor:
        run = dispatch.kernel("layer_norm", backend, "layer_norm_fwd")
        y, statistics = run(x, weight, bias, eps, float_out)
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.backend = backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return None, *_backward(ctx, "layer_norm", dy, None, (1, 2, 3)), None, None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        float_out: bool,
    ) -> tuple[Tensor, Tensor]:
        run = dispatch.kernel("add_layer_norm", backend, "add_layer_norm_fwd")
        y, s, statistics = run(x, residual, weight, bias, eps, float_out)
        ctx.save_for_backward(s, weight, bias, statistics)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return y, s

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> Any:
        dx, dweight, dbias = _backward(ctx, "add_layer_norm", dy, ds, (1, 3, 4))
        return None, dx, dx, dweight, dbias, None, None


def _backward(
    ctx: Any, op: str, dy: Tensor | None, ds: Tensor | None, inputs: tuple[int, int, int]
) -> tuple[Tensor | None, ...]:
    """Gradients of the input, the weight and the bias, whose argument positions are `inputs`."""
    x, weight, bias, statistics = ctx.saved_tensors
    need_dweight, need_dbias = (ctx.needs_input_grad[i] for i in inputs[1:])
    with without_grad():
        run = dispatch.kernel(op, ctx.backend, "layer_norm_bwd")
        dx, dweight, dbias = run(
            torch.zeros_like(x) if dy is None else rows_for(ctx.backend, dy),
            x,
            weight,
            statistics,
            None if ds is None else rows_for(ctx.backend, ds),
            need_dweight,
            need_dbias,
        )
        dweight = dweight.to(weight.dtype) if need_dweight else None
        dbias = dbias.to(bias.dtype) if need_dbias else None
    return once(op, (dy, ds, x, weight, bias), dx, dweight, dbias)


def _layer_norm_fwd_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, float_out: bool
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=torch.float32 if float_out else x.dtype)
    return y, x.new_empty((2, math.prod(x.shape[:-1])), dtype=statistics_dtype(x))


def _add_layer_norm_fwd_fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    float_out: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y, statistics = _layer_norm_fwd_fake(x, weight, bias, eps, float_out)
    return y, x.new_empty(x.shape), statistics


def _layer_norm_bwd_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    ds: Tensor | None,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n = x.shape[-1]
    return (
        x.new_empty(x.shape),
        statistics.new_empty(n if need_dweight else 0),
        statistics.new_empty(n if need_dbias else 0),
    )


define(
    "layer_norm_fwd",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, bool float_out)"
    " -> (Tensor y, Tensor statistics)",
    _layer_norm_fwd_fake,
)
define(
    "add_layer_norm_fwd",
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, bool float_out)"
    " -> (Tensor y, Tensor s, Tensor statistics)",
    _add_layer_norm_fwd_fake,
)
define(
    "layer_norm_bwd",
    "(Tensor dy, Tensor x, Tensor? weight, Tensor statistics, Tensor? ds,"
    " bool need_dweight, bool need_dbias) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _layer_norm_bwd_fake,
)
