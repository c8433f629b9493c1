"""Who is measured beside us: a name, a function of the same arguments, or why it is absent.

`torch_eager` is the formula of the op's docstring in plain torch, `torch_compile` that compiled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as T

from benchmarks.peer import Absent, Function, Peer, always, compiled, module, on_cuda
from benchmarks.peers_attention import (
    ATTENTION,
    DECODE_ATTENTION,
    VARLEN_ATTENTION,
    causal,
    exact_attention,
    exact_varlen_attention,
    positions,
)
from benchmarks.shapes import Rows, Scores
from fastgpt import functional as F
from fastgpt.peer import band_mask

__all__ = [
    "ADD_LAYER_NORM",
    "ATTENTION",
    "BIAS_GELU",
    "CROSS_ENTROPY",
    "DECODE_ATTENTION",
    "LAYER_NORM",
    "LINEAR_CROSS_ENTROPY",
    "MASKED_SOFTMAX",
    "SOFTMAX",
    "VARLEN_ATTENTION",
    "band_mask",
    "exact_attention",
    "exact_varlen_attention",
]

# --- rows ---------------------------------------------------------------------------------------


def _torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return T.layer_norm(x, x.shape[-1:], weight, bias)


def _torch_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    s = x + residual
    return _torch_layer_norm(s, weight, bias), s


def _torch_softmax(x: Tensor) -> Tensor:
    return T.softmax(x, -1)


def _torch_bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return T.gelu(x + bias, approximate="tanh")


def _liger_layer_norm(shape: Rows, device: torch.device) -> Function:
    apply = module("liger_kernel.ops.layer_norm").LigerLayerNormFunction.apply
    return lambda x, weight, bias: apply(x, weight, bias, 1e-5)


def _liger_softmax(shape: Rows, device: torch.device) -> Function:
    return module("liger_kernel.ops.softmax").LigerSoftmaxFunction.apply


LAYER_NORM: dict[str, Peer] = {
    "fastgpt": always(lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias)),
    "torch_eager": always(_torch_layer_norm),
    "torch_compile": compiled(always(_torch_layer_norm)),
    "liger": _liger_layer_norm,
}

ADD_LAYER_NORM: dict[str, Peer] = {
    "fastgpt": always(
        lambda x, residual, weight, bias: F.add_layer_norm(x, residual, x.shape[-1:], weight, bias)
    ),
    "torch_eager": always(_torch_add_layer_norm),
    "torch_compile": compiled(always(_torch_add_layer_norm)),
}

SOFTMAX: dict[str, Peer] = {
    "fastgpt": always(F.softmax),
    "torch_eager": always(_torch_softmax),
    "torch_compile": compiled(always(_torch_softmax)),
    "liger": _liger_softmax,
}

BIAS_GELU: dict[str, Peer] = {
    "fastgpt": always(F.bias_gelu),
    "torch_eager": always(_torch_bias_gelu),
    "torch_compile": compiled(always(_torch_bias_gelu)),
}

SCALE = 0.125
"""Of scores, in masked_softmax: that of heads of 64."""


def _fastgpt_masked_softmax(shape: Scores, device: torch.device) -> Function:
    return lambda scores: F.masked_softmax(scores, scale=SCALE, window=shape.window)


def _masked_softmax(scores: Tensor, seen: Tensor) -> Tensor:
    return T.softmax((scores * SCALE).masked_fill(~seen, float("-inf")), -1)


def _torch_masked_softmax(shape: Scores, device: torch.device) -> Function:
    seen = band_mask(shape.s, shape.window or shape.s, device)
    return lambda scores: _masked_softmax(scores, seen)


def _masked_softmax_formula(shape: Scores, device: torch.device) -> Function:
    """With the mask computed inside: a compiler fuses it, which is faster than reading one."""
    visible = causal(shape.s, shape.window)
    return lambda scores: _masked_softmax(scores, visible(*positions(shape.s, device)))


MASKED_SOFTMAX: dict[str, Peer] = {
    "fastgpt": _fastgpt_masked_softmax,
    "torch_eager": _torch_masked_softmax,
    "torch_compile": compiled(_masked_softmax_formula),
}


# --- losses -------------------------------------------------------------------------------------


def _liger_loss(name: str) -> Peer:
    def build(shape: Any, device: torch.device) -> Function:
        function = getattr(module("liger_kernel.transformers.functional"), name)
        return lambda *inputs: function(*inputs)

    return build


def _torch_linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return T.cross_entropy(T.linear(x, weight), target)


def _chunked_linear_cross_entropy(shape: Any, device: torch.device) -> Function:
    """torch's own, which does not hold all logits either."""
    function = getattr(T, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        raise Absent(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    return lambda x, weight, target: function(x, weight, target, options=options())


def _cut_cross_entropy(shape: Any, device: torch.device) -> Function:
    return module("cut_cross_entropy").linear_cross_entropy


CROSS_ENTROPY: dict[str, Peer] = {
    "fastgpt": always(F.cross_entropy),
    "torch_eager": always(T.cross_entropy),
    "torch_compile": compiled(always(T.cross_entropy)),
    "liger": _liger_loss("liger_cross_entropy"),
}

LINEAR_CROSS_ENTROPY: dict[str, Peer] = {
    "fastgpt": always(F.linear_cross_entropy),
    "torch_eager": always(_torch_linear_cross_entropy),
    "torch_compile": compiled(always(_torch_linear_cross_entropy)),
    "torch_chunked": _chunked_linear_cross_entropy,
    "liger": _liger_loss("liger_fused_linear_cross_entropy"),
    "cut_cross_entropy": on_cuda(_cut_cross_entropy, "cut-cross-entropy"),
}
