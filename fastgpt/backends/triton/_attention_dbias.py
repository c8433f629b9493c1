"""dbias = dS, summed over the axes along which the bias is broadcast.

A program takes one tile of scores and walks the elements of the batch and the heads that share a
bias. A tile of a bias without rows (or without columns) is summed to one row (or column), and
these partial sums are added by a second kernel, tile after tile. 4 d flops a score, hidden ones
in visible tiles included.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastgpt.backends.triton._attention_bwd import score_gradient
from fastgpt.backends.triton._attention_tile import (
    COUNTS,
    INF,
    extras_of,
    key_alive,
    key_bounds,
    key_walk,
    load_parts,
)
from fastgpt.backends.triton._blocks import LOG2E, index


@triton.jit(do_not_specialize=[*COUNTS, "bias_count_b", "bias_count_h", "partial_h", "partial_q"])
def attention_bwd_dbias_kernel(
    g_dout, g_q, g_k, g_v, g_delta, g_lse2, g_partial,
    dout_b, dout_h, dout_s, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s,
    bias_count_b, bias_count_h, partial_h, partial_q, lse_b, lse_h,
    b, h, group, sq, sk, tq, tk, scale, offset, window, threshold, rescale,
    g_cu_q, g_cu_k, g_padding, g_mask, g_bias, g_slopes, g_seed, padding_b, padding_s,
    mask_b, mask_h, mask_q, mask_k, bias_b, bias_h, bias_q, bias_k, slopes_b, slopes_h,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, PACKED: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
    BIASED: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, OF_ROWS: tl.constexpr, OF_COLUMNS: tl.constexpr,
):  # fmt: skip
    sq = index(sq)
    sk = index(sk)
    offset = index(offset)
    window = index(window)
    m_tiles = (sq + BLOCK_M - 1) // BLOCK_M
    n_tiles = (sk + BLOCK_N - 1) // BLOCK_N
    tile = index(tl.program_id(0)) % (m_tiles * n_tiles)
    y = index(tl.program_id(0)) // (m_tiles * n_tiles)
    m_tile = tile // n_tiles
    n_tile = tile % n_tiles
    # Elements and heads that share this bias: all if it has one, else one.
    z_count = b // bias_count_b
    head_count = h // bias_count_h

    m0 = m_tile * BLOCK_M
    n0 = n_tile * BLOCK_N
    rows = m0 + tl.arange(0, BLOCK_M)
    columns = n0 + tl.arange(0, BLOCK_N)
    rows64 = rows.to(tl.int64)[:, None]
    columns64 = columns.to(tl.int64)[:, None]
    seed = 0
    if DROPOUT:
        seed = tl.load(g_seed)
    total = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    low, high = key_bounds(rows, offset, window, sk, CAUSAL, WINDOWED)
    m1 = tl.minimum(m0 + BLOCK_M, sq)
    walk = key_walk(m0, m1, offset, window, sk, BLOCK_N, CAUSAL, WINDOWED, True)
    first = walk[2]
    if (n0 >= first) & (n0 < first + walk[0] * BLOCK_N):
        for i in range(z_count * head_count):
            z = y // bias_count_h + i // head_count
            head = y % bias_count_h + i % head_count
            key_head = head // group
            extras = extras_of(
                z, head, sq, sk, offset, g_padding, g_mask, g_bias, g_slopes,
                padding_b, padding_s, mask_b, mask_h, mask_q, mask_k,
                bias_b, bias_h, bias_q, bias_k, slopes_b, slopes_h, PADDED, MASKED, BIASED, ALIBI,
            )  # fmt: skip
            at = z.to(tl.int64) * lse_b + head.to(tl.int64) * lse_h + rows
            lse2 = tl.load(g_lse2 + at, mask=rows < sq, other=INF)
            delta = tl.load(g_delta + at, mask=rows < sq, other=0.0)
            some = (lse2 < INF)[:, None]
            alive = key_alive(columns, sk, extras[3], padding_s, PADDED)
            g_q_head = g_q + z.to(tl.int64) * q_b + head.to(tl.int64) * q_h
            g_dout_head = g_dout + z.to(tl.int64) * dout_b + head.to(tl.int64) * dout_h
            g_k_head = g_k + z.to(tl.int64) * k_b + key_head.to(tl.int64) * k_h
            g_v_head = g_v + z.to(tl.int64) * v_b + key_head.to(tl.int64) * v_h
            q0, q1 = load_parts(g_q_head, rows64 * q_s, some, D, D0, D1, True, WIDE)
            dout0, dout1 = load_parts(g_dout_head, rows64 * dout_s, some, D, D0, D1, True, WIDE)
            k0, k1 = load_parts(g_k_head, columns64 * k_s, alive[:, None], D, D0, D1, True, WIDE)
            v0, v1 = load_parts(g_v_head, columns64 * v_s, alive[:, None], D, D0, D1, True, WIDE)
            gradient = score_gradient(
                q0, q1, dout0, dout1, k0, k1, v0, v1, lse2, delta, rows, n0, columns, alive,
                low, high, scale * LOG2E, extras, seed, z * h + head, threshold, rescale,
                D1, BLOCK_M, BLOCK_N, True, WINDOWED, PADDED, MASKED, BIASED, ALIBI, DROPOUT,
                PRECISION,
            )  # fmt: skip
            total += gradient[2]

    g_partial += y.to(tl.int64) * partial_h
    if OF_ROWS and OF_COLUMNS:
        at = rows64 * partial_q + columns[None, :]
        tl.store(g_partial + at, total, mask=(rows < sq)[:, None] & (columns < sk)[None, :])
    elif OF_ROWS:
        tl.store(g_partial + rows.to(tl.int64) * partial_q + n_tile, tl.sum(total, 1), rows < sq)
    elif OF_COLUMNS:
        at = m_tile.to(tl.int64) * partial_q + columns
        tl.store(g_partial + at, tl.sum(total, 0), mask=columns < sk)
    else:
        tl.store(g_partial + tile, tl.sum(tl.sum(total, 1), 0))


@triton.jit(do_not_specialize=["n", "count", "inner"])
def attention_bwd_dbias_sum_kernel(g_partial, g_dbias, n, count, inner, BLOCK: tl.constexpr):
    """dbias (n / inner, inner) = the sum over the middle axis of partial (n / inner, count, inner),
    one after the other."""
    at = index(tl.program_id(0)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g_partial += at // inner * count * inner + at % inner
    total = tl.full([BLOCK], 0.0, tl.float32)
    for _ in range(count):
        total += tl.load(g_partial, mask=at < n, other=0.0)
        g_partial += inner
    tl.store(g_dbias + at, total, mask=at < n)
