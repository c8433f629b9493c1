"""Attention within packed documents: the kernels of `attention`, told where each document lies."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.backends.triton._attention_host import (
    Flags,
    Numbers,
    backward,
    describe,
    forward,
)


def varlen_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    window: int | None,
    need_out_lo: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """q (tq, h, d), k and v (tk, hk, d) -> out (tq, h, d), lse (h, tq) and out_lo."""
    tq, h, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((h, tq), dtype=torch.float32)
    with_lo = need_out_lo and q.dtype != torch.float32
    out_lo = q.new_empty(q.shape if with_lo else (0,))
    numbers, flags = _describe(
        q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, window
    )
    forward(
        _as_batch(q),
        _as_batch(k),
        _as_batch(v),
        _as_batch(out),
        _as_batch(out_lo) if with_lo else out_lo,
        lse[None],
        numbers,
        flags,
        window,
    )
    return out, lse, out_lo


def varlen_attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    out_lo: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (tq, h, d), dk and dv (tk, hk, d)."""
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    numbers, flags = _describe(
        q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, window
    )
    backward(
        _as_batch(dout),
        None if dlse is None else dlse[None],
        _as_batch(q),
        _as_batch(k),
        _as_batch(v),
        _as_batch(out),
        lse[None],
        _as_batch(out_lo) if out_lo.numel() else out_lo,
        _as_batch(dq),
        _as_batch(dk),
        _as_batch(dv),
        numbers,
        flags,
        window,
    )
    return dq, dk, dv


def _describe(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    window: int | None,
) -> tuple[Numbers, Flags]:
    return describe(
        _as_batch(q),
        _as_batch(k),
        b=cu_seqlens_q.shape[0] - 1,
        # At least one tile, for the tokens that no document has.
        sq=max(max_seqlen_q, 1),
        sk=max(max_seqlen_k, 1),
        scale=scale,
        causal=causal,
        window=window,
        offset=0,
        cu_seqlens=(cu_seqlens_q, cu_seqlens_k),
    )


def _as_batch(x: Tensor) -> Tensor:
    """(t, h, d) seen as (1, h, t, d)."""
    return x.transpose(0, 1)[None]
