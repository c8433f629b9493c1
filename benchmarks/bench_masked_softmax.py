"""Scale, mask and softmax of attention scores, forward and forward with backward."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks import peers, shapes
from benchmarks.measure import Counts, Draw, Op


def inputs(shape: shapes.Scores, draw: Draw) -> tuple[Tensor, ...]:
    return (draw.normal(shape.bh, shape.s, shape.s),)


def counts(shape: shapes.Scores, size: int, backward: bool) -> Counts:
    """The visible scores, and y with its zeros; backward the visible y and dy, and dscores."""
    visible, all_ = shape.bh * shape.pairs, shape.bh * shape.s**2
    return Counts((3 * visible + 2 * all_ if backward else visible + all_) * size)


OP = Op(shapes.MASKED_SOFTMAX, peers.MASKED_SOFTMAX, inputs, counts)


def bench_masked_softmax(measure: Callable[[], None]) -> None:
    measure()
