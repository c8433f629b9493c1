"""Tensors as rows: most kernels take (r, n) with the last stride 1 and any row stride."""

from __future__ import annotations

import math

from torch import Tensor


def as_rows(tensor: Tensor) -> Tensor:
    """(..., n) -> (r, n) with the last stride 1, a view wherever one exists; 0-d -> (1, 1)."""
    if tensor.dim() == 0:
        return tensor.reshape(1, 1)
    return unit_stride(tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1]))


def as_matrices(tensor: Tensor) -> Tensor:
    """(..., m, n) -> (r, m, n) with the last stride 1, a view wherever one exists."""
    leading = math.prod(tensor.shape[:-2])
    return unit_stride(tensor.reshape(leading, tensor.shape[-2], tensor.shape[-1]))


def unit_stride(tensor: Tensor) -> Tensor:
    """`tensor` itself if its last stride is 1, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
