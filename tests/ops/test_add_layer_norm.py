"""add_layer_norm: the residual addition, then layer_norm, in one pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastgpt
from fastgpt import functional as F
from fastgpt.backends.reference.layer_norm import layer_norm_fwd
from tests.contract import (
    LOW_DTYPES,
    Case,
    Inputs,
    OpSpec,
    Results,
    check_contract,
    device_of,
    first_axis,
    grid,
    make,
    normal,
    rounded,
    skip_unless_runs,
)
from tests.ops.test_layer_norm import cancellation as layer_norm_cancellation


def case(
    id: str,
    *shape: int,
    weight: bool = True,
    bias: bool = True,
    shift: float = 0.0,
    parameter_dtype: torch.dtype | None = None,
    dtypes: tuple[torch.dtype, ...] = LOW_DTYPES,
) -> Case:
    """x and residual of `shape`, normalized over the last dimension."""

    def make(g: torch.Generator, dtype: torch.dtype) -> Inputs:
        n, wide = shape[-1], parameter_dtype or dtype
        return {
            "x": normal(g, *shape, dtype=dtype),
            "residual": normal(g, *shape, dtype=dtype, scale=2.0, shift=shift),
            "normalized_shape": (n,),
            "weight": normal(g, n, dtype=wide, scale=0.5, shift=1.0) if weight else None,
            "bias": normal(g, n, dtype=wide) if bias else None,
            "eps": 1e-5,
        }

    return Case(id, make, dtypes=dtypes)


CASES = (
    case("one_row", 1, 64),
    case("one_column_all_terms_cancel", 5, 1),
    case("no_rows", 0, 24),
    case("prime", 7, 131),
    case("just_over_a_chunk_of_rows", 67, 33),
    case("batch_and_sequence", 2, 5, 48),
    case("far_mean", 4, 96, shift=200.0),
    case("no_weight_no_bias", 6, 48, weight=False, bias=False),
    case("float32_parameters", 6, 48, parameter_dtype=torch.float32),
    case("gpt3_13b", 3, 5140),
    case("just_over_what_registers_hold", 2, 16387, dtypes=(torch.float16,)),
)


def low(
    x: Tensor,
    residual: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    s = x + residual
    return torch.nn.functional.layer_norm(s, normalized_shape, weight, bias, eps), s


def stored(outputs: tuple[Any, ...], args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """The contract normalizes s as stored, so the ideal does too."""
    s = rounded(outputs[1], dtype)
    y, statistics = layer_norm_fwd(s, *args[2:])
    return y, s, rounded(statistics)


def cancellation(inputs: Inputs, results: Results) -> dict[str, float]:
    s = inputs["x"] + inputs["residual"]
    found = layer_norm_cancellation(s, inputs, results["outgoing_y"])
    return found | {"dresidual": found["dx"]} if found else {}


SPEC = OpSpec(
    op="add_layer_norm",
    function=F.add_layer_norm,
    low=low,
    outputs=("y", "s"),
    gradients=("x", "residual", "weight", "bias"),
    cases=CASES,
    rows=first_axis(
        ("just_over_a_chunk_of_rows", "gpt3_13b"), ("x", "residual"), ("dweight", "dbias")
    ),
    stored={"add_layer_norm_fwd": stored},
    cancellation=cancellation,
)


@pytest.mark.parametrize(("backend", "dtype", "case"), grid(SPEC))
def test_contract(backend: str, dtype: torch.dtype, case: Case) -> None:
    check_contract(SPEC, backend, dtype, case)


@pytest.mark.parametrize("dtype", LOW_DTYPES)
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_is_layer_norm_of_the_sum_bit_for_bit(backend: str, dtype: torch.dtype) -> None:
    skip_unless_runs("add_layer_norm", backend, dtype)
    inputs = make(SPEC, SPEC.case("prime"), dtype)
    device = device_of(backend)
    inputs = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in inputs.items()}
    with fastgpt.backend(backend):
        y, s = F.add_layer_norm(**inputs)
        rest = {name: inputs[name] for name in ("normalized_shape", "weight", "bias", "eps")}
        assert torch.equal(s, inputs["x"] + inputs["residual"])
        assert torch.equal(y, F.layer_norm(s, **rest))
