"""What torch.compile sees of the ops on the Triton backend, without a GPU: prints a line of JSON.

The ops are compiled by Dynamo and AOTAutograd, forward and backward, on fake tensors, and the
graphs are kept instead of being run. Three things stand in for a GPU: torch is told that it has a
Triton, Triton that its target is an sm_90 (it analyses which arguments a kernel writes), and the
table that Triton takes CPU tensors, since autograd refuses those of a device that torch lacks.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._triton

torch.utils._triton.has_triton = lambda: True  # before Dynamo asks

import triton
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget

import fastgpt
from fastgpt import dispatch
from fastgpt import functional as F
from fastgpt.backends.triton import _launch

LENGTHS = (33, 40, 64, 65, 127, 128, 200, 257, 1000, 1024)
OF_ONE_BLOCK = (520, 523, 576, 640, 777, 800, 801, 900, 1000, 1024)
"""A row's length decides the size of its block: these have the same."""


class Target:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def floats(*shape: int, grad: bool = True) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, requires_grad=grad)


def ints(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def attention(s: int) -> dict[str, Any]:
    return {"q": floats(2, 4, s, 64), "k": floats(2, 2, s, 64), "v": floats(2, 2, s, 64)}


def varlen_attention(s: int) -> dict[str, Any]:
    q, k, v = floats(2 * s, 4, 64), floats(2 * s, 2, 64), floats(2 * s, 2, 64)
    ends = ints(3, dtype=torch.int32)
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return dict(zip(names, (q, k, v, ends, ends, s, s), strict=True)) | {"window": 20}


def decode_attention(s: int) -> dict[str, Any]:
    new = [floats(2, heads, 1, 64, grad=False) for heads in (4, 2, 2)]
    caches = [floats(2, 2, s, 64, grad=False) for _ in range(2)]
    names = ("q", "k_new", "v_new", "k_cache", "v_cache", "cache_lengths")
    lengths = ints(2, dtype=torch.int32)
    return dict(zip(names, (*new, *caches, lengths), strict=True))


CALLS: dict[str, Callable[[int], dict[str, Any]]] = {
    "softmax": lambda s: {"input": floats(2, s, 768)},
    "masked_softmax": lambda s: {"scores": floats(2, 3, s, s), "window": 20},
    "layer_norm": lambda s: {
        "input": floats(2, s, 768),
        "normalized_shape": (768,),
        "weight": floats(768),
        "bias": floats(768),
    },
    "add_layer_norm": lambda s: {
        "x": floats(2, s, 768),
        "residual": floats(2, s, 768),
        "normalized_shape": (768,),
        "weight": floats(768),
    },
    "bias_gelu": lambda s: {"x": floats(2, s, 768), "bias": floats(768)},
    "cross_entropy": lambda s: {"input": floats(2 * s, 5000), "target": ints(2 * s)},
    "linear_cross_entropy": lambda s: {
        "input": floats(2 * s, 64),
        "linear_weight": floats(5000, 64),
        "target": ints(2 * s),
    },
    "attention": attention,
    "varlen_attention": varlen_attention,
    "decode_attention": decode_attention,
}


class Graphs:
    """The graphs of one direction: how many, the kernels in them, and the inputs they copy."""

    def __init__(self) -> None:
        self.count = 0
        self.kernels: list[str] = []
        self.copied: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

        self.count += 1
        for node in graph.graph.nodes:
            if "triton_kernel_wrapper" not in str(node.target):
                continue
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            name = getattr(kernel, "fn", kernel).__name__
            self.kernels.append(name)
            self.copied += [
                f"{name}: {argument}"
                for argument in node.kwargs.get("tensors_to_clone", ())
                if node.kwargs["kwargs"][argument].op == "placeholder"
            ]
        return graph.forward


def trace(op: str) -> dict[str, Any]:
    """Compile `op` and call it, forward and backward, with ten lengths."""
    torch.compiler.reset()
    forward, backward = Graphs(), Graphs()
    compiler = aot_autograd(fw_compiler=forward, bw_compiler=backward, inference_compiler=forward)
    compiled = torch.compile(getattr(F, op), backend=compiler, fullgraph=True, dynamic=True)
    for s in OF_ONE_BLOCK if op == "masked_softmax" else LENGTHS:
        inputs = CALLS[op](s)
        leaves = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
        out = compiled(**inputs)
        if leaves:
            outs = out if isinstance(out, tuple) else (out,)
            torch.autograd.grad(outs, leaves, [torch.empty_like(o) for o in outs])
    return {"forward": vars(forward), "backward": vars(backward), "differentiable": bool(leaves)}


def on_cuda() -> dict[str, Any]:
    """The forward of softmax alone, on tensors that say they are on a CUDA device."""
    torch.compiler.reset()
    forward = Graphs()
    compiled = torch.compile(F.softmax, backend=forward, fullgraph=True, dynamic=True)
    return {"device": str(compiled(torch.empty(3, 768, device="cuda")).device)} | vars(forward)


def main(*ops: str) -> None:
    triton.runtime.driver.set_active(Target())
    _launch._architecture = "sm_90"
    found = {}
    with fastgpt.backend("triton"), FakeTensorMode():
        found["on_cuda"] = on_cuda()
        dispatch.DEVICES["triton"] = ("cpu",)
        for op in ops:
            try:
                found[op] = trace(op)
            except Exception:
                found[op] = {"failed": traceback.format_exc()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
