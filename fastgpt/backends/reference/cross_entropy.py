"""loss_i = (1 - e) w_t (lse_i - x_it) + e / v * sum_j w_j (lse_i - x_ij), with t the target of row
i, e the label smoothing and w the class weights; the mean divides by the sum of w_t.

Rows whose target is ignore_index are not read: their loss, lse and gradient are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.ops._checks import statistics_dtype
from fastgpt.ops._losses import check_classes

NONE, MEAN, SUM = 0, 1, 2


def cross_entropy_fwd(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (r, v), target (r,) -> loss (r,) or (), lse (r,) float64 and the sum of w_t ()."""
    kept, safe = _targets(target, x.shape[1], ignore_index)
    wide = torch.where(kept[:, None], x.to(statistics_dtype(x)), 0.0)
    lse = torch.logsumexp(wide.double(), -1)
    surprise = -torch.log_softmax(wide, -1)  # lse - wide would lose the digits of large logits
    loss = surprise.gather(1, safe[:, None])[:, 0]
    row_weight = kept.to(wide.dtype)
    if weight is not None:
        row_weight = row_weight * weight.to(wide.dtype)[safe]
        loss = loss * weight.to(wide.dtype)[safe]
    if label_smoothing > 0:
        smooth = surprise if weight is None else surprise * weight.to(wide.dtype)
        loss = (1 - label_smoothing) * loss + label_smoothing * (smooth.sum(-1) / x.shape[1])
    loss = torch.where(kept, loss, 0.0)
    weight_sum = row_weight.sum()
    if reduction == MEAN:
        loss = loss.sum() / weight_sum
    elif reduction == SUM:
        loss = loss.sum()
    return loss, torch.where(kept, lse, 0.0), weight_sum


def cross_entropy_bwd(
    dloss: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    weight_sum: Tensor,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
) -> Tensor:
    """dx_j = g ((1 - e) w_t (p_j - [j = t]) + e / v (p_j sum(w) - w_j)), g the row's dloss."""
    kept, safe = _targets(target, x.shape[1], ignore_index)
    wide = lse.dtype
    g = dloss.to(wide)
    if reduction == MEAN:
        g = g / weight_sum
    p = torch.exp(x.to(wide) - lse[:, None])
    w = torch.ones(x.shape[1], dtype=wide, device=x.device)
    if weight is not None:
        w = weight.to(wide)
    onehot = torch.zeros_like(p).scatter_(1, safe[:, None], 1.0)
    dx = (1 - label_smoothing) * w[safe][:, None] * (p - onehot)
    if label_smoothing > 0:
        dx = dx + label_smoothing / x.shape[1] * (p * w.sum() - w)
    return torch.where(kept[:, None], g.reshape(-1, 1) * dx, 0.0).to(x.dtype)


def _targets(target: Tensor, v: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Which rows count, and their classes with 0 for the rows that do not."""
    check_classes("reference", target, v, ignore_index)
    kept = target != ignore_index
    return kept, torch.where(kept, target, 0)
