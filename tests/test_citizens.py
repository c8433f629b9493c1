"""Ops as citizens of torch: expanded gradients, checkpointing, second backwards, huge tensors."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastgpt
from fastgpt import functional as F
from tests.contract import (
    OpSpec,
    device_of,
    make,
    outgoing_for,
    run,
    same_bits,
    skip_unless_runs,
)
from tests.specs import every

BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])

# Beside the first case of rows, one that takes another way.
MORE_CASES = {"linear_cross_entropy": ("ignored_rows",)}
DIFFERENTIABLE = [
    pytest.param(*param.values, name, id=f"{param.id}-{name}")
    for param in every(differentiable=True)
    for spec in param.values[:1]
    for name in (spec.rows.cases[0], *MORE_CASES.get(spec.op, ()))
]


@pytest.mark.parametrize(("spec", "backend", "name"), DIFFERENTIABLE)
def test_expanded_gradients_flow(spec: OpSpec, backend: str, name: str) -> None:
    """What flows out of a sum has stride 0 everywhere."""
    skip_unless_runs(spec.op, backend)
    inputs = make(spec, spec.case(name), torch.float32)

    def expanded(_: str, output: Tensor) -> Tensor:
        return torch.ones((), device=output.device).expand_as(output)

    def contiguous(_: str, output: Tensor) -> Tensor:
        return torch.ones(output.shape, device=output.device)

    with fastgpt.backend(backend):
        got = run(spec, spec.function, inputs, expanded, device_of(backend))
        want = run(spec, spec.function, inputs, contiguous, device_of(backend))
    same_bits("expanded gradient", got, want)


@pytest.mark.parametrize(("spec", "backend", "name"), DIFFERENTIABLE)
def test_second_backward_raises_or_is_right(spec: OpSpec, backend: str, name: str) -> None:
    """A gradient penalty: compiled kernels name the backend that can, and that one does."""
    skip_unless_runs(spec.op, backend)
    inputs = make(spec, spec.case(name), torch.float32)
    x = inputs[spec.gradients[0]].requires_grad_()
    with fastgpt.backend(backend):
        result = spec.function(**inputs)
        first = result[0] if isinstance(result, tuple) else result
        (dx,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
        if backend == "reference":
            (penalty,) = torch.autograd.grad(dx.square().sum(), x)
            assert penalty.isfinite().all()
            assert penalty.any()
            return
        with pytest.raises(RuntimeError, match=re.escape('fastgpt.backend("reference")')) as caught:
            torch.autograd.grad(dx.square().sum(), x)
    assert str(caught.value).startswith(spec.op)


@pytest.mark.parametrize(("spec", "backend", "name"), DIFFERENTIABLE)
def test_one_gradient_alone_is_the_same(spec: OpSpec, backend: str, name: str) -> None:
    """What is not needed is not computed, and changes nothing in what is."""
    skip_unless_runs(spec.op, backend)
    inputs = make(spec, spec.case(name), torch.float32)
    names = [leaf for leaf in spec.gradients if isinstance(inputs[leaf], Tensor)]
    gradients = []
    for wanted in [names, *([leaf] for leaf in names)]:
        call = {n: v.detach() if isinstance(v, Tensor) else v for n, v in inputs.items()}
        for leaf in wanted:
            call[leaf].requires_grad_()
        with fastgpt.backend(backend):
            result = spec.function(**call)
            first = result[0] if isinstance(result, tuple) else result
            gradients.append(torch.autograd.grad(first.sum(), [call[leaf] for leaf in wanted]))
    for together, alone in zip(gradients[0], gradients[1:], strict=True):
        assert torch.equal(alone[0], together)


@pytest.mark.parametrize(("spec", "backend", "name"), DIFFERENTIABLE)
def test_checkpointed_gradients_are_the_same(spec: OpSpec, backend: str, name: str) -> None:
    skip_unless_runs(spec.op, backend)
    case = spec.case(name)
    inputs, outgoing = make(spec, case, torch.float32), outgoing_for(spec, case, torch.float32)
    names = list(inputs)

    def checkpointed(**call: Any) -> Any:
        def function(*args: Any) -> Any:
            return spec.function(**dict(zip(names, args, strict=True)))

        return checkpoint(function, *call.values(), use_reentrant=False)

    with fastgpt.backend(backend):
        want = run(spec, spec.function, inputs, outgoing, device_of(backend))
        same_bits("checkpoint", run(spec, checkpointed, inputs, outgoing, device_of(backend)), want)


@BACKENDS
def test_checkpointing_draws_the_same_dropout(backend: str) -> None:
    skip_unless_runs("attention", backend)
    q, k, v = torch.randn(3, 2, 2, 33, 16).requires_grad_().unbind()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.attention(q, k, v, dropout_p=0.3)

    gradients = []
    with fastgpt.backend(backend):
        for call in (attend, lambda *args: checkpoint(attend, *args, use_reentrant=False)):
            torch.manual_seed(5)
            gradients.append(torch.autograd.grad(call(q, k, v).square().sum(), (q, k, v)))
        again = attend(q, k, v)
    for got, want in zip(*gradients, strict=True):
        assert torch.equal(got, want)
    assert not torch.equal(again, attend(q, k, v)), "every call draws its own mask"


@BACKENDS
def test_dropout_follows_torchs_seed(backend: str) -> None:
    skip_unless_runs("attention", backend)
    q = torch.randn(1, 2, 20, 8)
    outs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        with fastgpt.backend(backend):
            outs.append(F.attention(q, q, q, dropout_p=0.5))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_more_than_65535_heads_in_a_batch() -> None:
    q = torch.randn(66_000, 1, 2, 4)
    with torch.no_grad():
        out = F.attention(q, q, q)
        packed = torch.equal(out[-1:], F.attention(q[-1:], q[-1:], q[-1:]))
    assert packed
    torch.testing.assert_close(out[:, :, 0], q[:, :, 0])


@pytest.fixture
def far() -> Tensor:
    """Two bfloat16 rows of 64, more than 2^32 elements apart; only their pages are ever touched."""
    try:
        memory = torch.empty(2**32 + 4096, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"8 GiB of address space: {error}")
    rows = memory.as_strided((2, 64), (2**32, 1))
    rows.copy_(torch.randn(2, 64))
    return rows


def test_offsets_of_64_bits(far: Tensor) -> None:
    near = far.contiguous()
    assert torch.equal(F.softmax(far), F.softmax(near))
    assert torch.equal(F.layer_norm(far, 64), F.layer_norm(near, 64))
    assert torch.equal(F.bias_gelu(far), F.bias_gelu(near))
    target = torch.tensor([3, 5])
    assert torch.equal(F.cross_entropy(far, target), F.cross_entropy(near, target))
    assert torch.equal(F.attention(*[far[None, None]] * 3), F.attention(*[near[None, None]] * 3))


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton", "cuda_emulated"])
@pytest.mark.parametrize("op", ["softmax", "layer_norm", "bias_gelu"])
def test_one_row_of_any_stride(op: str, backend: str) -> None:
    skip_unless_runs(op, backend)
    x = torch.randn(2 * 48, device=device_of(backend))[::2]
    more = {"softmax": (-1,), "layer_norm": ((48,),), "bias_gelu": ()}[op]
    with fastgpt.backend(backend):
        got = getattr(F, op)(x, *more)
        assert torch.equal(got, getattr(F, op)(x.contiguous(), *more))
