"""Queries that see no key, as those on left padding, the way a model's eager attention treats them.

Eager attention adds the least float to hidden scores. Where all of a query's are hidden they become
equal, the softmax uniform, and the gradient goes through scores that the forward did not read. The
loss of a left-padded batch depends on it: the last padding token predicts the first visible one.
Our kernels give such a query 0, as torch's SDPA does, so that its row is filled in here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def blind_queries(padding: Tensor, sq: int, window: int | None) -> Tensor:
    """Which of the last sq queries of (b, n) keys see none of them, causally: bool (b, sq)."""
    n = padding.shape[1]
    seen = padding.cumsum(-1)
    if window is not None:
        seen = seen - torch.nn.functional.pad(seen, (window, 0))[:, :n]
    return seen[:, n - sq :] == 0


def attend_blindly(q: Tensor, k: Tensor, v: Tensor, scale: float, rows: Tensor | None) -> Tensor:
    """Attention whose scores are all equal, differentiated as if they were q k^T * scale.

    Args:
        q: (b, h, r, d).
        k, v: (b, hk, s, d).
        scale: factor on the scores.
        rows: bool (r, s), which keys each query averages; None is all, without ever holding (r, s).

    Returns:
        (b, h, r, d) in the dtype of v.
    """
    repeats = q.shape[1] // k.shape[1]
    q, k, v_ = q.float(), *(x.float().repeat_interleave(repeats, 1) for x in (k, v))
    if rows is not None:
        scores = q @ k.transpose(-1, -2) * scale
        level = torch.zeros((), device=q.device).masked_fill(~rows, float("-inf"))
        return ((scores - scores.detach() + level).softmax(-1) @ v_).to(v.dtype)
    mean = v_.mean(2, keepdim=True)
    # The scores' gradient is (1 / s) dout . (v_j - mean), so that of q and k needs one (d, d) sum.
    moment = k.transpose(-1, -2) @ (v_ - mean).detach() / k.shape[2]
    first_order = q @ moment * scale
    return (mean + (first_order - first_order.detach())).to(v.dtype)
