"""linear_cross_entropy against torch's projection followed by torch's loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastgpt
from fastgpt import dispatch
from fastgpt import functional as F
from fastgpt.ops import linear_cross_entropy
from tests.contract import (
    Case,
    Inputs,
    OpSpec,
    Results,
    check_contract,
    device_of,
    expected,
    first_axis,
    grid,
    judge,
    normal,
    run,
    same_bits,
    skip_unless_runs,
)
from tests.ops.test_cross_entropy import row_cancellation, stored


def case(
    id: str,
    *shape: int,
    v: int,
    bias: bool = False,
    bias_dtype: torch.dtype | None = None,
    ignored: float = 0.0,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    scale: float = 1.0,
) -> Case:
    """Hidden states (..., c), v classes, the share `ignored` of the rows without a target."""

    def make(g: torch.Generator, dtype: torch.dtype) -> Inputs:
        c = shape[-1]
        target = torch.randint(v, shape[:-1], generator=g)
        target[torch.rand(target.shape, generator=g) < ignored] = -100
        return {
            "input": normal(g, *shape, dtype=dtype, scale=scale),
            "linear_weight": normal(g, v, c, dtype=dtype, scale=2 * c**-0.5),
            "target": target,
            "linear_bias": normal(g, v, dtype=bias_dtype or dtype) if bias else None,
            "ignore_index": -100,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
        }

    return Case(id, make)


CPU = torch.device("cpu")

CASES = (
    case("one_row", 1, 16, v=64),
    case("one_class_all_terms_cancel", 5, 16, v=1),
    case("no_rows", 0, 16, v=24, reduction="sum"),
    case("prime", 13, 23, v=131, reduction="none"),
    case("just_over_a_block_of_rows", 67, 24, v=33),
    case("several_blocks_of_classes", 5, 16, v=4099),
    case("batch_and_sequence", 2, 9, 24, v=65, reduction="none"),
    case("sum", 13, 24, v=65, reduction="sum"),
    case("smoothed", 13, 24, v=65, label_smoothing=0.1),
    case("bias", 13, 24, v=65, bias=True),
    case("float32_bias", 13, 24, v=65, bias=True, bias_dtype=torch.float32),
    case("ignored_rows", 13, 24, v=65, ignored=0.4, bias=True),
    case("everything_sum", 13, 24, v=65, ignored=0.4, label_smoothing=0.2, reduction="sum"),
    case("everything_none", 9, 24, v=65, ignored=0.4, label_smoothing=0.2, reduction="none"),
    case("peaked", 6, 32, v=48, scale=20.0),
    case("gpt3_width", 2, 2048, v=97),
)


def low(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    logits = torch.nn.functional.linear(input, linear_weight)
    if linear_bias is not None:
        logits = (logits + linear_bias).to(logits.dtype)
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, -2),
        target.flatten(),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return loss.view(target.shape) if reduction == "none" else loss


def cancellation(inputs: Inputs, results: Results) -> dict[str, float]:
    """The terms of each logit cancel, then the losses, then p - onehot in both products."""
    x, weight = inputs["input"].flatten(0, -2), inputs["linear_weight"]
    if x.numel() == 0:
        return {}
    logits = (x.abs() @ weight.abs().T).max().item()
    dloss = results["outgoing_loss"]
    rows = inputs["target"].numel()
    found = row_cancellation(logits, dloss, inputs, rows, exponent=logits)
    dlogits = found["dlogits"]
    return {
        "loss": found["loss"],
        "dinput": dlogits * weight.abs().max().item(),
        "dlinear_weight": dlogits * x.abs().max().item(),
        "dlinear_bias": dlogits,
    }


SPEC = OpSpec(
    op="linear_cross_entropy",
    function=F.linear_cross_entropy,
    low=low,
    outputs=("loss",),
    gradients=("input", "linear_weight", "linear_bias"),
    cases=CASES,
    rows=first_axis(
        ("batch_and_sequence",), ("input", "target"), ("dlinear_weight", "dlinear_bias")
    ),
    stored={"linear_cross_entropy_fwd": stored},
    cancellation=cancellation,
)


@pytest.mark.parametrize(("backend", "dtype", "case"), grid(SPEC))
def test_contract(backend: str, dtype: torch.dtype, case: Case) -> None:
    check_contract(SPEC, backend, dtype, case)


@pytest.mark.parametrize("backend", ["cpu", "cuda", "cuda_emulated"])
def test_several_blocks_of_rows(backend: str) -> None:
    """Partial products are added over the rows; too many of them for Triton's interpreter."""
    dtype = torch.bfloat16
    skip_unless_runs(SPEC.op, backend, dtype)
    rows = case("several_blocks_of_rows", 4099, 8, v=37, bias=True, ignored=0.1)
    want = expected(SPEC, rows, dtype)
    with fastgpt.backend(backend):
        got = run(SPEC, SPEC.function, want.inputs, want.outgoing, device_of(backend))
    found = judge(SPEC, want, got)
    assert not found, "\n".join(found)


ROWS_KEPT = {"all": 300 * (65 + 16), "lots": 299 * (65 + 16), "none": 0}
"""Floats that may be kept for the 300 rows below; lots of rows are for float32 alone."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_with_the_loss_and_after_it(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cpu kernel computes them at once where the logits fit; a row's bits are the same."""
    skip_unless_runs(SPEC.op, "cpu", dtype)
    rows = case("rows", 300, 24, v=65, bias=True, ignored=0.1, reduction="sum")
    want = expected(SPEC, rows, dtype)
    names = []
    kernel = dispatch.kernel

    def recording(op: str, backend: str, name: str) -> Any:
        names.append(name)
        return kernel(op, backend, name)

    monkeypatch.setattr(dispatch, "kernel", recording)
    results = {}
    for kept, floats in ROWS_KEPT.items():
        monkeypatch.setattr(linear_cross_entropy, "_MOST_FLOATS", floats)
        names.clear()
        with fastgpt.backend("cpu"):
            results[kept] = run(SPEC, SPEC.function, want.inputs, want.outgoing, CPU)
        at_once = kept == "all" or (kept == "lots" and dtype == torch.float32)
        assert len(names) == (1 if at_once else 2), (kept, names)
        found = judge(SPEC, want, results[kept])
        assert not found, "\n".join(found)
    same_bits("none kept", results["none"], results["all"])
    same_bits("lots", results["lots"], {n: results["all"][n] for n in ("loss", "dinput")})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_several_blocks_of_both(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that are computed again, as where they do not fit."""
    skip_unless_runs(SPEC.op, "cpu", dtype)
    monkeypatch.setattr(linear_cross_entropy, "_MOST_FLOATS", 0)
    rows = case("both", 530, 8, v=4099, bias=True, ignored=0.1, label_smoothing=0.1)
    want = expected(SPEC, rows, dtype)
    with fastgpt.backend("cpu"):
        found = judge(SPEC, want, run(SPEC, SPEC.function, want.inputs, want.outgoing, CPU))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("floats", [0, 1 << 23])
def test_ignored_rows_stay_zero_under_an_infinite_gradient(
    floats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_unless_runs(SPEC.op, "cpu")
    monkeypatch.setattr(linear_cross_entropy, "_MOST_FLOATS", floats)
    x, weight = torch.randn(2, 8, requires_grad=True), torch.randn(5, 8)
    with fastgpt.backend("cpu"):
        (F.linear_cross_entropy(x, weight, torch.tensor([3, -100])) * torch.inf).backward()
    assert x.grad is not None
    assert not x.grad[0].isfinite().any()
    assert not x.grad[1].any()


def test_shapes_alone_are_differentiated() -> None:
    skip_unless_runs(SPEC.op, "cpu")
    meta = [torch.empty(n, 8, device="meta", requires_grad=True) for n in (6, 5)]
    loss = F.linear_cross_entropy(*meta, torch.zeros(6, dtype=torch.int64, device="meta"))
    assert [g.shape for g in torch.autograd.grad(loss, meta)] == [(6, 8), (5, 8)]
    with FakeTensorMode(), fastgpt.backend("cpu"):
        x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
        loss = F.linear_cross_entropy(x, weight, torch.zeros(6, dtype=torch.int64))
        shapes = [g.shape for g in torch.autograd.grad(loss, (x, weight))]
    assert shapes == [(6, 8), (5, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_second_backward_finds_what_the_first_gave_away(dtype: torch.dtype) -> None:
    skip_unless_runs(SPEC.op, "cpu", dtype)
    x, weight = torch.randn(40, 24, dtype=dtype), torch.randn(65, 24, dtype=dtype)
    leaves = (x.requires_grad_(), weight.requires_grad_())
    with fastgpt.backend("cpu"):
        loss = F.linear_cross_entropy(*leaves, torch.randint(65, (40,)))
    dloss = torch.tensor(0.7)
    first = torch.autograd.grad(loss, leaves, dloss.to(loss.dtype), retain_graph=True)
    copies = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()
    second = torch.autograd.grad(loss, leaves, dloss.to(loss.dtype), retain_graph=True)
    only_x = torch.autograd.grad(loss, x, dloss.to(loss.dtype))
    for got, kept in zip((*second, *only_x), (*copies, copies[0]), strict=True):
        assert torch.equal(got, kept)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def test_many_gradients_at_once() -> None:
    """`dloss` has no value to read where it is a batch, or traced."""
    skip_unless_runs(SPEC.op, "cpu")
    weight, target = torch.randn(5, 8), torch.tensor([3, 0, 1])
    x = torch.randn(3, 8, requires_grad=True)
    with fastgpt.backend("cpu"):
        loss = F.linear_cross_entropy(x, weight, target)
        (want,) = torch.autograd.grad(loss, x, retain_graph=True)
        factors = torch.tensor([1.0, -2.0, 0.0])
        (got,) = torch.autograd.grad(loss, x, factors, is_grads_batched=True)
    assert torch.equal(got, factors[:, None, None] * want)

    def gradient(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(F.linear_cross_entropy(x, weight, target), x)[0]

    with fastgpt.backend("cpu"):
        assert torch.equal(make_fx(gradient)(x.detach())(x.detach()), want)
