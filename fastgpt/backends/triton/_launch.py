"""The only launch of Triton kernels, what a launch was (for compiling ahead of time), and for whom.

Conventions of the kernels: counts (rows, sq, sk) are in `do_not_specialize`, so that a new one
compiles nothing. Strides, and a length that masks the contiguous axis, are not: whether 16 divides
them decides the width of the loads. Grids put everything on axis 0, which alone may exceed 65535.
Offsets of rows are int64.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from fastgpt.backends.triton import interpreted


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
        # Inductor guards the device itself, and a launch without programs is dropped there.
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
    run = wrap_triton(kernel)[(programs,)]
    with torch.get_device_module(tensor.device).device(tensor.device):
        run(*args, **constants, num_warps=num_warps, num_stages=num_stages)


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


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


next_power_of_2 = triton.next_power_of_2
