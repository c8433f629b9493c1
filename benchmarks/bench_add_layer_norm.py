"""The residual addition and its LayerNorm, forward and forward with backward."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks import peers, shapes
from benchmarks.measure import Counts, Draw, Op


def inputs(shape: shapes.Rows, draw: Draw) -> tuple[Tensor, ...]:
    x, residual = draw.normal(shape.r, shape.n), draw.normal(shape.r, shape.n)
    return x, residual, draw.normal(shape.n), draw.normal(shape.n)


def counts(shape: shapes.Rows, size: int, backward: bool) -> Counts:
    """x, residual, y, s, weight, bias; backward s, dy, ds, dx, weight, dweight, dbias.

    The gradients of x and residual are one tensor.
    """
    rows, vectors = (8, 5) if backward else (4, 2)
    return Counts((rows * shape.r + vectors) * shape.n * size)


OP = Op(shapes.ADD_LAYER_NORM, peers.ADD_LAYER_NORM, inputs, counts)


def bench_add_layer_norm(measure: Callable[[], None]) -> None:
    measure()
