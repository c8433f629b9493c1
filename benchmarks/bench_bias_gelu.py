"""The bias and GELU (tanh) of a decoder's MLP, forward and forward with backward."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks import peers, shapes
from benchmarks.measure import Counts, Draw, Op


def inputs(shape: shapes.Rows, draw: Draw) -> tuple[Tensor, ...]:
    return draw.normal(shape.r, shape.n), draw.normal(shape.n)


def counts(shape: shapes.Rows, size: int, backward: bool) -> Counts:
    """x, y, bias; backward x, dy, dx, bias, dbias."""
    rows, vectors = (5, 3) if backward else (2, 1)
    return Counts((rows * shape.r + vectors) * shape.n * size)


OP = Op(shapes.BIAS_GELU, peers.BIAS_GELU, inputs, counts)


def bench_bias_gelu(measure: Callable[[], None]) -> None:
    measure()
