"""Attention of one new token a sequence over its cache; there is no backward."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks import peers, shapes
from benchmarks.measure import Counts, Draw, Op


def inputs(shape: shapes.Decode, draw: Draw) -> tuple[Tensor, ...]:
    cache = (shape.b, shape.hk, shape.keys, shape.d)
    q, k, v = draw.normal(shape.b, shape.h, 1, shape.d), draw.normal(*cache), draw.normal(*cache)
    return q, k, v, draw.integers(shape.lengths)


def counts(shape: shapes.Decode, size: int, backward: bool) -> Counts:
    """q, out, the lengths, and of the caches the keys and values that are seen; two products."""
    q, kv = shape.b * shape.h * shape.d, shape.visible * shape.hk * shape.d
    product = 2 * shape.h * shape.visible * shape.d
    return Counts((2 * q + 2 * kv) * size + 4 * shape.b, 2 * product)


OP = Op(
    shapes.DECODE_ATTENTION,
    peers.DECODE_ATTENTION,
    inputs,
    counts,
    plain="torch_math",
    differentiable=False,
)


def bench_decode_attention(measure: Callable[[], None]) -> None:
    measure()
