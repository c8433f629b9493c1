"""Attention of (b, h, s, d) tensors, by the kernels of `_attention_fwd.py`, `_attention_bwd.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.backends.triton._attention_host import backward, bias_gradient, describe, forward
from fastgpt.ops._attention_checks import empty_token_major


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
    out = empty_token_major(q, *q.shape)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    with_lo = need_out_lo and q.dtype != torch.float32
    out_lo = empty_token_major(q, *q.shape) if with_lo else q.new_empty(0)
    numbers, flags = describe(
        q,
        k,
        b=q.shape[0],
        sq=q.shape[2],
        sk=k.shape[2],
        scale=scale,
        causal=causal,
        window=window,
        offset=query_offset,
        key_padding_mask=key_padding_mask,
        bias=bias,
        mask=mask,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
    )
    forward(q, k, v, out, out_lo, lse, numbers, flags, window)
    return out, lse, out_lo


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
    dq = empty_token_major(q, *q.shape)
    dk, dv = empty_token_major(k, *k.shape), empty_token_major(v, *v.shape)
    numbers, flags = describe(
        q,
        k,
        b=q.shape[0],
        sq=q.shape[2],
        sk=k.shape[2],
        scale=scale,
        causal=causal,
        window=window,
        offset=query_offset,
        key_padding_mask=key_padding_mask,
        bias=bias,
        mask=mask,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
    )
    need_dbias = need_dbias and bias is not None
    delta, lse2 = backward(
        dout, dlse, q, k, v, out, lse, out_lo, dq, dk, dv, numbers, flags, window, need_dbias
    )
    if need_dbias and bias is not None:
        dbias = bias_gradient(dout, q, k, v, delta, lse2, bias, numbers, flags, window)
    else:
        dbias = lse.new_empty(0)
    return dq, dk, dv, dbias
