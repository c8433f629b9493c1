"""out = softmax(scale * q k^T + bias - slope * |i' - j|, band) v, the whole score matrix at once.

Key j is visible to query i' = i + query_offset iff (j <= i' when causal) and |i' - j| < window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.backends.reference._attend import (
    attend,
    attend_bwd,
    rounding_error,
    token_major,
    unrounded,
)
from fastgpt.backends.reference._band import visible
from fastgpt.backends.reference._philox import dropout_keep
from fastgpt.ops._checks import statistics_dtype


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    query_offset: int,
    key_padding_mask: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    need_out_lo: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """q (b, h, sq, d), k, v (b, hk, sk, d) -> out (b, h, sq, d), lse (b, h, sq) and out_lo."""
    wide = statistics_dtype(q)
    seen, biases = _masks(
        q, k, causal, window, query_offset, key_padding_mask, bias, mask, alibi_slopes
    )
    keep = _keep(q, k, dropout_p, dropout_seed)
    out_wide, lse = attend(q.to(wide), k.to(wide), v.to(wide), scale, seen, biases, keep)
    out_wide = token_major(out_wide)
    out = out_wide.to(q.dtype)
    return out, lse, rounding_error(out_wide, out, need_out_lo)


def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    out_lo: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    query_offset: int,
    key_padding_mask: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq like q, dk and dv like k and v; dbias of the shape of bias, or empty."""
    wide = statistics_dtype(q)
    seen, biases = _masks(
        q, k, causal, window, query_offset, key_padding_mask, bias, mask, alibi_slopes
    )
    keep = _keep(q, k, dropout_p, dropout_seed)
    dq, dk, dv, dscores = attend_bwd(
        dout.to(wide),
        dlse,
        q.to(wide),
        k.to(wide),
        v.to(wide),
        unrounded(out, out_lo, wide),
        lse,
        scale,
        seen,
        biases,
        keep,
    )
    if need_dbias and bias is not None:
        dbias = dscores.sum_to_size(bias.shape)
    else:
        dbias = dscores.new_empty(0)
    return (
        token_major(dq.to(q.dtype)),
        token_major(dk.to(k.dtype)),
        token_major(dv.to(v.dtype)),
        dbias,
    )


def _masks(
    q: Tensor,
    k: Tensor,
    causal: bool,
    window: int | None,
    query_offset: int,
    key_padding_mask: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """What is visible and what is added to the scores, both broadcasting to (b, h, sq, sk)."""
    wide = statistics_dtype(q)
    rows = torch.arange(q.shape[2], device=q.device).view(1, 1, -1, 1) + query_offset
    columns = torch.arange(k.shape[2], device=q.device).view(1, 1, 1, -1)
    padding = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
    seen = visible(rows, columns, causal, window, padding, mask)
    biases = None if bias is None else bias.to(wide)
    if alibi_slopes is not None:
        alibi = -alibi_slopes.to(wide)[..., None, None] * (rows - columns).abs()
        biases = alibi if biases is None else biases + alibi
    return seen, biases


def _keep(q: Tensor, k: Tensor, dropout_p: float, dropout_seed: Tensor | None) -> Tensor | None:
    """The dropout mask divided by 1 - p; None without dropout."""
    if dropout_p == 0.0 or dropout_seed is None:
        return None
    b, h, sq, sk = *q.shape[:3], k.shape[2]
    keep = dropout_keep(dropout_seed, b, h, sq, sk, dropout_p)
    return keep.to(statistics_dtype(q)) / (1.0 - dropout_p)
