"""What the two cross-entropy losses share: the checks of their common arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.ops._checks import (
    check_number,
    check_same_device,
    check_shape,
    check_tensor,
    host_checks,
    statistics_dtype,
)

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def check_options(ignore_index: int, reduction: str, label_smoothing: float) -> None:
    """The options that do not depend on any tensor."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {ignore_index!r}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: expected an int of 64 bits, got {ignore_index}")
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f'reduction: expected "none", "mean" or "sum", got {reduction!r}')
    check_number("label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected a number from 0 to 1, got {label_smoothing}")


def check_target(target: Tensor, input: Tensor, shape: tuple[int, ...], layout: str) -> None:
    """Class indices of `shape`, which `layout` names, on the device of input."""
    check_tensor("target", target)
    if target.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"target: expected dtype int64 (or uint8), got {target.dtype}")
    check_shape("target", target, shape, layout)
    check_same_device("target", target, "input", input)


def flat_classes(target: Tensor) -> Tensor:
    """Class indices as the kernels take them: (r,) int64 without gaps; target itself if it is."""
    if target.dim() == 1 and target.dtype == torch.int64 and target.is_contiguous():
        return target
    return target.reshape(-1).to(torch.int64).contiguous()


def check_classes(backend: str, target: Tensor, classes: int, ignore_index: int) -> None:
    """ValueError unless each target is a class or ignore_index, where the host may look."""
    if not host_checks(backend, target):
        return
    bad = (target != ignore_index) & ((target < 0) | (target >= classes))
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise ValueError(
            f"target[{i}]: expected a class from 0 to {classes - 1} "
            f"or ignore_index {ignore_index}, got {int(target[i])}"
        )


def loss_dtype(input: Tensor, autocast: bool) -> torch.dtype:
    """The loss has the dtype of input; under autocast it is float32, as torch's."""
    return torch.float32 if autocast and input.dtype != torch.float64 else input.dtype


def loss_outputs(x: Tensor, reduction: int) -> tuple[Tensor, Tensor, Tensor]:
    """Empty loss (r,) or (), lse (r,) and weight_sum () of the rows of x, as the kernels make them.

    lse is float64, so that x - lse keeps its digits however far the logits are from 0.
    """
    r, wide = x.shape[0], statistics_dtype(x)
    loss = x.new_empty((r,) if reduction == REDUCTIONS["none"] else (), dtype=wide)
    return loss, x.new_empty(r, dtype=torch.float64), x.new_empty((), dtype=wide)
