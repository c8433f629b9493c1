"""CUDA graphs: captured once, replayed for what was not there yet, a decode step above all.

Nothing is read by the host: lengths and seeds are tensors, and the keys are split by the cache's
capacity.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastgpt
from fastgpt import dispatch
from fastgpt import functional as F

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
WINDOW = 24
BACKENDS = [
    name for name in dispatch.TABLE["decode_attention"] if "cuda" in dispatch.DEVICES.get(name, ())
]


def captured(step, warm_ups: int = 3) -> torch.cuda.CUDAGraph:
    """The graph of `step`, after calls on another stream that compile and allocate."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_ups):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@needs_gpu
@pytest.mark.parametrize("window", [None, WINDOW], ids=["dense", "band"])
@pytest.mark.parametrize(
    ("b", "capacity", "d"), [(3, 96, 64), (24, 4096, 128)], ids=["one_split", "many_splits"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decode_step_replays(
    backend: str, b: int, capacity: int, d: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every replay appends where the lengths now say, and attends to what is there by then."""
    monkeypatch.setenv("FASTGPT_CHECK", "1")  # which reads lengths, but not while it is captured
    reason = dispatch.refusal("decode_attention", backend, "cuda", torch.bfloat16)
    if reason is not None:
        pytest.skip(f"{backend} {reason}")
    h, hk = 4, 2
    options = {"device": "cuda", "dtype": torch.bfloat16}
    caches = torch.randn(2, b, hk, capacity, d, **options)
    start = torch.linspace(0, capacity - 8, b, dtype=torch.int32, device="cuda")
    lengths = start.clone()
    q, new = torch.empty(b, h, 1, d, **options), torch.empty(2, b, hk, 1, d, **options)
    out = torch.empty_like(q)

    def attend(caches: Tensor) -> Tensor:
        return F.decode_attention(
            q, caches[0], caches[1], lengths, k_new=new[0], v_new=new[1], window=window
        )

    def step() -> None:
        out.copy_(attend(caches))
        lengths.add_(1)

    with fastgpt.backend(backend), torch.no_grad():
        graph = captured(step)
        lengths.copy_(start)
        caches.copy_(torch.randn_like(caches))
        plain = caches.clone()
        for _ in range(6):
            q.normal_()
            new.normal_()
            expected = attend(plain)
            graph.replay()
            assert torch.equal(out, expected)
            assert torch.equal(caches, plain)
    assert torch.equal(lengths, start + 6)


@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward_replay_with_another_seed(backend: str) -> None:
    """Dropout's seed is a tensor: the mask of a replay is that of the seed it finds there."""
    reason = dispatch.refusal("attention", backend, "cuda", torch.bfloat16, 64)
    if reason is not None:
        pytest.skip(f"{backend} {reason}")
    x = torch.randn(2, 2, 40, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    seed = torch.tensor(1, dtype=torch.int64, device="cuda")
    results = torch.empty(2, *x.shape, device="cuda", dtype=x.dtype)

    def step() -> tuple[Tensor, Tensor]:
        y = F.layer_norm(x, 64)
        out = F.attention(y, y, y, dropout_p=0.25, dropout_seed=seed)
        (dx,) = torch.autograd.grad(out, x, torch.ones_like(out))
        return out.detach(), dx

    with fastgpt.backend(backend):
        graph = captured(lambda: [to.copy_(new) for to, new in zip(results, step(), strict=True)])
        for value in (1, 2, 3):
            seed.fill_(value)
            with torch.no_grad():
                x.normal_()
            expected = torch.stack(step())
            graph.replay()
            assert torch.equal(results, expected)
