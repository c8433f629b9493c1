"""Causal attention, dense and banded, forward and forward with backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import peers, shapes
from benchmarks.conftest import build

SHAPES = shapes.ATTENTION
PEERS = peers.ATTENTION


@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "fwd_bwd"])
def bench_attention(
    shape: shapes.Attention,
    dtype: torch.dtype,
    backward: bool,
    peer: str,
    device: torch.device,
    measure: Callable[..., None],
) -> None:
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(
            shape.b, heads, shape.s, shape.d, dtype=dtype, device=device, generator=generator
        )
        for heads in (shape.h, shape.hk, shape.hk)
    )
    plain = PEERS["torch_math"](shape, device)
    measure(
        build(PEERS[peer], shape, device),
        (q, k, v),
        group=f"attention {shape} {dtype} {'fwd+bwd' if backward else 'fwd'}",
        backward=backward,
        reference=plain,
        low=plain,
        moved=shape.bytes(dtype, False) + backward * shape.bytes(dtype, True),
        flops=shape.flops(False) + backward * shape.flops(True),
    )
