"""The oracle itself: the reference backend in float64 against plain torch and its own gradients."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgpt
from fastgpt import functional as F
from tests.contract import (
    Case,
    OpSpec,
    Results,
    by_formulas,
    cast,
    make,
    outgoing_for,
    planted,
    reference,
    run,
)
from tests.ops import (
    test_add_layer_norm,
    test_attention,
    test_bias_gelu,
    test_cross_entropy,
    test_layer_norm,
    test_linear_cross_entropy,
    test_masked_softmax,
    test_softmax,
    test_varlen_attention,
)
from tests.specs import SPECS

EVERY_CASE = [
    pytest.param(spec, case, id=f"{op}-{case.id}")
    for op, spec in SPECS.items()
    for case in spec.cases
]
TINY = {
    "add_layer_norm": test_add_layer_norm.case("tiny", 3, 4),
    "attention": test_attention.case(
        "tiny", 2, 2, 1, 5, 3, 2, window=2, pad="left", bias=(2, 1, 3), alibi=True, dropout_p=0.2,
        lse=True,
    ),
    "bias_gelu": test_bias_gelu.case("tiny", 3, 4),
    "cross_entropy": test_cross_entropy.case(
        "tiny", 4, 5, weighted=True, ignored=0.4, label_smoothing=0.2
    ),
    "layer_norm": test_layer_norm.case("tiny", 3, 4),
    "linear_cross_entropy": test_linear_cross_entropy.case(
        "tiny", 4, 3, v=5, bias=True, ignored=0.4, label_smoothing=0.2
    ),
    "masked_softmax": test_masked_softmax.case("tiny", 1, 4, 3, window=2),
    "softmax": test_softmax.case("tiny", 3, 4),
    "varlen_attention": test_varlen_attention.case(
        "tiny", ((3, 2), (0, 0), (2, 4)), d=2, window=2, unused=1, lse=True
    ),
}  # fmt: skip


def assert_same(got: Results, want: Results) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(
            got[name], tensor, rtol=1e-9, atol=1e-9, equal_nan=True, msg=name
        )


@pytest.mark.parametrize(("spec", "case"), EVERY_CASE)
def test_float64_is_plain_torch(spec: OpSpec, case: Case) -> None:
    inputs = cast(make(spec, case, torch.float64), torch.float64)
    outgoing = outgoing_for(spec, case, torch.float64)
    got = reference(spec, inputs, outgoing)
    want = run(spec, spec.low, inputs, outgoing)
    assert {t.dtype for n, t in got.items() if n not in ("lse", "loss")} <= {torch.float64}
    assert_same(got, want)


@pytest.mark.parametrize(("spec", "case"), EVERY_CASE)
def test_backward_formulas_are_the_derivative_of_the_forward(spec: OpSpec, case: Case) -> None:
    inputs = cast(make(spec, case, torch.float64), torch.float64)
    outgoing = outgoing_for(spec, case, torch.float64)
    assert_same(by_formulas(spec, inputs, outgoing), reference(spec, inputs, outgoing))


def tiny(op: str) -> tuple[Callable[..., Any], list[Tensor]]:
    """The function of its differentiable arguments alone, and those in float64."""
    spec = SPECS[op]
    inputs = cast(make(spec, TINY[op], torch.float64), torch.float64)
    names = [name for name in spec.gradients if inputs[name] is not None]

    def function(*tensors: Tensor) -> Any:
        results = spec.function(**inputs | dict(zip(names, tensors, strict=True)))
        several = results if isinstance(results, tuple) else (results,)
        # Rows that see no key have lse -inf, which no finite difference can take.
        return tuple(torch.where(result == -torch.inf, 0.0, result) for result in several)

    return function, [inputs[name].requires_grad_() for name in names]


@pytest.mark.parametrize("op", TINY)
def test_gradcheck(op: str) -> None:
    function, tensors = tiny(op)
    with fastgpt.backend("reference"):
        assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("op", TINY)
def test_second_backward(op: str) -> None:
    function, tensors = tiny(op)
    with fastgpt.backend("reference"):
        assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("op", TINY)
def test_compiled_backends_refuse_a_second_backward(op: str) -> None:
    spec = SPECS[op]
    inputs = make(spec, TINY[op], torch.float32)
    wanted = [inputs[name].requires_grad_() for name in spec.gradients if inputs[name] is not None]
    with planted(lambda name, raw: raw):
        result = spec.function(**inputs)
        first = result[0] if isinstance(result, tuple) else result
        penalty = torch.autograd.grad(first.square().sum(), wanted, create_graph=True)
        with pytest.raises(RuntimeError, match=re.escape('fastgpt.backend("reference")')):
            sum(g.square().sum() for g in penalty).backward()


def test_hidden_scores_do_not_read_their_gradient() -> None:
    scores = torch.randn(1, 5, 5, requires_grad=True)
    outgoing = torch.ones(5, 5).tril().masked_fill(torch.ones(5, 5).triu(1).bool(), torch.nan)
    with fastgpt.backend("reference"):
        F.masked_softmax(scores).backward(outgoing[None])
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("offsets", [[0], [0, 0]])
def test_packed_nothing_has_gradients(offsets: list[int]) -> None:
    """Without a single token to attend, every input still gets its zero gradient."""
    ends = torch.tensor(offsets, dtype=torch.int32)
    q, k = (torch.randn(n, 2, 4, requires_grad=True) for n in (0, 3))
    with fastgpt.backend("reference"):
        out = F.varlen_attention(q, k, k, ends, ends, 0, 0)
        dq, dk = torch.autograd.grad(out.sum(), (q, k))
    assert dq.shape == q.shape
    assert not dk.any()


def test_rows_that_see_nothing_do_not_read_their_gradient() -> None:
    q, k, v = (torch.randn(1, 1, s, 4, requires_grad=True) for s in (3, 2, 2))
    outgoing = torch.ones(1, 1, 3, 4)
    outgoing[:, :, 0] = torch.nan
    with fastgpt.backend("reference"):
        grads = torch.autograd.grad(F.attention(q, k, v), (q, k, v), outgoing)
    assert all(g.isfinite().all() for g in grads)
