"""cross_entropy against torch's own, over the contract grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastgpt
from fastgpt import dispatch
from fastgpt import functional as F
from tests.contract import (
    Case,
    Inputs,
    OpSpec,
    Results,
    check_contract,
    device_of,
    first_axis,
    grid,
    normal,
    rounded,
    skip_unless_runs,
)


def hidden(inputs: Inputs) -> Inputs:
    """Rows whose target is ignore_index are not read."""
    ignored = inputs["target"] == inputs["ignore_index"]
    return inputs | {"input": inputs["input"].masked_fill(ignored[:, None], float("nan"))}


def case(
    id: str,
    *shape: int,
    scale: float = 3.0,
    offset: float = 0.0,
    weighted: bool = False,
    ignored: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16),
) -> Case:
    """Logits (n, v) or (n, v, d1), of whose rows the share `ignored` has no target."""

    def make(g: torch.Generator, dtype: torch.dtype) -> Inputs:
        n, v, *rest = shape
        target = torch.randint(v, (n, *rest), generator=g)
        target[torch.rand(target.shape, generator=g) < ignored] = ignore_index
        weight = torch.rand(v, generator=g, dtype=torch.float64).add(0.5).to(dtype)
        return {
            "input": normal(g, *shape, dtype=dtype, scale=scale) + offset,
            "target": target,
            "weight": weight if weighted else None,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
        }

    return Case(id, make, hidden if ignored and len(shape) == 2 else None, dtypes)


CASES = (
    case("one_row", 1, 64),
    case("one_class_all_terms_cancel", 5, 1),
    case("no_rows_sum", 0, 24, reduction="sum"),
    case("no_rows_mean_is_nan", 0, 24),
    case("prime", 7, 131, reduction="none"),
    case("just_over_a_vector", 3, 17),
    case("just_over_a_chunk_of_rows", 67, 33),
    case("sum", 13, 31, reduction="sum"),
    case("smoothed", 13, 31, label_smoothing=0.1),
    case("all_smoothing", 13, 31, label_smoothing=1.0),
    case("weighted", 13, 31, weighted=True),
    case("weighted_none", 13, 31, weighted=True, reduction="none"),
    case("ignored_rows", 13, 31, ignored=0.4),
    case("ignored_class", 13, 31, ignored=0.4, ignore_index=3, reduction="none"),
    case("all_rows_ignored_sum", 5, 31, ignored=1.0, reduction="sum"),
    case("everything", 13, 31, weighted=True, ignored=0.4, label_smoothing=0.2),
    case(
        "everything_sum", 13, 31, weighted=True, ignored=0.4, label_smoothing=0.2, reduction="sum"
    ),
    case(
        "everything_none", 9, 31, weighted=True, ignored=0.4, label_smoothing=0.2, reduction="none"
    ),
    case("positions", 3, 19, 4, ignored=0.2, reduction="none"),
    case("peaked", 6, 48, scale=40.0),
    case("far_from_zero", 9, 33, offset=1000.0, reduction="sum"),
    case("gpt3_vocabulary", 3, 50257),
)


def row_cancellation(
    lse: float, dloss: Tensor, inputs: Inputs, rows: int, exponent: float = 0.0
) -> dict[str, float]:
    """lse - x[target] cancels in the loss, p - onehot in dlogits.

    `exponent`: the size of what cancels in the exponent of p.
    """
    weight = inputs.get("weight")
    largest = 1.0 if weight is None else weight.max().item()
    if inputs["reduction"] == "mean":
        counted = inputs["target"][inputs["target"] != inputs["ignore_index"]]
        share = counted.numel() if weight is None else weight[counted].sum().item()
        dloss = dloss / max(share, 1e-30)
    total = rows if inputs["reduction"] == "sum" else 1
    return {
        "loss": largest * lse * total,
        "dlogits": largest * dloss.abs().max().item() * (1 + exponent) if dloss.numel() else 0.0,
    }


def cancellation(inputs: Inputs, results: Results) -> dict[str, float]:
    x = inputs["input"]
    if x.numel() == 0:
        return {}
    lse = torch.logsumexp(x, 1).abs().max().item() + x.abs().max().item()
    found = row_cancellation(lse, results["outgoing_loss"], inputs, inputs["target"].numel())
    return {"loss": found["loss"], "dinput": found["dlogits"]}


def stored(outputs: tuple[Any, ...], args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    loss, lse, weight_sum = outputs
    return loss, lse, rounded(weight_sum)


SPEC = OpSpec(
    op="cross_entropy",
    function=F.cross_entropy,
    low=torch.nn.functional.cross_entropy,
    outputs=("loss",),
    gradients=("input",),
    cases=CASES,
    rows=first_axis(("prime", "everything_none"), ("input", "target")),
    stored={"cross_entropy_fwd": stored},
    cancellation=cancellation,
)


@pytest.mark.parametrize(("backend", "dtype", "case"), grid(SPEC))
def test_contract(backend: str, dtype: torch.dtype, case: Case) -> None:
    check_contract(SPEC, backend, dtype, case)


@pytest.mark.parametrize("v", [131, 5003])
@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda_emulated"])
def test_a_row_has_the_same_bits_wherever_it_lies(backend: str, v: int) -> None:
    """In bfloat16 a row of odd length begins at any even address; lse keeps every digit."""
    skip_unless_runs("cross_entropy", backend)
    device = device_of(backend)
    x = torch.randn(6, v, dtype=torch.bfloat16, device=device)
    target = torch.arange(6, device=device)
    forward = dispatch.kernel("cross_entropy", backend, "cross_entropy_fwd")
    _, together, _ = forward(x, target, None, -100, 0, 0.0)
    alone = [forward(x[i : i + 1].clone(), target[i : i + 1], None, -100, 0, 0.0) for i in range(6)]
    assert torch.equal(together, torch.cat([lse for _, lse, _ in alone]))


def test_a_nan_of_any_bits_among_the_weights_is_a_nan() -> None:
    """Rounded as a number, one of all ones would come out as 0."""
    skip_unless_runs(SPEC.op, "cpu", torch.bfloat16)
    x = torch.randn(3, 96, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.full((96,), -1, dtype=torch.int32).view(torch.float32)
    with fastgpt.backend("cpu"):
        F.cross_entropy(x, torch.tensor([1, 40, 95]), weight, reduction="sum").backward()
    assert x.grad is not None
    assert x.grad.isnan().all()
