"""Backend `cuda_emulated`: the CUDA kernels, compiled for the CPU, on the CPU's tensors.

Its op library registers the kernels as `torch.ops.fastgpt_emulated`, under the schemas of
`torch.ops.fastgpt`. Every op with a `cuda` cell gets a cell of the same content, so that the tests
run it like any backend: what a kernel must not do (race, leave its tensors, wait for ever) is a
RuntimeError, and each launch takes another order of threads. `make test` builds it.

Its device is an old one, of compute capability 8.0. Backend `cuda_emulated_sm90` runs the same
library on one of 9.0, for those ops and dtypes whose kernels differ there.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastgpt import dispatch

NAME = "cuda_emulated"
NAMESPACE = "fastgpt_emulated"
NAME_SM90 = "cuda_emulated_sm90"
NAMESPACE_SM90 = "fastgpt_emulated_sm90"
OPS_SM90 = ("attention", "varlen_attention")
DTYPES_SM90 = (torch.bfloat16, torch.float16)
ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/emulator"
LIBRARY = BUILD / "libfastgpt_emulated.so"
CASES = BUILD / "fastgpt_emulator_cases"
GPU_CASES = BUILD / "fastgpt_gpu_cases"
_definitions = torch.library.Library(NAMESPACE, "DEF")
_definitions_sm90 = torch.library.Library(NAMESPACE_SM90, "DEF")


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
            _define(name, NAMESPACE, _definitions)
            if name.rpartition("_")[0] in OPS_SM90:
                _define(name, NAMESPACE_SM90, _definitions_sm90)
                _definitions_sm90.impl(name, _on_sm90(name), "CPU")
    return None


def _define(name: str, namespace: str, definitions: torch.library.Library) -> None:
    """The schema and the shapes of torch.ops.fastgpt.<name>."""
    op = getattr(torch.ops.fastgpt, name).default
    schema = str(op._schema).removeprefix("fastgpt::")
    definitions.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def fake(*args: Any) -> Any:
        return op(*args)

    torch.library.register_fake(f"{namespace}::{name}", fake, lib=definitions)


def _on_sm90(name: str) -> Callable[..., Any]:
    """The emulated op on a device of compute capability 9.0."""
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    set_capability = ctypes.CDLL(str(LIBRARY)).fastgpt_emulator_set_compute_capability

    def run(*args: Any) -> Any:
        set_capability(90)
        try:
            return op(*args)
        finally:
            set_capability(80)

    return run


def add_to_table() -> None:
    """A `cuda_emulated` cell beside every `cuda` cell, beside some a `cuda_emulated_sm90` too."""
    for name, namespace in ((NAME, NAMESPACE), (NAME_SM90, NAMESPACE_SM90)):
        dispatch.DEVICES[name] = ("cpu",)
        dispatch.MISSING[name] = missing
        dispatch.NAMESPACES[name] = namespace
    for op, row in dispatch.TABLE.items():
        if "cuda" not in row:
            continue
        # A row of its own: ops share theirs, and have the second backend or not.
        dispatch.TABLE[op] = row | {NAME: row["cuda"]}
        if op in OPS_SM90:
            dispatch.TABLE[op][NAME_SM90] = replace(row["cuda"], dtypes=DTYPES_SM90)


def take_bank_conflicts() -> int:
    """Passes over shared memory beyond one per matrix that ldmatrix took since the last call."""
    assert missing() is None
    take = ctypes.CDLL(str(LIBRARY)).fastgpt_emulator_take_bank_conflicts
    take.restype = ctypes.c_uint64
    return int(take())
