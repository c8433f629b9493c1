"""out = softmax(scale q k^T + bias - slope |i' - j|, band) v and lse, dense or packed.

A program takes BLOCK_M queries of one head and walks the tiles of BLOCK_N keys that any of them
sees, with running maximum and sum: first the tiles at the edges of the band, which need a mask,
then the full ones without. Heavy tiles start first. Reads q, k, v and writes out once if the keys
of the heads in flight stay in the L2 cache; 4 d flops per visible pair. Tiles and order are
functions of the shape of a head, so its bits do not depend on the batch.
Source: Dao 2023, https://arxiv.org/abs/2307.08691; the band as in Child et al. 2019.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastgpt.backends.triton._attention_tile import (
    COUNTS,
    INF,
    accumulate,
    biased,
    clear,
    extras_of,
    inner,
    kept,
    key_alive,
    key_bounds,
    key_walk,
    load_parts,
    origin,
    place,
    scaled,
    span,
    store_parts,
    zero_unless,
    zeros,
)
from fastgpt.backends.triton._blocks import LN2, LOG2E, device, index, rounded


@device
def fwd_tile(
    acc0, acc1, peak, total, n0, shared,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
    WINDOWED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
    BIASED: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, NEGATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The running values after the keys n0 to n0 + BLOCK_N - 1."""
    (
        q0, q1, g_k, g_v, k_s, v_s,
        rows, low, high, scale, extras, seed, y, threshold,
    ) = shared  # fmt: skip
    columns = n0 + tl.arange(0, BLOCK_N)
    columns64 = columns.to(tl.int64)[:, None]
    alive = columns
    if EDGE:
        alive = key_alive(columns, extras[1], extras[3], extras[4], PADDED)
    k0, k1 = load_parts(g_k, columns64 * k_s, alive[:, None], D, D0, D1, EDGE)
    s = inner(q0, q1, k0, k1, D1, PRECISION)
    if EDGE or ALIBI or NEGATIVE:
        t = biased(
            s * scale, rows[:, None], columns[None, :], alive[None, :],
            columns[None, :], low[:, None], high[:, None], extras,
            EDGE, WINDOWED, True, PADDED, MASKED, BIASED, ALIBI,
        )  # fmt: skip
        higher = tl.maximum(peak, tl.max(t, 1))
        base = tl.where(higher == -INF, 0.0, higher)
        p = tl.exp2(t - base[:, None])
    else:
        # One multiply-add a score: the maximum of the products is the product of the maximum.
        higher = tl.maximum(peak, tl.max(s, 1) * scale)
        base = higher
        p = tl.exp2(tl.fma(s, scale, -base[:, None]))
    decay = tl.exp2(peak - base)
    total = total * decay + tl.sum(p, 1)
    acc0, acc1 = scaled(acc0, acc1, decay[:, None], D1)
    if DROPOUT:
        p = tl.where(kept(seed, rows, n0, y, threshold, BLOCK_M, BLOCK_N), p, 0.0)
    v0, v1 = load_parts(g_v, columns64 * v_s, alive[:, None], D, D0, D1, EDGE)
    if MASKED:
        # A probability of 0 does not stop a NaN: keys that no row here sees are zero.
        met = tl.max((t > -INF).to(tl.int32), 0) > 0
        v0, v1 = zero_unless(met[:, None], v0, v1, D1)
    acc0, acc1 = accumulate(acc0, acc1, p, v0, v1, g_v.dtype.element_ty, D1, PRECISION)
    return acc0, acc1, higher, total


@triton.jit(do_not_specialize=COUNTS)
def attention_fwd_kernel(
    g_q, g_k, g_v, g_out, g_out_lo, g_lse,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, out_b, out_h, out_s, lse_b, lse_h,
    b, h, group, sq, sk, tq, tk, scale, offset, window, threshold, rescale,
    g_cu_q, g_cu_k, g_padding, g_mask, g_bias, g_slopes, g_seed, padding_b, padding_s,
    mask_b, mask_h, mask_q, mask_k, bias_b, bias_h, bias_q, bias_k, slopes_b, slopes_h,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, PACKED: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
    BIASED: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WITH_LO: tl.constexpr, NEGATIVE: tl.constexpr,
):  # fmt: skip
    sq = index(sq)
    sk = index(sk)
    offset = index(offset)
    window = index(window)
    tiles = (sq + BLOCK_M - 1) // BLOCK_M
    heads = index(b) * h
    if PACKED:
        heads += h
    tile, y = place(tiles, heads, sk, D, WINDOWED)
    if CAUSAL:
        tile = tiles - 1 - tile  # the last queries see the most keys
    z = y // h
    head = y % h
    first_q = 0
    if PACKED:
        end_q = tl.load(g_cu_q + z + 1, mask=z < b, other=tq)  # document b: what none has
        first_q, sq = span(tl.load(g_cu_q + z), end_q, tq)
    g_out = origin(g_out, z, first_q, out_b, out_s, PACKED) + head.to(tl.int64) * out_h
    g_out_lo = origin(g_out_lo, z, first_q, out_b, out_s, PACKED) + head.to(tl.int64) * out_h
    g_lse = origin(g_lse, z, first_q, lse_b, 1, PACKED) + head.to(tl.int64) * lse_h
    m0 = tile * BLOCK_M
    if PACKED:
        if m0 >= sq:
            return
        if z == b:
            step = tiles * BLOCK_M
            clear(g_out, out_s, m0, step, sq, BLOCK_M, D, D0, D1)
            if WITH_LO:
                clear(g_out_lo, out_s, m0, step, sq, BLOCK_M, D, D0, D1)
            for start in range(m0, sq, step):
                rows = start + tl.arange(0, BLOCK_M)
                tl.store(g_lse + rows, tl.full([BLOCK_M], -INF, tl.float32), mask=rows < sq)
            return
    first_k = 0
    if PACKED:
        end_k = tl.load(g_cu_k + z + 1, mask=z < b, other=tk)  # document b: what none has
        first_k, sk = span(tl.load(g_cu_k + z), end_k, tk)
        offset = sk - sq
    key_head = head // group
    g_q = origin(g_q, z, first_q, q_b, q_s, PACKED) + head.to(tl.int64) * q_h
    g_k = origin(g_k, z, first_k, k_b, k_s, PACKED) + key_head.to(tl.int64) * k_h
    g_v = origin(g_v, z, first_k, v_b, v_s, PACKED) + key_head.to(tl.int64) * v_h
    extras = extras_of(
        z, head, sq, sk, offset, g_padding, g_mask, g_bias, g_slopes, padding_b, padding_s,
        mask_b, mask_h, mask_q, mask_k, bias_b, bias_h, bias_q, bias_k, slopes_b, slopes_h,
        PADDED, MASKED, BIASED, ALIBI,
    )  # fmt: skip
    seed = 0
    if DROPOUT:
        seed = tl.load(g_seed)

    rows = m0 + tl.arange(0, BLOCK_M)
    rows64 = rows.to(tl.int64)[:, None]
    within = (rows < sq)[:, None]
    q0, q1 = load_parts(g_q, rows64 * q_s, within, D, D0, D1, True)
    low, high = key_bounds(rows, offset, window, sk, CAUSAL, WINDOWED)
    shared = (
        q0, q1, g_k, g_v, k_s, v_s,
        rows, low, high, scale * LOG2E, extras, seed, y, threshold,
    )  # fmt: skip
    acc0, acc1 = zeros(BLOCK_M, D0, D1)
    peak = tl.full([BLOCK_M], -INF, tl.float32)
    total = tl.full([BLOCK_M], 0.0, tl.float32)

    edges, left, first, second, fulls, full = key_walk(
        m0, tl.minimum(m0 + BLOCK_M, sq), offset, window, sk, BLOCK_N,
        CAUSAL, WINDOWED, PADDED or MASKED or BIASED,
    )  # fmt: skip
    for i in range(edges):
        n0 = tl.where(i < left, first, second) + i * BLOCK_N
        acc0, acc1, peak, total = fwd_tile(
            acc0, acc1, peak, total, n0, shared, D, D0, D1, BLOCK_M, BLOCK_N, True,
            WINDOWED, PADDED, MASKED, BIASED, ALIBI, DROPOUT, NEGATIVE, PRECISION,
        )  # fmt: skip
    if not (PADDED or MASKED or BIASED):
        for i in range(fulls):
            n0 = full + i * BLOCK_N
            acc0, acc1, peak, total = fwd_tile(
                acc0, acc1, peak, total, n0, shared, D, D0, D1, BLOCK_M, BLOCK_N, False,
                WINDOWED, PADDED, MASKED, BIASED, ALIBI, DROPOUT, NEGATIVE, PRECISION,
            )  # fmt: skip

    total = tl.where(total == 0.0, 1.0, total)  # where no key was seen: acc is 0, peak is -inf
    tl.store(g_lse + rows, (peak + tl.log2(total)) * LN2, mask=rows < sq)
    acc0, acc1 = scaled(acc0, acc1, (rescale / total)[:, None], D1)
    out_offsets = rows64 * out_s
    store_parts(g_out, out_offsets, within, acc0, acc1, D, D0, D1)
    if WITH_LO:
        acc0 -= rounded(acc0, g_out.dtype.element_ty).to(tl.float32)
        if D1 > 0:
            acc1 -= rounded(acc1, g_out.dtype.element_ty).to(tl.float32)
        store_parts(g_out_lo, out_offsets, within, acc0, acc1, D, D0, D1)
