"""decode_attention: the newest queries over the cache, each sequence against plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastgpt
from fastgpt import dispatch
from fastgpt import functional as F
from tests.attention_in_torch import attend
from tests.contract import (
    LOW_DTYPES,
    Case,
    Inputs,
    OpSpec,
    Results,
    check_contract,
    device_of,
    first_axis,
    grid,
    normal,
    skip_unless_runs,
)

HALVES = (torch.bfloat16, torch.float16)


def positions(inputs: Inputs, b: int) -> Tensor:
    """The position whose key each slot of sequence b holds before the append; -1 for none."""
    capacity, length = inputs["k_cache"].shape[2], int(inputs["cache_lengths"][b])
    held = torch.full((capacity,), -1)
    p = torch.arange(max(0, length - capacity) if inputs["ring"] else 0, length)
    held[p % capacity] = p
    return held


def hidden(inputs: Inputs) -> Inputs:
    """Slots without a key hold NaN and inf, and so do those before cache_start."""
    k, v = inputs["k_cache"].clone(), inputs["v_cache"].clone()
    for b in range(len(k)):
        held = positions(inputs, b)
        first = 0 if inputs["cache_start"] is None else int(inputs["cache_start"][b])
        k[b, :, held < first], v[b, :, held < first] = float("nan"), float("-inf")
    return inputs | {"k_cache": k, "v_cache": v}


def case(
    id: str,
    lengths: tuple[int, ...],
    *,
    t: int = 1,
    append: bool = True,
    h: int = 2,
    hk: int = 2,
    d: int = 16,
    capacity: int = 64,
    window: int | None = None,
    start: tuple[int, ...] | None = None,
    ring: bool = False,
    scale: float | None = None,
    lse: bool = False,
    dtypes: tuple[torch.dtype, ...] = LOW_DTYPES,
) -> Case:
    """A sequence per length in caches (b, hk, capacity, d), t queries each."""

    def make(g: torch.Generator, dtype: torch.dtype) -> Inputs:
        b = len(lengths)
        return {
            "q": normal(g, b, h, t, d, dtype=dtype),
            "k_cache": normal(g, b, hk, capacity, d, dtype=dtype),
            "v_cache": normal(g, b, hk, capacity, d, dtype=dtype),
            "cache_lengths": torch.tensor(lengths, dtype=torch.int32),
            "k_new": normal(g, b, hk, t, d, dtype=dtype) if append else None,
            "v_new": normal(g, b, hk, t, d, dtype=dtype) if append else None,
            "window": window,
            "scale": scale,
            "cache_start": None if start is None else torch.tensor(start, dtype=torch.int32),
            "ring": ring,
            "return_lse": lse,
        }

    return Case(id, make, hidden, dtypes)


CASES = (
    case("first_token", (0, 0)),
    case("no_batch", ()),
    case("nothing_cached", (0, 5), append=False, lse=True),
    case("prime_lengths", (1, 13, 37, 61), lse=True),
    case("full_cache", (63, 64 - 1)),
    case("without_append", (5, 64, 33), append=False),
    case("just_over_block", (128, 129, 300), capacity=320, d=64, lse=True),
    case("several_new_tokens", (0, 7, 50), t=5),
    case("several_queries_without_append", (3, 40), t=3, append=False),
    case("two_heads_per_key_head", (9, 30), h=4, hk=2),
    case("one_key_head", (9, 30), h=6, hk=1),
    case("window", (2, 30, 60), window=7, lse=True),
    case("window_1_sees_itself", (0, 30), window=1),
    case("window_beyond_cache", (2, 30), window=500),
    case("left_padding", (20, 30, 40), start=(0, 11, 40), lse=True),
    case("left_padding_hides_all", (20, 30), start=(20, 11), append=False, lse=True),
    case("left_padding_and_window", (20, 30), start=(15, 3), window=9, t=3),
    case("ring_not_yet_full", (3, 0), capacity=16, window=16, ring=True),
    case("ring_wrapped", (16, 17, 100, 1000), capacity=16, window=16, ring=True, lse=True),
    case("ring_several_new_tokens", (2, 18, 31), capacity=18, window=16, t=3, ring=True),
    case("ring_with_room", (20, 90), capacity=32, window=11, ring=True, start=(0, 85)),
    case("ring_without_append", (5, 40), capacity=16, window=12, ring=True, append=False),
    case("head_dim_of_gpt3_xl", (40, 100), capacity=128, d=128, h=3, hk=3, scale=0.05),
    case("many_splits", (1100, 3), capacity=1152, d=130, h=1, hk=1, lse=True),
    case("long_chunk", (0, 40), t=17, h=1, hk=1, d=24, window=9, lse=True),
    case("long_chunk_in_a_ring", (3, 100), t=17, h=1, hk=1, capacity=40, window=16, ring=True),
    case("more_queries_than_a_tile_has_rows", (40,), t=13, h=5, hk=1, d=80, dtypes=HALVES),
)


def low(**inputs: Any) -> Any:
    """Append to the caches, gather each sequence's keys in order, attend."""
    q, lse, out = inputs["q"], [], []
    t = q.shape[2]
    for b, length in enumerate(inputs["cache_lengths"].tolist()):
        held = positions(inputs, b)
        if inputs["k_new"] is not None:
            for i in range(t):
                slot = (length + i) % len(held)
                held[slot] = length + i
                inputs["k_cache"][b, :, slot] = inputs["k_new"][b, :, i]
                inputs["v_cache"][b, :, slot] = inputs["v_new"][b, :, i]
            length += t
        own = torch.arange(length - t, length)[:, None]
        first = 0 if inputs["cache_start"] is None else int(inputs["cache_start"][b])
        seen = (held >= first) & (held >= 0) & (held <= own)
        if inputs["window"] is not None:
            seen = seen & (own - held < inputs["window"])
        k, v = inputs["k_cache"][b : b + 1], inputs["v_cache"][b : b + 1]
        parts = attend(q[b : b + 1], k, v, seen, inputs["scale"])
        out.append(parts[0])
        lse.append(parts[1])
    wide = torch.promote_types(q.dtype, torch.float32)
    whole = torch.cat(out) if out else q.clone()
    return (whole, torch.cat(lse).to(wide)) if inputs["return_lse"] else whole


def cancellation(inputs: Inputs, results: Results) -> dict[str, float]:
    q, k = inputs["q"], inputs["k_cache"]
    if q.numel() == 0:
        return {}
    scale = q.shape[-1] ** -0.5 if inputs["scale"] is None else inputs["scale"]
    return {"lse": scale * q.abs().sum(-1).max().item() * k.abs().max().item()}


BATCHED = ("q", "k_cache", "v_cache", "cache_lengths", "k_new", "v_new", "cache_start")


SPEC = OpSpec(
    op="decode_attention",
    function=F.decode_attention,
    low=low,
    outputs=("out", "lse"),
    gradients=(),
    cases=CASES,
    rows=first_axis(
        ("prime_lengths", "window", "left_padding", "ring_wrapped", "many_splits"), BATCHED
    ),
    stored={},
    cancellation=cancellation,
    storage={"out": (0, 2, 1, 3)},
    mutated=("k_cache", "v_cache"),
    unit_stride=("k_cache", "v_cache"),
)


@pytest.mark.parametrize(("backend", "dtype", "case"), grid(SPEC))
def test_contract(backend: str, dtype: torch.dtype, case: Case) -> None:
    check_contract(SPEC, backend, dtype, case)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("ring", [False, True], ids=["linear", "ring"])
@pytest.mark.parametrize(
    ("h", "hk", "t", "d", "dtype"),
    [
        (16, 8, 3, 64, torch.bfloat16),
        (8, 8, 1, 128, torch.float32),
        (32, 2, 1, 128, torch.bfloat16),
        (8, 4, 1, 80, torch.float16),
        (16, 2, 2, 256, torch.bfloat16),
        (4, 4, 1, 20, torch.bfloat16),  # 40 bytes a row: no copies of 16
    ],
)
def test_a_full_gpu_gives_the_bits_of_a_sequence_alone(
    h: int, hk: int, t: int, d: int, dtype: torch.dtype, ring: bool
) -> None:
    """On a full GPU a block takes several splits in turn, on an idle one each split has a block."""
    skip_unless_runs("decode_attention", "cuda", dtype)
    b, capacity = 96, 4096
    options = {"device": "cuda", "dtype": dtype}
    q, new = torch.randn(b, h, t, d, **options), torch.randn(2, b, hk, t, d, **options)
    caches = torch.randn(2, b, hk, capacity, d, **options)
    most = 2 * capacity if ring else capacity - t
    lengths = torch.randint(most // 2, most, (b,), dtype=torch.int32, device="cuda")

    def step(of: slice) -> list[Tensor]:
        k, v = caches[:, of].clone()
        appended = {"k_new": new[0, of], "v_new": new[1, of]}
        out = F.decode_attention(q[of], k, v, lengths[of], window=4000, ring=ring, **appended)
        return [out, k, v]

    with fastgpt.backend("cuda"):
        together = step(slice(None))
        for i in range(0, b, 19):
            alone = step(slice(i, i + 1))
            assert all(torch.equal(x[i], y[0]) for x, y in zip(together, alone, strict=True))


FAR = 2**31 - 1


GPU_BACKENDS = [b for b in dispatch.TABLE["decode_attention"] if b not in ("cpu", "reference")]


@pytest.mark.parametrize("ring", [False, True], ids=["linear", "ring"])
@pytest.mark.parametrize("t", [1, 3, 17], ids=lambda t: f"t={t}")
@pytest.mark.parametrize("append", [True, False], ids=["append", "no_append"])
@pytest.mark.parametrize("tested", GPU_BACKENDS)
def test_any_length_and_start_is_memory_safe(tested: str, append: bool, t: int, ring: bool) -> None:
    """What the op does not check on a GPU: the raw kernel writes and reads no slot that is not
    there, and agrees with the reference about the others."""
    skip_unless_runs("decode_attention", tested)
    pairs = [(-FAR - 1, 0), (-1, 0), (-9, -5), (5, -FAR - 1), (24, 3), (39, 20), (40, 41), (41, 0)]
    pairs += [(47, 30), (100, 90), (30, FAR), (FAR - 1, FAR - 3), (FAR, 0)]
    b, capacity, g = len(pairs), 40, torch.Generator().manual_seed(0)
    dtype, tolerance = (torch.float32, 1e-5) if t == 1 else (torch.bfloat16, 0.02)
    fence = normal(g, b, 1, capacity + 2, 8, dtype=dtype)
    q = normal(g, b, 1, t, 8, dtype=dtype)
    new = [normal(g, b, 1, t, 8, dtype=dtype) if append else None for _ in range(2)]
    length, start = torch.tensor(pairs, dtype=torch.int32).T.contiguous()
    results = []
    for backend in (tested, "reference"):
        device = device_of(backend)
        fenced = [fence.clone().to(device), fence.flip(0).to(device)]
        caches = [x[:, :, 1:-1] for x in fenced]
        run = dispatch.kernel("decode_attention", backend, "decode_attention")
        moved = [None if x is None else x.to(device) for x in (q, *caches, length, *new)]
        outputs = run(*moved, 0.3, 16, start.to(device), ring)
        results.append([x.cpu() for x in (*outputs, *fenced)])
    (out, lse, *got), (want_out, want_lse, *want) = results
    torch.testing.assert_close(out, want_out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_backward_notices_the_append(backend: str) -> None:
    skip_unless_runs("decode_attention", backend)
    g = torch.Generator().manual_seed(0)
    q = normal(g, 1, 2, 1, 8, dtype=torch.float32).requires_grad_()
    caches = [normal(g, 1, 2, 6, 8, dtype=torch.float32) for _ in range(2)]
    out = F.attention(q, *caches)
    with torch.no_grad(), fastgpt.backend(backend):
        new = torch.zeros(1, 2, 1, 8)
        length = torch.tensor([4], dtype=torch.int32)
        F.decode_attention(q, *caches, length, k_new=new, v_new=new)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
