"""The contract harness: one description per op, one check for every backend, dtype and case.

A spec says how to call an op and how plain torch computes the same; `check_contract` holds every
backend of the dispatch table to the error rule of `numerics.py`, forward and backward, on fresh
memory full of NaN, on strided, transposed and misaligned inputs, with garbage wherever nothing may
look, and bit for bit on a second run. What cannot run on this machine is skipped with the reason.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgpt
from fastgpt import dispatch
from fastgpt.backends import triton
from tests.numerics import violations, worst

Inputs = dict[str, Any]
Results = dict[str, Tensor]
Raw = Callable[..., Any]
Outgoing = Callable[[str, Tensor], Tensor]
"""(name of an output, the output) -> the gradient that flows into it."""

LOW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_plain_kernel = dispatch.kernel


@dataclass(frozen=True)
class Case:
    """One input of an op; the id says why this size is in the grid."""

    id: str
    make: Callable[[torch.Generator, torch.dtype], Inputs]
    hidden: Callable[[Inputs], Inputs] | None = None
    """The same inputs with NaN and inf where the op must not look."""
    dtypes: tuple[torch.dtype, ...] = LOW_DTYPES


@dataclass(frozen=True)
class Rows:
    """What one element of the batch is: of the inputs, and of each result (None: not its own)."""

    cases: tuple[str, ...]
    count: Callable[[Inputs], int]
    of_inputs: Callable[[Inputs, int], Inputs]
    of_result: Callable[[Inputs, str, Tensor, int], Tensor | None]


def first_axis(
    cases: tuple[str, ...], arguments: tuple[str, ...], shared: tuple[str, ...] = ()
) -> Rows:
    """Element i of the first axis of `arguments`; the results named in `shared` sum over it."""

    def of_inputs(inputs: Inputs, i: int) -> Inputs:
        own = {name: inputs[name][i : i + 1] for name in arguments if inputs[name] is not None}
        return inputs | own

    return Rows(
        cases,
        lambda inputs: len(inputs[arguments[0]]),
        of_inputs,
        lambda inputs, name, result, i: None if name in shared else result[i : i + 1],
    )


@dataclass(frozen=True, eq=False)
class OpSpec:
    """How to test one op. `low` takes the arguments of `function` and is plain torch."""

    op: str
    function: Callable[..., Any]
    low: Callable[..., Any]
    outputs: tuple[str, ...]
    gradients: tuple[str, ...]
    cases: tuple[Case, ...]
    rows: Rows
    stored: Mapping[str, Callable[[Any, tuple[Any, ...], torch.dtype], Any]]
    """raw forward -> (outputs, arguments, dtype) -> the outputs in float64, rounded as stored."""
    cancellation: Callable[[Inputs, Results], dict[str, float]] = lambda inputs, results: {}
    """(inputs, reference results and `outgoing_<output>`), float64 -> M of each result."""
    factor: Mapping[str, float] = field(default_factory=dict)
    """Results whose rms rule has a larger factor than 2; the reason stands beside the spec."""
    storage: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Outputs that are contiguous only after this permutation."""
    mutated: tuple[str, ...] = ()
    """Arguments written in place; their content afterwards is a result."""
    unit_stride: tuple[str, ...] = ()
    """Arguments whose last stride must be 1 (those that cannot be copied)."""

    def case(self, id: str) -> Case:
        return next(case for case in self.cases if case.id == id)


@dataclass(frozen=True, eq=False)
class Expected:
    """Everything that a backend's results are judged by."""

    dtype: torch.dtype
    inputs: Inputs
    outgoing: Outgoing
    ref: Results
    low: Results
    low32: Results
    ideal: Results
    cancel: dict[str, float]


# --- making inputs ---------------------------------------------------------------------------


def normal(
    g: torch.Generator, *shape: int, dtype: torch.dtype, scale: float = 1.0, shift: float = 0.0
) -> Tensor:
    """Normal values, drawn in float64 so that every dtype rounds the same numbers."""
    values = torch.randn(shape, generator=g, dtype=torch.float64) * scale + shift
    return values.to(dtype)


def rounded(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """x as it is after being stored in `dtype`."""
    return x.to(dtype).to(x.dtype)


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same values with every floating tensor, and every dtype asked for, in `dtype`."""

    def change(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return dtype
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    return {name: change(value) for name, value in inputs.items()}


def make(spec: OpSpec, case: Case, dtype: torch.dtype) -> Inputs:
    g = torch.Generator().manual_seed(zlib.crc32(f"{spec.op} {case.id}".encode()))
    return case.make(g, dtype)


def outgoing_for(spec: OpSpec, case: Case, dtype: torch.dtype) -> Outgoing:
    """Random gradients of the outputs, the same values (rounded to `dtype`) for every run."""

    def outgoing(name: str, output: Tensor) -> Tensor:
        g = torch.Generator().manual_seed(zlib.crc32(f"{spec.op} {case.id} {name}".encode()))
        return normal(g, *output.shape, dtype=dtype).to(output.dtype).to(output.device)

    return outgoing


def _strided(x: Tensor) -> Tensor:
    """Last stride 2, NaN (or True, or the largest integer) between the elements."""
    wide = _garbage(x, (*x.shape[:-1], 2 * x.shape[-1]))
    wide[..., ::2] = x
    return wide[..., ::2]


def _misaligned(x: Tensor) -> Tensor:
    """Rows one element longer than they should be, the first at an odd address."""
    wide = _garbage(x, (*x.shape[:-1], x.shape[-1] + 1))
    wide[..., 1:] = x
    return wide[..., 1:]


def _transposed(x: Tensor) -> Tensor:
    """The last two axes but one, or the only two, swapped in memory."""
    a, b = (-3, -2) if x.ndim > 2 else (0, 1)
    return x.transpose(a, b).contiguous().transpose(a, b)


def _garbage(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    if x.is_floating_point():
        return x.new_full(shape, float("nan"))
    return x.new_full(shape, True if x.dtype == torch.bool else torch.iinfo(x.dtype).max)


LAYOUTS = (_strided, _misaligned, _transposed)
"""What a kernel does not hope for."""


def relaid(spec: OpSpec, inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The same values, every tensor in another memory layout."""

    def fits(name: str, value: Any) -> bool:
        if not isinstance(value, Tensor) or value.ndim < (2 if change is _transposed else 1):
            return False
        moves_last = change is _strided or (change is _transposed and value.ndim < 3)
        return not (moves_last and name in spec.unit_stride)

    return {name: change(value) if fits(name, value) else value for name, value in inputs.items()}


# --- running -----------------------------------------------------------------------------------


def run(
    spec: OpSpec,
    function: Callable[..., Any],
    inputs: Inputs,
    outgoing: Outgoing,
    device: str = "cpu",
) -> Results:
    """Outputs, what was written in place, and the gradient `d<argument>` of each argument."""
    call: Inputs = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value = copy.deepcopy(value) if name in spec.mutated else value.detach()
            value = value.to(device)
            if name in spec.gradients and value.is_floating_point():
                value.requires_grad_()
        call[name] = value
    returned = function(**call)
    returned = returned if isinstance(returned, tuple) else (returned,)
    outputs = dict(zip(spec.outputs, returned, strict=False))
    results = {name: output.detach() for name, output in outputs.items()}
    results |= {name: call[name] for name in spec.mutated}
    wanted = [name for name in spec.gradients if isinstance(call.get(name), Tensor)]
    if wanted and torch.is_grad_enabled():
        driven = {name: output for name, output in outputs.items() if output.requires_grad}
        gradients = torch.autograd.grad(
            list(driven.values()),
            [call[name] for name in wanted],
            [outgoing(name, output) for name, output in driven.items()],
            materialize_grads=True,
        )
        results |= {f"d{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}
    return {name: result.cpu() for name, result in results.items()}


@contextlib.contextmanager
def planted(wrap: Callable[[str, Raw], Raw]) -> Iterator[None]:
    """Every op runs as on a compiled backend whose raw op `name` is wrap(name, reference op)."""

    def kernel(op: str, backend: str, name: str) -> Raw:
        return wrap(name, _plain_kernel(op, "reference", name))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "kernel", kernel)
        patch.setattr(dispatch, "pick", lambda op, tensor, **features: "planted")
        yield


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that an element that no kernel wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def reference(spec: OpSpec, inputs: Inputs, outgoing: Outgoing) -> Results:
    """The float64 results by the reference backend, differentiated by torch."""
    with fastgpt.backend("reference"):
        return run(spec, spec.function, cast(inputs, torch.float64), outgoing)


def by_formulas(
    spec: OpSpec, inputs: Inputs, outgoing: Outgoing, dtype: torch.dtype | None = None
) -> Results:
    """The float64 results by the reference's explicit backward.

    With a dtype, what is stored between forward and backward is rounded as stored in that dtype.
    """

    def wrap(name: str, raw: Raw) -> Raw:
        if dtype is None or name not in spec.stored:
            return raw
        return lambda *args: spec.stored[name](raw(*args), args, dtype)

    with planted(wrap):
        return run(spec, spec.function, cast(inputs, torch.float64), outgoing)


@functools.lru_cache(maxsize=256)
def expected(spec: OpSpec, case: Case, dtype: torch.dtype) -> Expected:
    inputs, outgoing = make(spec, case, dtype), outgoing_for(spec, case, dtype)
    ref = reference(spec, inputs, outgoing)
    gradients_in = {
        f"outgoing_{name}": outgoing(name, ref[name]) for name in spec.outputs if name in ref
    }
    with threads(1):  # torch's error depends on how many threads share a sum
        low = low32 = run(spec, spec.low, cast(inputs, torch.float32), outgoing)
        if dtype != torch.float32:
            low = run(spec, spec.low, inputs, outgoing)
    return Expected(
        dtype,
        inputs,
        outgoing,
        ref,
        low,
        low32,
        by_formulas(spec, inputs, outgoing, dtype),
        spec.cancellation(cast(inputs, torch.float64), ref | gradients_in),
    )


def device_of(backend: str) -> str:
    """Where a backend's tests put their tensors: Triton's interpreter takes those of the CPU."""
    on_gpu = backend == "cuda" or (backend == "triton" and not triton.interpreted())
    return "cuda" if on_gpu else "cpu"


def judge(spec: OpSpec, want: Expected, got: Results) -> list[str]:
    """Every way in which `got` breaks the error rule or the promises on dtype and layout."""
    found = [] if got.keys() == want.ref.keys() else [f"results {[*got]}, expected {[*want.ref]}"]
    for name in want.ref.keys() & got.keys():
        low = want.low[name]
        if got[name].dtype == torch.float32 != want.dtype:
            # Not rounded itself, but it may come from what the contract rounds on the way.
            low = max(want.low32[name], want.ideal[name], key=lambda x: worst(x - want.ref[name]))
        if got[name].dtype != want.low[name].dtype:
            found.append(f"{name}: dtype {got[name].dtype}, expected {want.low[name].dtype}")
        if name in spec.outputs:
            axes = spec.storage.get(name, tuple(range(got[name].ndim)))
            if not got[name].permute(axes).is_contiguous():
                found.append(f"{name}: strides {got[name].stride()} of {tuple(got[name].shape)}")
        found += violations(
            name,
            got[name],
            want.ref[name],
            low,
            want.ideal[name],
            cancel=want.cancel.get(name, 0.0),
            factor=spec.factor.get(name, 2.0),
        )
    return found


# --- checking -----------------------------------------------------------------------------------


def grid(spec: OpSpec) -> list[Any]:
    """Every (backend, dtype, case) that the dispatch table declares, as pytest parameters.

    Triton's interpreter and the emulator take seconds a case: of float16, which differs from
    bfloat16 in its conversions alone, they get every third.
    """
    slow = {"cuda_emulated", "cuda_emulated_sm90", *(["triton"] if triton.interpreted() else [])}
    return [
        pytest.param(backend, dtype, case, id=f"{backend}-{str(dtype)[6:]}-{case.id}")
        for backend, cell in dispatch.TABLE[spec.op].items()
        for dtype in LOW_DTYPES
        for i, case in enumerate(spec.cases)
        if dtype in cell.dtypes and dtype in case.dtypes
        if not (backend in slow and dtype == torch.float16 and i % 3)
    ]


def skip_unless_runs(op: str, backend: str, dtype: torch.dtype = torch.float32) -> None:
    reason = dispatch.refusal(op, backend, device_of(backend), dtype)
    if reason is not None:
        pytest.skip(f"{backend} {reason}")


def same_bits(what: str, got: Results, want: Results) -> None:
    for name, tensor in want.items():
        equal = (got[name] == tensor) | (got[name].isnan() & tensor.isnan())
        assert equal.all(), (
            f"{what}: {name} differs in {int((~equal).sum())} of {equal.numel()} values"
        )


def check_contract(spec: OpSpec, backend: str, dtype: torch.dtype, case: Case) -> None:
    """Hold one backend of one op to its contract on one case."""
    skip_unless_runs(spec.op, backend, dtype)
    want, device = expected(spec, case, dtype), device_of(backend)

    def call(inputs: Inputs, outgoing: Outgoing = want.outgoing) -> Results:
        with fastgpt.backend(backend), poisoned():
            return run(spec, spec.function, inputs, outgoing, device)

    flowed: list[tuple[Tensor, Tensor]] = []

    def recorded(name: str, output: Tensor) -> Tensor:
        gradient = want.outgoing(name, output)
        flowed.append((gradient, gradient.clone()))
        return gradient

    first = call(want.inputs, recorded)
    found = judge(spec, want, first)
    assert not found, "\n".join(found)
    assert all(torch.equal(after, before) for after, before in flowed), "a gradient was overwritten"
    fresh = {name: v for name, v in make(spec, case, dtype).items() if isinstance(v, Tensor)}
    same_bits("arguments after the call", want.inputs, fresh)
    same_bits("second run", call(want.inputs), first)
    with torch.no_grad():
        outputs = call(want.inputs)
    same_bits("without gradients", outputs, {name: first[name] for name in outputs})
    there = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in want.inputs.items()}
    for change in LAYOUTS:

        def outgoing(name: str, output: Tensor, change: Any = change) -> Tensor:
            return relaid(spec, {name: want.outgoing(name, output)}, change)[name]

        found = judge(spec, want, call(relaid(spec, there, change), outgoing))
        assert not found, f"{change.__name__} arguments: " + "\n".join(found)
    if case.hidden is not None:
        hidden = {name: value for name, value in first.items() if name not in spec.mutated}
        same_bits("garbage where nothing may look", call(case.hidden(want.inputs)), hidden)
