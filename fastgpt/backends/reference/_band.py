"""Which key a query may see, as boolean masks, and how hidden keys are kept from leaking."""

from __future__ import annotations

import torch
from torch import Tensor


def band(rows: Tensor, columns: Tensor, causal: bool, window: int | None) -> Tensor | None:
    """The causal and band rule over positions that broadcast; None when it hides nothing.

    Key j is visible to row i' iff (j <= i' when causal) and |i' - j| < window.
    """
    distance = rows - columns
    if window is None:
        return distance >= 0 if causal else None
    return (distance >= 0) & (distance < window) if causal else distance.abs() < window


def visible(
    rows: Tensor,
    columns: Tensor,
    causal: bool,
    window: int | None,
    *masks: Tensor | None,
) -> Tensor | None:
    """`band` and all of `masks`; None when nothing is hidden."""
    seen = band(rows, columns, causal, window)
    for mask in masks:
        if mask is not None:
            seen = mask if seen is None else seen & mask
    return seen


def zero_hidden(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Zero the queries that see no key and the keys that no query sees.

    A probability of 0 does not stop a NaN or an inf, in either direction: 0 * NaN is NaN.
    """
    if seen is None:
        return q, k, v
    some_key = seen.any(-1).unsqueeze(-1)  # (b|1, h|1, sq|1, 1)
    some_query = seen.any(-2).unsqueeze(-1)  # (b|1, h|1, sk|1, 1)
    return zero_where_not(some_key, q), zero_where_not(some_query, k), zero_where_not(some_query, v)


def zero_where_not(condition: Tensor, x: Tensor) -> Tensor:
    """x where the condition holds, else 0; NaN passes neither forward nor backward."""
    return torch.where(condition, x, torch.zeros((), dtype=x.dtype, device=x.device))
