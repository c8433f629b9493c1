"""Tensors as rows: most kernels take (r, n) with the last stride 1 and any row stride."""

from __future__ import annotations

import math

from torch import Tensor

from fastgpt.dispatch import NAMESPACES


def as_rows(tensor: Tensor) -> Tensor:
    """(..., n) -> (r, n) with the last stride 1, a view wherever one exists; 0-d -> (1, 1)."""
    if tensor.dim() == 2:
        return unit_stride(tensor)
    if tensor.dim() < 2:
        return unit_stride(tensor.reshape(1, -1))
    return unit_stride(tensor.flatten(0, -2))


def as_matrices(tensor: Tensor) -> Tensor:
    """(..., m, n) -> (r, m, n) with the last stride 1, a view wherever one exists."""
    if tensor.dim() == 3:
        return unit_stride(tensor)
    leading = math.prod(tensor.shape[:-2])
    return unit_stride(tensor.reshape(leading, tensor.shape[-2], tensor.shape[-1]))


def rows_for(backend: str, tensor: Tensor) -> Tensor:
    """`as_rows(tensor)`, or `tensor` itself where the kernels of `backend` find its rows.

    The compiled ones do so in a contiguous tensor of more dimensions, and their results have its
    shape: two views less, each of which costs as much as a tiny kernel.
    """
    rank = tensor.dim()
    if (rank == 2 or (rank > 2 and backend in NAMESPACES)) and tensor.is_contiguous():
        return tensor
    return as_rows(tensor)


def matrices_for(backend: str, tensor: Tensor) -> Tensor:
    """The same of `as_matrices(tensor)`, for the kernels on matrices."""
    if tensor.dim() > 3 and backend in NAMESPACES and tensor.is_contiguous():
        return tensor
    return as_matrices(tensor)


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """The result of a kernel on the rows or matrices of `like`, in the shape of `like`."""
    return rows if rows.dim() == like.dim() else rows.view_as(like)


def unit_stride(tensor: Tensor) -> Tensor:
    """`tensor` itself if its last stride is 1, else a contiguous copy."""
    return tensor if tensor.is_contiguous() or tensor.stride(-1) == 1 else tensor.contiguous()
