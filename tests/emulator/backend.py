"""Backend `cuda_emulated`: the CUDA kernels, compiled for the CPU, on the CPU's tensors.

Its op library registers the kernels as `torch.ops.fastgpt_emulated`, under the schemas of
`torch.ops.fastgpt`. Every op with a `cuda` cell gets a cell of the same content, so that the tests
run it like any backend: what a kernel must not do (race, leave its tensors, wait for ever) is a
RuntimeError, and each launch takes another order of threads. `make test` builds it.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from fastgpt import dispatch

NAME = "cuda_emulated"
NAMESPACE = "fastgpt_emulated"
ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/emulator"
LIBRARY = BUILD / "libfastgpt_emulated.so"
CASES = BUILD / "fastgpt_emulator_cases"
GPU_CASES = BUILD / "fastgpt_gpu_cases"
_definitions = torch.library.Library(NAMESPACE, "DEF")


def not_built(what: Path) -> str | None:
    """Why `what` is not there; None if it is."""
    if what.exists():
        return None
    return f"{what.name} is not built: `make test` does it, with GCC and the headers of CUDA"


@functools.cache
def missing() -> str | None:
    """Why the emulator cannot run here; None if it can, and then its library is loaded."""
    reason = not_built(LIBRARY)
    if reason is not None:
        return reason
    torch.ops.load_library(str(LIBRARY))
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    for qualified in registered:
        namespace, _, name = qualified.partition("::")
        if namespace == NAMESPACE:
            _define(name)
    return None


def _define(name: str) -> None:
    """The schema and the shapes of torch.ops.fastgpt.<name>."""
    op = getattr(torch.ops.fastgpt, name).default
    schema = str(op._schema).removeprefix("fastgpt::")
    _definitions.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def fake(*args: Any) -> Any:
        return op(*args)

    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_definitions)


def add_to_table() -> None:
    """A `cuda_emulated` cell beside every `cuda` cell."""
    dispatch.DEVICES[NAME] = ("cpu",)
    dispatch.MISSING[NAME] = missing
    dispatch.NAMESPACES[NAME] = NAMESPACE
    for row in dispatch.TABLE.values():
        if "cuda" in row:
            row[NAME] = row["cuda"]


def take_bank_conflicts() -> int:
    """Passes over shared memory beyond one per matrix that ldmatrix took since the last call."""
    assert missing() is None
    take = ctypes.CDLL(str(LIBRARY)).fastgpt_emulator_take_bank_conflicts
    take.restype = ctypes.c_uint64
    return int(take())
