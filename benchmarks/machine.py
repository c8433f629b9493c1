"""The machine that is measured: its name, and the roofs that figures are held against."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastgpt.backends import native

RESULTS = Path(__file__).resolve().parent / "results"


def device(name: str | None) -> torch.device:
    """cpu or cuda; without a name a GPU if there is one. ValueError if it is not here."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not name:
        return torch.device("cuda" if gpus else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or cuda, got {name!r}")
    if found.type == "cuda" and (found.index or 0) >= gpus:
        raise ValueError(f"--device: {name} asked for, but torch sees {gpus or 'no'} GPUs here")
    return found


def name_of(device: torch.device) -> str:
    """What its maker calls the GPU; or the CPU, and the level of the kernels that run on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    from cpuinfo import get_cpu_info  # type: ignore[import-untyped] # of pytest-benchmark

    brand, level = get_cpu_info().get("brand_raw", "CPU"), native.cpu_isa()
    return f"{brand} ({level})" if level else str(brand)


def folder_of(device: torch.device) -> Path:
    """benchmarks/results/<machine>, the name in lower case with dashes."""
    return RESULTS / re.sub(r"[\W_]+", "-", name_of(device)).strip("-").lower()


def roofs(device: torch.device) -> dict[str, Any]:
    """GB/s of a copy; TFLOP/s of torch's matrix product by dtype, or of float32 if that is more."""
    full, half = (_matmul_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16))
    return {
        "copy_gb_per_s": _copy_bandwidth(device),
        "matmul_tflop_per_s": {"float32": full, "bfloat16": max(full, half)},
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _best_of(function: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(6):
        synchronize(device)
        begin = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times)


def _copy_bandwidth(device: torch.device) -> float:
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best_of(lambda: target.copy_(source), device) / 1e9


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s, of large matrices where those do not take too long."""
    rate = 0.0
    for n in (256, 1024, 8192):
        if rate and 2 * n**3 / rate > 1.5e12:  # longer than 1.5 s
            break
        a = torch.randn(n, n, device=device, dtype=dtype)
        rate = max(rate, 2 * n**3 / _best_of(lambda a=a: a @ a, device) / 1e12)  # type: ignore[misc]
    return rate
