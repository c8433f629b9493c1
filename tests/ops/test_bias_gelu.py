"""bias_gelu: gelu(x + bias) against torch's gelu, over the contract grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastgpt import functional as F
from tests.contract import Case, Inputs, OpSpec, Results, check_contract, first_axis, grid, normal


def case(
    id: str,
    *shape: int,
    approximate: str = "tanh",
    bias: bool = True,
    scale: float = 1.0,
    shift: float = 0.0,
    bias_dtype: torch.dtype | None = None,
) -> Case:
    def make(g: torch.Generator, dtype: torch.dtype) -> Inputs:
        return {
            "x": normal(g, *shape, dtype=dtype, scale=scale, shift=shift),
            "bias": normal(g, shape[-1], dtype=bias_dtype or dtype) if bias else None,
            "approximate": approximate,
        }

    return Case(id, make)


CASES = (
    case("one_row", 1, 64),
    case("one_column", 5, 1),
    case("no_rows", 0, 24),
    case("prime", 7, 131),
    case("just_over_a_vector", 3, 17),
    case("just_over_a_chunk_of_rows", 67, 33),
    case("chunks_of_several_rows", 1100, 40),
    case("batch_and_sequence", 2, 5, 48),
    case("erf", 7, 131, approximate="none"),
    case("no_bias", 6, 48, bias=False),
    case("no_bias_erf", 6, 48, bias=False, approximate="none"),
    case("float32_bias", 6, 48, bias_dtype=torch.float32),
    case("both_tails", 6, 48, scale=20.0),
    case("left_tail", 6, 48, shift=-8.0),
    case("left_tail_erf", 6, 48, shift=-8.0, approximate="none"),
    case("gpt3_xl", 2, 8192),
)


def low(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    shifted = x if bias is None else (x + bias).to(x.dtype)
    return torch.nn.functional.gelu(shifted, approximate=approximate)


def cancellation(inputs: Inputs, results: Results) -> dict[str, float]:
    """1 + tanh(u) (or erf) cancels in the left tail, times x in y, times x'u in dx."""
    shifted = inputs["x"] if inputs["bias"] is None else inputs["x"] + inputs["bias"]
    if shifted.numel() == 0:
        return {}
    dy = results["outgoing_y"].abs()
    return {
        "y": shifted.clamp(max=0).abs().max().item(),
        "dx": (dy * (1 + shifted.clamp(max=0).abs())).max().item(),
        "dbias": dy.flatten(0, -2).sum(0).max().item(),
    }


SPEC = OpSpec(
    op="bias_gelu",
    function=F.bias_gelu,
    low=low,
    outputs=("y",),
    gradients=("x", "bias"),
    cases=CASES,
    rows=first_axis(("just_over_a_chunk_of_rows", "erf"), ("x",), ("dbias",)),
    stored={},
    cancellation=cancellation,
)


@pytest.mark.parametrize(("backend", "dtype", "case"), grid(SPEC))
def test_contract(backend: str, dtype: torch.dtype, case: Case) -> None:
    check_contract(SPEC, backend, dtype, case)
