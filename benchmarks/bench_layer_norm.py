"""LayerNorm with weight and bias, forward and forward with backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import peers, shapes
from benchmarks.conftest import build

SHAPES = shapes.LAYER_NORM
PEERS = peers.LAYER_NORM


@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "fwd_bwd"])
def bench_layer_norm(
    shape: shapes.Rows,
    dtype: torch.dtype,
    backward: bool,
    peer: str,
    device: torch.device,
    measure: Callable[..., None],
) -> None:
    generator = torch.Generator(device).manual_seed(0)
    x, weight, bias = (
        torch.randn(size, dtype=dtype, device=device, generator=generator)
        for size in ((shape.r, shape.n), (shape.n,), (shape.n,))
    )
    plain = PEERS["torch_eager"]()
    measure(
        build(PEERS[peer]),
        (x, weight, bias),
        group=f"layer_norm {shape} {dtype} {'fwd+bwd' if backward else 'fwd'}",
        backward=backward,
        reference=plain,
        low=plain,
        moved=shape.bytes(dtype, 5 if backward else 2),
    )
