"""The raw ops under opcheck, and the functions under torch.compile: what eager gives, bit for bit.

`aot_eager` traces, functionalises and partitions as inductor does, and runs the very same kernels.
The reference backend is traced only (`eager`): its graph holds no op of ours.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import fastgpt
from fastgpt import dispatch
from fastgpt import functional as F
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
from tests.specs import SPECS, every

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
def test_opcheck(spec: OpSpec, backend: str) -> None:
    skip_unless_runs(spec.op, backend)
    case = spec.case(RICHEST[spec.op])
    inputs = make(spec, case, torch.bfloat16)
    calls = raw_calls(spec, backend, inputs, outgoing_for(spec, case, torch.bfloat16))
    assert len(calls) == (2 if spec.gradients else 1)
    for name, args in calls:
        torch.library.opcheck(
            getattr(torch.ops.fastgpt, name).default,
            args,
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


@pytest.mark.parametrize(("spec", "backend"), every())
def test_compiled_equals_eager(spec: OpSpec, backend: str) -> None:
    skip_unless_runs(spec.op, backend)
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
