"""Every bench file's `OP` over its shapes, dtypes, directions and peers, and what goes into JSON.

A peer that cannot run here is skipped with the reason; one that breaks the error rule fails and
is not timed. Peers that compile at run time are measured with `--compile`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastgpt
from benchmarks import figures, machine
from benchmarks.measure import Case, History, Op, prepare
from benchmarks.peer import COMPILING

DTYPES = [torch.float32, torch.bfloat16]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compile", action="store_true", help="measure peers that compile too")
    parser.addoption("--device", default=None, help="cpu or cuda; a GPU if there is one")


def pytest_configure(config: pytest.Config) -> None:
    try:
        device_of(config)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


def device_of(config: pytest.Config) -> torch.device:
    return machine.device(config.getoption("--device", None))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The peers of a group follow one another, so that its inputs and reference are made once."""
    op: Op = metafunc.module.OP
    device = device_of(metafunc.config)
    directions = [False, True] if op.differentiable else [False]
    metafunc.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
    metafunc.parametrize("shape", op.shapes[device.type], ids=str)
    metafunc.parametrize("backward", directions, ids=lambda b: "fwd_bwd" if b else "fwd")
    metafunc.parametrize("peer", list(op.peers))


@pytest.fixture(scope="session")
def history() -> History:
    return History()


@pytest.fixture(scope="session")
def groups() -> dict[str, Case]:
    """The group that is being measured; the tensors of earlier ones are let go."""
    return {}


@pytest.fixture
def case(
    request: pytest.FixtureRequest,
    groups: dict[str, Case],
    dtype: torch.dtype,
    shape: Any,
    backward: bool,
) -> Case:
    name = request.function.__name__.removeprefix("bench_")
    device = device_of(request.config)
    case = Case(name, request.module.OP, shape, dtype, backward, device)
    if str(case) not in groups:
        groups.clear()
        groups[str(case)] = case
    return groups[str(case)]


@pytest.fixture
def measure(
    request: pytest.FixtureRequest, benchmark: Any, case: Case, peer: str, history: History
) -> Callable[[], None]:
    """Times a forward, or a forward with its backward; what a peer cannot do is a skip."""

    def run() -> None:
        if peer in COMPILING and not request.config.getoption("--compile"):
            pytest.skip("compiles at run time; measured with --compile")
        step = prepare(case, peer, history)
        benchmark.group = str(case)
        benchmark.extra_info.update(case.counts._asdict(), peer=peer, device=case.device.type)
        benchmark(step)

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    device = device_of(config)
    machine_info.clear()
    machine_info.update(
        device=machine.name_of(device),
        threads=torch.get_num_threads(),
        fastgpt=fastgpt.__version__,
        torch=torch.__version__,
        **machine.roofs(device),
    )


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]
) -> None:
    figures.slim(output_json)
