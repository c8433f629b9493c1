"""What the benchmarks share: device and dtype, the error rule, timing, the machine's roofs.

A peer that cannot run here is skipped with the reason; one that breaks the error rule fails and
is not timed. Peers that compile at run time are measured with `--compile`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgpt
from benchmarks.peers import Absent

COMPILING = ("torch_compile", "torch_flex")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compile", action="store_true", help="measure peers that compile too")
    parser.addoption("--device", default=None, help="cpu or cuda; a GPU if there is one")


def device_of(config: pytest.Config) -> torch.device:
    name = config.getoption("--device", None)
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`shape` runs over the module's SHAPES for the device, `peer` over its PEERS."""
    device = device_of(metafunc.config)
    if "shape" in metafunc.fixturenames:
        metafunc.parametrize("shape", metafunc.module.SHAPES[device.type], ids=str)
    if "dtype" in metafunc.fixturenames:
        dtypes = [torch.float32, torch.bfloat16]
        metafunc.parametrize("dtype", dtypes, ids=lambda d: str(d).removeprefix("torch."))
    if "peer" in metafunc.fixturenames:
        metafunc.parametrize("peer", list(metafunc.module.PEERS))


@pytest.fixture
def device(request: pytest.FixtureRequest, peer: str) -> torch.device:
    if peer in COMPILING and not request.config.getoption("--compile"):
        pytest.skip("compiles at run time; measured with --compile")
    return device_of(request.config)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build(peer: Callable[..., Any], *args: Any) -> Callable[..., Tensor]:
    """The peer's function, or a skip with the reason."""
    try:
        return peer(*args)  # type: ignore[no-any-return]
    except Absent as reason:
        pytest.skip(str(reason))


def check_error(got: Tensor, low: Tensor, ref: Tensor) -> None:
    """The max rule: at most twice the error of plain torch in the same dtype, plus rounding."""
    got, low = got.double(), low.double()
    eps = torch.finfo(torch.float32 if got.dtype == torch.float64 else got.dtype).eps
    scale = ref.abs().max()
    limit = 2 * (low - ref).abs().max() + 16 * eps * scale
    error = (got - ref).abs().max()
    assert torch.isfinite(got).all(), "result is not finite"
    assert error <= limit, f"breaks the error rule: {error:.2e}, allowed {limit:.2e}"


@pytest.fixture
def measure(benchmark: Any, device: torch.device, peer: str) -> Callable[..., None]:
    """Times a forward, or a forward with its backward; what a peer cannot do is a skip."""

    def run(
        function: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        *,
        group: str,
        backward: bool,
        reference: Callable[..., Tensor],
        low: Callable[..., Tensor],
        moved: int,
        flops: int = 0,
    ) -> None:
        def step() -> Tensor:
            if not backward:
                with torch.no_grad():
                    return function(*inputs)
            for x in inputs:
                x.grad = None
            out = function(*inputs)
            out.backward(dout)
            return out

        for x in inputs:
            x.requires_grad_(backward and x.is_floating_point())
        wide = [x.detach().double() if x.is_floating_point() else x for x in inputs]
        try:
            with torch.no_grad():
                out = function(*inputs)
                check_error(out, low(*inputs), reference(*wide))
            dout = torch.randn_like(out)
            step()
        except RuntimeError as error:
            if peer == "fastgpt":
                raise
            pytest.skip(f"does not run here: {str(error).splitlines()[0]}")

        def synchronized() -> None:
            step()
            synchronize(device)

        benchmark.group = group
        benchmark.extra_info.update(bytes=moved, flops=flops, device=str(device))
        benchmark(synchronized)

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    device = device_of(config)
    on_gpu = device.type == "cuda"
    machine_info.update(
        fastgpt=fastgpt.__version__,
        torch=torch.__version__,
        device=torch.cuda.get_device_name(device)
        if on_gpu
        else machine_info["cpu"].get("brand_raw", "CPU"),
        threads=torch.get_num_threads(),
        copy_gb_per_s=_copy_bandwidth(device),
        matmul_tflop_per_s=_matmul_rate(device),
    )


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


def _matmul_rate(device: torch.device) -> float:
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / _best_of(lambda: a @ a, device) / 1e12
