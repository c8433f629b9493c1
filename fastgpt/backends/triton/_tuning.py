"""Tile sizes of the kernels, measured per architecture and kept in tuning.json.

    {architecture: {kind: {"<head_dim> <window> <dtype>":
        [block_m, block_n, num_warps, num_stages]}}}

architecture: `sm_90`, `gfx942`, ...; `cpu` is the interpreter; `default` serves every other one and
    must fit into 64 KiB of shared memory.
kind: `attention_fwd`, `attention_bwd_dkv` (block_n keys stay), `attention_bwd_dq` (block_m queries
    stay; also the gradient of the bias).
head_dim: the class that holds it, 64, 96, 128 or 256.
window: `dense`, or `narrow` up to NARROW keys, where a large tile is mostly hidden; either may be
    replaced by `laden`, for scores that something is added to, masked in or dropped from, and for
    which less of the registers is left.
dtype: `16` or `32` bits.

A combination that an architecture lacks is that of `default`. The sizes are functions of the shape
of one head, never of the batch or of the multiprocessors, or bits would depend on them.
"""

from __future__ import annotations

import functools
import json
from importlib import resources

import torch

NARROW = 512
HEAD_DIMS = (64, 96, 128, 256)

Tiles = tuple[int, int, int, int]


def attention_tiles(
    kind: str,
    architecture: str,
    head_dim: int,
    window: int | None,
    dtype: torch.dtype,
    laden: bool = False,
) -> Tiles:
    """(block_m, block_n, num_warps, num_stages)."""
    width = "narrow" if window is not None and window <= NARROW else "dense"
    bits = 32 if dtype == torch.float32 else 16
    return _look_up(kind, architecture, head_dim, width, bits, laden)


@torch.compiler.assume_constant_result  # the tracer would not see it on the cached function
def _look_up(
    kind: str, architecture: str, head_dim: int, width: str, bits: int, laden: bool
) -> Tiles:
    return _cached(kind, architecture, head_dim, width, bits, laden)


@functools.cache
def _cached(
    kind: str, architecture: str, head_dim: int, width: str, bits: int, laden: bool
) -> Tiles:
    head_dim = next(d for d in HEAD_DIMS if head_dim <= d)
    for name in (architecture, "default"):
        for window in ("laden", width) if laden else (width,):
            key = f"{head_dim} {window} {bits}"
            tiles = _table().get(name, {}).get(kind, {}).get(key)
            if tiles is not None:
                block_m, block_n, num_warps, num_stages = tiles
                return block_m, block_n, num_warps, num_stages
    raise KeyError(f"tuning.json: no {kind} tiles for {key!r}")


@functools.cache
def _table() -> dict[str, dict[str, dict[str, list[int]]]]:
    text = resources.files(__package__).joinpath("tuning.json").read_text()
    table: dict[str, dict[str, dict[str, list[int]]]] = json.loads(text)
    return table
