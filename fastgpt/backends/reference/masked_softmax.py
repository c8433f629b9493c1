"""softmax(scale * scores) over the visible band of each (sq, sk) matrix; hidden entries are 0.

Query i sits at position i' = i + sk - sq and sees key j iff (j <= i' when causal) and
|i' - j| < window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.ops._checks import statistics_dtype


def masked_softmax_fwd(
    scores: Tensor, scale: float, causal: bool, window: int | None, float_out: bool
) -> Tensor:
    """scores (r, sq, sk) -> y (r, sq, sk), in float32 if asked; a row that sees nothing is 0."""
    visible = _visible(scores, causal, window)
    z = torch.where(visible, scores.to(statistics_dtype(scores)) * scale, -torch.inf)
    # Rows of zero width have no maximum, so the softmax keeps one hidden column of its own.
    z = torch.nn.functional.pad(z, (0, 1), value=-torch.inf)
    top = z.detach().amax(-1, keepdim=True)
    e = torch.exp(z - torch.where(top == -torch.inf, 0.0, top))[..., :-1]
    total = e.sum(-1, keepdim=True)
    y = e / torch.where(total == 0, 1.0, total)
    # 0 already; so that the gradient of a hidden entry, NaN included, is not read.
    return torch.where(visible, y, 0.0).to(torch.float32 if float_out else scores.dtype)


def masked_softmax_bwd(
    dy: Tensor,
    y: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    in_dtype: torch.dtype,
) -> Tensor:
    """dscores = scale * y * (dy - sum(dy * y)) over the band, 0 elsewhere."""
    wide = statistics_dtype(y)
    visible = _visible(y, causal, window)
    dy, y = torch.where(visible, dy.to(wide), 0.0), torch.where(visible, y.to(wide), 0.0)
    return (scale * y * (dy - (dy * y).sum(-1, keepdim=True))).to(in_dtype)


def _visible(scores: Tensor, causal: bool, window: int | None) -> Tensor:
    sq, sk = scores.shape[-2:]
    position = torch.arange(sq, device=scores.device)[:, None] + (sk - sq)
    key = torch.arange(sk, device=scores.device)
    visible = key <= position if causal else torch.ones_like(key <= position)
    if window is not None:
        visible = visible & ((position - key).abs() < window)
    return visible
