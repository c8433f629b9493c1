"""y_j = exp(x_j - max x) / sum_k exp(x_k - max x) over the last axis."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.ops._checks import statistics_dtype


def softmax_fwd(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """x (r, n) -> y (r, n) in out_dtype."""
    wide = x.to(statistics_dtype(x))
    return torch.softmax(wide, dim=-1).to(out_dtype)


def softmax_bwd(dy: Tensor, y: Tensor, in_dtype: torch.dtype) -> Tensor:
    """dx = y * (dy - sum(dy * y)) in in_dtype."""
    wide = statistics_dtype(y)
    dy, y = dy.to(wide), y.to(wide)
    return (y * (dy - (dy * y).sum(-1, keepdim=True))).to(in_dtype)
