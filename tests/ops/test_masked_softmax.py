"""masked_softmax: scale, causal rule and band fused into the softmax over the keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastgpt import functional as F
from tests.attention_in_torch import band
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


def hidden(inputs: Inputs) -> Inputs:
    """Scores that the causal rule and the band hide may be any finite value."""
    scores = inputs["scores"]
    seen = band(scores.shape[-2], scores.shape[-1], inputs["causal"], inputs["window"])
    return inputs | {"scores": torch.where(seen, scores, torch.full_like(scores, 6e4))}


def case(
    id: str,
    *shape: int,
    causal: bool = True,
    window: int | None = None,
    scale: float = 0.3,
    dtypes: tuple[torch.dtype, ...] = LOW_DTYPES,
) -> Case:
    def make(g: torch.Generator, dtype: torch.dtype) -> Inputs:
        return {
            "scores": normal(g, *shape, dtype=dtype, scale=4.0),
            "scale": scale,
            "causal": causal,
            "window": window,
        }

    return Case(id, make, hidden, dtypes)


CASES = (
    case("one_key", 1, 1, 1, 1),
    case("no_rows", 0, 2, 4, 4),
    case("prime", 2, 3, 13, 13),
    case("just_over_a_vector", 1, 2, 33, 33),
    case("without_batch", 9, 9),
    case("one_query", 2, 3, 1, 40),
    case("short_queries_bottom_right", 1, 2, 5, 37),
    case("queries_that_see_no_key", 1, 2, 9, 5),
    case("window_1_sees_itself", 1, 2, 12, 12, window=1),
    case("window_across_vectors", 1, 2, 70, 70, window=19),
    case("window_is_s", 1, 2, 20, 20, window=20),
    case("window_beyond_s", 1, 2, 20, 20, window=100),
    case("two_sided_band", 1, 2, 24, 24, causal=False, window=5),
    case("two_sided_band_of_rectangle", 1, 2, 7, 24, causal=False, window=5),
    case("all_keys", 1, 2, 10, 31, causal=False),
    case("peaked", 1, 2, 24, 24, scale=8.0),
    case("gpt3_window", 1, 1, 300, 300, window=256, scale=128**-0.5),
    case("just_over_what_registers_hold", 1, 2, 16500, window=16390, dtypes=(torch.bfloat16,)),
)


def low(scores: Tensor, scale: float, causal: bool, window: int | None) -> Tensor:
    seen = band(scores.shape[-2], scores.shape[-1], causal, window)
    some = seen.any(-1, keepdim=True)
    # Rows that see no key take the softmax of any finite row, times 0: torch's own is NaN there.
    masked = (scores * scale).masked_fill(~seen & some, float("-inf"))
    return torch.softmax(masked, -1) * some


def cancellation(inputs: Inputs, results: Results) -> dict[str, float]:
    product = results["y"] * results["outgoing_y"]
    return {"dscores": inputs["scale"] * product.abs().max().item() if product.numel() else 0.0}


SPEC = OpSpec(
    op="masked_softmax",
    function=F.masked_softmax,
    low=low,
    outputs=("y",),
    gradients=("scores",),
    cases=CASES,
    rows=first_axis(("prime", "one_query"), ("scores",)),
    stored={"masked_softmax_fwd": lambda outputs, args, dtype: rounded(outputs, dtype)},
    cancellation=cancellation,
)


@pytest.mark.parametrize(("backend", "dtype", "case"), grid(SPEC))
def test_contract(backend: str, dtype: torch.dtype, case: Case) -> None:
    check_contract(SPEC, backend, dtype, case)
