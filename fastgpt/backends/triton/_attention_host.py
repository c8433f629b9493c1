"""The launches that dense and packed attention share, on (b, h, s, d) views of their tensors."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from fastgpt.backends.triton._attention_bwd import (
    attention_bwd_delta_kernel,
    attention_bwd_dkv_kernel,
    attention_bwd_dq_kernel,
)
from fastgpt.backends.triton._attention_dbias import (
    attention_bwd_dbias_kernel,
    attention_bwd_dbias_sum_kernel,
)
from fastgpt.backends.triton._attention_fwd import attention_fwd_kernel
from fastgpt.backends.triton._launch import architecture, ceil_div, launch, next_power_of_2
from fastgpt.backends.triton._tuning import attention_tiles

FAR = 1 << 30
"""A window that covers everything, small enough to be added to a position."""

Numbers = tuple[Any, ...]
Flags = dict[str, Any]


def parts(d: int) -> tuple[int, int]:
    """The widths of the two parts that hold d columns; the second may be 0.

    80 is 64 + 16 and 96 is 64 + 32: a tile of 128 columns would waste a third of the product.
    """
    whole = max(16, next_power_of_2(d))
    first = whole // 2
    rest = max(16, next_power_of_2(d - first)) if d > first else 0
    return (first, rest) if first >= 64 and first + rest < whole else (whole, 0)


def describe(
    q: Tensor,
    k: Tensor,
    *,
    b: int,
    sq: int,
    sk: int,
    scale: float,
    causal: bool,
    window: int | None,
    offset: int,
    cu_seqlens: tuple[Tensor, Tensor] | None = None,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[Numbers, Flags]:
    """The arguments from `b` to `slopes_h` that all kernels take, and their flags.

    q is (b, h, sq, d), or (1, h, tq, d) of b documents; sq and sk are then those of the longest.
    """
    h, hk = q.shape[1], k.shape[1]
    d = operator.index(q.shape[3])  # not symbolic, in traced code
    dropout = dropout_seed is not None and dropout_p > 0.0
    threshold = round(dropout_p * 2**32) if dropout else 0
    rescale = 1.0 / (1.0 - dropout_p) if dropout else 1.0
    limit = 0 if window is None else window if window < FAR else FAR
    cu_q, cu_k = (q, q) if cu_seqlens is None else cu_seqlens
    numbers = (
        *(b, h, h // hk, sq, sk, q.shape[2], k.shape[2]),
        *(scale, offset, limit, threshold, rescale),
        *(cu_q, cu_k, *(q if x is None else x for x in (key_padding_mask, mask, bias))),
        *(q if alibi_slopes is None else alibi_slopes, dropout_seed if dropout else q),
        *((0, 0) if key_padding_mask is None else key_padding_mask.stride()),
        *broadcast_strides(mask),
        *broadcast_strides(bias),
        *slope_strides(alibi_slopes),
    )
    first, second = parts(d)
    flags = {
        "D": d,
        "D0": first,
        "D1": second,
        "PACKED": cu_seqlens is not None,
        "CAUSAL": bool(causal),
        "WINDOWED": window is not None,
        "PADDED": key_padding_mask is not None,
        "MASKED": mask is not None,
        "BIASED": bias is not None,
        "ALIBI": alibi_slopes is not None,
        "DROPOUT": dropout,
        "PRECISION": precision(q),
    }
    return numbers, flags


def broadcast_strides(x: Tensor | None) -> tuple[int, ...]:
    """The strides with which x broadcasts to (b, h, sq, sk)."""
    if x is None:
        return 0, 0, 0, 0
    pairs = zip(x.shape, x.stride(), strict=True)
    return tuple(0 if size == 1 else stride for size, stride in pairs)


def slope_strides(slopes: Tensor | None) -> tuple[int, int]:
    if slopes is None:
        return 0, 0
    return (0, slopes.stride(0)) if slopes.dim() == 1 else (slopes.stride(0), slopes.stride(1))


def precision(q: Tensor) -> str:
    """How float32 is multiplied: as float32, unless torch may round its own products too."""
    if q.dtype == torch.float32 and torch.version.hip is None and q.device.type == "cuda":
        return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    return "ieee"


def tiles(kind: str, q: Tensor, flags: Flags, window: int | None) -> Flags:
    """The sizes of a kernel's tiles and how it is launched."""
    dtype = torch.float32 if flags.get("WIDE") else q.dtype
    laden = any(flags[name] for name in ("PADDED", "MASKED", "BIASED", "ALIBI", "DROPOUT"))
    block_m, block_n, num_warps, num_stages = attention_tiles(
        kind, architecture(q.device), flags["D"], window, dtype, laden
    )
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def for_backward(flags: Flags, sq: int) -> Flags:
    """The flags of a backward pass: WIDE if its products are those of float32.

    The rounding of P and dS to 16 bits does not average out in so few terms, nor would they fill
    the tiles of a tensor core. Packed documents have no sq of their own here.
    """
    return {**flags, "WIDE": flags["D"] < 16 or (sq < 16 and not flags["PACKED"])}


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    out_lo: Tensor,
    lse: Tensor,
    numbers: Numbers,
    flags: Flags,
    window: int | None,
) -> None:
    """Fill out, lse and, unless it is empty, out_lo."""
    b, h, _, sq = numbers[:4]
    config = tiles("attention_fwd", q, flags, window)
    launch(
        attention_fwd_kernel,
        ceil_div(sq, config["BLOCK_M"]) * (b + flags["PACKED"]) * h,
        *(q, k, v, out, out if out_lo.numel() == 0 else out_lo, lse),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *lse.stride()[:2]),
        *numbers,
        **flags,
        **config,
        WITH_LO=out_lo.numel() > 0,
        NEGATIVE=numbers[7] < 0.0,
    )


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    out_lo: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    numbers: Numbers,
    flags: Flags,
    window: int | None,
    need_exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """Fill dq, dk and dv; returns delta, and the lse in units of log2(e).

    lse and dlse are contiguous, and dv is stored as dk is. `need_exact`: the delta that is returned
    is rowsum(P dP) - dlse, not made of an output that came of rounded P, as a sum over dS needs it.
    """
    b, h, _, sq, sk = numbers[:5]
    flags = for_backward(flags, sq)
    statistics = lse.new_empty((3 if need_exact else 2, *lse.shape))
    delta, lse2, exact = statistics[0], statistics[1], statistics[-1]
    rows = max(16, 4096 // next_power_of_2(flags["D"]))
    launch(
        attention_bwd_delta_kernel,
        ceil_div(q.shape[2], rows) * q.shape[0] * h,
        *(dout, out, out if out_lo.numel() == 0 else out_lo),
        *(lse, lse if dlse is None else dlse, delta, lse2),
        *(*dout.stride()[:3], *out.stride()[:3], *lse.stride()[:2], h, q.shape[2]),
        ROWS=rows,
        D=flags["D"],
        BLOCK_D=next_power_of_2(flags["D"]),
        WITH_LO=out_lo.numel() > 0,
        WITH_DLSE=dlse is not None,
    )
    inputs = (dout, q, k, v, delta, lse2)
    at = (*dout.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    config = tiles("attention_bwd_dkv", q, flags, window)
    launch(
        attention_bwd_dkv_kernel,
        ceil_div(sk, config["BLOCK_N"]) * (b + flags["PACKED"]) * k.shape[1],
        *(*inputs, dk, dv, *at, *dk.stride()[:3], *lse.stride()[:2], *numbers),
        **flags,
        **config,
        GROUPED=h != k.shape[1],
    )
    config = tiles("attention_bwd_dq", q, flags, window)
    launch(
        attention_bwd_dq_kernel,
        ceil_div(sq, config["BLOCK_M"]) * (b + flags["PACKED"]) * h,
        *(*inputs, lse if dlse is None else dlse, exact, dq),
        *(*at, *dq.stride()[:3], *lse.stride()[:2], *numbers),
        **flags,
        **config,
        WITH_EXACT=need_exact,
        WITH_DLSE=dlse is not None,
    )
    return exact if need_exact else delta, lse2


def bias_gradient(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor,
    lse2: Tensor,
    bias: Tensor,
    numbers: Numbers,
    flags: Flags,
    window: int | None,
) -> Tensor:
    """dbias in float32, of the shape of bias (1 or b, 1 or h, 1 or sq, 1 or sk)."""
    sq, sk = q.shape[2], k.shape[2]
    flags = for_backward(flags, sq)
    count_b, count_h, of_rows, of_columns = bias.shape
    config = tiles("attention_bwd_dq", q, flags, window)
    m_tiles, n_tiles = ceil_div(sq, config["BLOCK_M"]), ceil_div(sk, config["BLOCK_N"])
    dbias = delta.new_empty(bias.shape)
    partial_rows = m_tiles if of_rows == 1 else sq
    partial_columns = n_tiles if of_columns == 1 else sk
    whole = of_rows != 1 and of_columns != 1
    partial = dbias if whole else delta.new_empty((count_b, count_h, partial_rows, partial_columns))
    launch(
        attention_bwd_dbias_kernel,
        count_b * count_h * m_tiles * n_tiles,
        *(dout, q, k, v, delta, lse2, partial),
        *(*dout.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
        *(count_b, count_h, *partial.stride()[1:3], *lse2.stride()[:2]),
        *numbers,
        **flags,
        **config,
        OF_ROWS=of_rows != 1,
        OF_COLUMNS=of_columns != 1,
    )
    if not whole:
        outer = count_b * count_h * (1 if of_rows == 1 else sq)
        inner = 1 if of_columns == 1 else sk
        count = (m_tiles if of_rows == 1 else 1) * (n_tiles if of_columns == 1 else 1)
        launch(
            attention_bwd_dbias_sum_kernel,
            ceil_div(outer * inner, 256),
            *(partial, dbias, outer * inner, count, inner),
            BLOCK=256,
        )
    return dbias
