"""The attention formula that dense, packed and cached attention share.

    s = scale * q k^T + bias        P = exp(s - lse)        lse = log(sum_j exp(s_j))
    out = (P * keep / (1 - p)) v

    delta = rowsum(dout * out) - dlse
    dS = P * (dout v^T * keep / (1 - p) - delta)
    dq = scale * dS k        dk = scale * dS^T q        dv = (P * keep / (1 - p))^T dout

Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; the backward as in Dao et al. 2022,
https://arxiv.org/abs/2205.14135.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.backends.reference._band import zero_hidden, zero_where_not
from fastgpt.ops._checks import without_autocast


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    seen: Tensor | None,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q (b, h, sq, d), k and v (b, hk, sk, d) -> out (b, h, sq, d) and lse (b, h, sq).

    All in the dtype to compute in. `seen` (bool) and `bias` broadcast to (b, h, sq, sk); `keep`
    is the dropout mask, already divided by 1 - p. Differentiable; a row that sees no key gives 0
    and -inf with zero gradients.
    """
    k, v = _per_query_head(k, q), _per_query_head(v, q)
    with without_autocast(q):
        q, k, v = zero_hidden(q, k, v, seen)
        scores = _scores(q, k, scale, seen, bias)
        if k.shape[2]:
            peak = scores.detach().amax(-1, keepdim=True)
        else:
            peak = scores.new_full((*scores.shape[:3], 1), -torch.inf)
        empty = peak == -torch.inf
        weights = (scores - torch.where(empty, 0.0, peak)).exp()
        total = weights.sum(-1, keepdim=True) + empty
        weights = weights / total
        if seen is not None:  # what may overflow, the gradient of a hidden key, is not read
            weights = zero_where_not(seen, weights)
        lse = torch.where(empty, -torch.inf, peak + total.log()).squeeze(-1)
        # 0 already where a row is empty; so that its gradient, NaN included, is not read.
        out = zero_where_not(~empty, (weights if keep is None else weights * keep) @ v)
    return out, lse


def attend_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    seen: Tensor | None,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dscores), dk and dv summed over the query heads that share a key head.

    `out` is the output before its rounding. dscores (b, h, sq, sk) is the gradient of the biased
    scores.
    """
    hk = k.shape[1]
    k, v = _per_query_head(k, q), _per_query_head(v, q)
    with without_autocast(q):
        q, k, v = zero_hidden(q, k, v, seen)
        empty = (lse == -torch.inf)[..., None]
        dout = zero_where_not(~empty, dout)
        delta = (dout * out).sum(-1, keepdim=True)
        if dlse is not None:
            delta = delta - zero_where_not(~empty, dlse[..., None])
        scores = _scores(q, k, scale, seen, bias)
        weights = (scores - torch.where(empty, 0.0, lse[..., None])).exp()
        dweights = dout @ v.mT
        kept = weights
        if keep is not None:
            dweights, kept = dweights * keep, weights * keep
        dscores = weights * (dweights - delta)
        if seen is not None:
            dscores = zero_where_not(seen, dscores)
        dq = scale * (dscores @ k)
        dk = scale * (dscores.mT @ q)
        dv = kept.mT @ dout
    return dq, _per_key_head(dk, hk), _per_key_head(dv, hk), dscores


def _scores(q: Tensor, k: Tensor, scale: float, seen: Tensor | None, bias: Tensor | None) -> Tensor:
    scores = scale * (q @ k.mT)  # (b, h, sq, d) x (b, h, d, sk) -> (b, h, sq, sk)
    if bias is not None:
        scores = scores + bias
    return scores if seen is None else torch.where(seen, scores, -torch.inf)


def _per_query_head(x: Tensor, q: Tensor) -> Tensor:
    """(b, hk, sk, d) -> (b, h, sk, d): query head i reads key head i / (h / hk)."""
    h, hk = q.shape[1], x.shape[1]
    return x if h == hk else x.repeat_interleave(h // hk, dim=1)


def _per_key_head(dx: Tensor, hk: int) -> Tensor:
    return dx if dx.shape[1] == hk else dx.unflatten(1, (hk, -1)).sum(2)


def token_major(x: Tensor) -> Tensor:
    """The same (b, h, s, d) values stored as (b, s, h, d)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def rounding_error(wide: Tensor, rounded: Tensor, need: bool) -> Tensor:
    """What rounding `wide` lost, in the dtype of `rounded`; empty if not needed or nothing is."""
    if not need or wide.dtype == rounded.dtype:
        return rounded.new_empty(0)
    return (wide - rounded.to(wide.dtype)).to(rounded.dtype)


def unrounded(rounded: Tensor, error: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `rounding_error`."""
    wide = rounded.to(dtype)
    return wide + error.to(dtype) if error.numel() else wide
