"""Who is measured beside us: a name, a function of the same arguments, or why it is absent."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as T

from benchmarks.shapes import Attention
from fastgpt import functional as F
from fastgpt.peer import band_mask

Function = Callable[..., Tensor]


class Absent(Exception):
    """The peer cannot run here; the message says why."""


def module(name: str) -> Any:
    """An optional package, or Absent."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"{name} is not installed") from error


def _sdpa(backend: str | None) -> Callable[[Attention, torch.device], Function]:
    def build(shape: Attention, device: torch.device) -> Function:
        mask = None if shape.window is None else band_mask(shape.s, shape.window, device)
        grouped = shape.h != shape.hk

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return T.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
            )

        if backend is None:
            return run
        choice = getattr(torch.nn.attention.SDPBackend, backend)

        def forced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with torch.nn.attention.sdpa_kernel(choice):
                return run(q, k, v)

        return forced

    return build


def _fastgpt_attention(shape: Attention, device: torch.device) -> Function:
    return lambda q, k, v: F.attention(q, k, v, window=shape.window)


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flex(shape: Attention, device: torch.device) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask

    window = shape.window or shape.s

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < window)

    blocks = create_block_mask(visible, None, None, shape.s, shape.s, device=str(device))
    flex = _compiled_flex()
    return lambda q, k, v: flex(q, k, v, block_mask=blocks, enable_gqa=shape.h != shape.hk)


def _flash_attn(shape: Attention, device: torch.device) -> Function:
    function = module("flash_attn").flash_attn_func
    if device.type != "cuda":
        raise Absent("flash-attn runs on CUDA only")
    left = -1 if shape.window is None else shape.window - 1

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(*(x.transpose(1, 2) for x in (q, k, v)), causal=True, window_size=(left, 0))
        return out.transpose(1, 2)  # type: ignore[no-any-return]

    return run


ATTENTION: dict[str, Callable[[Attention, torch.device], Function]] = {
    "fastgpt": _fastgpt_attention,
    "torch_sdpa": _sdpa(None),
    "torch_math": _sdpa("MATH"),
    "torch_flash": _sdpa("FLASH_ATTENTION"),
    "torch_efficient": _sdpa("EFFICIENT_ATTENTION"),
    "torch_cudnn": _sdpa("CUDNN_ATTENTION"),
    "torch_flex": _flex,
    "flash_attn": _flash_attn,
}


def _liger(path: str, name: str) -> Callable[[], Function]:
    def build() -> Function:
        return getattr(module(f"liger_kernel.{path}"), name).apply  # type: ignore[no-any-return]

    return build


def _liger_layer_norm() -> Function:
    apply = _liger("ops.layer_norm", "LigerLayerNormFunction")()
    return lambda x, weight, bias: apply(x, weight, bias, 1e-5)


def _liger_cross_entropy() -> Function:
    function = module("liger_kernel.transformers.functional").liger_cross_entropy
    return lambda x, target: function(x, target)


def _compiled(function: Function) -> Callable[[], Function]:
    return lambda: torch.compile(function)


def _torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return T.layer_norm(x, x.shape[-1:], weight, bias)


LAYER_NORM: dict[str, Callable[[], Function]] = {
    "fastgpt": lambda: lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias),
    "torch_eager": lambda: _torch_layer_norm,
    "torch_compile": _compiled(_torch_layer_norm),
    "liger": _liger_layer_norm,
}

CROSS_ENTROPY: dict[str, Callable[[], Function]] = {
    "fastgpt": lambda: F.cross_entropy,
    "torch_eager": lambda: T.cross_entropy,
    "torch_compile": _compiled(T.cross_entropy),
    "liger": _liger_cross_entropy,
}
