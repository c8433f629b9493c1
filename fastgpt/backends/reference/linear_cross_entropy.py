"""cross_entropy(x @ weight.T + bias, target), by the plain formula: it holds the (r, v) logits."""

from __future__ import annotations

from torch import Tensor

from fastgpt.backends.reference.cross_entropy import cross_entropy_bwd, cross_entropy_fwd
from fastgpt.ops._checks import statistics_dtype, without_autocast


def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (r, c), weight (v, c), target (r,) -> loss (r,) or (), lse (r,) float64, their count ()."""
    logits = _logits(x, weight, bias)
    return cross_entropy_fwd(logits, target, None, ignore_index, reduction, label_smoothing)


def linear_cross_entropy_bwd(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    weight_sum: Tensor,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx = dlogits @ weight, dweight = dlogits.T @ x, dbias = sum of dlogits over the rows."""
    dlogits = cross_entropy_bwd(
        dloss,
        _logits(x, weight, bias),
        target,
        None,
        lse,
        weight_sum,
        ignore_index,
        reduction,
        label_smoothing,
    )
    wide, none = dlogits.dtype, dlogits.new_empty(0)
    with without_autocast(x):
        dx = (dlogits @ weight.to(wide)).to(x.dtype) if need_dx else none.to(x.dtype)
        dweight = dlogits.T @ x.to(wide) if need_dweight else none
        dbias = dlogits.sum(0) if need_dbias else none
    return dx, dweight.to(weight.dtype), dbias


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = statistics_dtype(x)
    with without_autocast(x):
        logits = x.to(wide) @ weight.to(wide).T
        return logits if bias is None else logits + bias.to(wide)
