"""varlen_attention: attention within each of several documents packed without padding."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.backends.reference import varlen_attention as reference
from fastgpt.ops._attention_checks import cast_together, check_heads, check_scale
from fastgpt.ops._autograd import needs_grad, once, record, without_grad
from fastgpt.ops._checks import (
    check_flag,
    check_rank,
    check_same_device,
    check_shape,
    check_window,
    host_checks,
    statistics_dtype,
)
from fastgpt.ops._library import define
from fastgpt.ops._rows import unit_stride


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """`attention` within each document of a packed sequence; no token sees another document.

    Document n has the queries `cu_seqlens_q[n]` up to `cu_seqlens_q[n + 1]`, and its keys
    likewise. Within it, query i of sq stands at `i' = i + sk - sq`, and key j is visible to it iff
    `j <= i'` (when causal) and `|i' - j| < window` (when a window is given).

        cu_seqlens_q = cu_seqlens_k = [0, 2, 5], causal, window=2
        1 0 . . .
        1 1 . . .
        . . 1 0 0
        . . 1 1 0
        . . 0 1 1

    Tokens after the last offset belong to no document: their output is 0 and their lse -inf.

    Args:
        q: (tq, h, d), float32, bfloat16 or float16 with d <= 256 (float64 and larger d run on the
            reference backend). Under autocast q, k and v are cast to its dtype.
        k, v: (tk, hk, d) of the same dtype and device; h is a multiple of hk.
        cu_seqlens_q, cu_seqlens_k: (n + 1,) int32 on the same device; from 0, not decreasing, at
            most tq or tk.
        max_seqlen_q, max_seqlen_k: at least the length of the longest document.
        causal, window, scale: as for `attention`.
        return_lse: also return the log-sum-exp of each query's scores.

    Returns:
        (tq, h, d) in the dtype of q. With `return_lse` also (h, tq) float32, differentiable.

    Raises:
        ValueError: a rank, shape, head count, device or window is not as above; on CPUs (on GPUs
            with FASTGPT_CHECK=1) also what the offsets hold.
        TypeError: a dtype is not as above, or q, k and v have several.

    Sources: Dao 2023, https://arxiv.org/abs/2307.08691; the band as in Child et al. 2019,
    https://arxiv.org/abs/1904.10509.
    """
    check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    q, k, v = cast_together(q, k, v)
    check_flag("causal", causal)
    check_window(window)
    check_scale(scale)
    check_flag("return_lse", return_lse)
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    backend = dispatch.pick(
        "varlen_attention", q, head_dim=q.shape[2], causal=causal, window=window
    )
    check_offsets_on_host(backend, q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    options = (max_seqlen_q, max_seqlen_k, scale, causal, window)
    if backend != "reference" and needs_grad(q, k, v):
        tensors = (q, k, v, cu_seqlens_q, cu_seqlens_k)
        return record(_VarlenAttention, backend, *tensors, *options, return_lse)
    run = reference.varlen_attention_fwd
    if backend != "reference":
        run = dispatch.kernel("varlen_attention", backend, "varlen_attention_fwd")
    out, lse, _ = run(q, k, v, cu_seqlens_q, cu_seqlens_k, *options, False)
    return (out, lse) if return_lse else out


def check_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> None:
    """Check the shapes of q (tq, h, d), k and v (tk, hk, d), their offsets and longest lengths."""
    check_rank("q", q, 3, "(tq, h, d)")
    check_rank("k", k, 3, "(tk, hk, d)")
    check_shape("k", k, (*k.shape[:2], q.shape[2]), "(tk, hk, d) with d of q")
    check_shape("v", v, tuple(k.shape), "that of k, (tk, hk, d)")
    check_heads(q.shape[1], k.shape[1], q.shape[2])
    _check_offsets("cu_seqlens_q", cu_seqlens_q, q)
    _check_offsets("cu_seqlens_k", cu_seqlens_k, q)
    check_shape("cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape), "that of cu_seqlens_q")
    _check_longest("max_seqlen_q", max_seqlen_q)
    _check_longest("max_seqlen_k", max_seqlen_k)


def _check_offsets(name: str, offsets: Tensor, q: Tensor) -> None:
    check_rank(name, offsets, 1, "(n + 1,)")
    if offsets.dtype != torch.int32:
        raise TypeError(f"{name}: expected dtype int32, got {offsets.dtype}")
    if offsets.shape[0] < 1:
        raise ValueError(f"{name}: expected shape (n + 1,), got {tuple(offsets.shape)}")
    check_same_device(name, offsets, "q", q)


def _check_longest(name: str, longest: int) -> None:
    if isinstance(longest, bool) or not isinstance(longest, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(longest).__name__}")
    if longest < 0:
        raise ValueError(f"{name}: expected an int of at least 0, got {longest}")


def check_offsets_on_host(
    backend: str,
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> None:
    """Check what the offsets hold, where Python must (see `host_checks`)."""
    if host_checks(backend, cu_seqlens_q):
        _check_contents("cu_seqlens_q", cu_seqlens_q, q.shape[0], "max_seqlen_q", max_seqlen_q)
        _check_contents("cu_seqlens_k", cu_seqlens_k, k.shape[0], "max_seqlen_k", max_seqlen_k)


def _check_contents(
    name: str, offsets: Tensor, total: int, longest_name: str, longest: int
) -> None:
    """ValueError unless offsets rise from 0 to at most `total` by steps of at most `longest`."""
    values = offsets.tolist()
    if values[0] != 0:
        raise ValueError(f"{name}[0]: expected 0, got {values[0]}")
    for i, (before, value) in enumerate(pairwise(values), start=1):
        if not before <= value <= total:
            raise ValueError(f"{name}[{i}]: expected from {before} to {total}, got {value}")
        if value - before > longest:
            raise ValueError(
                f"{name}[{i}]: expected at most {before + longest}, as {longest_name} is "
                f"{longest}, got {value}"
            )


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
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
        return_lse: bool,
    ) -> Any:
        options = (max_seqlen_q, max_seqlen_k, scale, causal, window)
        run = dispatch.kernel("varlen_attention", backend, "varlen_attention_fwd")
        need_out_lo = q.dtype != torch.float32
        out, lse, out_lo = run(q, k, v, cu_seqlens_q, cu_seqlens_k, *options, need_out_lo)
        ctx.save_for_backward(q, k, v, out, lse, out_lo, cu_seqlens_q, cu_seqlens_k)
        ctx.backend = backend
        ctx.options = options
        ctx.set_materialize_grads(False)
        return (out, lse) if return_lse else out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None) -> Any:
        saved = ctx.saved_tensors
        out = saved[3]
        run = dispatch.kernel("varlen_attention", ctx.backend, "varlen_attention_bwd")
        with without_grad():
            grads = run(
                torch.zeros_like(out) if dout is None else unit_stride(dout),
                None if dlse is None else dlse.contiguous(),
                *saved,
                *ctx.options,
            )
        return None, *once("varlen_attention", (dout, dlse, *saved), *grads), *(None,) * 8


def _varlen_attention_fwd_fake(
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
    tq, h, _ = q.shape
    lse = q.new_empty((h, tq), dtype=statistics_dtype(q))
    with_lo = need_out_lo and q.dtype != lse.dtype
    return q.new_empty(q.shape), lse, q.new_empty(q.shape if with_lo else (0,))


def _varlen_attention_bwd_fake(
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
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_INPUTS = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "float scale, bool causal, SymInt? window"
)
define(
    "varlen_attention_fwd",
    f"(Tensor q, Tensor k, Tensor v, {_INPUTS}, bool need_out_lo)"
    " -> (Tensor out, Tensor lse, Tensor out_lo)",
    _varlen_attention_fwd_fake,
)
define(
    "varlen_attention_bwd",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"Tensor out_lo, {_INPUTS}) -> (Tensor dq, Tensor dk, Tensor dv)",
    _varlen_attention_bwd_fake,
)
