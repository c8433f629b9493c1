"""The emulator itself: primitives against the PTX ISA, planted faults, its place in the table."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

import fastgpt
from fastgpt import dispatch
from fastgpt import functional as F
from tests.emulator import backend

NOT_BUILT = backend.not_built(backend.CASES)


def run_cases(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300)


def cases() -> list[str]:
    return run_cases(backend.CASES, "--list").stdout.splitlines() if NOT_BUILT is None else []


@pytest.mark.skipif(NOT_BUILT is not None, reason=str(NOT_BUILT))
@pytest.mark.parametrize("case", cases())
def test_case(case: str) -> None:
    """A primitive does what the PTX ISA says, or a fault is reported on every order of threads."""
    done = run_cases(backend.CASES, case)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_primitives_on_the_gpu() -> None:
    """What the emulator believes of the hardware is what the hardware does."""
    if not backend.GPU_CASES.exists():
        pytest.skip(f"{backend.GPU_CASES.name} is not built: `make gpu` does it")
    done = run_cases(backend.GPU_CASES)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_cuda_cell_is_emulated() -> None:
    for op, row in dispatch.TABLE.items():
        assert row.get("cuda") == row.get(backend.NAME)
        on_sm90 = row.get(backend.NAME_SM90)
        assert (on_sm90 is not None) == (op in backend.OPS_SM90)
        assert on_sm90 is None or on_sm90.max_head_dim == row["cuda"].max_head_dim


@pytest.mark.parametrize("name", [backend.NAME, backend.NAME_SM90])
def test_it_is_never_chosen_by_itself(name: str) -> None:
    assert name not in dispatch.BACKENDS
    for op in dispatch.TABLE:
        assert dispatch.pick(op, torch.randn(2, 3)) != name


needs_library = pytest.mark.skipif(backend.missing() is not None, reason=str(backend.missing()))


@needs_library
def test_orders_of_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(5, 700), torch.randn(700)
    results = []
    for schedule in range(8):
        monkeypatch.setenv("FASTGPT_EMULATOR_SCHEDULE", str(schedule))
        with fastgpt.backend(backend.NAME):
            results.append(F.layer_norm(x, 700, weight))
    for result in results[1:]:
        assert torch.equal(result, results[0])
    torch.testing.assert_close(results[0], torch.nn.functional.layer_norm(x, (700,), weight))


@needs_library
@pytest.mark.parametrize("name", [backend.NAME, backend.NAME_SM90])
def test_orders_of_threads_change_no_bit_of_attention(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (torch.randn(1, 2, 70, 64, dtype=torch.bfloat16) for _ in range(3))
    results = []
    for schedule in range(4):
        monkeypatch.setenv("FASTGPT_EMULATOR_SCHEDULE", str(schedule))
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        with fastgpt.backend(name):
            out = F.attention(*inputs, window=40)
            out.sum().backward()
        results.append([out, *(x.grad for x in inputs)])
    for result in results[1:]:
        assert all(torch.equal(got, want) for got, want in zip(result, results[0], strict=True))


@needs_library
@pytest.mark.parametrize("name", [backend.NAME, backend.NAME_SM90])
@pytest.mark.parametrize("d", [64, 80, 96, 128])
def test_attention_reads_matrices_without_conflicts(d: int, name: str) -> None:
    """ldmatrix finds the eight rows of each matrix in different banks, at every native width."""
    backend.take_bank_conflicts()
    inputs = [torch.randn(1, 1, 40, d, dtype=torch.float16, requires_grad=True) for _ in range(3)]
    with fastgpt.backend(name):
        F.attention(*inputs).sum().backward()
    assert backend.take_bank_conflicts() == 0


@needs_library
def test_layer_norm_reads_no_matrices() -> None:
    backend.take_bank_conflicts()
    with fastgpt.backend(backend.NAME):
        F.layer_norm(torch.randn(2, 64), 64)
    assert backend.take_bank_conflicts() == 0
