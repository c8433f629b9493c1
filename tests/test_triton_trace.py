"""torch.compile sees the Triton kernels: their launches are nodes of its graphs, not opaque calls.

Without a GPU nothing of this is run, and Inductor, which asks the GPU for its properties, has no
part in it: that compiled code gives the bits of eager code is shown by test_compile.py on a GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastgpt.backends import triton

if (MISSING := triton.missing()) is not None:
    pytest.skip(MISSING, allow_module_level=True)

from fastgpt.backends.triton import _launch
from tests.triton_aot import OPS

ROOT = Path(__file__).resolve().parents[1]
WRITTEN_IN_PLACE = {"decode_attention": ("g_k_cache", "g_v_cache")}


def traced() -> dict[str, Any]:
    """What tests/triton_trace.py saw of all ops, in a process without Triton's interpreter."""
    own = {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton_trace", *OPS],
        cwd=ROOT,
        env=os.environ | own,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_launches_are_in_the_graph_and_ten_lengths_cost_two() -> None:
    """On fake CPU tensors: torch's autograd takes no CUDA tensor where it has no CUDA."""
    found = traced()
    for op in OPS:
        failed = found[op].get("failed")
        assert failed is None, f"{op}: {failed}"
        for direction in ("forward", "backward") if found[op]["differentiable"] else ("forward",):
            graphs, where = found[op][direction], f"{op}, {direction}"
            assert graphs["kernels"], f"{where}: no kernel in the graphs"
            assert graphs["count"] <= 2, f"{where}: {graphs['count']} compilations"
            in_place = WRITTEN_IN_PLACE.get(op, ("nothing",))
            copied = {name for name in graphs["copied"] if not name.endswith(in_place)}
            assert not copied, f"{where}: inputs are copied before the launch"
    assert found["on_cuda"]["device"] == "cuda:0"
    assert found["on_cuda"]["kernels"] == ["softmax_fwd_kernel"]


class Kernel:
    """Records how it is launched."""

    def __init__(self) -> None:
        self.launches: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.launches.append((grid, args, options))


def test_an_eager_launch_calls_the_kernel_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's wrapper for tracing takes a millisecond and never forgets a launch."""
    monkeypatch.setattr(_launch, "interpreted", lambda: False)
    any_device = SimpleNamespace(device=contextlib.nullcontext)
    monkeypatch.setattr(torch, "get_device_module", lambda device: any_device)
    kernel, x = Kernel(), torch.ones(3)
    _launch.launch(kernel, 5, x, 7, BLOCK=16, num_warps=8)
    ((grid, args, options),) = kernel.launches
    assert grid == (5,)
    assert args == (x, 7)
    assert options["BLOCK"] == 16
    assert options["num_warps"] == 8
    assert options["enable_fp_fusion"]
    _launch.launch(kernel, 0, x)
    assert len(kernel.launches) == 1


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 127, 128, 129, 50257])
def test_next_power_of_2(n: int) -> None:
    power = _launch.next_power_of_2(n)
    assert power >= max(n, 1) > power / 2 or power == 1
    assert power & (power - 1) == 0
