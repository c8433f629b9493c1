"""The layers of the repository, by the names that `kernels` and transformers know them by.

`kernels` binds a layer's forward to the module that it replaces, which keeps its class, parameters
and hooks. Hence its rules: no constructor, no member but forward and the two flags.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt import functional as F
from fastgpt import nn

__all__ = [
    "CrossEntropyLoss",
    "FastGELU",
    "GeLU",
    "GeluTanh",
    "LayerNorm",
    "NewGELU",
    "Softmax",
]


class _Layer(torch.nn.Module):
    can_torch_compile = True
    has_backward = True


class LayerNorm(_Layer):
    forward = nn.LayerNorm.forward


class Softmax(_Layer):
    forward = nn.Softmax.forward


class CrossEntropyLoss(_Layer):
    forward = nn.CrossEntropyLoss.forward


class GeluTanh(_Layer):
    """gelu by tanh: NewGELU and FastGELU are the same formula, written out in other ways."""

    def forward(self, input: Tensor) -> Tensor:
        return F.bias_gelu(input, approximate="tanh")


class NewGELU(GeluTanh):
    pass


class FastGELU(GeluTanh):
    pass


class GeLU(_Layer):
    """gelu by erf."""

    def forward(self, input: Tensor) -> Tensor:
        return F.bias_gelu(input, approximate="none")
