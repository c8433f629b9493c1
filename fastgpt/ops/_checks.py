"""Checks of arguments that several ops share. Each raises before anything is allocated.

Shape and value: ValueError. Dtype and type: TypeError. Every message names the argument, what was
expected and what came.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
from torch import Tensor

NARROW_DTYPES = (torch.bfloat16, torch.float16)
FLOAT_DTYPES = (torch.float32, *NARROW_DTYPES, torch.float64)


def check_tensor(name: str, value: object) -> None:
    """TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def check_float(name: str, tensor: Tensor) -> None:
    """TypeError unless `tensor` has a dtype that the ops compute in."""
    if not isinstance(tensor, Tensor):
        check_tensor(name, tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name}: expected dtype float32, bfloat16, float16 or float64, got {tensor.dtype}"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of layout {tensor.layout}")


def check_rank(name: str, tensor: Tensor, rank: int, layout: str) -> None:
    """ValueError unless `tensor` has `rank` dimensions; `layout` names them, as `(b, h, s, d)`."""
    if not isinstance(tensor, Tensor):
        check_tensor(name, tensor)
    if tensor.dim() != rank:
        raise ValueError(
            f"{name}: expected {rank} dimensions {layout}, got shape {tuple(tensor.shape)}"
        )


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], layout: str) -> None:
    """ValueError unless `tensor` has exactly `shape`; `layout` names its dimensions."""
    if not isinstance(tensor, Tensor):
        check_tensor(name, tensor)
    if tensor.shape != shape:
        raise ValueError(
            f"{name}: expected shape {layout} = {tuple(shape)}, got {tuple(tensor.shape)}"
        )


def check_same_device(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """ValueError unless both tensors are on one device."""
    if tensor.is_cpu and like.is_cpu:
        return
    if tensor.device != like.device:
        raise ValueError(
            f"{name}: expected device {like.device} as {like_name}, got {tensor.device}"
        )


def check_same_dtype(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """TypeError unless both tensors have one dtype."""
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name}: expected dtype {like.dtype} as {like_name}, got {tensor.dtype}")


def check_parameter(
    name: str, tensor: Tensor, like_name: str, like: Tensor, shape: tuple[int, ...], layout: str
) -> None:
    """A weight or bias of this shape, on the device of `like`, in its dtype or in float32."""
    if not isinstance(tensor, Tensor):
        check_tensor(name, tensor)
    dtype = tensor.dtype
    if dtype != like.dtype and dtype != torch.float32:
        check_float(name, tensor)
        raise TypeError(
            f"{name}: expected dtype {like.dtype} (as {like_name}) or float32, got {dtype}"
        )
    if not (tensor.is_cpu and like.is_cpu):
        check_same_device(name, tensor, like_name, like)
    if tensor.shape != shape:
        check_shape(name, tensor, shape, layout)


def check_window(window: int | None) -> None:
    """None (dense) or an int of at least 1: the number of keys that a query sees, its own too."""
    if window is None:
        return
    if isinstance(window, bool) or not isinstance(window, (int, torch.SymInt)):
        raise TypeError(f"window: expected None or an int >= 1, got {window!r}")
    if window < 1:
        raise ValueError(f"window: expected None or an int >= 1, got {window}")
    if type(window) is int and window >= 2**63:
        raise ValueError(f"window: expected None or an int of 64 bits, got {window}")


def check_number(name: str, value: object) -> None:
    """TypeError unless `value` is a number (not a tensor)."""
    if type(value) is float:  # as nearly always, and cheaper to find out
        return
    if not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name}: expected a number, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """TypeError unless `value` is a bool (or 0 or 1)."""
    if value is True or value is False or isinstance(value, torch.SymBool):
        return
    if not isinstance(value, int) or value not in (0, 1):
        raise TypeError(f"{name}: expected a bool, got {value!r}")


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype of the autocast region that covers `tensor`'s device, None outside of one."""
    device = "cpu" if tensor.is_cpu else tensor.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """No autocast on the device of `tensor`: it would take products in a narrower dtype than the
    one to compute in."""
    device = tensor.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def statistics_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of sums and statistics: float64 for float64, float32 for all else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def host_checks(backend: str, tensor: Tensor) -> bool:
    """Whether Python must check the contents of `tensor`: offsets, lengths, class indices.

    The cpu kernels check what they read; the other backends need it on a CPU. On a GPU it would
    wait for the device, and runs with FASTGPT_CHECK=1 alone, never within the capture of a graph.
    """
    if backend == "cpu" or torch.compiler.is_compiling() or type(tensor) is not Tensor:
        return False
    if tensor.is_cpu:
        return True
    if tensor.device.type == "meta" or os.environ.get("FASTGPT_CHECK") != "1":
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
