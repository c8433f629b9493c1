"""decode_attention: the newest queries of each sequence over its cache of keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastgpt import dispatch
from fastgpt.backends.reference import decode_attention as reference
from fastgpt.ops._attention_checks import check_heads, check_scale, empty_token_major
from fastgpt.ops._autograd import needs_grad
from fastgpt.ops._checks import (
    autocast_dtype,
    check_flag,
    check_float,
    check_rank,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_window,
    host_checks,
    statistics_dtype,
)
from fastgpt.ops._library import define
from fastgpt.ops._rows import unit_stride


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    cache_start: Tensor | None = None,
    ring: bool = False,
    return_lse: bool = False,
) -> Any:
    """Append t keys and values to the caches, then attend with the t newest queries; no gradient.

    With `total = cache_lengths + t` (or `cache_lengths` when nothing is appended), query i of t
    stands at position `p_i = total - t + i`, and sees position p iff `cache_start <= p <= p_i`
    and `p_i - p < window`. The host never reads the lengths; the caller advances them.

        cache_lengths = 3, t = 2, capacity 6, window=3
        slot       0 1 2 3 4 5        k_new goes to the slots 3 and 4
        query 0    0 1 1 1 0 0
        query 1    0 0 1 1 1 0

    With `ring=True` position p lives in slot `p % capacity`, so that a cache of
    `window + t - 1` slots serves a banded layer for any length.

    Args:
        q: (b, h, t, d), float32, bfloat16 or float16 with d <= 256 (float64 and larger d run on
            the reference backend). Under autocast q, k_new and v_new are cast to the dtype of the
            caches.
        k_cache, v_cache: (b, hk, capacity, d) of the same dtype and device, h a multiple of hk;
            written in place when k_new and v_new are given.
        cache_lengths: (b,) int32 on the same device: valid keys before the append.
        k_new, v_new: (b, hk, t, d), both or none.
        window: number of keys that a query may look back on, its own included; None is all.
        scale: factor on q k^T; default d ** -0.5.
        cache_start: (b,) int32: the first visible position, which skips left padding.
        ring: index the caches modulo their capacity; needs a window.
        return_lse: also return the log-sum-exp of each query's scores.

    Returns:
        (b, h, t, d) in the dtype of q, stored as (b, t, h, d). With `return_lse` also (b, h, t)
        float32. Work is split over the keys by the capacity alone, so that a sequence has the
        same bits in any batch.

    Raises:
        ValueError: a rank, shape, head count, device or window is not as above, a ring is too
            small, or a tensor requires a gradient in grad mode; on CPUs (on GPUs with
            FASTGPT_CHECK=1) also a cache that is full or a length that is negative.
        TypeError: a dtype is not as above.

    Sources: Dao et al. 2023 (split keys), https://crfm.stanford.edu/2023/10/12/flashdecoding.html;
    the band as in Child et al. 2019, https://arxiv.org/abs/1904.10509.
    """
    _check_shapes(q, k_cache, v_cache, cache_lengths, k_new, v_new, cache_start)
    check_window(window)
    check_scale(scale)
    check_flag("ring", ring)
    check_flag("return_lse", return_lse)
    if ring:
        _check_ring(k_cache.shape[2], q.shape[2], window)
    if needs_grad(q, k_cache, v_cache, k_new, v_new):
        _refuse_grad(q=q, k_cache=k_cache, v_cache=v_cache, k_new=k_new, v_new=v_new)
    if autocast_dtype(q) is not None:
        q = q.to(k_cache.dtype)
        k_new = None if k_new is None else k_new.to(k_cache.dtype)
        v_new = None if v_new is None else v_new.to(k_cache.dtype)
    _check_dtypes(q, k_cache, v_cache, k_new, v_new)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    backend = dispatch.pick(
        "decode_attention",
        q,
        head_dim=q.shape[3],
        window=window,
        append=k_new is not None,
        ring=ring,
    )
    if host_checks(backend, cache_lengths):
        t_new = 0 if k_new is None else k_new.shape[2]
        _check_contents(cache_lengths, None if ring else k_cache.shape[2], t_new)
    run = reference.decode_attention
    if backend != "reference":
        run = dispatch.kernel("decode_attention", backend, "decode_attention")
        if k_new is not None and not torch.compiler.is_compiling():
            # As every in-place op of torch: a backward that saved them earlier is to notice.
            increment_version((k_cache, v_cache))
    out, lse = run(
        unit_stride(q),
        k_cache,
        v_cache,
        cache_lengths.contiguous(),
        None if k_new is None else unit_stride(k_new),
        None if v_new is None else unit_stride(v_new),
        scale,
        window,
        None if cache_start is None else cache_start.contiguous(),
        ring,
    )
    return (out, lse) if return_lse else out


def _check_shapes(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    k_new: Tensor | None,
    v_new: Tensor | None,
    cache_start: Tensor | None,
) -> None:
    check_rank("q", q, 4, "(b, h, t, d)")
    check_rank("k_cache", k_cache, 4, "(b, hk, capacity, d)")
    b, h, t, d = q.shape
    cache = k_cache.shape
    hk = cache[1]
    if cache[0] != b or cache[3] != d:
        check_shape("k_cache", k_cache, (b, hk, cache[2], d), "(b, hk, capacity, d), b and d of q")
    if not isinstance(v_cache, Tensor) or v_cache.shape != cache:
        check_shape("v_cache", v_cache, cache, "that of k_cache, (b, hk, capacity, d)")
    check_heads(h, hk, d, "q", "k_cache")
    if d > 1:
        _check_unit_stride("k_cache", k_cache)
        _check_unit_stride("v_cache", v_cache)
    if k_new is not None and v_new is not None:
        check_shape("k_new", k_new, (b, hk, t, d), "(b, hk, t, d)")
        check_shape("v_new", v_new, (b, hk, t, d), "(b, hk, t, d)")
        _check_writable("k_cache", k_cache)
        _check_writable("v_cache", v_cache)
    elif k_new is not None or v_new is not None:
        missing = "k_new" if k_new is None else "v_new"
        raise ValueError(f"{missing}: expected both k_new and v_new or neither, got None for one")
    _check_counts("cache_lengths", cache_lengths, q)
    if cache_start is not None:
        _check_counts("cache_start", cache_start, q)


def _check_unit_stride(name: str, cache: Tensor) -> None:
    if cache.stride(3) != 1:
        raise ValueError(
            f"{name}: expected a last stride of 1, as it is written in place, "
            f"got strides {tuple(cache.stride())}"
        )


def _check_writable(name: str, cache: Tensor) -> None:
    strides = cache.stride()
    if 0 in strides and any(s == 0 and n > 1 for s, n in zip(strides, cache.shape, strict=True)):
        raise ValueError(
            f"{name}: expected elements of its own for each position, as it is written in place, "
            f"got strides {tuple(strides)}; give it clone()d"
        )


def _check_counts(name: str, counts: Tensor, q: Tensor) -> None:
    b = q.shape[0]
    if not isinstance(counts, Tensor) or counts.dim() != 1 or counts.shape[0] != b:
        check_shape(name, counts, (b,), "(b,)")
    check_same_device(name, counts, "q", q)
    if counts.dtype != torch.int32:
        raise TypeError(f"{name}: expected dtype int32, got {counts.dtype}")


def _check_ring(capacity: int, t: int, window: int | None) -> None:
    if window is None:
        raise ValueError("window: expected an int >= 1 with ring=True, got None")
    if capacity < window + t - 1:
        raise ValueError(
            f"k_cache: expected a capacity of at least window + t - 1 = {window + t - 1} with "
            f"ring=True, got {capacity}"
        )


def _refuse_grad(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if needs_grad(tensor):
            raise ValueError(
                f"{name}: expected a tensor that requires no gradient, as decode_attention "
                "computes none, got requires_grad=True; call it under torch.no_grad(), or use "
                "attention()"
            )


def _check_dtypes(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k_new: Tensor | None, v_new: Tensor | None
) -> None:
    check_float("q", q)
    dtype = q.dtype
    caches = (("k_cache", k_cache), ("v_cache", v_cache), ("k_new", k_new), ("v_new", v_new))
    for name, tensor in caches:
        if tensor is not None:
            check_same_device(name, tensor, "q", q)
            if tensor.dtype != dtype:
                check_float(name, tensor)
                check_same_dtype(name, tensor, "q", q)


def _check_contents(cache_lengths: Tensor, capacity: int | None, t_new: int) -> None:
    """ValueError for a negative length, or a cache (not a ring) that cannot hold t_new more."""
    for i, length in enumerate(cache_lengths.tolist()):
        if length < 0:
            raise ValueError(f"cache_lengths[{i}]: expected at least 0, got {length}")
        if capacity is not None and length + t_new > capacity:
            raise ValueError(
                f"cache_lengths[{i}]: expected at most {capacity - t_new}, as the cache has "
                f"{capacity} slots and {t_new} more are appended, got {length}"
            )


def _decode_attention_fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    k_new: Tensor | None,
    v_new: Tensor | None,
    scale: float,
    window: int | None,
    cache_start: Tensor | None,
    ring: bool,
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=statistics_dtype(q))
    return empty_token_major(q, *q.shape), lse


define(
    "decode_attention",
    "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_lengths, Tensor? k_new, "
    "Tensor? v_new, float scale, SymInt? window, Tensor? cache_start, bool ring)"
    " -> (Tensor out, Tensor lse)",
    _decode_attention_fake,
)
