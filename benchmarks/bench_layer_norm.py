"""LayerNorm with weight and bias, forward and forward with backward."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks import peers, shapes
from benchmarks.measure import Counts, Draw, Op


def inputs(shape: shapes.Rows, draw: Draw) -> tuple[Tensor, ...]:
    return draw.normal(shape.r, shape.n), draw.normal(shape.n), draw.normal(shape.n)


def counts(shape: shapes.Rows, size: int, backward: bool) -> Counts:
    """x, y, weight, bias; backward x, dy, dx, weight, dweight, dbias."""
    rows, vectors = (5, 5) if backward else (2, 2)
    return Counts((rows * shape.r + vectors) * shape.n * size)


OP = Op(shapes.LAYER_NORM, peers.LAYER_NORM, inputs, counts)


def bench_layer_norm(measure: Callable[[], None]) -> None:
    measure()
