"""Checks and layouts that the attention ops share."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from fastgpt.ops._checks import (
    autocast_dtype,
    check_float,
    check_rank,
    check_same_device,
    check_same_dtype,
    check_shape,
)

Names = tuple[str, str, str]
NAMES = ("q", "k", "v")


def check_qkv(q: Tensor, k: Tensor, v: Tensor, names: Names = NAMES) -> None:
    """Check the shapes of q (b, h, sq, d) and of k and v (b, hk, sk, d)."""
    name_q, name_k, name_v = names
    check_rank(name_q, q, 4, "(b, h, sq, d)")
    check_rank(name_k, k, 4, "(b, hk, sk, d)")
    b, h, _, d = q.shape
    _, hk, sk, _ = k.shape
    shape = (b, hk, sk, d)
    if k.shape != shape:
        check_shape(name_k, k, shape, f"(b, hk, sk, d) with b and d of {name_q}")
    if not isinstance(v, Tensor) or v.shape != shape:
        check_shape(name_v, v, shape, f"that of {name_k}, (b, hk, sk, d)")
    check_heads(h, hk, d, name_q, name_k)


def check_heads(h: int, hk: int, d: int, name_q: str = "q", name_k: str = "k") -> None:
    """ValueError unless hk key heads can serve h query heads of d elements."""
    if h < 1:
        raise ValueError(f"{name_q}: expected at least one head, got {h}")
    if hk < 1 or h % hk != 0:
        raise ValueError(
            f"{name_k}: expected a number of heads that divides the {h} heads of {name_q}, got {hk}"
        )
    if d < 1:
        raise ValueError(f"{name_q}: expected a head dimension of at least 1, got {d}")


def cast_together(q: Tensor, k: Tensor, v: Tensor, names: Names = NAMES) -> tuple[Tensor, ...]:
    """q, k and v in the autocast dtype (float64 stays); they must share a device and a dtype."""
    name_q, name_k, name_v = names
    check_same_device(name_k, k, name_q, q)
    check_same_device(name_v, v, name_q, q)
    check_float(name_q, q)
    dtype = autocast_dtype(q)
    if dtype is not None:
        check_float(name_k, k)
        check_float(name_v, v)
        q, k, v = (t if t.dtype == torch.float64 else t.to(dtype) for t in (q, k, v))
    check_same_dtype(name_k, k, name_q, q)
    check_same_dtype(name_v, v, name_q, q)
    return q, k, v


def check_scale(scale: float | None) -> None:
    """TypeError unless `scale` is None or a number; ValueError for one that no float is near."""
    if scale is None:
        return
    if not isinstance(scale, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"scale: expected None or a float, got {type(scale).__name__}")
    if type(scale) is int and abs(scale) > sys.float_info.max:
        raise ValueError(
            f"scale: expected a number in the range of floats, got {scale.bit_length()} bits"
        )


def broadcasts(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    """Whether `shape` broadcasts to `full` without enlarging it."""
    if len(shape) > len(full):
        return False
    trailing = full[len(full) - len(shape) :]
    return all(size == 1 or size == whole for size, whole in zip(shape, trailing, strict=True))


def empty_token_major(x: Tensor, b: int, h: int, s: int, d: int) -> Tensor:
    """Uninitialised (b, h, s, d), stored as (b, s, h, d)."""
    return x.new_empty((b, s, h, d)).transpose(1, 2)
