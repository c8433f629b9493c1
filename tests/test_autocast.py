"""Autocast: attention in its dtype, everything that sums over a row in float32."""

from __future__ import annotations

import pytest
import torch

import fastgpt
from fastgpt import functional as F
from tests.contract import skip_unless_runs

X = torch.randn(6, 32)
W = torch.randn(32)
TARGET = torch.arange(6)
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])
REGIONS = pytest.mark.parametrize("region", [torch.bfloat16, torch.float16])


def both(*tensors):
    """The tensors in float32 and rounded to bfloat16, which autocast leaves as they are."""
    return [
        [t.to(dtype).requires_grad_() for t in tensors] for dtype in (torch.float32, torch.bfloat16)
    ]


@BACKENDS
@REGIONS
def test_attention_runs_in_the_dtype_of_the_region(backend: str, region: torch.dtype) -> None:
    skip_unless_runs("attention", backend)
    q, k, v = torch.randn(3, 2, 2, 9, 16).requires_grad_()
    ends = torch.tensor([0, 9], dtype=torch.int32)
    with fastgpt.backend(backend), torch.autocast("cpu", region):
        out, lse = F.attention(q, k.bfloat16(), v, return_lse=True)
        packed = F.varlen_attention(*(t[0].transpose(0, 1) for t in (q, k, v)), ends, ends, 9, 9)
    assert out.dtype == packed.dtype == region
    assert lse.dtype == torch.float32
    with fastgpt.backend(backend):
        same = F.attention(q.to(region), k.bfloat16().to(region), v.to(region))
    assert torch.equal(out, same)
    assert torch.autograd.grad(out.sum(), q)[0].dtype == torch.float32


@BACKENDS
def test_decode_follows_its_caches(backend: str) -> None:
    skip_unless_runs("decode_attention", backend)
    cache = torch.randn(2, 1, 2, 9, 16, dtype=torch.bfloat16)
    lengths = torch.tensor([4], dtype=torch.int32)
    new = torch.randn(1, 2, 1, 16)
    with fastgpt.backend(backend), torch.autocast("cpu", torch.bfloat16):
        out = F.decode_attention(new, *cache, lengths, k_new=new, v_new=new)
    assert out.dtype == torch.bfloat16
    assert torch.equal(cache[0, :, :, 4:5], new.bfloat16())


@BACKENDS
@REGIONS
def test_rows_are_reduced_and_returned_in_float32(backend: str, region: torch.dtype) -> None:
    for op in ("layer_norm", "add_layer_norm", "softmax", "cross_entropy", "linear_cross_entropy"):
        skip_unless_runs(op, backend)
    for x, w in both(X, W):
        with fastgpt.backend(backend), torch.autocast("cpu", region):
            y = F.layer_norm(x, 32, w, w)
            added, s = F.add_layer_norm(x, x, 32, w, w)
            p = F.softmax(x)
            loss = F.cross_entropy(x, TARGET)
            fused = F.linear_cross_entropy(x, w.repeat(7, 1), TARGET)
        assert {t.dtype for t in (y, added, p, loss, fused)} == {torch.float32}
        assert s.dtype == x.dtype
        gradients = torch.autograd.grad(
            y.sum() + added.square().sum() + p.square().sum() + loss + fused, (x, w)
        )
        assert [g.dtype for g in gradients] == [x.dtype, w.dtype]
        # Inputs are read as they are: in float32, nothing was rounded to the region's dtype.
        torch.testing.assert_close(
            y, torch.nn.functional.layer_norm(x.float(), (32,), w.float(), w.float())
        )
        torch.testing.assert_close(p, x.float().softmax(-1))


@BACKENDS
def test_softmax_dtype_wins_over_autocast(backend: str) -> None:
    skip_unless_runs("softmax", backend)
    with fastgpt.backend(backend), torch.autocast("cpu", torch.bfloat16):
        assert (
            F.softmax(X, dtype=torch.bfloat16).dtype == torch.softmax(X, -1, torch.bfloat16).dtype
        )


@REGIONS
def test_float64_stays(region: torch.dtype) -> None:
    x, w = X.double(), W.double()
    with torch.autocast("cpu", region):
        results = (F.layer_norm(x, 32, w), *F.add_layer_norm(x, x, 32, w), F.softmax(x))
    assert {t.dtype for t in results} == {torch.float64}


@BACKENDS
@REGIONS
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_parameters_of_losses(
    backend: str, region: torch.dtype, narrow: torch.dtype
) -> None:
    skip_unless_runs("linear_cross_entropy", backend)
    weight, bias = (torch.rand(32).to(narrow) for _ in range(2))
    with fastgpt.backend(backend), torch.autocast("cpu", region):
        got = F.cross_entropy(X, TARGET, weight)
        assert torch.equal(got, F.cross_entropy(X, TARGET, weight.float()))
        projection = torch.eye(32)
        fused = F.linear_cross_entropy(X, projection, TARGET, linear_bias=bias)
        want = F.linear_cross_entropy(X, projection, TARGET, linear_bias=bias.to(region))
        assert torch.equal(fused, want)
