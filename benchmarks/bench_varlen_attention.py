"""Causal attention within packed documents, forward and forward with backward."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks import peers, shapes
from benchmarks.measure import Counts, Draw, Op


def inputs(shape: shapes.Documents, draw: Draw) -> tuple[Tensor, ...]:
    offsets = [sum(shape.lengths[:n]) for n in range(len(shape.lengths) + 1)]
    q, k, v = (draw.normal(shape.total, h, shape.d) for h in (shape.h, shape.hk, shape.hk))
    return q, k, v, draw.integers(offsets)


def counts(shape: shapes.Documents, size: int, backward: bool) -> Counts:
    """As dense attention, summed over the documents; the offsets once each way."""
    q, kv = (shape.total * h * shape.d for h in (shape.h, shape.hk))
    offsets = 4 * (len(shape.lengths) + 1)
    product = 2 * shape.h * shape.pairs * shape.d
    if not backward:
        return Counts((2 * q + 2 * kv) * size + offsets, 2 * product)
    return Counts((6 * q + 6 * kv) * size + 2 * offsets, 7 * product)


OP = Op(
    shapes.VARLEN_ATTENTION,
    peers.VARLEN_ATTENTION,
    inputs,
    counts,
    plain="torch_loop",
    exact=peers.exact_varlen_attention,
)


def bench_varlen_attention(measure: Callable[[], None]) -> None:
    measure()
