"""Wrong arguments: each raises the right exception, which names the argument and what came."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import fastgpt
from fastgpt import dispatch
from fastgpt import functional as F
from tests.contract import device_of, skip_unless_runs

Q = torch.zeros(2, 4, 5, 8)
K = torch.zeros(2, 2, 7, 8)
ROWS = torch.zeros(3, 6)
TARGET = torch.zeros(3, dtype=torch.int64)
PACKED = torch.zeros(6, 2, 8)
OFFSETS = torch.tensor([0, 2, 6], dtype=torch.int32)
CACHE = torch.zeros(2, 2, 9, 8)
LENGTHS = torch.tensor([3, 9], dtype=torch.int32)
META = torch.device("meta")


def learned(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def attention(q: Any = Q, k: Any = K, v: Any = K, **options: Any) -> Any:
    return F.attention(q, k, v, **options)


def sdpa(q: Any = Q, k: Any = K, v: Any = K, **options: Any) -> Any:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)


def varlen(
    q: Any = PACKED,
    k: Any = PACKED,
    v: Any = PACKED,
    cu_q: Any = OFFSETS,
    cu_k: Any = OFFSETS,
    max_q: Any = 4,
    max_k: Any = 4,
    **options: Any,
) -> Any:
    return F.varlen_attention(q, k, v, cu_q, cu_k, max_q, max_k, **options)


def decode(
    q: Any = Q[:, :, :1], k: Any = CACHE, v: Any = CACHE, lengths: Any = LENGTHS, **options: Any
) -> Any:
    k, v = (c.clone() if isinstance(c, Tensor) and not c.requires_grad else c for c in (k, v))
    return F.decode_attention(q, k, v, lengths, **options)


def offsets(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


NEW = torch.zeros(2, 2, 1, 8)
BAD: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    # attention
    (ValueError, "q", lambda: attention(q=Q[0])),
    (ValueError, "k", lambda: attention(k=K[0], v=K[0])),
    (ValueError, "k", lambda: attention(k=K[..., :6], v=K[..., :6])),
    (ValueError, "k", lambda: attention(k=K[:1], v=K[:1])),
    (ValueError, "v", lambda: attention(v=K[:, :, :3])),
    (ValueError, "k", lambda: attention(q=Q[:, :3])),
    (ValueError, "k", lambda: attention(k=K[:, :0], v=K[:, :0])),
    (ValueError, "q", lambda: attention(q=Q[..., :0], k=K[..., :0], v=K[..., :0])),
    (TypeError, "q", lambda: attention(q=[1.0])),
    (TypeError, "q", lambda: attention(q=Q.int())),
    (TypeError, "q", lambda: attention(q=Q.to(torch.complex64))),
    (TypeError, "v", lambda: attention(v=K.bool())),
    (TypeError, "k", lambda: attention(k=K.half())),
    (TypeError, "v", lambda: attention(v=K.double())),
    (ValueError, "k", lambda: attention(k=K.to(META))),
    (ValueError, "v", lambda: attention(v=K.to(META))),
    (ValueError, "window", lambda: attention(window=0)),
    (ValueError, "window", lambda: attention(window=-3)),
    (TypeError, "window", lambda: attention(window=2.0)),
    (TypeError, "window", lambda: attention(window=True)),
    (TypeError, "scale", lambda: attention(scale="big")),
    (TypeError, "causal", lambda: attention(causal="no")),
    (TypeError, "causal", lambda: attention(causal=2)),
    (TypeError, "return_lse", lambda: attention(return_lse="no")),
    (ValueError, "window", lambda: attention(window=2**70)),
    (ValueError, "scale", lambda: attention(scale=10**400)),
    (TypeError, "q", lambda: attention(q=Q.to_sparse())),
    (TypeError, "causal", lambda: attention(causal=None)),
    (ValueError, "q", lambda: attention(q=Q[:, :0])),
    (TypeError, "key_padding_mask", lambda: attention(key_padding_mask=torch.ones(2, 7))),
    (ValueError, "key_padding_mask", lambda: attention(key_padding_mask=torch.ones(2, 6).bool())),
    (
        ValueError,
        "key_padding_mask",
        lambda: attention(key_padding_mask=torch.ones(2, 7, device=META).bool()),
    ),
    (ValueError, "bias", lambda: attention(bias=torch.zeros(3, 5, 7))),
    (ValueError, "bias", lambda: attention(bias=torch.zeros(1, 2, 4, 5, 7))),
    (TypeError, "bias", lambda: attention(bias=torch.zeros(5, 7).int())),
    (ValueError, "alibi_slopes", lambda: attention(alibi_slopes=torch.zeros(3))),
    (TypeError, "alibi_slopes", lambda: attention(alibi_slopes=torch.zeros(4).long())),
    (ValueError, "alibi_slopes", lambda: attention(alibi_slopes=learned(torch.zeros(4)))),
    (ValueError, "dropout_p", lambda: attention(dropout_p=1.5)),
    (ValueError, "dropout_p", lambda: attention(dropout_p=-0.1)),
    (TypeError, "dropout_seed", lambda: attention(dropout_p=0.1, dropout_seed=torch.zeros(1))),
    (
        ValueError,
        "dropout_seed",
        lambda: attention(dropout_p=0.1, dropout_seed=torch.zeros(2, dtype=torch.int64)),
    ),
    # scaled_dot_product_attention, whose calls without a window torch answers or refuses
    (ValueError, "window", lambda: sdpa(window=0)),
    (TypeError, "key", lambda: sdpa(k=K.half(), window=2)),
    (TypeError, "scale", lambda: sdpa(scale="a")),
    (TypeError, "query", lambda: sdpa(q=Q.int(), window=2)),
    # varlen_attention
    (ValueError, "q", lambda: varlen(q=PACKED[0])),
    (ValueError, "k", lambda: varlen(k=PACKED[..., :4], v=PACKED[..., :4])),
    (ValueError, "v", lambda: varlen(v=PACKED[:3])),
    (ValueError, "k", lambda: varlen(q=PACKED[:, :1].expand(6, 3, 8))),
    (TypeError, "q", lambda: varlen(q=PACKED.int())),
    (TypeError, "k", lambda: varlen(k=PACKED.half())),
    (ValueError, "v", lambda: varlen(v=PACKED.to(META))),
    (ValueError, "window", lambda: varlen(window=0)),
    (TypeError, "cu_seqlens_q", lambda: varlen(cu_q=OFFSETS.long())),
    (TypeError, "cu_seqlens_k", lambda: varlen(cu_k=OFFSETS.float())),
    (ValueError, "cu_seqlens_q", lambda: varlen(cu_q=OFFSETS[None])),
    (ValueError, "cu_seqlens_k", lambda: varlen(cu_k=OFFSETS[:2])),
    (ValueError, "cu_seqlens_q", lambda: varlen(cu_q=OFFSETS[:0], cu_k=OFFSETS[:0])),
    (ValueError, "max_seqlen_q", lambda: varlen(max_q=-1)),
    (TypeError, "max_seqlen_k", lambda: varlen(max_k=2.5)),
    # decode_attention
    (
        ValueError,
        "k_cache",
        lambda: F.decode_attention(
            Q[:, :, :1], CACHE[:1].expand(2, -1, -1, -1), CACHE, LENGTHS, k_new=NEW, v_new=NEW
        ),
    ),
    (ValueError, "q", lambda: decode(q=Q[0])),
    (ValueError, "k_cache", lambda: decode(k=CACHE[0], v=CACHE[0])),
    (ValueError, "v_cache", lambda: decode(v=CACHE[:, :, :4])),
    (ValueError, "k_cache", lambda: decode(q=torch.zeros(2, 3, 1, 8))),
    (TypeError, "q", lambda: decode(q=Q[:, :, :1].int())),
    (TypeError, "k_cache", lambda: decode(k=CACHE.half(), v=CACHE.half())),
    (ValueError, "v_cache", lambda: decode(v=CACHE.to(META))),
    (ValueError, "k_cache", lambda: decode(k=CACHE.transpose(2, 3).contiguous().transpose(2, 3))),
    (TypeError, "cache_lengths", lambda: decode(lengths=LENGTHS.long())),
    (ValueError, "cache_lengths", lambda: decode(lengths=LENGTHS[:1])),
    (ValueError, "v_new", lambda: decode(k_new=NEW)),
    (ValueError, "k_new", lambda: decode(v_new=NEW)),
    (ValueError, "k_new", lambda: decode(k_new=NEW[..., :4], v_new=NEW[..., :4])),
    (TypeError, "k_new", lambda: decode(k_new=NEW.half(), v_new=NEW.half())),
    (TypeError, "cache_start", lambda: decode(cache_start=LENGTHS.float())),
    (ValueError, "cache_start", lambda: decode(cache_start=LENGTHS[:1])),
    (ValueError, "window", lambda: decode(window=0)),
    (ValueError, "window", lambda: decode(ring=True)),
    (ValueError, "k_cache", lambda: decode(ring=True, window=10)),
    (TypeError, "ring", lambda: decode(ring="yes", window=3)),
    (ValueError, "q", lambda: decode(q=learned(Q[:, :, :1]))),
    (ValueError, "k_cache", lambda: decode(k=learned(CACHE))),
    # layer_norm and add_layer_norm
    (TypeError, "input", lambda: F.layer_norm(ROWS.int(), 6)),
    (TypeError, "input", lambda: F.layer_norm([1.0], 1)),
    (ValueError, "normalized_shape", lambda: F.layer_norm(ROWS, 5)),
    (ValueError, "normalized_shape", lambda: F.layer_norm(ROWS, (2, 3, 6))),
    (ValueError, "normalized_shape", lambda: F.layer_norm(ROWS, ())),
    (TypeError, "normalized_shape", lambda: F.layer_norm(ROWS, None)),
    (TypeError, "eps", lambda: F.layer_norm(ROWS, 6, eps="small")),
    (TypeError, "eps", lambda: F.add_layer_norm(ROWS, ROWS, 6, eps=None)),
    (ValueError, "weight", lambda: F.layer_norm(ROWS, 6, torch.ones(5))),
    (TypeError, "weight", lambda: F.layer_norm(ROWS, 6, torch.ones(6).half())),
    (TypeError, "weight", lambda: F.layer_norm(ROWS, 6, torch.ones(6).int())),
    (ValueError, "weight", lambda: F.layer_norm(ROWS, 6, torch.ones(6, device=META))),
    (ValueError, "bias", lambda: F.layer_norm(ROWS, 6, None, torch.ones(7))),
    (TypeError, "bias", lambda: F.layer_norm(ROWS.half(), 6, None, torch.ones(6).bfloat16())),
    (TypeError, "x", lambda: F.add_layer_norm(ROWS.int(), ROWS.int(), 6)),
    (ValueError, "residual", lambda: F.add_layer_norm(ROWS, ROWS[:2], 6)),
    (TypeError, "residual", lambda: F.add_layer_norm(ROWS, ROWS.half(), 6)),
    (TypeError, "residual", lambda: F.add_layer_norm(ROWS, ROWS.int(), 6)),
    (ValueError, "residual", lambda: F.add_layer_norm(ROWS, ROWS.to(META), 6)),
    (ValueError, "normalized_shape", lambda: F.add_layer_norm(ROWS, ROWS, 5)),
    # softmax and masked_softmax
    (TypeError, "input", lambda: F.softmax(ROWS.int())),
    (ValueError, "dim", lambda: F.softmax(ROWS, 2)),
    (ValueError, "dim", lambda: F.softmax(ROWS, -3)),
    (TypeError, "dtype", lambda: F.softmax(ROWS, -1, torch.int32)),
    (TypeError, "scores", lambda: F.masked_softmax(ROWS.int())),
    (ValueError, "scores", lambda: F.masked_softmax(ROWS[0])),
    (ValueError, "window", lambda: F.masked_softmax(ROWS, window=0)),
    (TypeError, "window", lambda: F.masked_softmax(ROWS, window=1.5)),
    (TypeError, "scale", lambda: F.masked_softmax(ROWS, scale=None)),
    (TypeError, "causal", lambda: F.masked_softmax(ROWS, causal="no")),
    # bias_gelu
    (TypeError, "x", lambda: F.bias_gelu(ROWS.int())),
    (ValueError, "bias", lambda: F.bias_gelu(ROWS, torch.zeros(5))),
    (TypeError, "bias", lambda: F.bias_gelu(ROWS, torch.zeros(6).half())),
    (ValueError, "bias", lambda: F.bias_gelu(ROWS, torch.zeros(6, device=META))),
    (ValueError, "approximate", lambda: F.bias_gelu(ROWS, None, "erf")),
    # cross_entropy
    (TypeError, "input", lambda: F.cross_entropy(ROWS.int(), TARGET)),
    (ValueError, "input", lambda: F.cross_entropy(ROWS[0, 0], TARGET)),
    (ValueError, "input", lambda: F.cross_entropy(ROWS[:, :0], TARGET)),
    (ValueError, "target", lambda: F.cross_entropy(ROWS, TARGET[:2])),
    (TypeError, "target", lambda: F.cross_entropy(ROWS, TARGET.int())),
    (TypeError, "target", lambda: F.cross_entropy(ROWS, TARGET.bool())),
    (ValueError, "target", lambda: F.cross_entropy(ROWS, TARGET.to(META))),
    (ValueError, "weight", lambda: F.cross_entropy(ROWS, TARGET, torch.ones(5))),
    (TypeError, "weight", lambda: F.cross_entropy(ROWS, TARGET, torch.ones(6).half())),
    (ValueError, "weight", lambda: F.cross_entropy(ROWS, TARGET, learned(torch.ones(6)))),
    (ValueError, "reduction", lambda: F.cross_entropy(ROWS, TARGET, reduction="avg")),
    (ValueError, "reduction", lambda: F.cross_entropy(ROWS, TARGET, reduction=["mean"])),
    (ValueError, "label_smoothing", lambda: F.cross_entropy(ROWS, TARGET, label_smoothing=1.1)),
    (TypeError, "label_smoothing", lambda: F.cross_entropy(ROWS, TARGET, label_smoothing="a")),
    (TypeError, "ignore_index", lambda: F.cross_entropy(ROWS, TARGET, ignore_index=0.5)),
    # linear_cross_entropy
    (TypeError, "input", lambda: F.linear_cross_entropy(ROWS.int(), ROWS.int(), TARGET)),
    (ValueError, "linear_weight", lambda: F.linear_cross_entropy(ROWS, ROWS[:, :5], TARGET)),
    (ValueError, "linear_weight", lambda: F.linear_cross_entropy(ROWS, ROWS[0], TARGET)),
    (TypeError, "linear_weight", lambda: F.linear_cross_entropy(ROWS, ROWS.half(), TARGET)),
    (ValueError, "linear_weight", lambda: F.linear_cross_entropy(ROWS, ROWS.to(META), TARGET)),
    (ValueError, "target", lambda: F.linear_cross_entropy(ROWS, ROWS, TARGET[:2])),
    (TypeError, "target", lambda: F.linear_cross_entropy(ROWS, ROWS, TARGET.float())),
    (
        ValueError,
        "linear_bias",
        lambda: F.linear_cross_entropy(ROWS, ROWS, TARGET, linear_bias=torch.zeros(2)),
    ),
    (
        TypeError,
        "linear_bias",
        lambda: F.linear_cross_entropy(ROWS, ROWS, TARGET, linear_bias=torch.zeros(3).half()),
    ),
    (ValueError, "reduction", lambda: F.linear_cross_entropy(ROWS, ROWS, TARGET, reduction="")),
    (ValueError, "ignore_index", lambda: F.cross_entropy(ROWS, TARGET, ignore_index=2**70)),
    (ValueError, "x", lambda: F.bias_gelu(torch.tensor(1.0), torch.tensor(1.0))),
    (TypeError, "input", lambda: F.layer_norm(ROWS.to_sparse(), ROWS.shape[-1])),
    (
        ValueError,
        "label_smoothing",
        lambda: F.linear_cross_entropy(ROWS, ROWS, TARGET, label_smoothing=-0.1),
    ),
]

# What tensors hold: checked by the op itself, so once per backend.
BAD_CONTENTS: list[tuple[str, str, int, Callable[[], Any]]] = [
    ("cross_entropy", "target[1]", 6, lambda: F.cross_entropy(ROWS, torch.tensor([0, 6, 1]))),
    ("cross_entropy", "target[2]", -1, lambda: F.cross_entropy(ROWS, torch.tensor([0, 5, -1]))),
    (
        "linear_cross_entropy",
        "target[0]",
        3,
        lambda: F.linear_cross_entropy(ROWS, ROWS, torch.tensor([3, 0, 1])),
    ),
    ("varlen_attention", "cu_seqlens_q[2]", 2, lambda: varlen(cu_q=offsets(0, 4, 2))),
    ("varlen_attention", "cu_seqlens_k[2]", 2, lambda: varlen(cu_k=offsets(0, 4, 2))),
    ("varlen_attention", "cu_seqlens_q[0]", 1, lambda: varlen(cu_q=offsets(1, 2, 6))),
    ("varlen_attention", "cu_seqlens_k[2]", 7, lambda: varlen(cu_k=offsets(0, 3, 7))),
    ("decode_attention", "cache_lengths[1]", 9, lambda: decode(k_new=NEW, v_new=NEW)),
    ("decode_attention", "cache_lengths[0]", 10, lambda: decode(lengths=offsets(10, 0))),
    ("decode_attention", "cache_lengths[1]", -1, lambda: decode(lengths=offsets(0, -1))),
]


def assert_says(message: str, argument: str) -> None:
    assert re.match(rf"{re.escape(argument)}\b", message), message
    assert "expected" in message
    assert re.search(r"\bgot\b|\bis\b|\bfrom\b", message), message


@pytest.mark.parametrize(
    ("error", "argument", "call"),
    [pytest.param(*bad, id=f"{i}-{bad[1]}") for i, bad in enumerate(BAD)],
)
def test_arguments(error: type[Exception], argument: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert_says(str(caught.value), argument)


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
@pytest.mark.parametrize(
    ("op", "element", "value", "call"),
    [pytest.param(*bad, id=f"{bad[1]}={bad[2]}") for bad in BAD_CONTENTS],
)
def test_contents(backend: str, op: str, element: str, value: int, call: Callable[[], Any]) -> None:
    skip_unless_runs(op, backend)
    if device_of(backend) != "cpu":
        pytest.skip("a GPU is not waited for without FASTGPT_CHECK=1")
    with fastgpt.backend(backend), pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(element), message
    assert_says(message, element.split("[")[0])
    assert re.search(rf"(got|is) {value}\b", message), message


def test_bad_contents_write_nothing() -> None:
    """A full cache is noticed before anything is appended."""
    for backend in ("cpu", "reference"):
        if dispatch.refusal("decode_attention", backend, "cpu", torch.float32) is not None:
            continue
        cache = torch.zeros_like(CACHE)
        with fastgpt.backend(backend), pytest.raises(ValueError, match="cache_lengths"):
            F.decode_attention(
                Q[:, :, :1], cache, cache.clone(), LENGTHS, k_new=NEW + 1, v_new=NEW + 1
            )
        assert not cache.any()


def test_a_raw_call_with_more_new_tokens_than_a_ring_has_slots_raises() -> None:
    skip_unless_runs("decode_attention", "cpu")
    new = torch.zeros(2, 2, CACHE.shape[2] + 1, 8)
    q, lengths = torch.zeros(2, 4, new.shape[2], 8), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="k_new: unexpected shape"):
        torch.ops.fastgpt.decode_attention(
            q, CACHE.clone(), CACHE.clone(), lengths, new, new, 0.3, 3, None, True
        )


def test_arguments_are_checked_before_anything_is_allocated() -> None:
    """A shape that no machine could allocate for is refused by its error, not by the allocator."""
    q = torch.empty(1, 1, 1, 8).expand(2**20, 4, 2**20, 8)
    with pytest.raises(ValueError, match=r"^window"):
        F.attention(q, q, q, window=0)
    with pytest.raises(ValueError, match=r"^residual"):
        F.add_layer_norm(q, q[1:], 8)


VMAP = {
    "attention": lambda x: F.attention(x[None], x[None], x[None]),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "softmax": lambda x: F.softmax(x),
    "bias_gelu": lambda x: F.bias_gelu(x),
    "masked_softmax": lambda x: F.masked_softmax(x),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("op", VMAP)
def test_vmap_raises(op: str, grad: bool) -> None:
    skip_unless_runs(op, "cpu")
    x = torch.randn(3, 2, 5, 8, requires_grad=grad)
    with fastgpt.backend("cpu"), pytest.raises(RuntimeError):
        torch.vmap(VMAP[op])(x)


@pytest.mark.parametrize("op", VMAP)
def test_torch_func_is_told_where_it_works(op: str) -> None:
    skip_unless_runs(op, "cpu")
    gradient = torch.func.grad(lambda x: VMAP[op](x).square().sum())
    x = torch.randn(2, 5, 8)
    with fastgpt.backend("cpu"), pytest.raises(RuntimeError, match=f'^{op}: .*"reference"'):
        gradient(x)
    with fastgpt.backend("reference"):
        assert gradient(x).isfinite().all()


@pytest.mark.parametrize("op", VMAP)
def test_forward_mode_differentiation_raises(op: str) -> None:
    """The kernels have no tangent: dropping it silently would be a wrong derivative."""
    skip_unless_runs(op, "cpu")
    x = torch.randn(2, 5, 8)
    with fastgpt.backend("cpu"), pytest.raises(RuntimeError):
        torch.func.jvp(VMAP[op], (x,), (x,))
    with fastgpt.backend("cpu"), forward_ad.dual_level(), pytest.raises(RuntimeError):
        VMAP[op](forward_ad.make_dual(x, x))
    with fastgpt.backend("reference"):
        assert torch.func.jvp(VMAP[op], (x,), (x,))[1].any()
