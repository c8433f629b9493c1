"""What an op may cost: memory that never holds a score or logit matrix, a band that is linear in S.

Peaks are of the process (torch's allocator does not see a kernel's own scratch), read from Linux.
"""

from __future__ import annotations

import ctypes
import gc
import re
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgpt
from fastgpt import functional as F
from fastgpt.backends import native
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
        native.release_memory()
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


OLD_TORCH = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11)
of_kept_pages = pytest.mark.skipif(
    native.MISSING is not None or OLD_TORCH, reason="needs the op library and torch 2.11"
)


def rows(mib: int, value: float = 0.0) -> Tensor:
    """A result of `mib` MiB of the CPU kernels."""
    with fastgpt.backend("cpu"):
        return F.bias_gelu(torch.full((mib, MIB // 4), value))


@of_kept_pages
def test_the_pages_of_a_large_result_are_made_once() -> None:
    x = torch.randn(48, MIB // 4)  # torch's allocator would map 12288 new pages each time

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        with fastgpt.backend("cpu"):
            F.softmax(x)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert faults() < 1000


@of_kept_pages
def test_no_result_lies_in_the_memory_of_another() -> None:
    held = [rows(mib, float(mib)) for mib in (2, 3, 4, 5, 8, 5, 4, 3, 2)]
    del held[1::2]
    held += [rows(mib, float(mib)) for mib in (3, 5, 6, 2)]
    for y in held:  # gelu(value) is the same everywhere, and near to a value of 2 and more
        assert round(y[0, 0].item()) == y.shape[0]
        assert torch.equal(y, y[:1, :1].expand_as(y))


@of_kept_pages
def test_a_view_keeps_the_memory_of_its_base() -> None:
    view = rows(4, 1.0)[1, :8]
    expected = view.clone()
    rows(4, 2.0)
    assert torch.equal(view, expected)


@of_kept_pages
def test_what_is_kept_with_what_is_used_is_never_more_than_was_used() -> None:
    native.release_memory()
    held = [rows(16) for _ in range(6)]
    del held
    assert native.release_memory() == 96 * MIB
    held = [rows(16) for _ in range(6)]
    del held
    large = rows(64)  # no block of 16 MiB serves it
    assert native.release_memory() == 32 * MIB
    del large
    assert native.release_memory() == 64 * MIB
    assert native.release_memory() == 0


@of_kept_pages
def test_the_system_may_take_back_what_is_kept_beyond_256_mib() -> None:
    """Kept pages still count as the process's; the system finds them marked as free."""
    if not (rollup := Path("/proc/self/smaps_rollup")).exists():
        pytest.skip("needs /proc/self/smaps_rollup")
    native.release_memory()
    held = [rows(32) for _ in range(12)]
    del held
    free = int(re.search(r"LazyFree:\s+(\d+) kB", rollup.read_text())[1])
    assert 100 < free / 1024 <= 128
    native.release_memory()
