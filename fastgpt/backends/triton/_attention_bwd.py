"""dq, dk, dv of attention, dense or packed; P is computed anew from q, k and lse.

    delta = rowsum(dout * out) - dlse    dS = P * (dout v^T * keep / (1 - p) - delta)
    dq = scale dS k    dk = scale dS^T q    dv = (P * keep / (1 - p))^T dout

dk and dv: a program takes BLOCK_N keys and walks the query heads that share them and the tiles of
queries that see them. dq: a program takes BLOCK_M queries, as in the forward. So nothing is added
by two programs and no order is left to chance, for 14 d flops per visible pair instead of 10 d.
Source: Dao 2023, https://arxiv.org/abs/2307.08691.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastgpt.backends.triton._attention_tile import (
    COUNTS,
    INF,
    LEAST_LSE,
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
    query_bounds,
    query_walk,
    scaled,
    span,
    store_parts,
    zero_unless,
    zeros,
)
from fastgpt.backends.triton._blocks import LOG2E, device, index


@triton.jit(do_not_specialize=COUNTS)
def attention_bwd_delta_kernel(
    g_dout, g_out, g_out_lo, g_lse, g_dlse, g_delta, g_lse2,
    dout_b, dout_h, dout_s, out_b, out_h, out_s, lse_b, lse_h, h, sq,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    WITH_LO: tl.constexpr, WITH_DLSE: tl.constexpr,
):  # fmt: skip
    """delta, and lse in units of log2(e): 0 and inf where a row has no gradient: P is 0."""
    tiles = (sq + ROWS - 1) // ROWS
    y = index(tl.program_id(0)) // tiles
    rows = index(tl.program_id(0)) % tiles * ROWS + tl.arange(0, ROWS)
    z = (y // h).to(tl.int64)
    head = (y % h).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)[None, :]
    at = z * lse_b + head * lse_h + rows
    lse = tl.load(g_lse + at, mask=rows < sq, other=-INF)
    some = lse > LEAST_LSE
    # The gradient of a row that saw no key is not read: it may hold anything.
    inside = some[:, None] & (columns < D)
    rows64 = rows.to(tl.int64)[:, None]
    out_at = z * out_b + head * out_h + rows64 * out_s + columns
    out = tl.load(g_out + out_at, mask=inside, other=0.0).to(tl.float32)
    if WITH_LO:
        out += tl.load(g_out_lo + out_at, mask=inside, other=0.0).to(tl.float32)
    dout_at = z * dout_b + head * dout_h + rows64 * dout_s + columns
    dout = tl.load(g_dout + dout_at, mask=inside, other=0.0).to(tl.float32)
    delta = tl.sum(dout * out, 1)
    if WITH_DLSE:
        delta -= tl.load(g_dlse + at, mask=some, other=0.0)
    tl.store(g_delta + at, delta, mask=rows < sq)
    tl.store(g_lse2 + at, tl.where(some, lse * LOG2E, INF), mask=rows < sq)


@device
def tile_and_head(i, tiles, key_head, group, GROUPED: tl.constexpr):
    """The tile and the query head of step i through the tiles of all heads of a group."""
    tile = i
    head = key_head
    if GROUPED:
        tile = i % tiles
        head = key_head * group + i // tiles
    return tile, head


@device
def dkv_tile(
    dk0, dk1, dv0, dv1, m0, head, y, extras, shared,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
    BIASED: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """dk and dv with the queries m0 to m0 + BLOCK_M - 1; the tile of scores is (keys, queries)."""
    (
        k0, k1, v0, v1, g_q, g_dout, g_lse2, g_delta, q_h, q_s, dout_h, dout_s, lse_h,
        n0, columns, alive, low, high, scale, seed, threshold, rescale,
    ) = shared  # fmt: skip
    head = head.to(tl.int64)
    g_q += head * q_h
    g_dout += head * dout_h
    g_lse2 += head * lse_h
    g_delta += head * lse_h
    rows = m0 + tl.arange(0, BLOCK_M)
    within = rows
    some = rows
    if EDGE:
        within = rows < extras[0]
        lse2 = tl.load(g_lse2 + rows, mask=within, other=INF)
        some = lse2 < INF  # what a query that sees no key holds must not be met
    else:
        lse2 = tl.load(g_lse2 + rows)
    rows64 = rows.to(tl.int64)[:, None]
    q0, q1 = load_parts(g_q, rows64 * q_s, some[:, None], D, D0, D1, EDGE, WIDE)
    dout0, dout1 = load_parts(g_dout, rows64 * dout_s, some[:, None], D, D0, D1, EDGE, WIDE)
    s = inner(k0, k1, q0, q1, D1, PRECISION)
    t = biased(
        tl.fma(s, scale, -lse2[None, :]), rows[None, :], columns[:, None], alive[:, None],
        rows[None, :], low[:, None], high[:, None], extras,
        EDGE, CAUSAL or WINDOWED, WINDOWED, PADDED, MASKED, BIASED, ALIBI,
    )  # fmt: skip
    p = tl.exp2(t)
    pv = p
    keep = p
    if DROPOUT:
        keep = tl.trans(kept(seed, rows, n0, y, threshold, BLOCK_M, BLOCK_N))
        pv = tl.where(keep, p, 0.0)
    dtype: tl.constexpr = tl.float32 if WIDE else g_q.dtype.element_ty
    dv0, dv1 = accumulate(dv0, dv1, pv, dout0, dout1, dtype, D1, PRECISION)
    dp = inner(v0, v1, dout0, dout1, D1, PRECISION)
    if DROPOUT:
        dp = tl.where(keep, dp * rescale, 0.0)
    # Not earlier: a thread holds a value for every other column of its tile, and registers are few.
    if EDGE:
        delta = tl.load(g_delta + rows, mask=within, other=0.0)
    else:
        delta = tl.load(g_delta + rows)
    ds = p * (dp - delta[None, :])
    if EDGE:  # a hidden key or value may hold NaN, and its dp may have overflowed
        ds = tl.where(p == 0.0, 0.0, ds)
    dk0, dk1 = accumulate(dk0, dk1, ds, q0, q1, dtype, D1, PRECISION)
    return dk0, dk1, dv0, dv1


@triton.jit(do_not_specialize=COUNTS)
def attention_bwd_dkv_kernel(
    g_dout, g_q, g_k, g_v, g_delta, g_lse2, g_dk, g_dv,
    dout_b, dout_h, dout_s, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s,
    dk_b, dk_h, dk_s, lse_b, lse_h,
    b, h, group, sq, sk, tq, tk, scale, offset, window, threshold, rescale,
    g_cu_q, g_cu_k, g_padding, g_mask, g_bias, g_slopes, g_seed, padding_b, padding_s,
    mask_b, mask_h, mask_q, mask_k, bias_b, bias_h, bias_q, bias_k, slopes_b, slopes_h,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, PACKED: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
    BIASED: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    sq = index(sq)
    sk = index(sk)
    offset = index(offset)
    window = index(window)
    tiles = (sk + BLOCK_N - 1) // BLOCK_N
    hk = h // group
    heads = index(b) * hk
    if PACKED:
        heads += hk
    tile, y = place(tiles, heads, sq, D, WINDOWED)  # the first keys are seen by the most queries
    z = y // hk
    key_head = y % hk
    first_k = 0
    if PACKED:
        end_k = tl.load(g_cu_k + z + 1, mask=z < b, other=tk)  # document b: what none has
        first_k, sk = span(tl.load(g_cu_k + z), end_k, tk)
    n0 = tile * BLOCK_N
    if PACKED:
        if n0 >= sk:
            return
        if z == b:
            g_dk = origin(g_dk, z, first_k, dk_b, dk_s, PACKED) + key_head.to(tl.int64) * dk_h
            g_dv = origin(g_dv, z, first_k, dk_b, dk_s, PACKED) + key_head.to(tl.int64) * dk_h
            clear(g_dk, dk_s, n0, tiles * BLOCK_N, sk, BLOCK_N, D, D0, D1)
            clear(g_dv, dk_s, n0, tiles * BLOCK_N, sk, BLOCK_N, D, D0, D1)
            return
    first_q = 0
    if PACKED:
        end_q = tl.load(g_cu_q + z + 1, mask=z < b, other=tq)  # document b: what none has
        first_q, sq = span(tl.load(g_cu_q + z), end_q, tq)
        offset = sk - sq
    g_k = origin(g_k, z, first_k, k_b, k_s, PACKED) + key_head.to(tl.int64) * k_h
    g_v = origin(g_v, z, first_k, v_b, v_s, PACKED) + key_head.to(tl.int64) * v_h
    seed = 0
    if DROPOUT:
        seed = tl.load(g_seed)

    columns = n0 + tl.arange(0, BLOCK_N)
    columns64 = columns.to(tl.int64)[:, None]
    if PADDED:
        g_padding += z.to(tl.int64) * padding_b
    alive = key_alive(columns, sk, g_padding, padding_s, PADDED)
    k0, k1 = load_parts(g_k, columns64 * k_s, alive[:, None], D, D0, D1, True, WIDE)
    v0, v1 = load_parts(g_v, columns64 * v_s, alive[:, None], D, D0, D1, True, WIDE)
    low, high = query_bounds(columns, offset, window, CAUSAL, WINDOWED)
    shared = (
        k0, k1, v0, v1,
        origin(g_q, z, first_q, q_b, q_s, PACKED),
        origin(g_dout, z, first_q, dout_b, dout_s, PACKED),
        origin(g_lse2, z, first_q, lse_b, 1, PACKED),
        origin(g_delta, z, first_q, lse_b, 1, PACKED),
        q_h, q_s, dout_h, dout_s, lse_h,
        n0, columns, alive, low, high, scale * LOG2E, seed, threshold, rescale,
    )  # fmt: skip
    dk0, dk1 = zeros(BLOCK_N, D0, D1)
    dv0, dv1 = zeros(BLOCK_N, D0, D1)

    edges, left, first, second, fulls, full = query_walk(
        n0, tl.minimum(n0 + BLOCK_N, sk), offset, window, sq, BLOCK_M,
        CAUSAL, WINDOWED, PADDED or MASKED or BIASED,
    )  # fmt: skip
    # One loop over the heads that share the keys and over the tiles of each: it need not restart.
    for i in range(edges * group):
        j, head = tile_and_head(i, edges, key_head, group, GROUPED)
        extras = extras_of(
            z, head, sq, sk, offset, g_padding, g_mask, g_bias, g_slopes, padding_b,
            padding_s, mask_b, mask_h, mask_q, mask_k, bias_b, bias_h, bias_q, bias_k,
            slopes_b, slopes_h, False, MASKED, BIASED, ALIBI,
        )  # fmt: skip
        m0 = tl.where(j < left, first, second) + j * BLOCK_M
        dk0, dk1, dv0, dv1 = dkv_tile(
            dk0, dk1, dv0, dv1, m0, head, z * h + head, extras, shared,
            D, D0, D1, BLOCK_M, BLOCK_N, True, CAUSAL, WINDOWED,
            PADDED, MASKED, BIASED, ALIBI, DROPOUT, PRECISION, WIDE,
        )  # fmt: skip
    if not (PADDED or MASKED or BIASED):
        for i in range(fulls * group):
            j, head = tile_and_head(i, fulls, key_head, group, GROUPED)
            extras = extras_of(
                z, head, sq, sk, offset, g_padding, g_mask, g_bias, g_slopes, padding_b,
                padding_s, mask_b, mask_h, mask_q, mask_k, bias_b, bias_h, bias_q, bias_k,
                slopes_b, slopes_h, False, False, False, ALIBI,
            )  # fmt: skip
            m0 = full + j * BLOCK_M
            dk0, dk1, dv0, dv1 = dkv_tile(
                dk0, dk1, dv0, dv1, m0, head, z * h + head, extras, shared,
                D, D0, D1, BLOCK_M, BLOCK_N, False, CAUSAL, WINDOWED,
                PADDED, MASKED, BIASED, ALIBI, DROPOUT, PRECISION, WIDE,
            )  # fmt: skip

    dk0, dk1 = scaled(dk0, dk1, scale, D1)
    dv0, dv1 = scaled(dv0, dv1, rescale, D1)
    within = (columns < sk)[:, None]
    g_dk = origin(g_dk, z, first_k, dk_b, dk_s, PACKED) + key_head.to(tl.int64) * dk_h
    g_dv = origin(g_dv, z, first_k, dk_b, dk_s, PACKED) + key_head.to(tl.int64) * dk_h
    store_parts(g_dk, columns64 * dk_s, within, dk0, dk1, D, D0, D1)
    store_parts(g_dv, columns64 * dk_s, within, dv0, dv1, D, D0, D1)


@device
def score_gradient(
    q0, q1, dout0, dout1, k0, k1, v0, v1, lse2, delta,
    rows, n0, columns, alive, low, high, scale, extras, seed, y, threshold, rescale,
    D1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
    WINDOWED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
    BIASED: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P, P dP and dS of a tile (queries, keys)."""
    s = inner(q0, q1, k0, k1, D1, PRECISION)
    dp = inner(dout0, dout1, v0, v1, D1, PRECISION)  # runs while P is computed
    t = biased(
        tl.fma(s, scale, -lse2[:, None]), rows[:, None], columns[None, :], alive[None, :],
        columns[None, :], low[:, None], high[:, None], extras,
        EDGE, WINDOWED, True, PADDED, MASKED, BIASED, ALIBI,
    )  # fmt: skip
    p = tl.exp2(t)
    if DROPOUT:
        keep = kept(seed, rows, n0, y, threshold, BLOCK_M, BLOCK_N)
        dp = tl.where(keep, dp * rescale, 0.0)
    if EDGE:  # a hidden key or value may hold NaN, and its dp may have overflowed
        dp = tl.where(p == 0.0, 0.0, dp)
    pdp = p * dp
    ds = p * (dp - delta[:, None])
    if MASKED:  # delta may be NaN
        ds = tl.where(p == 0.0, 0.0, ds)
    return p, pdp, ds


@device
def dq_tile(
    dq0, dq1, exact, n0, shared,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
    WINDOWED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
    BIASED: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, WITH_EXACT: tl.constexpr,
):  # fmt: skip
    """dq with the keys n0 to n0 + BLOCK_N - 1, and rowsum(P dP)."""
    (
        q0, q1, dout0, dout1, lse2, delta, g_k, g_v, k_s, v_s,
        rows, low, high, scale, extras, seed, y, threshold, rescale,
    ) = shared  # fmt: skip
    columns = n0 + tl.arange(0, BLOCK_N)
    columns64 = columns.to(tl.int64)[:, None]
    alive = columns
    if EDGE:
        alive = key_alive(columns, extras[1], extras[3], extras[4], PADDED)
    k0, k1 = load_parts(g_k, columns64 * k_s, alive[:, None], D, D0, D1, EDGE, WIDE)
    v0, v1 = load_parts(g_v, columns64 * v_s, alive[:, None], D, D0, D1, EDGE, WIDE)
    p, pdp, ds = score_gradient(
        q0, q1, dout0, dout1, k0, k1, v0, v1, lse2, delta,
        rows, n0, columns, alive, low, high, scale, extras, seed, y, threshold, rescale,
        D1, BLOCK_M, BLOCK_N, EDGE, WINDOWED, PADDED, MASKED, BIASED, ALIBI, DROPOUT, PRECISION,
    )  # fmt: skip
    if MASKED:
        met = tl.max((p > 0.0).to(tl.int32), 0) > 0
        k0, k1 = zero_unless(met[:, None], k0, k1, D1)
    if WITH_EXACT:
        exact += tl.sum(pdp, 1)
    dtype: tl.constexpr = tl.float32 if WIDE else g_k.dtype.element_ty
    dq0, dq1 = accumulate(dq0, dq1, ds, k0, k1, dtype, D1, PRECISION)
    return dq0, dq1, exact


@triton.jit(do_not_specialize=COUNTS)
def attention_bwd_dq_kernel(
    g_dout, g_q, g_k, g_v, g_delta, g_lse2, g_dlse, g_exact, g_dq,
    dout_b, dout_h, dout_s, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s,
    dq_b, dq_h, dq_s, lse_b, lse_h,
    b, h, group, sq, sk, tq, tk, scale, offset, window, threshold, rescale,
    g_cu_q, g_cu_k, g_padding, g_mask, g_bias, g_slopes, g_seed, padding_b, padding_s,
    mask_b, mask_h, mask_q, mask_k, bias_b, bias_h, bias_q, bias_k, slopes_b, slopes_h,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, PACKED: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
    BIASED: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, WITH_EXACT: tl.constexpr, WITH_DLSE: tl.constexpr,
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
        tile = tiles - 1 - tile
    z = y // h
    head = y % h
    first_q = 0
    if PACKED:
        end_q = tl.load(g_cu_q + z + 1, mask=z < b, other=tq)  # document b: what none has
        first_q, sq = span(tl.load(g_cu_q + z), end_q, tq)
    g_dq = origin(g_dq, z, first_q, dq_b, dq_s, PACKED) + head.to(tl.int64) * dq_h
    m0 = tile * BLOCK_M
    if PACKED:
        if m0 >= sq:
            return
        if z == b:
            clear(g_dq, dq_s, m0, tiles * BLOCK_M, sq, BLOCK_M, D, D0, D1)
            return
    first_k = 0
    if PACKED:
        end_k = tl.load(g_cu_k + z + 1, mask=z < b, other=tk)  # document b: what none has
        first_k, sk = span(tl.load(g_cu_k + z), end_k, tk)
        offset = sk - sq
    key_head = head // group
    g_q = origin(g_q, z, first_q, q_b, q_s, PACKED) + head.to(tl.int64) * q_h
    g_dout = origin(g_dout, z, first_q, dout_b, dout_s, PACKED) + head.to(tl.int64) * dout_h
    g_lse2 = origin(g_lse2, z, first_q, lse_b, 1, PACKED) + head.to(tl.int64) * lse_h
    g_delta = origin(g_delta, z, first_q, lse_b, 1, PACKED) + head.to(tl.int64) * lse_h
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
    lse2 = tl.load(g_lse2 + rows, mask=rows < sq, other=INF)
    delta = tl.load(g_delta + rows, mask=rows < sq, other=0.0)
    some = (lse2 < INF)[:, None]
    q0, q1 = load_parts(g_q, rows64 * q_s, some, D, D0, D1, True, WIDE)
    dout0, dout1 = load_parts(g_dout, rows64 * dout_s, some, D, D0, D1, True, WIDE)
    low, high = key_bounds(rows, offset, window, sk, CAUSAL, WINDOWED)
    shared = (
        q0, q1, dout0, dout1, lse2, delta, g_k, g_v, k_s, v_s,
        rows, low, high, scale * LOG2E, extras, seed, y, threshold, rescale,
    )  # fmt: skip
    dq0, dq1 = zeros(BLOCK_M, D0, D1)
    exact = tl.full([BLOCK_M], 0.0, tl.float32)

    edges, left, first, second, fulls, full = key_walk(
        m0, tl.minimum(m0 + BLOCK_M, sq), offset, window, sk, BLOCK_N,
        CAUSAL, WINDOWED, PADDED or MASKED or BIASED,
    )  # fmt: skip
    for i in range(edges):
        n0 = tl.where(i < left, first, second) + i * BLOCK_N
        dq0, dq1, exact = dq_tile(
            dq0, dq1, exact, n0, shared, D, D0, D1, BLOCK_M, BLOCK_N, True,
            WINDOWED, PADDED, MASKED, BIASED, ALIBI, DROPOUT, PRECISION, WIDE, WITH_EXACT,
        )  # fmt: skip
    if not (PADDED or MASKED or BIASED):
        for i in range(fulls):
            n0 = full + i * BLOCK_N
            dq0, dq1, exact = dq_tile(
                dq0, dq1, exact, n0, shared, D, D0, D1, BLOCK_M, BLOCK_N, False,
                WINDOWED, PADDED, MASKED, BIASED, ALIBI, DROPOUT, PRECISION, WIDE, WITH_EXACT,
            )  # fmt: skip
    dq0, dq1 = scaled(dq0, dq1, scale, D1)
    store_parts(g_dq, rows64 * dq_s, (rows < sq)[:, None], dq0, dq1, D, D0, D1)
    if WITH_EXACT:
        at = z.to(tl.int64) * lse_b + head.to(tl.int64) * lse_h + rows
        if WITH_DLSE:
            exact -= tl.load(g_dlse + at, mask=lse2 < INF, other=0.0)
        tl.store(g_exact + at, exact, mask=rows < sq)
