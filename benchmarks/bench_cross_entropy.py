"""Cross-entropy over a vocabulary, forward and forward with backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import peers, shapes
from benchmarks.conftest import build

SHAPES = shapes.CROSS_ENTROPY
PEERS = peers.CROSS_ENTROPY


@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "fwd_bwd"])
def bench_cross_entropy(
    shape: shapes.Rows,
    dtype: torch.dtype,
    backward: bool,
    peer: str,
    device: torch.device,
    measure: Callable[..., None],
) -> None:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape.r, shape.n, dtype=dtype, device=device, generator=generator)
    target = torch.randint(shape.n, (shape.r,), device=device, generator=generator)
    plain = PEERS["torch_eager"]()
    measure(
        build(PEERS[peer]),
        (x, target),
        group=f"cross_entropy {shape} {dtype} {'fwd+bwd' if backward else 'fwd'}",
        backward=backward,
        reference=plain,
        low=plain,
        moved=shape.bytes(dtype, 3 if backward else 1),
    )
