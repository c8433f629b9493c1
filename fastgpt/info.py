"""What `fastgpt info` and `fastgpt explain` print: the machine, the build, one op's choice."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastgpt
from fastgpt import dispatch, functional
from fastgpt.backends import native

_SWITCHES = (
    "FASTGPT_BACKEND",
    "FASTGPT_CPU_ISA",
    "FASTGPT_NATIVE",
    "FASTGPT_LOG",
    "FASTGPT_CHECK",
)


def report() -> str:
    """Versions, the op library or why there is none, CPU, GPUs, Triton, the support matrix."""
    rows = [
        ("fastgpt", f"{fastgpt.__version__} in {os.path.dirname(fastgpt.__file__)}"),
        ("python", f"{platform.python_version()} ({platform.platform()})"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}"),
        *_native_rows(),
        ("cpu", f"{torch.get_num_threads()} threads, torch's own level {_torch_level()}"),
        *_gpu_rows(),
        ("triton", _version("triton") or "not installed; needed for the triton backend only"),
    ]
    rows += [(name, value) for name in _SWITCHES if (value := os.environ.get(name))]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    return "\n".join([*lines, "", dispatch.support_matrix()])


def _native_rows() -> list[tuple[str, str]]:
    if native.MISSING is not None:
        return [
            ("op library", f"missing: {native.MISSING}"),
            ("", "every op runs on the reference backend (plain torch) until then"),
        ]
    isa = native.cpu_isa() or f"unknown ({native.EXTENSION_MISSING})"
    rows = [("op library", str(native.OP_LIBRARY))]
    rows.append(("cpu kernels", f"{isa}; FASTGPT_CPU_ISA=baseline|v3|v4|v4_bf16 lowers the level"))
    architectures = native.gpu_architectures()
    rows.append(
        (
            "gpu kernels",
            ", ".join(architectures) if architectures else "none: built without nvcc",
        )
    )
    return rows


def _torch_level() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _gpu_rows() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        return [("gpu", "none that torch can use")]
    rows = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.append(
            (
                f"gpu {index}",
                f"{properties.name}, sm_{properties.major}{properties.minor}, "
                f"{properties.total_memory / 2**30:.0f} GiB",
            )
        )
    refusal = dispatch.refusal("layer_norm", "cuda", "cuda", torch.float32)
    return [*rows, ("cuda backend", f"off: {refusal}" if refusal else "on")]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
"""A function, its arguments and its keyword arguments."""


def _attention(q: Tensor, keywords: dict[str, Any]) -> Call:
    return functional.attention, (q, q, q), keywords


def _sdpa(q: Tensor, keywords: dict[str, Any]) -> Call:
    causal = {"is_causal": keywords.pop("causal", True)}
    return functional.scaled_dot_product_attention, (q, q, q), {**keywords, **causal}


def _varlen(q: Tensor, keywords: dict[str, Any]) -> Call:
    offsets = torch.empty(2, dtype=torch.int32, device=q.device)
    length = q.shape[0]
    return functional.varlen_attention, (q, q, q, offsets, offsets, length, length), keywords


def _decode(cache: Tensor, keywords: dict[str, Any]) -> Call:
    lengths = torch.empty(cache.shape[0], dtype=torch.int32, device=cache.device)
    return functional.decode_attention, (cache[:, :, :1], cache, cache, lengths), keywords


def _rows_op(name: str) -> Callable[[Tensor, dict[str, Any]], Call]:
    def call(x: Tensor, keywords: dict[str, Any]) -> Call:
        size = x.shape[-1]
        args: dict[str, tuple[Any, ...]] = {
            "layer_norm": (x, (size,)),
            "add_layer_norm": (x, x, (size,)),
            "softmax": (x,),
            "bias_gelu": (x,),
            "masked_softmax": (x,),
        }
        return getattr(functional, name), args[name], keywords

    return call


def _cross_entropy(x: Tensor, keywords: dict[str, Any]) -> Call:
    target = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    return functional.cross_entropy, (x, target), keywords


def _linear_cross_entropy(x: Tensor, keywords: dict[str, Any]) -> Call:
    n, c, v = x.shape
    target = torch.empty(n, dtype=torch.int64, device=x.device)
    return functional.linear_cross_entropy, (x[:, :, 0], x.new_empty(v, c), target), keywords


EXAMPLES: dict[str, tuple[str, Callable[[Tensor, dict[str, Any]], Call]]] = {
    "attention": ("b,h,s,d", _attention),
    "scaled_dot_product_attention": ("b,h,s,d", _sdpa),
    "varlen_attention": ("t,h,d", _varlen),
    "decode_attention": ("b,h,s_max,d", _decode),
    "layer_norm": ("...,n", _rows_op("layer_norm")),
    "add_layer_norm": ("...,n", _rows_op("add_layer_norm")),
    "softmax": ("...,n", _rows_op("softmax")),
    "masked_softmax": ("...,sq,sk", _rows_op("masked_softmax")),
    "bias_gelu": ("...,n", _rows_op("bias_gelu")),
    "cross_entropy": ("n,v", _cross_entropy),
    "linear_cross_entropy": ("n,c,v", _linear_cross_entropy),
}
"""op -> the layout of `--shape` and the call that it describes."""


def explain_call(
    op: str,
    shape: Sequence[int],
    dtype: str = "float32",
    device: str = "cpu",
    *,
    window: int | None = None,
    causal: bool | None = None,
) -> str:
    """`fastgpt.explain` of one op at a shape, without allocating it and for devices not there.

    Raises:
        ValueError: unknown op or dtype, a shape of the wrong rank, or an option that op lacks.
    """
    if op not in EXAMPLES:
        raise ValueError(f"op: expected one of {', '.join(EXAMPLES)}, got {op!r}")
    layout, example = EXAMPLES[op]
    names = layout.split(",")
    if len(shape) != len(names) and not (names[0] == "..." and len(shape) >= len(names) - 1):
        raise ValueError(f"--shape: expected {layout} for {op}, got {','.join(map(str, shape))}")
    dtypes = {str(d).removeprefix("torch."): d for d in dispatch.REFERENCE_DTYPES}
    if dtype not in dtypes:
        raise ValueError(f"--dtype: expected one of {', '.join(dtypes)}, got {dtype!r}")
    keywords = {n: v for n, v in (("window", window), ("causal", causal)) if v is not None}
    takes = inspect.signature(getattr(functional, op)).parameters
    for name, value in keywords.items():
        if name not in takes and f"is_{name}" not in takes:
            raise ValueError(f"--{name}: {op} has no such option, got {value}")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(tuple(shape), dtype=dtypes[dtype], device=device)
        function, args, kwargs = example(x, keywords)
        return str(dispatch.explain(function, *args, **kwargs))
