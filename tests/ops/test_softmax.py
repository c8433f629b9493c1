"""softmax against torch's own, over the contract grid."""

from __future__ import annotations

import pytest
import torch

from fastgpt import functional as F
from tests.contract import (
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
    dim: int = -1,
    scale: float = 2.0,
    shift: float = 0.0,
    dtype: torch.dtype | None = None,
    hole: float | None = None,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16),
) -> Case:
    """An input of `shape`; with `hole`, every third element of a row is that value."""

    def make(g: torch.Generator, input_dtype: torch.dtype) -> Inputs:
        x = normal(g, *shape, dtype=input_dtype, scale=scale, shift=shift)
        if hole is not None:
            x[..., 1::3] = hole
        return {"input": x, "dim": dim, "dtype": dtype}

    return Case(id, make, dtypes=dtypes)


CASES = (
    case("one_row", 1, 64),
    case("one_column_all_terms_cancel", 5, 1),
    case("no_rows", 0, 24),
    case("prime", 7, 131),
    case("just_over_a_vector", 3, 17),
    case("first_dim", 19, 6, dim=0),
    case("middle_dim", 3, 21, 5, dim=1),
    case("scores", 2, 3, 9, 33),
    case("peaked", 6, 48, scale=30.0),
    case("far_from_zero", 6, 48, shift=-3e4),
    case("holes_of_minus_inf", 6, 48, hole=float("-inf")),
    case("to_float32", 6, 48, dtype=torch.float32),
    case("gpt3_vocabulary", 2, 50257),
    case("just_within_48_kib", 1, 12280, dtypes=(torch.float32,)),
    case("just_over_what_registers_hold", 2, 16392, dtypes=(torch.bfloat16,)),
    case("one_less_than_whole_packs", 1, 16391, dtypes=(torch.bfloat16,)),
    case("beyond_shared_memory", 1, 131077, dtypes=(torch.bfloat16,)),
)


def cancellation(inputs: Inputs, results: Results) -> dict[str, float]:
    """dx = y (dy - sum(y dy)): the two terms are equal where one element has all the weight."""
    product = results["y"] * results["outgoing_y"]
    return {"dinput": product.abs().max().item() if product.numel() else 0.0}


SPEC = OpSpec(
    op="softmax",
    function=F.softmax,
    low=torch.softmax,
    outputs=("y",),
    gradients=("input",),
    cases=CASES,
    rows=first_axis(("prime", "scores", "gpt3_vocabulary"), ("input",)),
    stored={"softmax_fwd": lambda outputs, args, dtype: rounded(outputs, dtype)},
    cancellation=cancellation,
)


@pytest.mark.parametrize(("backend", "dtype", "case"), grid(SPEC))
def test_contract(backend: str, dtype: torch.dtype, case: Case) -> None:
    check_contract(SPEC, backend, dtype, case)
