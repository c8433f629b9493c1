"""What stands between a peer and the clock: its inputs, the error rule, and how long it takes.

A bench file states an `Op`; `prepare` gives the step that is timed, or skips with the reason why
this peer is not.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.machine import synchronize
from benchmarks.peer import COMPILING, Absent, Function, Peer

TOO_SLOW = 2.0
"""Seconds: a peer whose call takes longer is not timed."""


def pattern(text: str) -> str:
    """A regular expression, as argparse wants it."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f"expected a regular expression, got {text!r}: {error}"
        ) from None
    return text


class Counts(NamedTuple):
    """What no kernel can avoid: every tensor read or written once, and the products' flops."""

    bytes: int
    flops: int = 0


@dataclass
class Draw:
    """The tensors of a group: seeded, of its dtype, on its device."""

    dtype: torch.dtype
    device: torch.device
    seed: int = 0

    def __post_init__(self) -> None:
        self._generator = torch.Generator(self.device).manual_seed(self.seed)

    def normal(self, *size: int) -> Tensor:
        return torch.randn(size, dtype=self.dtype, device=self.device, generator=self._generator)

    def classes(self, below: int, *size: int) -> Tensor:
        return torch.randint(below, size, device=self.device, generator=self._generator)

    def integers(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


@dataclass(frozen=True)
class Op:
    """What a bench file states: shapes by device, peers by name, inputs and counts of a shape.

    `counts` takes the shape, the bytes of an element, and whether a backward follows the forward.
    `plain` names the peer that is plain torch, which the error rule compares with; `exact`, where
    given, is what computes the float64 reference in its stead.
    """

    shapes: Mapping[str, Sequence[Any]]
    peers: Mapping[str, Peer]
    inputs: Callable[[Any, Draw], tuple[Tensor, ...]]
    counts: Callable[[Any, int, bool], Counts]
    plain: str = "torch_eager"
    exact: Peer | None = None
    differentiable: bool = True


@dataclass(frozen=True)
class Case:
    """One group of the benchmarks; all its peers get these inputs and must give these results."""

    name: str
    op: Op
    shape: Any
    dtype: torch.dtype
    backward: bool
    device: torch.device

    def __str__(self) -> str:
        return f"{self.name} {self.shape} {self.dtype} {'fwd+bwd' if self.backward else 'fwd'}"

    @cached_property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.op.inputs(self.shape, Draw(self.dtype, self.device))

    @cached_property
    def counts(self) -> Counts:
        return self.op.counts(self.shape, self.dtype.itemsize, self.backward)

    @cached_property
    def expected(self) -> tuple[list[Tensor], list[Tensor]]:
        """The results in float64, and the gradients of the outputs that they are for."""
        exact = (self.op.exact or self.op.peers[self.op.plain])(self.shape, self.device)
        inputs = self.leaves(torch.float64)
        outputs = forward(exact, inputs, self.backward)
        draw = Draw(self.dtype, self.device, seed=1)
        douts = [draw.normal(*out.shape) for out in outputs] if self.backward else []
        results = outputs + gradients(outputs, inputs, [dout.double() for dout in douts])
        return [x.detach() for x in results], douts

    @cached_property
    def plain(self) -> list[Tensor]:
        """The results of plain torch in the dtype."""
        function = self.op.peers[self.op.plain](self.shape, self.device)
        return self.results(function, self.leaves())

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Copies of the inputs, which a peer may record gradients for or write into."""
        dtype = dtype or self.dtype
        return [
            x.to(dtype, copy=True).requires_grad_(self.backward) if x.is_floating_point() else x
            for x in self.inputs
        ]

    def results(self, function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
        """One call, as it is timed: the outputs, and with a backward the gradients."""
        outputs = forward(function, inputs, self.backward)
        return outputs + gradients(outputs, inputs, self.expected[1] if self.backward else [])


def forward(function: Function, inputs: Sequence[Tensor], record: bool) -> list[Tensor]:
    with torch.set_grad_enabled(record):
        out = function(*inputs)
    return list(out) if isinstance(out, tuple) else [out]


def gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], douts: Sequence[Tensor]
) -> list[Tensor]:
    if not douts:
        return []
    return list(torch.autograd.grad(outputs, [x for x in inputs if x.requires_grad], douts))


def check_error(got: Tensor, ref: Tensor, low: Callable[[], Tensor]) -> None:
    """The max rule: at most twice the error of plain torch in the same dtype, plus rounding.

    `low`, what plain torch gives, is asked for only where rounding alone does not explain it.
    """
    assert got.shape == ref.shape, f"shape {tuple(got.shape)}, expected {tuple(ref.shape)}"
    assert torch.isfinite(got).all(), "result is not finite"
    eps = torch.finfo(torch.float32 if got.dtype == torch.float64 else got.dtype).eps
    limit = 16 * eps * ref.abs().max()
    error = (got.double() - ref).abs().max()
    if error > limit:
        limit = limit + 2 * (low().double() - ref).abs().max()
    assert error <= limit, f"breaks the error rule: {error:.2e}, allowed {limit:.2e}"


@dataclass
class History:
    """What calls of earlier shapes took, from which those of larger ones are foreseen."""

    seen: dict[tuple[str, torch.dtype, str], tuple[str, Counts, float]] = field(
        default_factory=dict
    )

    def add(self, case: Case, peer: str, seconds: float) -> None:
        self.seen[case.name, case.dtype, peer] = str(case.shape), case.counts, seconds

    def foresee(self, case: Case, peer: str) -> str | None:
        """Why the peer need not be tried: its last call, scaled by bytes or flops, the smaller."""
        key = case.name, case.dtype, peer
        if key not in self.seen:
            return None
        shape, counts, seconds = self.seen[key]
        pairs = zip(case.counts, counts, strict=True)
        seconds *= min(now / before for now, before in pairs if before)
        if seconds < 2 * TOO_SLOW:
            return None
        return f"too slow here: {seconds:.0f} s a call or more, by that of {shape} ({peer}, {case})"


def prepare(case: Case, peer: str, history: History) -> Callable[[], None]:
    """One call of the peer as a step to be timed; what it cannot do, or not in time, is a skip.

    Raises:
        AssertionError: its results break the error rule.
    """
    import pytest  # the rest of this module serves make gpu-bench, which does without

    foreseen = history.foresee(case, peer)
    if foreseen is not None:
        pytest.skip(foreseen)
    ref, _ = case.expected
    begin = time.perf_counter()
    try:
        function = case.op.peers[peer](case.shape, case.device)
        inputs = case.leaves()
        got = case.results(function, inputs)
    except Absent as reason:
        pytest.skip(str(reason))
    except RuntimeError as error:
        if peer == "fastgpt":
            raise
        pytest.skip(f"does not run here: {str(error).strip().splitlines()[0]}")
    synchronize(case.device)
    seconds = time.perf_counter() - begin
    for i, (x, y) in enumerate(zip(got, ref, strict=True)):
        check_error(x, y, lambda i=i: case.plain[i])  # type: ignore[misc]
    del got

    def step() -> None:
        case.results(function, inputs)
        synchronize(case.device)

    if seconds < 2 * TOO_SLOW or peer in COMPILING:  # the first call can be much slower
        begin = time.perf_counter()
        step()
        seconds = min(seconds, time.perf_counter() - begin)
    history.add(case, peer, seconds)
    if seconds > TOO_SLOW:
        pytest.skip(f"too slow here: {seconds:.1f} s a call ({peer}, {case})")
    return step
