"""y_j = exp(x_j - max x) / sum_k exp(x_k - max x) over the last axis."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.ops._checks import statistics_dtype


def softmax_fwd(x: Tensor, float_out: bool) -> Tensor:
    """x (r, n) -> y (r, n) in its dtype, or in float32."""
    wide = x.to(statistics_dtype(x))
    return torch.softmax(wide, dim=-1).to(torch.float32 if float_out else x.dtype)


def softmax_bwd(dy: Tensor, y: Tensor, in_dtype: torch.dtype) -> Tensor:
    """dx = y * (dy - sum(dy * y)) in in_dtype."""
    wide = statistics_dtype(y)
    dy, y = dy.to(wide), y.to(wide)
    return (y * (dy - (dy * y).sum(-1, keepdim=True))).to(in_dtype)
