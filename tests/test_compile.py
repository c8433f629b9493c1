"""The raw ops under opcheck, and the functions under torch.compile: what eager gives, bit for bit.

`aot_eager` traces, functionalises and partitions as inductor does, and runs the very same kernels.
The reference backend is traced only (`eager`): its graph holds no op of ours.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

import fastgpt
from fastgpt import dispatch
from fastgpt import functional as F
from fastgpt.backends import triton
from fastgpt.ops import linear_cross_entropy
from tests.contract import (
    Inputs,
    OpSpec,
    device_of,
    make,
    outgoing_for,
    run,
    same_bits,
    skip_unless_runs,
)
from tests.specs import every

# One case per op, the one that passes the most optional arguments.
RICHEST = {
    "add_layer_norm": "batch_and_sequence",
    "attention": "everything",
    "bias_gelu": "batch_and_sequence",
    "cross_entropy": "everything",
    "decode_attention": "left_padding",
    "layer_norm": "two_trailing_dims",
    "linear_cross_entropy": "ignored_rows",
    "masked_softmax": "window_across_vectors",
    "softmax": "middle_dim",
    "varlen_attention": "window",
}


def raw_calls(spec: OpSpec, backend: str, inputs: Inputs, outgoing) -> list[tuple[str, tuple]]:
    """Every raw op that the function and its backward run, with its arguments."""
    calls: list[tuple[str, tuple[Any, ...]]] = []
    kernel = dispatch.kernel

    def recording(op: str, backend: str, name: str):
        def call(*args: Any) -> Any:
            calls.append(
                (name, tree_map(lambda a: a.detach() if isinstance(a, Tensor) else a, args))
            )
            return kernel(op, backend, name)(*args)

        return call

    with pytest.MonkeyPatch.context() as patch, fastgpt.backend(backend):
        patch.setattr(dispatch, "kernel", recording)
        run(spec, spec.function, inputs, outgoing, device_of(backend))
    return calls


@pytest.mark.parametrize(("spec", "backend"), every(compiled_only=True))
def test_opcheck(spec: OpSpec, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("expecttest", reason="torch's opcheck imports it")
    skip_unless_runs(spec.op, backend)
    if backend == "triton":
        pytest.skip("the Triton kernels are no ops of their own: Dynamo traces their launches")
    case = spec.case(RICHEST[spec.op])
    inputs = make(spec, case, torch.bfloat16)
    outgoing = outgoing_for(spec, case, torch.bfloat16)
    calls = raw_calls(spec, backend, inputs, outgoing)
    if [name for name, _ in calls] == ["linear_cross_entropy_fwd_bwd"]:
        monkeypatch.setattr(
            linear_cross_entropy, "_MOST_FLOATS", 0
        )  # what fits nowhere takes two ops
        calls += raw_calls(spec, backend, inputs, outgoing)
        assert len(calls) == 3
    else:
        assert len(calls) == (2 if spec.gradients else 1)
    for name, args in calls:
        torch.library.opcheck(
            getattr(getattr(torch.ops, dispatch.NAMESPACES[backend]), name).default,
            args,
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


@pytest.mark.parametrize(("spec", "backend"), every())
def test_compiled_equals_eager(spec: OpSpec, backend: str) -> None:
    skip_unless_runs(spec.op, backend)
    if backend == "triton" and triton.interpreted():
        pytest.skip("Triton's interpreter cannot be traced")
    case = spec.case(RICHEST[spec.op])
    inputs, outgoing = make(spec, case, torch.float32), outgoing_for(spec, case, torch.float32)
    device = device_of(backend)
    torch.compiler.reset()
    how = "eager" if backend == "reference" else "aot_eager"
    compiled = torch.compile(spec.function, backend=how, fullgraph=True, dynamic=True)
    with fastgpt.backend(backend):
        eager = run(spec, spec.function, inputs, outgoing, device)
        same_bits("compiled", run(spec, compiled, inputs, outgoing, device), eager)
        with torch.no_grad():
            inference = run(spec, compiled, inputs, outgoing, device)
        same_bits("compiled without gradients", inference, {n: eager[n] for n in inference})


BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])


@BACKENDS
def test_ten_lengths_cost_at_most_two_compilations(backend: str) -> None:
    skip_unless_runs("attention", backend)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def block(x: Tensor) -> Tensor:
        heads = F.layer_norm(x, 32).unflatten(-1, (4, 8)).transpose(1, 2)
        return F.attention(heads, heads, heads, window=6).sum()

    with fastgpt.backend(backend):
        for s in (4, 6, 7, 9, 13, 16, 33, 40, 64, 65):
            x = torch.randn(2, s, 32, requires_grad=True)
            block(x).backward()
            assert x.grad.isfinite().all()
    assert counter.frame_count <= 2


@BACKENDS
def test_ten_losses_cost_at_most_two_compilations(backend: str) -> None:
    skip_unless_runs("linear_cross_entropy", backend)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    weight = torch.randn(11, 8, requires_grad=True)

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def loss_of(x: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = F.linear_cross_entropy(x, weight, target)
        return loss

    with fastgpt.backend(backend):
        for rows in (2, 3, 7, 9, 16, 33, 40, 64, 65, 300):
            x = torch.randn(rows, 8, requires_grad=True)
            loss_of(x, torch.randint(11, (rows,))).backward()
            assert x.grad.isfinite().all()
    assert counter.frame_count <= 2


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(32))
        self.head = torch.nn.Parameter(torch.randn(11, 32))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        heads = F.layer_norm(x, 32, self.weight).unflatten(-1, (4, 8)).transpose(1, 2)
        merged = F.attention(heads, heads, heads, window=3).transpose(1, 2).flatten(2)
        return F.linear_cross_entropy(F.bias_gelu(merged), self.head, target)


@BACKENDS
def test_export_keeps_the_ops_and_the_values(backend: str) -> None:
    skip_unless_runs("attention", backend)
    module, x = Block().requires_grad_(False), torch.randn(2, 7, 32)
    target = torch.randint(11, (2, 7))
    with fastgpt.backend(backend):
        s = torch.export.Dim("s", min=2, max=64)
        exported = torch.export.export(
            module, (x, target), dynamic_shapes={"x": {1: s}, "target": {1: s}}
        )
        names = {str(node.target) for node in exported.graph.nodes}
        assert ("fastgpt.attention_fwd.default" in names) == (backend == "cpu")
        longer, classes = torch.randn(2, 20, 32), torch.randint(11, (2, 20))
        torch.testing.assert_close(exported.module()(longer, classes), module(longer, classes))


def twice(x: Tensor) -> Tensor:
    """Each op with one tensor in two places."""
    w = x[0, 0, 0]
    y = F.layer_norm(x, 8, w, w) + F.add_layer_norm(x, x, 8, w, w)[0] + F.bias_gelu(w, w)
    rows = x.flatten(0, -2)
    loss = F.linear_cross_entropy(rows, rows, torch.arange(len(rows)))
    return F.attention(x, x, x, bias=x).sum() + y.sum() + loss


@BACKENDS
def test_one_tensor_in_two_places(backend: str) -> None:
    skip_unless_runs("attention", backend)
    torch.compiler.reset()
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    with fastgpt.backend(backend):
        (want,) = torch.autograd.grad(twice(x), x)
        (got,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(got, want)


def test_symbolic_shapes_outside_of_dynamo() -> None:
    q = torch.randn(1, 2, 6, 8)
    traced = make_fx(lambda q: F.attention(q, q, q), tracing_mode="symbolic")(q)
    assert torch.equal(traced(q), F.attention(q, q, q))
