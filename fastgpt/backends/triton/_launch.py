"""The only launch of Triton kernels, what a launch was (for compiling ahead of time), and for whom.

Conventions of the kernels: counts (rows, sq, sk) are in `do_not_specialize`, so that a new one
compiles nothing. Strides, and a length that masks the contiguous axis, are not: whether 16 divides
them decides the width of the loads. Grids put everything on axis 0, which alone may exceed 65535.
Offsets of rows are int64.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.library import wrap_triton

from fastgpt.backends.triton import interpreted

T = TypeVar("T")


@dataclass(frozen=True)
class Launch:
    """One launch as it would have been made."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


_recorded: list[Launch] | None = None
_architecture = ""


@contextlib.contextmanager
def recording(architecture: str) -> Iterator[list[Launch]]:
    """Collect the launches made inside, with the tuning of `architecture`, and make none of them.

    The ops may then be called on meta tensors.
    """
    global _recorded, _architecture
    before = _recorded, _architecture
    _recorded, _architecture = [], architecture
    try:
        yield _recorded
    finally:
        _recorded, _architecture = before


def launch(
    kernel: Any,
    programs: int,
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    **constants: Any,
) -> None:
    """Run `programs` programs of `kernel` on the device of the first tensor among `args`.

    `constants` are the kernel's tl.constexpr arguments.
    """
    if torch.compiler.is_compiling():
        # Inductor guards the device itself, and a launch without programs is dropped there. Only
        # here is it worth wrapping: each wrapped launch costs a millisecond and is kept for ever.
        wrap_triton(kernel)[(programs,)](
            *args, **constants, num_warps=num_warps, num_stages=num_stages
        )
        return
    if _recorded is not None:
        _recorded.append(Launch(kernel, args, constants, num_warps, num_stages))
        return
    if programs == 0:
        return
    if interpreted():
        kernel[(programs,)](*args, **constants)
        return
    tensor = next(a for a in args if isinstance(a, Tensor))
    with torch.get_device_module(tensor.device).device(tensor.device):
        # Fused multiply-adds, as Inductor has them: Triton's own default changes in 3.10.
        kernel[(programs,)](
            *args,
            **constants,
            num_warps=num_warps,
            num_stages=num_stages,
            enable_fp_fusion=True,
        )


def architecture(device: torch.device) -> str:
    """What the tables of tuned sizes are keyed by: `sm_90`, `gfx942`, or the device's type."""
    return _architecture or _architecture_of(device)


@torch.compiler.assume_constant_result
@functools.cache
def _architecture_of(device: torch.device) -> str:
    if device.type != "cuda" or interpreted():
        return device.type
    if torch.version.hip:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def remembered(function: Callable[..., T]) -> Callable[..., T]:
    """functools.cache for eager calls; the tracer would look through it, with a warning."""
    cached = functools.cache(function)

    @functools.wraps(function)
    def call(*args: Any) -> T:
        return function(*args) if torch.compiler.is_compiling() else cached(*args)

    return call


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """By comparisons alone: from a traced n they make a plain number, as a block size or a count
    of warps must be, and a guard that holds for every length of the same block."""
    power = 1
    while power < n:
        power *= 2
    return power
