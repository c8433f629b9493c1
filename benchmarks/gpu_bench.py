"""The ops on the GPU that is here, beside torch's fastest kernels, in one table: make gpu-bench.

    python -m benchmarks.gpu_bench [--only PATTERN] [--seconds N] [--no-compile] [--device cpu]
                                   [--folder F]

Ours and its peers take turns call by call, each with an L2 that holds something else; the medians
are compared. A peer whose results break the error rule is reported, not timed. The roof of a row is
the time that its bytes take at the rate of a copy, or its products at that of torch's matrix
product, whichever is longer, both measured in the same run. Rows come in order of importance; what
the seconds do not suffice for is listed. Writes benchmarks/results/<gpu>/gpu.json.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._functorch import config as functorch

import fastgpt
from benchmarks import machine
from benchmarks.measure import Case, Counts, Op, check_error, forward, pattern
from benchmarks.peer import COMPILING, Absent
from fastgpt import dispatch

Step = Callable[[], object]
OURS, OURS_TRITON = "fastgpt", "fastgpt_triton"
FLUSH_BYTES = 2**29
"""Written between two calls: far more than any L2."""
AHEAD_CYCLES = 1_000_000
"""What the GPU then waits, half a millisecond, while the host queues the call: no gap is timed."""
SECONDS_A_PEER = 0.15
BF16, F32 = torch.bfloat16, torch.float32
HALVES, BOTH = (BF16,), (BF16, F32)

PLAN: tuple[tuple[str, tuple[str, ...], tuple[torch.dtype, ...]], ...] = (
    ("attention", ("fwd", "bwd"), HALVES),
    ("decode_attention", ("fwd",), HALVES),
    ("layer_norm", ("fwd", "bwd"), HALVES),
    ("softmax", ("fwd", "bwd"), HALVES),
    ("cross_entropy", ("fwd+bwd",), HALVES),
    ("linear_cross_entropy", ("fwd+bwd",), HALVES),
    ("varlen_attention", ("fwd", "bwd"), HALVES),
    ("add_layer_norm", ("fwd", "bwd"), HALVES),
    ("masked_softmax", ("fwd", "bwd"), HALVES),
    ("bias_gelu", ("fwd", "bwd"), HALVES),
    ("layer_norm", ("fwd", "bwd"), (F32,)),
    ("softmax", ("fwd", "bwd"), (F32,)),
)
"""(op, directions, dtypes), over all shapes of the op on the device."""

COMPILED = ("gpt3_xl", "gpt2_vocabulary", "long_band", "batch", "demo")
"""Shapes by reason at which the peers that compile are measured: each takes seconds."""

LEFT_OUT = {
    "attention": ("torch_math", "torch_compile"),
    "varlen_attention": ("torch_mask", "torch_compile"),
    "decode_attention": ("torch_math",),
}
"""op -> peers that hold all scores: no competition at these lengths."""


@dataclass(frozen=True)
class Row:
    """One line of the table: an op at a shape, in one direction."""

    op: str
    shape: Any
    dtype: torch.dtype
    way: str

    @property
    def backward(self) -> bool:
        return self.way != "fwd"

    def __str__(self) -> str:
        return f"{self.op} {self.shape} {str(self.dtype).removeprefix('torch.')} {self.way}"


@dataclass
class Measured:
    """Seconds of each peer, why the others have none, and what the machine could do at best."""

    row: str
    bytes: int
    flops: int
    roof_seconds: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def ours(self) -> float | None:
        return self.seconds.get(OURS)

    @property
    def best_peer(self) -> str | None:
        peers = {name: s for name, s in self.seconds.items() if not name.startswith(OURS)}
        return min(peers, key=peers.__getitem__, default=None)


def op_of(name: str) -> Op:
    return importlib.import_module(f"benchmarks.bench_{name}").OP


def rows(device: torch.device) -> Iterator[Row]:
    for op, ways, dtypes in PLAN:
        for dtype in dtypes:
            for shape in op_of(op).shapes[device.type]:
                for way in ways:
                    yield Row(op, shape, dtype, way)


def counts(row: Row) -> Counts:
    count, size = op_of(row.op).counts, row.dtype.itemsize
    if row.way != "bwd":
        return count(row.shape, size, row.backward)
    both, once = count(row.shape, size, True), count(row.shape, size, False)
    return Counts(both.bytes - once.bytes, both.flops - once.flops)


def roof_seconds(row: Row, roofs: dict[str, Any]) -> float:
    """The least time that this machine could take."""
    moved, flops = counts(row)
    rate = roofs["matmul_tflop_per_s"][str(row.dtype).removeprefix("torch.")]
    return max(moved / (roofs["copy_gb_per_s"] * 1e9), flops / (rate * 1e12))


# --- steps --------------------------------------------------------------------------------------


@contextlib.contextmanager
def backend_of(peer: str) -> Iterator[None]:
    with fastgpt.backend("triton") if peer == OURS_TRITON else contextlib.nullcontext():
        yield


def peers_of(row: Row, device: torch.device, compiling: bool = True) -> list[str]:
    """Ours first, then our Triton kernels where others are chosen by themselves.

    Without `compiling` none that is compiled when it is first called, as those are.
    """
    named = [peer for peer in op_of(row.op).peers if peer not in LEFT_OUT.get(row.op, ())]
    chosen = dispatch.pick(row.op, torch.empty(0, dtype=row.dtype, device=device))
    refused = dispatch.refusal(row.op, "triton", device.type, row.dtype)
    if not compiling:
        return [p for p in named if p not in COMPILING]
    if chosen != "triton" and refused is None and device.type == "cuda":
        named.insert(1, OURS_TRITON)
    return [p for p in named if p not in COMPILING or row.shape.reason in COMPILED]


def step_of(case: Case, row: Row, peer: str) -> Step:
    """What is timed of a peer, whose results have been checked.

    Raises:
        Absent, RuntimeError: it cannot run here.
        AssertionError: its results break the error rule.
    """
    made = case.op.peers[OURS if peer == OURS_TRITON else peer]
    with backend_of(peer):
        function = made(case.shape, case.device)
        got = case.results(function, case.leaves())
    for i, (x, y) in enumerate(zip(got, case.expected[0], strict=True)):
        check_error(x, y, lambda i=i: case.plain[i])  # type: ignore[misc]
    del got
    inputs = case.leaves()
    if row.way == "bwd":
        with backend_of(peer):
            outputs = forward(function, inputs, True)
        wanted, douts = [x for x in inputs if x.requires_grad], case.expected[1]
        step: Step = lambda: torch.autograd.grad(outputs, wanted, douts, retain_graph=True)  # noqa: E731
    else:
        step = lambda: case.results(function, inputs)  # noqa: E731

    def within() -> object:
        with backend_of(peer):
            return step()

    within()
    return within if peer == OURS_TRITON else step


class Clock:
    """Times single calls: by events on a GPU, which the host's time is not part of."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.other = torch.empty(FLUSH_BYTES if self.cuda else 0, dtype=torch.int8, device=device)

    def __call__(self, step: Step) -> float:
        self.other.zero_()
        if not self.cuda:
            begin = time.perf_counter()
            step()
            return time.perf_counter() - begin
        torch.cuda._sleep(AHEAD_CYCLES)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def in_turn(steps: dict[str, Step], clock: Clock) -> dict[str, float]:
    """Medians; all take a call in each round, so that they see the same clock rates."""
    if not steps:
        return {}
    once = [clock(step) for step in steps.values()]
    rounds = max(5, min(100, round(SECONDS_A_PEER * len(once) / sum(once))))
    times: dict[str, list[float]] = {peer: [] for peer in steps}
    for _ in range(rounds):
        for peer, step in steps.items():
            times[peer].append(clock(step))
    return {peer: statistics.median(t) for peer, t in times.items()}


def measure(
    row: Row, clock: Clock, roofs: dict[str, Any], until: float, compiling: bool = True
) -> Measured:
    """`until`: when peers that compile are no longer begun."""
    case = Case(row.op, op_of(row.op), row.shape, row.dtype, row.backward, clock.device)
    found = Measured(str(row), *counts(row), roof_seconds(row, roofs))
    steps: dict[str, Step] = {}
    for peer in peers_of(row, clock.device, compiling):
        if peer in (*COMPILING, OURS_TRITON) and time.monotonic() > until:
            found.absent[peer] = "no time left to compile"
            continue
        try:
            steps[peer] = step_of(case, row, peer)
        except AssertionError as error:
            found.absent[peer] = str(error)
        except (Absent, RuntimeError, ValueError, TypeError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            found.absent[peer] = lines[0]
    found.seconds = in_turn(steps, clock)
    return found


# --- the table ----------------------------------------------------------------------------------


def line(found: Measured, width: int) -> str:
    """ours, the best peer, its time over ours, our rate, our share of the roof."""
    name, ours, best = f"{found.row:<{width}}", found.ours, found.best_peer
    if ours is None:
        return f"{name}  failed: {found.absent.get(OURS, 'not measured')}"
    peer, ratio = " " * 26, " " * 8
    if best is not None:
        peer = f"{found.seconds[best] * 1e3:9.3f} {best:<16}"
        ratio = f"{found.seconds[best] / ours:7.2f}x"
    rate = f"{found.bytes / ours / 1e9:8.1f} GB/s   "
    if found.flops and found.flops / found.bytes > 100:
        rate = f"{found.flops / ours / 1e12:8.2f} TFLOP/s"
    triton = found.seconds.get(OURS_TRITON)
    also = f"  triton {triton * 1e3:.3f}" if triton else ""
    return f"{name}{ours * 1e3:9.3f} {peer}{ratio} {rate} {found.roof_seconds / ours:5.0%}{also}"


def table(measured: list[Measured]) -> str:
    width = max((len(found.row) for found in measured), default=0)
    head = f"{'':<{width}}{'ours ms':>9} {'best peer ms':>26}{'ratio':>8}{'rate':>17}  roof"
    return "\n".join([head, *(line(found, width) for found in measured)])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", default="", type=pattern, help="a regular expression on the name of a row"
    )
    parser.add_argument("--seconds", type=float, default=400.0, help="begin no row after them")
    parser.add_argument("--no-compile", action="store_true", help="no peer that compiles first")
    parser.add_argument("--device", help="cpu or cuda; a GPU if there is one")
    parser.add_argument("--folder", type=Path, help="where gpu.json goes")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # SDPA tells of every backend that it was held not to take
    functorch.donated_buffer = False  # a compiled backward runs more than once
    try:
        device = machine.device(options.device)
    except ValueError as error:
        parser.error(str(error))
    until = time.monotonic() + options.seconds
    clock, roofs = Clock(device), machine.roofs(device)
    measured: list[Measured] = []
    late: list[str] = []
    for row in rows(device):
        if not re.search(options.only, str(row)):
            continue
        if time.monotonic() > until:
            late.append(str(row))
            continue
        last = until - options.seconds / 3
        measured.append(measure(row, clock, roofs, last, not options.no_compile))
        print(line(measured[-1], 0), flush=True)
    folder: Path = options.folder or machine.folder_of(device) / ("part" if options.only else "")
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "device": machine.name_of(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "roofs": roofs,
        "rows": [asdict(found) for found in measured],
        "no_time_for": late,
    }
    (folder / "gpu.json").write_text(json.dumps(document, indent=1) + "\n")
    print(f"\n{machine.name_of(device)}, torch {torch.__version__}, {_rates(roofs)}")
    for found in measured:
        for peer, reason in found.absent.items():
            if "breaks the error rule" in reason:
                print(f"{found.row}: {peer} {reason}")
    print(table(measured))
    if late:
        print(f"no time was left for {len(late)} rows, from {late[0]} on")
    return int(any(found.ours is None for found in measured))


def _rates(roofs: dict[str, Any]) -> str:
    products = ", ".join(
        f"{rate:.0f} TFLOP/s in {dtype}" for dtype, rate in roofs["matmul_tflop_per_s"].items()
    )
    return f"copies {roofs['copy_gb_per_s']:.0f} GB/s, torch's matrix product {products}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
