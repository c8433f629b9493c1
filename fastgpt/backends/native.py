"""Loads the compiled op library, if there is one, and keeps the reason if not."""

from __future__ import annotations

import ctypes
import importlib
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

OP_LIBRARY = Path(__file__).resolve().parent.parent / "libfastgpt_ops.so"
INSTALL_HINT = (
    "install a C++17 compiler (for example `apt-get install g++`) and reinstall: "
    "pip install --force-reinstall --no-deps fastgpt (from a checkout: pip install .)"
)


def _load_op_library() -> str | None:
    """Register the C++ kernels with torch; returns why not, None on success."""
    if os.environ.get("FASTGPT_NATIVE") == "0":
        return "FASTGPT_NATIVE=0 switches the compiled library off"
    if not OP_LIBRARY.exists():
        return f"{OP_LIBRARY.name} is not in the package (pure Python install); {INSTALL_HINT}"
    try:
        torch.ops.load_library(str(OP_LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"{OP_LIBRARY.name} does not load: {error}"
    return None


def _load_extension() -> tuple[ModuleType | None, str | None]:
    """Import the pybind11 module, which describes the build; returns it or why not."""
    if os.environ.get("FASTGPT_NATIVE") == "0":
        return None, "FASTGPT_NATIVE=0 switches the compiled library off"
    try:
        return importlib.import_module("fastgpt._C"), None
    except ImportError as error:
        return None, str(error)


MISSING: str | None = _load_op_library()
"""Why the op library is not loaded; None when it is."""

_C, EXTENSION_MISSING = _load_extension()


def release_memory() -> int:
    """Give the memory that freed results of CPU kernels have left back to the system.

    Large results and scratch (1.5 MiB and more) are kept for the next call, whose pages then need
    not be made again: at most what was in use at once, and an eighth of the machine's memory.

    Returns:
        How many bytes were kept.
    """
    if MISSING is not None:
        return 0
    release = ctypes.CDLL(str(OP_LIBRARY)).fastgpt_release_memory
    release.restype = ctypes.c_size_t
    return int(release())


def build_info() -> dict[str, Any]:
    """What was compiled: CPU ISA levels, the one in use, GPU architectures, compilers."""
    return dict(_C.build_info()) if _C is not None else {}


def cpu_isa() -> str | None:
    """The CPU instruction set level that the kernels run on (FASTGPT_CPU_ISA lowers it)."""
    return str(_C.cpu_isa()) if _C is not None and MISSING is None else None


def _warn_of_another_isa() -> None:
    """An import never fails, but a level that was asked for and is not used is not kept silent."""
    asked, used = os.environ.get("FASTGPT_CPU_ISA"), cpu_isa()
    if asked and used and asked != used:
        levels = ", ".join(build_info()["cpu_isa_levels"])
        warnings.warn(
            f"FASTGPT_CPU_ISA: expected one of {levels} that this machine has, got {asked!r}; "
            f"the kernels run at {used}",
            stacklevel=2,
        )


_warn_of_another_isa()


def gpu_architectures() -> tuple[str, ...]:
    """The GPU architectures that kernels were compiled for, as `sm_90`; empty without CUDA."""
    return tuple(str(a) for a in build_info().get("cuda_architectures", ()))


def cuda_refusal() -> str | None:
    """Why the compiled CUDA kernels cannot run on this machine's GPU; None if they can."""
    compiled = gpu_architectures()
    if not compiled:
        return "was not compiled (no nvcc when fastgpt was built; set FASTGPT_CUDA=1 to insist)"
    if not torch.cuda.is_available():
        return "needs a CUDA build of torch and a GPU, and torch.cuda.is_available() is False"
    driver_error = _C.cuda_driver_error() if _C is not None else EXTENSION_MISSING
    if driver_error:
        return str(driver_error)
    major, minor = torch.cuda.get_device_capability()
    capability = major * 10 + minor
    oldest = min(int(name.removeprefix("sm_").rstrip("a")) for name in compiled)
    if capability < oldest:
        return f"was compiled for {', '.join(compiled)}; this GPU is sm_{capability}"
    return None


def most_head_dim(wide: bool) -> int:
    """The widest heads, of float32 if `wide`, whose attention fits into this GPU's shared memory.

    The largest tiles need 132 KiB a block: A100 and later datacenter GPUs give 163 and more, those
    for desktops 99.
    """
    if torch.cuda.get_device_capability() in ((8, 6), (8, 9), (12, 0), (12, 1)):
        return 96 if wide else 128
    return 256


def cuda_kernel(op: str, tensor: torch.Tensor, head_dim: int, features: bool) -> str:
    """What the CUDA forward of `op` runs on: the GPU and, for attention, its tensor cores' form.

    features: there is more to the call than causal and window.
    """
    major, minor = torch.cuda.get_device_capability(tensor.device)
    capability = 10 * major + minor
    if op not in ("attention", "varlen_attention"):
        return f"sm_{capability}"
    compiled = any(name.startswith("sm_90") for name in gpu_architectures())
    bits = 8 * tensor.element_size()
    if compiled and _C is not None and _C.suits_warpgroups(bits, head_dim, features, capability):
        return f"sm_{capability} wgmma"
    return f"sm_{capability} mma.sync"
