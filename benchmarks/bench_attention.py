"""Causal attention, dense and banded, forward and forward with backward."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks import peers, shapes
from benchmarks.measure import Counts, Draw, Op


def inputs(shape: shapes.Attention, draw: Draw) -> tuple[Tensor, ...]:
    heads = (shape.h, shape.hk, shape.hk)
    return tuple(draw.normal(shape.b, h, shape.s, shape.d) for h in heads)


def counts(shape: shapes.Attention, size: int, backward: bool) -> Counts:
    """q, k, v, out, and two products; backward q, k, v, out, dout, dq, dk, dv, and five."""
    q, kv = (shape.b * h * shape.s * shape.d for h in (shape.h, shape.hk))
    product = 2 * shape.b * shape.h * shape.pairs * shape.d
    if not backward:
        return Counts((2 * q + 2 * kv) * size, 2 * product)
    return Counts((6 * q + 6 * kv) * size, 7 * product)


OP = Op(
    shapes.ATTENTION,
    peers.ATTENTION,
    inputs,
    counts,
    plain="torch_math",
    exact=peers.exact_attention,
)


def bench_attention(measure: Callable[[], None]) -> None:
    measure()
