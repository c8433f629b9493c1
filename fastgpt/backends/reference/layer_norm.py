"""y = (x - mean) * rstd * weight + bias over the last axis, rstd = (var + eps)^-1/2, var over n.

Ba, Kiros, Hinton: Layer Normalization, https://arxiv.org/abs/1607.06450
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.ops._checks import statistics_dtype


def layer_norm_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, float_out: bool
) -> tuple[Tensor, Tensor]:
    """x (r, n) -> y (r, n) in its dtype, or in float32, and the mean and rstd of rows (2, r)."""
    wide = x.to(statistics_dtype(x))
    mean = wide.mean(-1)
    centered = wide - mean[:, None]
    rstd = (centered.square().mean(-1) + eps).rsqrt()
    y = centered * rstd[:, None]
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(torch.float32 if float_out else x.dtype), torch.stack((mean, rstd))


def layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    ds: Tensor | None,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + ds with g = dy * weight, and the sums."""
    mean, rstd = statistics
    wide = statistics.dtype
    dy = dy.to(wide)
    xhat = (x.to(wide) - mean[:, None]) * rstd[:, None]
    g = dy if weight is None else dy * weight.to(wide)
    dx = rstd[:, None] * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True))
    if ds is not None:
        dx = dx + ds.to(wide)
    none = dy.new_empty(0)
    dweight = (dy * xhat).sum(0) if need_dweight else none
    dbias = dy.sum(0) if need_dbias else none
    return dx.to(x.dtype), dweight, dbias


def add_layer_norm_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    float_out: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """s = x + residual rounded to the dtype of x; y = layer_norm(s)."""
    s = x + residual
    y, statistics = layer_norm_fwd(s, weight, bias, eps, float_out)
    return y, s, statistics
