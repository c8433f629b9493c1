"""Attention in plain torch, whole matrices at a time: what the attention ops are tested against.

Independent of the package: the mask comes from the definition of the window, the rest from
matmul and softmax in the dtype of the inputs, as one would write it without a kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor


def band(
    sq: int, sk: int, causal: bool, window: int | None, query_offset: int | None = None
) -> Tensor:
    """(sq, sk), True where query i, at i' = i + sk - sq (or + query_offset), sees key j."""
    i = torch.arange(sq)[:, None] + (sk - sq if query_offset is None else query_offset)
    j = torch.arange(sk)[None, :]
    seen = torch.ones(sq, sk, dtype=torch.bool)
    if causal:
        seen &= j <= i
    if window is not None:
        seen &= (i - j).abs() < window
    return seen


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    scale: float | None = None,
    added: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out (b, h, sq, d), lse (b, h, sq), p (b, h, sq, sk) of q (b, h, sq, d), k, v (b, hk, sk, d).

    `seen` (bool), `added` to the scores, and `kept` (dropout's factor on p) broadcast to p.
    Rows that see no key have p = 0 and lse = -inf.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q @ k.transpose(-1, -2)) * scale
    if added is not None:
        scores = scores + added.to(scores.dtype)
        seen = seen & (added > float("-inf"))
    seen = seen.expand(scores.shape)
    some = seen.any(-1, keepdim=True)
    if scores.shape[-1] == 0:
        lse = scores.new_full(scores.shape[:-1], float("-inf"))
        return q * 0 + (scores @ v), lse + 0 * q.sum(-1), scores
    scores = scores.masked_fill(~seen, float("-inf")).masked_fill(~some, 0.0)
    p = torch.softmax(scores, -1) * some
    lse = torch.logsumexp(scores, -1).masked_fill(~some[..., 0], float("-inf"))
    return (p if kept is None else p * kept.to(p.dtype)) @ v, lse, p
