"""The output projection and its cross-entropy, forward and forward with backward."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks import peers, shapes
from benchmarks.measure import Counts, Draw, Op


def inputs(shape: shapes.Projection, draw: Draw) -> tuple[Tensor, ...]:
    x, weight = draw.normal(shape.r, shape.c), draw.normal(shape.v, shape.c) * shape.c**-0.5
    return x, weight, draw.classes(shape.v, shape.r)


def counts(shape: shapes.Projection, size: int, backward: bool) -> Counts:
    """x, weight, the classes, the loss, and one product; backward those as inputs, dx and dweight,
    and two products: no logits are read or written.
    """
    x, weight = shape.r * shape.c * size, shape.v * shape.c * size
    classes, loss, product = 8 * shape.r, size, 2 * shape.r * shape.v * shape.c
    if not backward:
        return Counts(x + weight + classes + loss, product)
    return Counts(3 * (x + weight) + 2 * (classes + loss), 3 * product)


OP = Op(shapes.LINEAR_CROSS_ENTROPY, peers.LINEAR_CROSS_ENTROPY, inputs, counts)


def bench_linear_cross_entropy(measure: Callable[[], None]) -> None:
    measure()
