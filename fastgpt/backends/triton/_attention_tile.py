"""What the attention kernels share: which tiles a program visits, how they are loaded and scored.

Rows are queries and columns are keys; row i stands at position i + offset. Key j is visible to a
row at position i' iff (j <= i' when CAUSAL) and |i' - j| < window (when WINDOWED). Scores are in
units of log2(e), so that probabilities are exp2 of them.

A head of d elements is held in parts of D0 and D1 columns (80 = 64 + 16, 96 = 64 + 32), since the
shape of a tile must be a power of two.
"""

from __future__ import annotations

import triton.language as tl

from fastgpt.backends.triton._blocks import INTERPRETED, LOG2E, device, dot, index, rounded

COUNTS = ("lse_b", "lse_h", "b", "h", "sq", "sk", "tq", "tk", "offset", "window", "threshold")
"""Arguments of which a new value compiles nothing."""

INF = tl.constexpr(float("inf"))
MOST_BIAS = tl.constexpr(1.7e38)
LEAST_LSE = tl.constexpr(-1e30)
"""The gradient of a row with a smaller log-sum-exp is 0: it saw no key, or only keys with a bias
beside which its scores have no digits."""
ELEMENTS_TOGETHER = tl.constexpr(1 << 22)
"""What heads that are computed together may read again and again: 16 MiB of two 16-bit tensors."""


# --- who computes what ----------------------------------------------------------------------------


@device
def place(tiles, heads, length, D: tl.constexpr, WINDOWED: tl.constexpr):
    """(tile, head) of this program.

    Programs start in order. First come the first tiles of as many heads as the L2 cache holds,
    then their second tiles; in a band neighbouring tiles of one head share what they read.
    """
    program = index(tl.program_id(0))
    if WINDOWED:
        tile = program % tiles
        y = program // tiles
    else:
        fit = ELEMENTS_TOGETHER // D // tl.maximum(length, 1)
        together = tl.minimum(tl.maximum(fit, 1), heads)
        first = program // (together * tiles) * together
        together = tl.minimum(together, heads - first)
        inside = program - first * tiles
        tile = inside // together
        y = first + inside % together
    return tile, y


@device
def span(first, end, total):
    """(first token, number of tokens) of a document: whatever the offsets hold, of the tensor.

    The kernels load the offsets themselves. Of a function that gets a pointer and returns what goes
    into an address, torch believes that the kernel writes there.
    """
    first = index(tl.minimum(tl.maximum(first, 0), total))
    return first, tl.minimum(tl.maximum(end, first), total) - first


@device
def origin(g, z, first, stride_b, stride_s, PACKED: tl.constexpr):
    """Where the first token of an element of the batch is."""
    if PACKED:
        g += first.to(tl.int64) * stride_s
    else:
        g += z.to(tl.int64) * stride_b
    return g


@device
def walk(
    lo, full_lo, full_hi, hi, count, BLOCK: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, SELECTIVE: tl.constexpr,
):  # fmt: skip
    """How to visit the tiles of `count` elements that hold some of [lo, hi).

    (edges, left, first, second, fulls, full): those with elements outside of [full_lo, full_hi)
    come first, from `first` on and after `left` of them from `second` on; the others start at
    `full`. SELECTIVE: there are no others, as more than the band may hide.
    """
    start = 0
    left = 0
    if LOW:
        start = tl.maximum(lo, 0) // BLOCK
        left = (tl.maximum(full_lo, 0) + BLOCK - 1) // BLOCK - start
    if HIGH:
        hi = tl.maximum(tl.minimum(hi, count), 0)
        full_hi = tl.maximum(tl.minimum(full_hi, count), 0)
    else:
        hi = count
        full_hi = count
    tiles = tl.maximum((hi + BLOCK - 1) // BLOCK - start, 0)
    left = tl.minimum(left, tiles)
    fulls = tl.maximum(full_hi // BLOCK - start - left, 0)
    if SELECTIVE:
        left = tiles
        fulls = 0
    first = start * BLOCK
    return tiles - fulls, left, first, first + fulls * BLOCK, fulls, first + left * BLOCK


@device
def key_walk(
    m0, m1, offset, window, sk, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SELECTIVE: tl.constexpr,
):  # fmt: skip
    """`walk` over the keys that the rows m0 to m1 - 1 see."""
    first = m0 + offset
    end = m1 + offset
    full_hi = first + 1
    hi = end
    if not CAUSAL and WINDOWED:
        full_hi = first + window
        hi = end + window - 1
    return walk(
        first - window + 1, end - window, full_hi, hi, sk, BLOCK_N,
        WINDOWED, CAUSAL or WINDOWED, SELECTIVE,
    )  # fmt: skip


@device
def query_walk(
    n0, n1, offset, window, sq, BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SELECTIVE: tl.constexpr,
):  # fmt: skip
    """`walk` over the rows that see the keys n0 to n1 - 1."""
    first = n0 - offset
    end = n1 - offset
    lo = first
    full_lo = end - 1
    if not CAUSAL and WINDOWED:
        lo = first - window + 1
        full_lo = end - window
    return walk(
        lo, full_lo, first + window, end + window - 1, sq, BLOCK_M,
        CAUSAL or WINDOWED, WINDOWED, SELECTIVE,
    )  # fmt: skip


@device
def key_bounds(rows, offset, window, sk, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """The first and the last key that each row sees."""
    at = rows + offset
    low = at
    high = at
    if WINDOWED:
        low = at - (window - 1)
        if not CAUSAL:
            high = at + (window - 1)
    if CAUSAL or WINDOWED:
        high = tl.minimum(high, sk - 1)
    else:
        high = tl.where(rows < 0, 0, sk - 1)
    return low, high


@device
def query_bounds(columns, offset, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """The first and the last row that would see each key."""
    at = columns - offset
    low = at
    high = at
    if WINDOWED:
        high = at + (window - 1)
        if not CAUSAL:
            low = at - (window - 1)
    return low, high


# --- tiles in memory ------------------------------------------------------------------------------


@device
def load_part(
    g, offsets, alive, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
    EDGE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Columns FIRST to FIRST + WIDTH - 1 of the rows at `offsets` (r, 1), in float32 if WIDE; 0
    beyond D, and in rows that are not alive (r, 1) if there are any (EDGE)."""
    columns = tl.arange(FIRST, FIRST + WIDTH)[None, :]
    g = g + offsets + columns
    if FIRST + WIDTH > D:
        inside = columns < D
        if EDGE:
            inside = inside & alive
        x = tl.load(g, mask=inside, other=0.0)
    elif EDGE:
        x = tl.load(g, mask=alive, other=0.0)
    else:
        x = tl.load(g)
    if WIDE or INTERPRETED:  # whose products of bfloat16 are those of the bits
        x = x.to(tl.float32)
    return x


@device
def load_parts(
    g, offsets, alive, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    EDGE: tl.constexpr, WIDE: tl.constexpr = False,
):  # fmt: skip
    x0 = load_part(g, offsets, alive, D, 0, D0, EDGE, WIDE)
    x1 = x0
    if D1 > 0:
        x1 = load_part(g, offsets, alive, D, D0, D1, EDGE, WIDE)
    return x0, x1


@device
def store_part(g, offsets, alive, x, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    columns = tl.arange(FIRST, FIRST + WIDTH)[None, :]
    if FIRST + WIDTH > D:
        alive = alive & (columns < D)
    tl.store(g + offsets + columns, rounded(x, g.dtype.element_ty), mask=alive)


@device
def store_parts(g, offsets, alive, x0, x1, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    store_part(g, offsets, alive, x0, D, 0, D0)
    if D1 > 0:
        store_part(g, offsets, alive, x1, D, D0, D1)


@device
def zeros(BLOCK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    x0 = tl.full([BLOCK, D0], 0.0, tl.float32)
    x1 = x0
    if D1 > 0:
        x1 = tl.full([BLOCK, D1], 0.0, tl.float32)
    return x0, x1


@device
def clear(
    g, stride, start, step, length, BLOCK: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """Zeros in the rows of every `step`-th block from row `start` on."""
    x0, x1 = zeros(BLOCK, D0, D1)
    for m0 in range(start, length, step):
        rows = (m0 + tl.arange(0, BLOCK))[:, None]
        store_parts(g, rows.to(tl.int64) * stride, rows < length, x0, x1, D, D0, D1)


# --- products and scores --------------------------------------------------------------------------


@device
def inner(a0, a1, b0, b1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T"""
    s = dot(a0, tl.trans(b0), None, PRECISION)
    if D1 > 0:
        s = dot(a1, tl.trans(b1), s, PRECISION)
    return s


@device
def accumulate(
    acc0, acc1, p, x0, x1, DTYPE: tl.constexpr, D1: tl.constexpr, PRECISION: tl.constexpr
):
    """acc + p x, with p in DTYPE, that of x."""
    p = rounded(p, DTYPE)
    acc0 = dot(p, x0, acc0, PRECISION)
    if D1 > 0:
        acc1 = dot(p, x1, acc1, PRECISION)
    return acc0, acc1


@device
def scaled(x0, x1, factor, D1: tl.constexpr):
    x0 = x0 * factor
    if D1 > 0:
        x1 = x1 * factor
    return x0, x1


@device
def zero_unless(condition, x0, x1, D1: tl.constexpr):
    x0 = tl.where(condition, x0, 0.0)
    if D1 > 0:
        x1 = tl.where(condition, x1, 0.0)
    return x0, x1


@device
def extras_of(
    z, head, sq, sk, offset,
    g_padding, g_mask, g_bias, g_slopes, padding_b, padding_s,
    mask_b, mask_h, mask_q, mask_k, bias_b, bias_h, bias_q, bias_k, slopes_b, slopes_h,
    PADDED: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """What changes the scores of one head, for `key_alive` and `biased`."""
    slope = 0.0
    if PADDED:
        g_padding += z.to(tl.int64) * padding_b
    if MASKED:
        g_mask += z.to(tl.int64) * mask_b + head.to(tl.int64) * mask_h
    if BIASED:
        g_bias += z.to(tl.int64) * bias_b + head.to(tl.int64) * bias_h
    if ALIBI:
        slope = tl.load(g_slopes + z * slopes_b + head * slopes_h) * LOG2E
    return (
        sq, sk, offset, g_padding, padding_s, g_mask, mask_q, mask_k, g_bias, bias_q, bias_k, slope
    )  # fmt: skip


@device
def key_alive(columns, sk, g_padding, padding_s, PADDED: tl.constexpr):
    """Which keys there are and are not padding."""
    alive = columns < sk
    if PADDED:
        at = columns.to(tl.int64) * padding_s
        alive = alive & (tl.load(g_padding + at, mask=alive, other=0) != 0)
    return alive


@device
def biased(
    t, rows, columns, alive, x, low, high, extras,
    EDGE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    PADDED: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """The scores t with their biases, -inf where x is not within [low, high] or the key is not
    alive; in a tile of either orientation, to the shape of which all of these broadcast."""
    sq, sk, offset, _, _, g_mask, mask_q, mask_k, g_bias, bias_q, bias_k, slope = extras
    if ALIBI:
        t -= tl.abs(rows + offset - columns).to(tl.float32) * slope
    if BIASED:
        at = rows.to(tl.int64) * bias_q + columns.to(tl.int64) * bias_k
        bias = tl.load(g_bias + at, mask=(rows < sq) & (columns < sk), other=0.0)
        bias = bias.to(tl.float32)
        # Only -inf hides: what a finite one adds in units of log 2 is finite.
        scaled = tl.minimum(tl.maximum(bias * LOG2E, -MOST_BIAS), MOST_BIAS)
        t += tl.where(tl.abs(bias) < INF, scaled, bias)
    if EDGE:
        if HIGH:
            seen = x <= high
            if LOW:
                seen = seen & (x >= low)
            t = tl.where(seen, t, -INF)
        elif LOW:
            t = tl.where(x >= low, t, -INF)
        if PADDED:
            t = tl.where(alive, t, -INF)
        if MASKED:
            at = rows.to(tl.int64) * mask_q + columns.to(tl.int64) * mask_k
            mask = tl.load(g_mask + at, mask=(rows < sq) & (columns < sk), other=0)
            t = tl.where(mask != 0, t, -INF)
    return t


@device
def kept(seed, rows, n0, y, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which probabilities (BLOCK_M, BLOCK_N) of head y = z h + head dropout keeps; a random word
    has the counter (column / 4, row, y, 0) and the lane column % 4."""
    groups = n0 // 4 + tl.arange(0, BLOCK_N // 4)
    w0, w1, w2, w3 = tl.philox(
        seed, groups.to(tl.int32)[None, :], rows.to(tl.int32)[:, None], y.to(tl.int32), 0
    )
    lanes = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    words = tl.reshape(lanes, [BLOCK_M, BLOCK_N])
    return words.to(tl.int64) >= threshold
