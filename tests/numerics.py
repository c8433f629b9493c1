"""The error rule: is a result as good as its dtype allows?

`ref` is the float64 reference on the same (already rounded) inputs, `low` is plain torch in the
tested dtype, `ideal` is the float64 formula with what lies between forward and backward rounded as
stored, and `cancel` is M, the size of the terms that cancel (without it a correct kernel fails
where ref is exactly 0). With c = 8 eps32 M:

1. float32:   max|got - ref| <= 2 max|low - ref| + eps max|ref| + c
2. bf16, f16: rms(got - ref) <= factor rms(ideal - ref) + c, factor 2 unless the op says why not
3. always:    the max rule, with the dtype's own eps, and no NaN or inf that ref lacks

The dtype of a result decides its rule: the float32 statistics of a bfloat16 call follow rule 1, and
their `low` is plain torch in float32, or `ideal` where that is further off.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS32 = torch.finfo(torch.float32).eps


def worst(x: Tensor) -> float:
    """The largest finite magnitude."""
    finite = x[x.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def violations(
    name: str,
    got: Tensor,
    ref: Tensor,
    low: Tensor,
    ideal: Tensor,
    *,
    cancel: float = 0.0,
    factor: float = 2.0,
) -> list[str]:
    """What is wrong with `got`, in words with figures; empty when it obeys the rule."""
    if got.shape != ref.shape:
        return [f"{name}: shape {tuple(got.shape)}, expected {tuple(ref.shape)}"]
    stored = ref.to(got.dtype)  # what overflows the dtype is an infinity that ref has
    finite = stored.isfinite()
    same = torch.where(finite, got.isfinite(), (got == stored) | (got.isnan() & stored.isnan()))
    if not same.all():
        where = tuple((~same).nonzero()[0].tolist())
        count = int((~same).sum())
        return [
            f"{name}: {count} values disagree on what is finite, first at {where}: "
            f"{got[where].item()}, expected {stored[where].item()}"
        ]

    def error(x: Tensor) -> Tensor:
        return (x.double() - ref)[finite]

    eps = torch.finfo(got.dtype).eps
    c = 8 * EPS32 * cancel
    found = []
    largest, bound = worst(error(got)), 2 * worst(error(low)) + eps * worst(ref[finite]) + c
    if not largest <= bound:
        found.append(f"{name}: max error {largest:.3g} exceeds {bound:.3g} (max rule)")
    if got.dtype in (torch.bfloat16, torch.float16):
        spread, bound = _rms(error(got)), factor * _rms(error(ideal.to(got.dtype))) + c
        if not spread <= bound:
            found.append(f"{name}: rms error {spread:.3g} exceeds {bound:.3g} (rms rule)")
    return found
