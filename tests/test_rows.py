"""The ops on rows give the same bits whatever the rank and the strides that hold the rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastgpt
from fastgpt import functional as F
from tests.contract import skip_unless_runs

N = 24
OPS: dict[str, Callable[..., Tensor | tuple[Tensor, Tensor]]] = {
    "layer_norm": lambda x: F.layer_norm(x, N),
    "softmax": lambda x: F.softmax(x, -1),
    "bias_gelu": lambda x: F.bias_gelu(x),
    "masked_softmax": lambda x: F.masked_softmax(x, scale=0.5),
    "add_layer_norm": lambda x, residual: F.add_layer_norm(x, residual, N),
}

# Each holds the rows of a contiguous (2, 3, 4, N) as they are.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "six_dimensions": lambda x: x.view(2, 1, 3, 1, 4, N),
    "heads_across": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "columns_across": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "gaps_between_rows": lambda x: torch.cat([x, x], -1)[..., :N],
    "any_stride_at_size_one": lambda x: x.view(6, 1, 4, N).as_strided(
        (6, 1, 4, N), (4 * N, 7, N, 1)
    ),
}


def results(op: str, layouts: list[str], inputs: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients as rows; the outgoing gradients come in the first layout too."""
    leaves = [LAYOUTS[name](x).detach() for name, x in zip(layouts, inputs, strict=True)]
    leaves = [x.requires_grad_() for x in leaves]
    ys = OPS[op](*leaves)
    ys = ys if isinstance(ys, tuple) else (ys,)
    for y in ys:
        assert y.shape == leaves[0].shape
        assert y.is_contiguous()
    outgoing = [LAYOUTS[layouts[0]](x.flip(0)) for x in inputs[: len(ys)]]
    gradients = torch.autograd.grad(ys, leaves, outgoing)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert gradient.shape == leaf.shape
    return [t.reshape(-1, N) for t in (*ys, *gradients)]


def together(op: str, layout: str) -> list[list[str]]:
    """The layouts of the op's inputs: x and residual may differ in theirs, but not in shape."""
    if op != "add_layer_norm":
        return [[layout]]
    if layout in ("six_dimensions", "any_stride_at_size_one"):
        return [[layout, layout]]
    return [[layout, layout], [layout, "contiguous"], ["contiguous", layout]]


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton", "cuda_emulated"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_any_layout(op: str, layout: str, backend: str) -> None:
    skip_unless_runs(op, backend)
    with fastgpt.backend(backend):
        for layouts in together(op, layout):
            inputs = [torch.randn(2, 3, 4, N) for _ in layouts]
            want = results(op, ["contiguous"] * len(inputs), inputs)
            for got, expected in zip(results(op, layouts, inputs), want, strict=True):
                assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["softmax_fwd", "layer_norm_fwd", "bias_gelu_fwd"])
def test_a_raw_call_with_scattered_rows_raises(name: str) -> None:
    skip_unless_runs("softmax", "cpu")
    options = {"softmax_fwd": (False,), "layer_norm_fwd": (None, None, 1e-5, False)}
    x = torch.randn(2, 3, N).transpose(0, 1)
    op = getattr(torch.ops.fastgpt, name)
    with pytest.raises(RuntimeError, match="x: unexpected shape, strides"):
        op(x, *options.get(name, (None, True)))
