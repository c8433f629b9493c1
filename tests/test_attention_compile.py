"""The attention functions under torch.compile: one graph, any length, the values of eager.

The reference backend is traced only: its graph holds no op of ours, and AOT autograd would spend
most of the time on it.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastgpt
from fastgpt import functional as F
from fastgpt.backends import native

BACKENDS = ["reference"] + ([] if native.MISSING else ["cpu"])
COMPILER = {"cpu": "aot_eager", "reference": "eager"}
LENGTHS = (17, 18, 33, 40, 64)
OFFSETS = torch.tensor([0, 5, 5, 12], dtype=torch.int32)

FUNCTIONS = {
    "attention": lambda q, k, v: F.attention(q, k, v, window=8, return_lse=True),
    "one_tensor_thrice": lambda q, k, v: F.attention(q, q, q),
    "padding_and_bias": lambda q, k, v: F.attention(
        q, k, v, bias=k[:1, :1, None, :, 0].float(), key_padding_mask=k[:, 0, :, 1] > -1
    ),
    "sdpa": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    ),
    "sdpa_of_torch": lambda q, k, v: F.scaled_dot_product_attention(q, q, q[..., :3]),
    "varlen": lambda q, k, v: F.varlen_attention(
        q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1), OFFSETS, OFFSETS, 7, 7
    ),
}


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def run(function, tensors):
    """Outputs and gradients."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum((out * out.detach().cos()).sum() for out in outputs)
    return *outputs, *torch.autograd.grad(total, leaves, allow_unused=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_equals_eager_for_every_length(name, backend):
    if name == "sdpa_of_torch" and backend != "reference":
        pytest.skip("a forced backend never goes to torch")
    function = FUNCTIONS[name]
    counter = CompileCounterWithBackend(COMPILER[backend])
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    with fastgpt.backend(backend):
        for s in LENGTHS:
            tensors = [torch.randn(2, h, s, 8) for h in (4, 2, 2)]
            for got, expected in zip(run(compiled, tensors), run(function, tensors), strict=True):
                torch.testing.assert_close(got, expected)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_decode_writes_the_caches(backend):
    def step(q, k_cache, v_cache, lengths, k_new, v_new):
        return F.decode_attention(
            q, k_cache, v_cache, lengths, k_new=k_new, v_new=v_new, window=4, return_lse=True
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=COMPILER[backend])
    lengths = torch.tensor([3, 9], dtype=torch.int32)
    for t in (1, 2, 3):
        q, new = torch.randn(2, 4, t, 8), torch.randn(2, 2, 2, t, 8)
        caches = torch.randn(2, 2, 2, 20, 8)
        expected_caches = caches.clone()
        with fastgpt.backend(backend):
            got = compiled(q, *caches, lengths, *new)
            expected = step(q, *expected_caches, lengths, *new)
        torch.testing.assert_close(got, expected)
        assert torch.equal(caches, expected_caches)
