"""Tensors as rows: most kernels take (r, n) with the last stride 1 and any row stride."""

from __future__ import annotations

import math

from torch import Tensor


def as_rows(tensor: Tensor) -> Tensor:
    """(..., n) -> (r, n) with the last stride 1, a view wherever one exists; 0-d -> (1, 1)."""
    if tensor.dim() == 2:
        return unit_stride(tensor)
    if tensor.dim() < 2:
        return unit_stride(tensor.reshape(1, -1))
    return unit_stride(tensor.flatten(0, -2))


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """The result of a kernel on `as_rows(like)` or `as_matrices(like)`, in the shape of `like`."""
    return rows if rows.dim() == like.dim() else rows.view_as(like)


def as_matrices(tensor: Tensor) -> Tensor:
    """(..., m, n) -> (r, m, n) with the last stride 1, a view wherever one exists."""
    if tensor.dim() == 3:
        return unit_stride(tensor)
    leading = math.prod(tensor.shape[:-2])
    return unit_stride(tensor.reshape(leading, tensor.shape[-2], tensor.shape[-1]))


def unit_stride(tensor: Tensor) -> Tensor:
    """`tensor` itself if its last stride is 1, else a contiguous copy."""
    return tensor if tensor.is_contiguous() or tensor.stride(-1) == 1 else tensor.contiguous()
