"""layer_norm against torch's own, over the contract grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import functional as F
from tests.contract import (
    LOW_DTYPES,
    Case,
    Inputs,
    OpSpec,
    Results,
    check_contract,
    first_axis,
    grid,
    normal,
    rounded,
)


def case(
    id: str,
    *shape: int,
    trailing: int = 1,
    weight: bool = True,
    bias: bool = True,
    shift: float = 0.0,
    parameter_dtype: torch.dtype | None = None,
    dtypes: tuple[torch.dtype, ...] = LOW_DTYPES,
) -> Case:
    """x of `shape`, normalized over its last `trailing` dimensions."""

    def make(g: torch.Generator, dtype: torch.dtype) -> Inputs:
        n = shape[len(shape) - trailing :]
        wide = parameter_dtype or dtype
        return {
            "input": normal(g, *shape, dtype=dtype, scale=2.0, shift=shift),
            "normalized_shape": n,
            "weight": normal(g, *n, dtype=wide, scale=0.5, shift=1.0) if weight else None,
            "bias": normal(g, *n, dtype=wide) if bias else None,
            "eps": 1e-5,
        }

    return Case(id, make, dtypes=dtypes)


CASES = (
    case("one_row", 1, 64),
    case("one_column_all_terms_cancel", 5, 1),
    case("no_rows", 0, 24),
    case("prime", 7, 131),
    case("just_over_a_vector", 3, 17),
    case("just_over_a_chunk_of_rows", 67, 33),
    case("two_trailing_dims", 2, 3, 5, 8, trailing=2),
    case("far_mean", 4, 96, shift=200.0),
    case("no_weight_no_bias", 6, 48, weight=False, bias=False),
    case("weight_only", 6, 48, bias=False),
    case("bias_only", 6, 48, weight=False),
    case("float32_parameters", 6, 48, parameter_dtype=torch.float32),
    case("turns_of_short_rows", 2200, 16),
    case("turns_of_rows_of_warps", 1100, 520, dtypes=(torch.float32,)),
    case("just_within_48_kib", 3, 4096, dtypes=(torch.float32,)),
    case("beyond_the_registers", 3, 8200, dtypes=(torch.float32,)),
    case("gpt3_13b", 3, 5140),
    case("gpt3_175b", 2, 12288, dtypes=(torch.bfloat16,)),
)


def stored(outputs: tuple[Any, ...], args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    y, statistics = outputs
    return y, rounded(statistics)


def cancellation(x: Tensor, inputs: Inputs, dy: Tensor) -> dict[str, float]:
    """x - mean cancels in xhat, and g with its mean and its projection on xhat in dx."""
    if x.numel() == 0:
        return {}
    n = len(inputs["normalized_shape"])
    axes = tuple(range(-n, 0))
    mean = x.mean(axes, keepdim=True)
    rstd = ((x - mean).square().mean(axes, keepdim=True) + inputs["eps"]).rsqrt()
    weight = inputs["weight"] if inputs["weight"] is not None else torch.ones(())
    lost = (mean * rstd).abs()  # of xhat, in units of eps32
    rows = tuple(range(x.ndim - n))
    return {
        "y": (lost * weight).abs().max().item(),
        "dx": (rstd * (1 + lost) * weight * dy).abs().max().item(),
        "dweight": (lost * dy).abs().sum(rows).max().item(),
        "dbias": 0.0,
    }


def layer_norm_cancellation(inputs: Inputs, results: Results) -> dict[str, float]:
    found = cancellation(inputs["input"], inputs, results["outgoing_y"])
    return found | {"dinput": found.pop("dx")} if found else {}


SPEC = OpSpec(
    op="layer_norm",
    function=F.layer_norm,
    low=torch.nn.functional.layer_norm,
    outputs=("y",),
    gradients=("input", "weight", "bias"),
    cases=CASES,
    rows=first_axis(("just_over_a_chunk_of_rows", "gpt3_13b"), ("input",), ("dweight", "dbias")),
    stored={"layer_norm_fwd": stored},
    cancellation=layer_norm_cancellation,
)


@pytest.mark.parametrize(("backend", "dtype", "case"), grid(SPEC))
def test_contract(backend: str, dtype: torch.dtype, case: Case) -> None:
    check_contract(SPEC, backend, dtype, case)
