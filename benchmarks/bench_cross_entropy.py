"""Cross-entropy over a vocabulary, forward and forward with backward."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks import peers, shapes
from benchmarks.measure import Counts, Draw, Op


def inputs(shape: shapes.Rows, draw: Draw) -> tuple[Tensor, ...]:
    return draw.normal(shape.r, shape.n), draw.classes(shape.n, shape.r)


def counts(shape: shapes.Rows, size: int, backward: bool) -> Counts:
    """The logits, the classes, the loss; backward all three as inputs, and the logits' gradient."""
    logits, classes, loss = shape.r * shape.n * size, 8 * shape.r, size
    return Counts((3 if backward else 1) * logits + (1 + backward) * (classes + loss))


OP = Op(shapes.CROSS_ENTROPY, peers.CROSS_ENTROPY, inputs, counts)


def bench_cross_entropy(measure: Callable[[], None]) -> None:
    measure()
