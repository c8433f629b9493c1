"""scaled_dot_product_attention: torch's function on our kernels, and a window for it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.ops._attention_checks import broadcasts, cast_together, check_qkv, check_scale
from fastgpt.ops._checks import (
    autocast_dtype,
    check_flag,
    check_same_device,
    check_tensor,
    check_window,
)
from fastgpt.ops.attention import run_attention

_NAMES = ("query", "key", "value")


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: int | None = None,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` with a `window`.

    Unlike `attention`, and as torch has it, is_causal aligns the first query with the first key.
    Query i stands at position i: key j is visible to it iff `j <= i` (when is_causal) and
    `|i - j| < window` (when a window is given).

        is_causal, window=None        is_causal, window=2
        sq=3, sk=5                    sq=3, sk=5
        1 0 0 0 0                     1 0 0 0 0
        1 1 0 0 0                     1 1 0 0 0
        1 1 1 0 0                     0 1 1 0 0

    Calls that our kernels do not serve (other ranks than 4, a value dimension other than that of
    query, broadcast batches, attn_mask together with is_causal, dropout_p = 1) go to torch, which
    answers or raises as it does; `fastgpt.explain` names the reason. The dropout mask is drawn
    from torch's seed, but is not the one that torch would draw.

    Args:
        query: (b, h, sq, d), float32, bfloat16, float16 or float64.
        key, value: (b, hk, sk, d), same dtype; hk = h, or with enable_gqa a divisor of h.
        attn_mask: broadcasts to (b, h, sq, sk); bool (True = may be seen), or float32 or the
            dtype of query, added to the scores and differentiable.
        dropout_p: probability of dropping an attention weight, whether training or not.
        is_causal: hide the keys after each query; excludes attn_mask.
        scale: factor on the scores; default d ** -0.5.
        enable_gqa: let groups of query heads share a key head.
        window: number of keys that a query may look back on, its own included; None is dense.

    Returns:
        (b, h, sq, d) in the dtype of query; 0 for a query that sees no key.

    Raises:
        ValueError, TypeError: a windowed call that our kernels do not serve, or window < 1.
        RuntimeError: what torch raises for arguments that it does not take.
    """
    check_window(window)
    check_scale(scale)
    try:
        _check(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
        q, k, v = cast_together(query, key, value, _NAMES)
    except (ValueError, TypeError) as error:
        if window is not None:
            raise
        dispatch.report_fallback("scaled_dot_product_attention", error.args[0])
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    boolean = attn_mask is not None and attn_mask.dtype == torch.bool
    return run_attention(
        q,
        k,
        v,
        causal=is_causal,
        window=window,
        scale=scale,
        query_offset=0,
        mask=attn_mask if boolean else None,
        bias=None if boolean else attn_mask,
        dropout_p=dropout_p,
    )


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> None:
    """ValueError or TypeError for what our kernels do not serve."""
    dense = not isinstance(query, Tensor) or (query.layout is torch.strided and not query.is_nested)
    if not dense:
        raise TypeError(f"query: expected a dense tensor, got one of layout {query.layout}")
    check_qkv(query, key, value, _NAMES)
    check_flag("is_causal", is_causal)
    h, hk = query.shape[1], key.shape[1]
    if h != hk and not enable_gqa:
        raise ValueError(f"key: expected {h} heads as query, or enable_gqa=True, got {hk} heads")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")
    if attn_mask is None:
        return
    check_tensor("attn_mask", attn_mask)
    if type(attn_mask).__module__ == "torch.nn.attention.bias":
        raise TypeError(f"attn_mask: expected elements, got a {type(attn_mask).__name__}")
    check_same_device("attn_mask", attn_mask, "query", query)
    if is_causal:
        raise ValueError("attn_mask: expected None when is_causal is set, got a tensor")
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype, autocast_dtype(query)):
        raise TypeError(
            f"attn_mask: expected dtype bool, float32 or {query.dtype}, got {attn_mask.dtype}"
        )
    full = (*query.shape[:3], key.shape[2])
    if attn_mask.dim() < 2 or not broadcasts(tuple(attn_mask.shape), full):
        raise ValueError(
            f"attn_mask: expected 2 to 4 dimensions that broadcast to (b, h, sq, sk) = {full}, "
            f"got shape {tuple(attn_mask.shape)}"
        )
