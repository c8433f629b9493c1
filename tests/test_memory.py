"""What an op may cost: memory that never holds a score or logit matrix, a band that is linear in S.

Peaks are of the process (torch's allocator does not see a kernel's own scratch), read from Linux.
"""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgpt
from fastgpt import functional as F
from tests.contract import skip_unless_runs, threads

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MIB = 2**20


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    """Scratch is per thread, so the bounds below are for so many."""
    with threads(2):
        yield


def kilobytes(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())[1])


def peak(call: Callable[[], Any]) -> float:
    """MiB by which the process grew at most while `call` ran."""
    try:
        call()  # what is allocated once per process (threads, tables) is not the op's
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        RESET.write_text("5")
    except (OSError, AttributeError):
        pytest.skip("needs /proc/self/clear_refs and malloc_trim (Linux, glibc)")
    before = kilobytes("VmRSS")
    call()
    return (kilobytes("VmHWM") - before) / 1024


def test_peak_sees_an_allocation() -> None:
    """The instrument itself: 64 MiB show, freed or not."""
    assert 60 < peak(lambda: torch.ones(16 * MIB).sum()) < 80


def step(s: int, window: int | None, backward: bool, dtype: torch.dtype) -> Callable[[], Any]:
    q, k, v = torch.randn(3, 1, 2, s, 64, dtype=dtype).unbind()
    for tensor in (q, k, v):
        tensor.requires_grad_(backward)

    def call() -> Any:
        out = F.attention(q, k, v, window=window)
        return torch.autograd.grad(out, (q, k, v), out.detach()) if backward else out

    return call


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("window", [None, 256], ids=["dense", "banded"])
def test_attention_never_holds_the_scores(window: int | None, backward: bool) -> None:
    """(s, s) scores of one head alone would be 64 MiB, q, k, v and their gradients are 2 each."""
    skip_unless_runs("attention", "cpu")
    with fastgpt.backend("cpu"):
        assert peak(step(4096, window, backward, torch.float32)) < (32 if backward else 16)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_of_a_band_is_linear(backward: bool) -> None:
    skip_unless_runs("attention", "cpu")
    with fastgpt.backend("cpu"):
        short, long = (peak(step(s, 256, backward, torch.float32)) for s in (8192, 16384))
    assert long < 2.3 * short + 1


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_time_of_a_band_is_linear(backward: bool) -> None:
    """The fastest of many runs, taken in turns: the machine's noise can only add to a time."""
    skip_unless_runs("attention", "cpu")
    best = {s: float("inf") for s in (4096, 8192)}
    calls = {s: step(s, 256, backward, torch.float32) for s in best}
    with fastgpt.backend("cpu"), threads(1):
        for _ in range(40):
            for s, call in calls.items():
                start = time.perf_counter()
                call()
                best[s] = min(best[s], time.perf_counter() - start)
            if best[8192] < 2.3 * best[4096]:
                return
    pytest.fail(f"seconds of S = 4096 and 8192: {best}")


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_packed_documents_cost_no_padding(backward: bool) -> None:
    """One long and 511 short documents: padded to the longest, q alone would be 256 MiB."""
    skip_unless_runs("varlen_attention", "cpu")
    ends = torch.cat([torch.tensor([0]), torch.arange(2048, 2048 + 512 * 2, 2)]).int()
    q, k, v = torch.randn(3, int(ends[-1]), 1, 64).unbind()
    for tensor in (q, k, v):
        tensor.requires_grad_(backward)

    def call() -> Any:
        out = F.varlen_attention(q, k, v, ends, ends, 2048, 2048)
        return torch.autograd.grad(out, (q, k, v), out.detach()) if backward else out

    with fastgpt.backend("cpu"):
        assert peak(call) < 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_linear_cross_entropy_never_holds_the_logits(backward: bool, dtype: torch.dtype) -> None:
    """(n, v) logits would be 64 MiB in float32; the weight's gradient is 2 MiB."""
    skip_unless_runs("linear_cross_entropy", "cpu")
    x, weight = torch.randn(1024, 32, dtype=dtype), torch.randn(16384, 32, dtype=dtype)
    target = torch.randint(16384, (1024,))
    for tensor in (x, weight):
        tensor.requires_grad_(backward)

    def call() -> Any:
        loss: Tensor = F.linear_cross_entropy(x, weight, target)
        return torch.autograd.grad(loss, (x, weight)) if backward else loss

    with fastgpt.backend("cpu"):
        assert peak(call) < 48


@pytest.mark.parametrize("op", ["layer_norm", "softmax", "bias_gelu", "cross_entropy"])
def test_rows_cost_one_output_and_one_gradient(op: str) -> None:
    """x is 32 MiB; beyond it there may be y, what flows into it, and dx."""
    skip_unless_runs(op, "cpu")
    x = torch.randn(1024, 8192, requires_grad=True)
    target = torch.randint(8192, (1024,))
    functions = {
        "layer_norm": lambda: F.layer_norm(x, 8192),
        "softmax": lambda: F.softmax(x),
        "bias_gelu": lambda: F.bias_gelu(x),
        "cross_entropy": lambda: F.cross_entropy(x, target),
    }

    def call() -> Any:
        y = functions[op]()
        return torch.autograd.grad(y, x, torch.ones_like(y))

    with fastgpt.backend("cpu"):
        assert peak(call) < (48 if op == "cross_entropy" else 112)
