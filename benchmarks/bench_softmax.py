"""Softmax of rows, forward and forward with backward."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks import peers, shapes
from benchmarks.measure import Counts, Draw, Op


def inputs(shape: shapes.Rows, draw: Draw) -> tuple[Tensor, ...]:
    return (draw.normal(shape.r, shape.n),)


def counts(shape: shapes.Rows, size: int, backward: bool) -> Counts:
    """x, y; backward y, dy, dx."""
    return Counts((5 if backward else 2) * shape.r * shape.n * size)


OP = Op(shapes.SOFTMAX, peers.SOFTMAX, inputs, counts)


def bench_softmax(measure: Callable[[], None]) -> None:
    measure()
