"""attention: dense or banded, grouped heads, padding, bias, ALiBi, dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.backends.reference import attention as reference
from fastgpt.ops._attention_checks import (
    broadcasts,
    cast_together,
    check_qkv,
    check_scale,
    empty_token_major,
)
from fastgpt.ops._autograd import needs_grad, once, record, without_grad
from fastgpt.ops._checks import (
    check_flag,
    check_float,
    check_same_device,
    check_shape,
    check_tensor,
    check_window,
    statistics_dtype,
)
from fastgpt.ops._library import define
from fastgpt.ops._rows import unit_stride


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Softmax attention, dense or within a band, without ever holding the (sq, sk) scores.

    Query i stands at position `i' = i + sk - sq`, so the last query is aligned with the last key.
    Key j is visible to it iff `j <= i'` (when causal) and `|i' - j| < window` (when a window is
    given): the window is the number of keys that a query may look back on, its own included.

        causal, window=None           causal, window=2          causal=False, window=2
        sq=3, sk=5                    sq=3, sk=5                sq=3, sk=5
        1 1 1 0 0                     0 1 1 0 0                 0 1 1 1 0
        1 1 1 1 0                     0 0 1 1 0                 0 0 1 1 1
        1 1 1 1 1                     0 0 0 1 1                 0 0 0 1 1

    `window=1` sees itself alone, `window >= max(sq, sk)` is dense. A query that sees no key gives
    output 0, lse -inf and zero gradients, and what padded keys hold, NaN included, never leaks.

    Args:
        q: (b, h, sq, d), float32, bfloat16 or float16 with d <= 256 (float64 and larger d run on
            the reference backend). Under autocast q, k and v are cast to its dtype.
        k, v: (b, hk, sk, d) of the same dtype and device; h is a multiple of hk, and query head i
            reads key head `i // (h // hk)` (grouped and multi-query attention).
        causal: hide the keys after each query.
        window: width of the band, at least 1; None is dense.
        scale: factor on q k^T; default d ** -0.5.
        key_padding_mask: (b, sk) bool, True where a key may be seen; any pattern.
        bias: added to the scaled scores; a float dtype, broadcasting to (b, h, sq, sk); -inf
            hides. Differentiable; pass it unexpanded, and its gradient is summed over the
            broadcast axes in a fixed order. A finite number as low as -1e7 on *every* key of a
            query leaves no digits of its log-sum-exp for the scores: the output is right, its
            gradient is not (below -1e30 it is 0).
        alibi_slopes: (h,) or (b, h) float; adds `-slope * |i' - j|` to the scores. No gradient.
        dropout_p: probability in [0, 1) of dropping an attention weight (Philox-4x32-10 of the
            seed, row and column: the same mask on every backend).
        dropout_seed: int64 tensor of one element on the device of q; drawn from torch's generator
            when not given.
        return_lse: also return the log-sum-exp of each query's scores.

    Returns:
        (b, h, sq, d) in the dtype of q, stored as (b, sq, h, d), so that merging the heads is a
        view. With `return_lse` also (b, h, sq) float32, differentiable.

    Raises:
        ValueError: a rank, shape, head count, device, window, dropout_p or seed is not as above,
            or alibi_slopes requires a gradient.
        TypeError: a dtype is not as above, or q, k and v have several.

    Sources: Brown et al. 2020 (https://arxiv.org/abs/2005.14165) alternate dense and locally banded
    layers after Child et al. 2019 (https://arxiv.org/abs/1904.10509); the algorithm is that of Dao
    et al. 2022 (https://arxiv.org/abs/2205.14135) and Dao 2023 (https://arxiv.org/abs/2307.08691).
    """
    check_qkv(q, k, v)
    q, k, v = cast_together(q, k, v)
    check_flag("causal", causal)
    check_window(window)
    check_scale(scale)
    check_flag("return_lse", return_lse)
    if key_padding_mask is not None:
        _check_key_padding_mask(key_padding_mask, q, k)
    if bias is not None:
        _check_bias(bias, q, k)
    if alibi_slopes is not None:
        _check_alibi_slopes(alibi_slopes, q)
    _check_dropout(dropout_p, dropout_seed, q)
    return run_attention(
        q,
        k,
        v,
        causal=causal,
        window=window,
        scale=scale,
        query_offset=k.shape[2] - q.shape[2],
        key_padding_mask=key_padding_mask,
        bias=bias,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        return_lse=return_lse,
    )


def run_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None,
    scale: float | None,
    query_offset: int,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """`attention` on checked arguments, with what only callers inside fastgpt use.

    Query i stands at `i' = i + query_offset`; `mask` is bool, True = may be seen, broadcasting
    to (b, h, sq, sk).
    """
    if mask is not None:
        mask, key_padding_mask = _split_mask(_unexpanded(_four_dims(mask)), key_padding_mask, k)
    backend = dispatch.pick(
        "attention",
        q,
        head_dim=q.shape[3],
        causal=causal,
        window=window,
        padding=key_padding_mask is not None,
        bias=bias is not None,
        mask=mask is not None,
        alibi=alibi_slopes is not None,
        dropout=dropout_p > 0.0,
        negative_scale=scale is not None and scale <= 0.0,
    )
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if bias is not None:
        bias = _prepare_bias(bias, q)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.to(statistics_dtype(q)).contiguous()
    if dropout_p == 0.0:
        dropout_seed = None
    elif dropout_seed is None:
        dropout_seed = torch.randint(2**63 - 1, (), device=q.device)
    if backend != "reference" and needs_grad(q, k, v, bias):
        return record(
            _Attention,
            backend,
            q,
            k,
            v,
            bias,
            key_padding_mask,
            mask,
            alibi_slopes,
            dropout_seed,
            scale,
            causal,
            window,
            query_offset,
            dropout_p,
            return_lse,
        )
    run = reference.attention_fwd
    if backend != "reference":
        run = dispatch.kernel("attention", backend, "attention_fwd")
    out, lse, _ = run(
        q,
        k,
        v,
        scale,
        causal,
        window,
        query_offset,
        key_padding_mask,
        bias,
        mask,
        alibi_slopes,
        dropout_p,
        dropout_seed,
        False,
    )
    return (out, lse) if return_lse else out


def _check_key_padding_mask(mask: Tensor, q: Tensor, k: Tensor) -> None:
    check_tensor("key_padding_mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(
            "key_padding_mask: expected dtype bool (True = may be seen; mask.bool() converts), "
            f"got {mask.dtype}"
        )
    check_shape("key_padding_mask", mask, (k.shape[0], k.shape[2]), "(b, sk)")
    check_same_device("key_padding_mask", mask, "q", q)


def _check_bias(bias: Tensor, q: Tensor, k: Tensor) -> None:
    check_float("bias", bias)
    check_same_device("bias", bias, "q", q)
    full = (*q.shape[:3], k.shape[2])
    if not broadcasts(tuple(bias.shape), full):
        raise ValueError(
            f"bias: expected a shape that broadcasts to (b, h, sq, sk) = {full}, "
            f"got {tuple(bias.shape)}"
        )


def _check_alibi_slopes(slopes: Tensor, q: Tensor) -> None:
    check_float("alibi_slopes", slopes)
    b, h = q.shape[:2]
    shape = tuple(slopes.shape)
    if shape != (h,) and shape != (b, h):
        raise ValueError(
            f"alibi_slopes: expected shape (h,) = {(h,)} or (b, h) = {(b, h)}, got {shape}"
        )
    check_same_device("alibi_slopes", slopes, "q", q)
    if needs_grad(slopes):
        raise ValueError(
            "alibi_slopes: expected a tensor that requires no gradient, as none is computed for "
            "it, got requires_grad=True; pass alibi_slopes.detach(), or learn the positions "
            "through `bias`, which is differentiable"
        )


def _check_dropout(p: float, seed: Tensor | None, q: Tensor) -> None:
    if not isinstance(p, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"dropout_p: expected a float, got {type(p).__name__}")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {p}")
    if seed is None:
        return
    check_tensor("dropout_seed", seed)
    if seed.dtype != torch.int64:
        raise TypeError(f"dropout_seed: expected dtype int64, got {seed.dtype}")
    if seed.numel() != 1:
        raise ValueError(f"dropout_seed: expected one element, got shape {tuple(seed.shape)}")
    check_same_device("dropout_seed", seed, "q", q)


def _four_dims(x: Tensor) -> Tensor:
    return x[(None,) * (4 - x.dim())] if x.dim() < 4 else x


def _unexpanded(x: Tensor) -> Tensor:
    """x with every dimension that `expand` made (stride 0) narrowed to size 1."""
    for dim in range(x.dim()):
        if x.stride(dim) == 0 and x.shape[dim] > 1:
            x = x.narrow(dim, 0, 1)
    return x


def _split_mask(
    mask: Tensor, key_padding_mask: Tensor | None, k: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """(mask, key_padding_mask): a mask that only depends on batch and key is a padding mask."""
    if mask.shape[1] != 1 or mask.shape[2] != 1:
        return mask, key_padding_mask
    padding = mask[:, 0, 0, :].expand(k.shape[0], k.shape[2])
    return None, padding if key_padding_mask is None else padding & key_padding_mask


def _prepare_bias(bias: Tensor, q: Tensor) -> Tensor:
    bias = _four_dims(bias)
    if bias.dtype == torch.float64 and q.dtype != torch.float64:
        bias = bias.float()
    # The gradient of an expanded tensor has its full shape; autograd sums it afterwards.
    return bias if needs_grad(bias) else _unexpanded(bias)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        key_padding_mask: Tensor | None,
        mask: Tensor | None,
        alibi_slopes: Tensor | None,
        dropout_seed: Tensor | None,
        scale: float,
        causal: bool,
        window: int | None,
        query_offset: int,
        dropout_p: float,
        return_lse: bool,
    ) -> Any:
        run = dispatch.kernel("attention", backend, "attention_fwd")
        out, lse, out_lo = run(
            q,
            k,
            v,
            scale,
            causal,
            window,
            query_offset,
            key_padding_mask,
            bias,
            mask,
            alibi_slopes,
            dropout_p,
            dropout_seed,
            q.dtype != torch.float32,
        )
        ctx.save_for_backward(
            q, k, v, out, lse, out_lo, key_padding_mask, bias, mask, alibi_slopes, dropout_seed
        )
        ctx.backend = backend
        ctx.options = (scale, causal, window, query_offset)
        ctx.dropout_p = dropout_p
        ctx.set_materialize_grads(False)
        return (out, lse) if return_lse else out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None) -> Any:
        q, k, v, out, lse, out_lo, padding, bias, mask, slopes, seed = ctx.saved_tensors
        need_dbias = ctx.needs_input_grad[4]
        run = dispatch.kernel("attention", ctx.backend, "attention_bwd")
        with without_grad():
            dq, dk, dv, dbias = run(
                torch.zeros_like(out) if dout is None else unit_stride(dout),
                None if dlse is None else dlse.contiguous(),
                q,
                k,
                v,
                out,
                lse,
                out_lo,
                *ctx.options,
                padding,
                bias,
                mask,
                slopes,
                ctx.dropout_p,
                seed,
                need_dbias,
            )
            dbias = dbias.to(bias.dtype) if need_dbias else None
        sources = (dout, dlse, q, k, v, bias)
        return None, *once("attention", sources, dq, dk, dv, dbias), *(None,) * 10


def _attention_fwd_fake(
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
    out = empty_token_major(q, *q.shape)
    lse = q.new_empty(q.shape[:3], dtype=statistics_dtype(q))
    with_lo = need_out_lo and q.dtype != lse.dtype
    return out, lse, empty_token_major(q, *q.shape) if with_lo else q.new_empty(0)


def _attention_bwd_fake(
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
    return (
        empty_token_major(q, *q.shape),
        empty_token_major(k, *k.shape),
        empty_token_major(v, *v.shape),
        lse.new_empty(bias.shape if need_dbias and bias is not None else (0,)),
    )


_INPUTS = (
    "float scale, bool causal, SymInt? window, SymInt query_offset, Tensor? key_padding_mask, "
    "Tensor? bias, Tensor? mask, Tensor? alibi_slopes, float dropout_p, Tensor? dropout_seed, "
)
define(
    "attention_fwd",
    f"(Tensor q, Tensor k, Tensor v, {_INPUTS}bool need_out_lo)"
    " -> (Tensor out, Tensor lse, Tensor out_lo)",
    _attention_fwd_fake,
)
define(
    "attention_bwd",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"Tensor out_lo, {_INPUTS}bool need_dbias) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
    _attention_bwd_fake,
)
