"""The spec of every op, for the tests that hold of all of them."""

from __future__ import annotations

from typing import Any

import pytest

from fastgpt import dispatch
from tests.contract import OpSpec
from tests.ops import (
    test_add_layer_norm,
    test_attention,
    test_bias_gelu,
    test_cross_entropy,
    test_decode_attention,
    test_layer_norm,
    test_linear_cross_entropy,
    test_masked_softmax,
    test_softmax,
    test_varlen_attention,
)

SPECS: dict[str, OpSpec] = {
    module.SPEC.op: module.SPEC
    for module in (
        test_add_layer_norm,
        test_attention,
        test_bias_gelu,
        test_cross_entropy,
        test_decode_attention,
        test_layer_norm,
        test_linear_cross_entropy,
        test_masked_softmax,
        test_softmax,
        test_varlen_attention,
    )
}

each_op = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


def every(*, compiled_only: bool = False, differentiable: bool = False) -> list[Any]:
    """(spec, backend) for every cell of the dispatch table."""
    return [
        pytest.param(spec, backend, id=f"{op}-{backend}")
        for op, spec in SPECS.items()
        for backend in dispatch.TABLE[op]
        if not (compiled_only and backend == "reference")
        and not (differentiable and not spec.gradients)
    ]
