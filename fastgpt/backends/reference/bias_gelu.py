"""y = gelu(z), z = x + bias: z * Phi(z), or its tanh approximation.

Hendrycks, Gimpel: Gaussian Error Linear Units, https://arxiv.org/abs/1606.08415
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgpt.ops._checks import statistics_dtype

_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
_CUBIC = 0.044715


def bias_gelu_fwd(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    """x (r, n), bias (n,) -> y (r, n) in the dtype of x; the sum is not rounded in between."""
    z = _sum(x, bias)
    if tanh:
        cdf = 0.5 * (1 + torch.tanh(_SQRT_2_OVER_PI * (z + _CUBIC * z**3)))
    else:
        cdf = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
    return (z * cdf).to(x.dtype)


def bias_gelu_bwd(
    dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, need_dbias: bool
) -> tuple[Tensor, Tensor]:
    """dx = dy * gelu'(z); dbias = sum of the unrounded dx over the rows, empty if not needed."""
    z = _sum(x, bias)
    if tanh:
        t = torch.tanh(_SQRT_2_OVER_PI * (z + _CUBIC * z**3))
        slope = _SQRT_2_OVER_PI * (1 + 3 * _CUBIC * z**2)
        derivative = 0.5 * (1 + t) + 0.5 * z * (1 - t**2) * slope
    else:
        density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
        derivative = 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * density
    dz = dy.to(z.dtype) * derivative
    dbias = dz.sum(0) if need_dbias else dz.new_empty(0)
    return dz.to(x.dtype), dbias


def _sum(x: Tensor, bias: Tensor | None) -> Tensor:
    wide = x.to(statistics_dtype(x))
    return wide if bias is None else wide + bias.to(wide.dtype)
