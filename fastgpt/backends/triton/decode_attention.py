"""The t newest queries of each sequence over its cache; query i stands at position total - t + i.

Plan: a program takes BLOCK_M of the group * t queries that share a key head over one split of the
keys that they see, and a second kernel merges the splits in ascending order. How many keys make a
split follows from the capacity, t, window, d and dtype; where the visible keys begin is found on
the device; programs of splits beyond the length end at once. A single query is multiplied on the
vector units, each lane with a softmax of its own; several go to the tensor cores. Up to FUSED_ROWS
new keys are taken from k_new and stored by split 0, and nobody else reads their slots.
Bytes: the visible k and v once, which bounds the speed. Flops: 4 t d a key and query head.
Source: Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.backends.triton._blocks import LN2, LOG2E, device, dot, rounded
from fastgpt.backends.triton._launch import ceil_div, launch, next_power_of_2

FUSED_ROWS = 16
MOST_SPLITS = 64
SPLIT_BYTES = 65536
"""Keys and values of a split, if there are not too many splits: less would be merged no sooner
than it is read."""


@device
def _visible(
    length, start, appended, block, group, t, window, capacity, block_m, RING, WINDOWED, FUSED
):
    """Positions [begin, end) that a block of queries sees of the cached keys; all have a slot."""
    total = length + appended
    first = total - t + block * block_m // group
    last = total - t + tl.minimum((block * block_m + block_m - 1) // group, t - 1)
    begin = start
    if WINDOWED:
        begin = tl.maximum(begin, first - window + 1)
    end = tl.minimum(length if FUSED else total, last + 1)
    if RING:
        begin = tl.maximum(begin, total - capacity)
    else:
        end = tl.minimum(end, capacity)
    return begin, tl.maximum(begin, end)


@device
def _slots(position, offsets, capacity, RING):
    """Where the keys position + offsets are, for a position >= 0 and offsets < capacity."""
    if RING:
        slots = position % capacity + offsets
        slots = tl.where(slots >= capacity, slots - capacity, slots)
    else:
        slots = position + offsets
    return slots


@device
def _centered(peak):
    """What to subtract from scores whose maximum is peak, so that no exponent is NaN."""
    return tl.where(peak == -float("inf"), 0.0, peak)


@device
def _attend_row(
    q, g_k, g_v, first, n, k_stride, v_stride, capacity, scale, D, BLOCK_D, BLOCK_N, RING
):
    """One query (1, BLOCK_D) over the n keys from position first on: (o, peak, total)."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    peaks = tl.full([BLOCK_N], -float("inf"), tl.float32)
    totals = tl.zeros([BLOCK_N], tl.float32)
    sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for j in range(0, n, BLOCK_N):
        offsets = j + tl.arange(0, BLOCK_N)
        inside = offsets < n
        slots = _slots(first, offsets, capacity, RING)[:, None]
        seen = inside[:, None] & (columns < D)
        k = tl.load(g_k + slots * k_stride + columns, mask=seen, other=0.0)
        v = tl.load(g_v + slots * v_stride + columns, mask=seen, other=0.0)
        s = tl.where(inside, tl.sum(k.to(tl.float32) * q, axis=1) * scale, -float("inf"))
        higher = tl.maximum(peaks, s)
        base = _centered(higher)
        p = tl.exp2(s - base)
        rescale = tl.exp2(peaks - base)
        totals = totals * rescale + p
        sums = sums * rescale[:, None] + p[:, None] * v.to(tl.float32)
        peaks = higher
    peak = tl.max(peaks, axis=0)
    weights = tl.exp2(peaks - _centered(peak))
    o = tl.sum(sums * weights[:, None], axis=0)
    one = tl.zeros([1], tl.float32)
    return o[None, :], one + peak, one + tl.sum(totals * weights, axis=0)


@device
def _attend_rows(
    q, low, high, g_k, g_v, first, n, k_stride, v_stride, capacity, scale, D, BLOCK_D, BLOCK_M,
    BLOCK_N, RING,
):  # fmt: skip
    """Queries (BLOCK_M, BLOCK_D), each over its keys [low, high) of the n from first on."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for j in range(0, n, BLOCK_N):
        offsets = j + tl.arange(0, BLOCK_N)
        slots = _slots(first, offsets, capacity, RING)[:, None]
        there = (offsets < n)[:, None] & (columns < D)
        k = tl.load(g_k + slots * k_stride + columns, mask=there, other=0.0)
        v = tl.load(g_v + slots * v_stride + columns, mask=there, other=0.0)
        s = dot(q, tl.trans(k), None, "ieee") * scale
        seen = (offsets[None, :] >= low[:, None]) & (offsets[None, :] < high[:, None])
        s = tl.where(seen, s, -float("inf"))
        higher = tl.maximum(peak, tl.max(s, axis=1))
        base = _centered(higher)
        p = tl.exp2(s - base[:, None])
        rescale = tl.exp2(peak - base)
        total = total * rescale + tl.sum(p, axis=1)
        o = dot(rounded(p, v.dtype), v, o * rescale[:, None], "ieee")
        peak = higher
    return o, peak, total


COUNTS = ["hk", "t", "appended", "capacity", "window", "splits", "split_keys"]


@triton.jit(do_not_specialize=[*COUNTS, "blocks"])
def decode_attention_kernel(
    g_q, g_k_cache, g_v_cache, g_lengths, g_start, g_k_new, g_v_new, g_out, g_lse, g_partial,
    g_state, scale, hk, group, t, appended, capacity, window, blocks, splits, split_keys,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h,
    v_stride_s, k_new_stride_b, k_new_stride_h, k_new_stride_t, v_new_stride_b, v_new_stride_h,
    v_new_stride_t, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, RING: tl.constexpr,
    WINDOWED: tl.constexpr, HAS_START: tl.constexpr, FUSED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % blocks  # first: blocks of queries read the same keys
    split = tl.program_id(0) // blocks % splits
    unit = tl.program_id(0) // blocks // splits  # a key head of a sequence
    b = (unit // hk).to(tl.int64)
    head = (unit % hk).to(tl.int64)
    # In 64 bits: whatever they hold, sums of them do not overflow. Not in a function of its own:
    # torch would take what it loads from for something that the kernel writes.
    length = tl.load(g_lengths + b).to(tl.int64)
    start = length * 0
    if HAS_START:
        start = tl.maximum(tl.load(g_start + b).to(tl.int64), 0)
    begin, end = _visible(
        length, start, appended, block, group, t, window, capacity, BLOCK_M, RING, WINDOWED, FUSED
    )
    first = begin + split.to(tl.int64) * split_keys
    n = tl.minimum(tl.maximum(end - first, 0), split_keys).to(tl.int32)
    if (n == 0) & (split > 0):
        return

    columns = tl.arange(0, BLOCK_D)[None, :]
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)  # queries by time, then by head of the group
    i = rows // group
    heads = head * group + rows % group
    there = (i < t)[:, None] & (columns < D)
    g_q += b * q_stride_b
    q = tl.load(
        g_q + heads[:, None] * q_stride_h + i.to(tl.int64)[:, None] * q_stride_t + columns,
        mask=there,
        other=0.0,
    )
    g_k_cache += b * k_stride_b + head * k_stride_h
    g_v_cache += b * v_stride_b + head * v_stride_h
    scale *= LOG2E
    if BLOCK_M == 1:
        q = q.to(tl.float32)
        o, peak, sum = _attend_row(
            q, g_k_cache, g_v_cache, first, n, k_stride_s, v_stride_s, capacity, scale,
            D, BLOCK_D, BLOCK_N, RING,
        )  # fmt: skip
    else:
        own = length + appended - t + i - first
        high = tl.minimum(tl.maximum(own + 1, 0), n).to(tl.int32)
        low = high * 0
        if WINDOWED:
            low = tl.minimum(tl.maximum(own + 1 - window, 0), n).to(tl.int32)
        o, peak, sum = _attend_rows(
            q, low, high, g_k_cache, g_v_cache, first, n, k_stride_s, v_stride_s, capacity, scale,
            D, BLOCK_D, BLOCK_M, BLOCK_N, RING,
        )  # fmt: skip

    if FUSED:
        if split == 0:
            new = tl.arange(0, BLOCK_T)
            if RING:
                slots = (length % capacity + capacity) % capacity + new
                slots = tl.where(slots >= capacity, slots - capacity, slots)
            else:
                slots = length + new
            held = (new < t) & (slots >= 0) & (slots < capacity)
            held_there = held[:, None] & (columns < D)
            g_k_new += b * k_new_stride_b + head * k_new_stride_h
            g_v_new += b * v_new_stride_b + head * v_new_stride_h
            k_new = tl.load(g_k_new + new[:, None] * k_new_stride_t + columns, mask=held_there)
            v_new = tl.load(g_v_new + new[:, None] * v_new_stride_t + columns, mask=held_there)
            if block == 0:
                tl.store(g_k_cache + slots[:, None] * k_stride_s + columns, k_new, mask=held_there)
                tl.store(g_v_cache + slots[:, None] * v_stride_s + columns, v_new, mask=held_there)
            shown = held & (length + new >= start)
            shown_there = shown[:, None] & (columns < D)
            k_new = tl.where(shown_there, k_new, 0.0)
            v_new = tl.where(shown_there, v_new, 0.0)
            if BLOCK_M == 1:
                s = tl.sum(q * k_new.to(tl.float32), axis=1)[None, :]
            else:
                s = dot(q, tl.trans(k_new), None, "ieee")
            seen = shown[None, :] & (new[None, :] <= i[:, None])
            if WINDOWED:
                seen &= i[:, None] - new[None, :] < window
            s = tl.where(seen, s * scale, -float("inf"))
            higher = tl.maximum(peak, tl.max(s, axis=1))
            base = _centered(higher)
            p = tl.exp2(s - base[:, None])
            rescale = tl.exp2(peak - base)
            sum = sum * rescale + tl.sum(p, axis=1)
            o *= rescale[:, None]
            if BLOCK_M == 1:
                o += tl.sum(tl.trans(p) * v_new.to(tl.float32), axis=0, keep_dims=True)
            else:
                o = dot(rounded(p, v_new.dtype), v_new, o, "ieee")
            peak = higher

    if WHOLE:
        empty = sum == 0.0
        sum = tl.where(empty, 1.0, sum)
        lse = tl.where(empty, -float("inf"), (peak + tl.log2(sum)) * LN2)
        tl.store(g_lse + (b * hk * group + heads) * t + i, lse, mask=i < t)
        g_out += (b * t + i)[:, None] * (hk * group * D) + heads[:, None] * D + columns
        tl.store(g_out, rounded(o / sum[:, None], g_out.dtype.element_ty), mask=there)
    else:
        at = (unit.to(tl.int64) * splits + split) * (group * t) + rows
        tl.store(g_partial + at[:, None] * D + columns, o, mask=there)
        tl.store(g_state + 2 * at, peak, mask=i < t)
        tl.store(g_state + 2 * at + 1, sum, mask=i < t)


@triton.jit(do_not_specialize=[*COUNTS, "block_m"])
def decode_attention_merge_kernel(
    g_partial, g_state, g_lengths, g_start, g_out, g_lse, hk, group, t, appended, capacity, window,
    block_m, splits, split_keys, D: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr, RING: tl.constexpr, WINDOWED: tl.constexpr, HAS_START: tl.constexpr,
    FUSED: tl.constexpr,
):  # fmt: skip
    """out = sum_n o_n 2^(peak_n - peak) / sum_n sum_n 2^(peak_n - peak), a row to a program."""
    unit = tl.program_id(0) // (group * t)
    row = tl.program_id(0) % (group * t)
    b = (unit // hk).to(tl.int64)
    length = tl.load(g_lengths + b).to(tl.int64)
    start = length * 0
    if HAS_START:
        start = tl.maximum(tl.load(g_start + b).to(tl.int64), 0)
    begin, end = _visible(
        length, start, appended, row // block_m, group, t, window, capacity,
        block_m, RING, WINDOWED, FUSED,
    )  # fmt: skip
    filled = tl.minimum(tl.maximum((end - begin + split_keys - 1) // split_keys, 1), splits)
    filled = filled.to(tl.int32)

    at = unit.to(tl.int64) * splits * (group * t) + row
    every = tl.arange(0, SPLITS)
    peaks = tl.load(
        g_state + 2 * (at + every * (group * t)), mask=every < filled, other=-float("inf")
    )
    peak = tl.max(peaks, axis=0)
    base = _centered(peak)
    columns = tl.arange(0, BLOCK_D)[None, :]
    sums = tl.zeros([16], tl.float32)
    o = tl.zeros([16, BLOCK_D], tl.float32)
    for s0 in range(0, filled, 16):
        s = s0 + tl.arange(0, 16)
        states = at + s * (group * t)
        weights = tl.load(g_state + 2 * states, mask=s < filled, other=-float("inf"))
        weights = tl.exp2(weights - base)
        sums += weights * tl.load(g_state + 2 * states + 1, mask=s < filled, other=0.0)
        part = tl.load(
            g_partial + states[:, None] * D + columns,
            mask=(s < filled)[:, None] & (columns < D),
            other=0.0,
        )
        o += weights[:, None] * part
    sum = tl.sum(sums, axis=0)
    empty = sum == 0.0
    sum = tl.where(empty, 1.0, sum)
    y = tl.sum(o, axis=0, keep_dims=True) / sum
    i = row // group
    head = unit % hk * group + row % group
    g_out += ((b * t + i) * (hk * group) + head) * D + columns
    tl.store(g_out, rounded(y, g_out.dtype.element_ty), mask=columns < D)
    lse = tl.where(empty, -float("inf"), (peak + tl.log2(sum)) * LN2)
    tl.store(g_lse + (b * hk * group + head) * t + i, lse)


@triton.jit(do_not_specialize=["hk", "t", "capacity", "blocks"])
def decode_attention_append_kernel(
    g_new, g_cache, g_lengths, hk, t, capacity, blocks, new_stride_b, new_stride_h, new_stride_t,
    stride_b, stride_h, stride_s, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    RING: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % blocks
    unit = tl.program_id(0) // blocks
    b = (unit // hk).to(tl.int64)
    head = (unit % hk).to(tl.int64)
    new = block * BLOCK_T + tl.arange(0, BLOCK_T)
    slots = tl.load(g_lengths + b).to(tl.int64) + new
    if RING:
        slots = (slots % capacity + capacity) % capacity
    columns = tl.arange(0, BLOCK_D)[None, :]
    held = ((new < t) & (slots >= 0) & (slots < capacity))[:, None] & (columns < D)
    g_new += b * new_stride_b + head * new_stride_h
    g_cache += b * stride_b + head * stride_h
    rows = tl.load(g_new + new.to(tl.int64)[:, None] * new_stride_t + columns, mask=held)
    tl.store(g_cache + slots[:, None] * stride_s + columns, rows, mask=held)


def decode_attention(
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
    """q (b, h, t, d), caches (b, hk, capacity, d) -> out (b, h, t, d), lse (b, h, t)."""
    b, h, t, d = q.shape
    hk, capacity = k_cache.shape[1], k_cache.shape[2]
    group = h // hk
    fused = k_new is not None and t <= FUSED_ROWS
    # Where no position is further away than the cache is long, the band hides nothing.
    windowed = window is not None and (ring or window < capacity)
    span = capacity
    if window is not None and windowed:
        span = min(capacity, window - 1 if fused else window + t - 1)
    block_d = max(16, next_power_of_2(d))
    split_keys = keys_per_split(span, t, block_d, q.dtype)
    splits = max(1, ceil_div(span, split_keys))
    # float32 has no tensor cores: its rows share their keys through the L2 cache.
    one = group * t == 1 or q.dtype == torch.float32
    block_m = 1
    if not one:
        block_m = min(64 if block_d <= 128 else 32, max(16, next_power_of_2(group * t)))
    blocks = ceil_div(group * t, block_m)
    block_n = max(16, (8192 if one and q.dtype != torch.float32 else 4096) // block_d)

    if k_new is not None and v_new is not None and not fused:
        for new, cache in ((k_new, k_cache), (v_new, v_cache)):
            launch(
                decode_attention_append_kernel,
                b * hk * ceil_div(t, 16),
                new,
                cache,
                cache_lengths,
                hk,
                t,
                capacity,
                ceil_div(t, 16),
                *new.stride()[:3],
                *cache.stride()[:3],
                D=d,
                BLOCK_D=block_d,
                BLOCK_T=16,
                RING=ring,
            )

    out = q.new_empty((b, t, h, d)).transpose(1, 2)
    lse = q.new_empty((b, h, t), dtype=torch.float32)
    partial = state = None
    if splits > 1:
        partial = q.new_empty((b, hk, splits, group * t, d), dtype=torch.float32)
        state = q.new_empty((b, hk, splits, group * t, 2), dtype=torch.float32)
    flags = {
        "D": d,
        "BLOCK_D": block_d,
        "RING": ring,
        "WINDOWED": windowed,
        "HAS_START": cache_start is not None,
        "FUSED": fused,
    }
    appended = 0 if k_new is None else t
    look_back = window if windowed else 0
    launch(
        decode_attention_kernel,
        b * hk * blocks * splits,
        q,
        k_cache,
        v_cache,
        cache_lengths,
        cache_start,
        k_new if fused else None,
        v_new if fused else None,
        out,
        lse,
        partial,
        state,
        scale,
        hk,
        group,
        t,
        appended,
        capacity,
        look_back,
        blocks,
        splits,
        split_keys,
        *q.stride()[:3],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        *((0, 0, 0) if k_new is None else k_new.stride()[:3]),
        *((0, 0, 0) if v_new is None else v_new.stride()[:3]),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_T=next_power_of_2(t) if one and fused else FUSED_ROWS,
        WHOLE=splits == 1,
        num_warps=8 if block_m in (1, 64) else 4,
        num_stages=3,
        **flags,
    )
    if splits > 1:
        launch(
            decode_attention_merge_kernel,
            b * h * t,
            partial,
            state,
            cache_lengths,
            cache_start,
            out,
            lse,
            hk,
            group,
            t,
            appended,
            capacity,
            look_back,
            block_m,
            splits,
            split_keys,
            SPLITS=MOST_SPLITS,
            **flags,
        )
    return out, lse


def keys_per_split(span: int, t: int, block_d: int, dtype: torch.dtype) -> int:
    """Of `span` keys; a function of the shape of one sequence, so that its bits are its own."""
    keys = SPLIT_BYTES // (2 * block_d * dtype.itemsize)
    keys = min(512, max(64, keys))
    most = max(1, MOST_SPLITS // ceil_div(max(t, 1), FUSED_ROWS))
    while span > keys * most:
        keys *= 2
    return keys
