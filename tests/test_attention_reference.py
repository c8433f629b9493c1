"""The attention oracle against itself: explicit backward, autograd, gradcheck, plain formulas."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import fastgpt
from fastgpt import functional as F
from fastgpt.backends.reference import attention as dense
from fastgpt.backends.reference import varlen_attention as varlen

B, H, HK, D = 2, 4, 2, 5


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def qkv(sq: int, sk: int, h: int = H, hk: int = HK, d: int = D) -> tuple[torch.Tensor, ...]:
    return randn(B, h, sq, d), randn(B, hk, sk, d, seed=1), randn(B, hk, sk, d, seed=2)


def brute_force(q, k, v, causal, window, offset, padding, mask, bias, slopes):
    """One row at a time, over Python lists of the visible keys."""
    b, h, sq, d = q.shape
    hk, sk = k.shape[1], k.shape[2]
    out, lse = torch.zeros_like(q), torch.full((b, h, sq), -torch.inf, dtype=q.dtype)
    for n, head, i in itertools.product(range(b), range(h), range(sq)):
        position = i + offset
        keys = [
            j
            for j in range(sk)
            if (not causal or j <= position)
            and (window is None or abs(position - j) < window)
            and (padding is None or padding[n, j])
            and (mask is None or mask.expand(b, h, sq, sk)[n, head, i, j])
        ]
        if not keys:
            continue
        key_head = head * hk // h
        scores = k[n, key_head, keys] @ q[n, head, i] / math.sqrt(d)
        if bias is not None:
            scores = scores + bias.expand(b, h, sq, sk)[n, head, i, keys]
        if slopes is not None:
            distance = torch.tensor([abs(position - j) for j in keys])
            scores = scores - slopes.expand(b, h)[n, head] * distance
        lse[n, head, i] = scores.logsumexp(0)
        out[n, head, i] = scores.softmax(0) @ v[n, key_head, keys]
    return out, lse


PADDING = torch.tensor([[False, False, True, True, False, True, True], [True] * 4 + [False] * 3])
OPTIONS = {
    "dense": {},
    "bidirectional": {"causal": False},
    "band": {"window": 3},
    "bidirectional_band": {"causal": False, "window": 2},
    "itself_only": {"window": 1},
    "padding": {"padding": PADDING},
    "padding_band": {"padding": PADDING, "window": 2},
    "bias": {"bias": randn(1, H, 1, 7)},
    "alibi": {"slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
    "mask": {"mask": randn(B, 1, 6, 7) > 0, "causal": False},
    "top_left": {"offset": 0},
    "rows_without_keys": {"offset": -3, "window": 2},
    "all": {
        "padding": PADDING,
        "window": 4,
        "bias": randn(B, 1, 6, 7),
        "slopes": torch.rand(B, H, dtype=torch.float64),
        "mask": randn(1, H, 6, 1) > -1,
    },
}


def call(fwd_or_bwd, tensors, option, tail):
    option = {"causal": True, "window": None, "offset": 1, **option}
    return fwd_or_bwd(
        *tensors,
        D**-0.5,
        option["causal"],
        option["window"],
        option["offset"],
        option.get("padding"),
        option.get("bias"),
        option.get("mask"),
        option.get("slopes"),
        *tail,
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_forward_is_the_formula(name):
    option, tensors = OPTIONS[name], qkv(6, 7)
    out, lse, out_lo = call(dense.attention_fwd, tensors, option, (0.0, None, True))
    expected_out, expected_lse = brute_force(
        *tensors,
        option.get("causal", True),
        option.get("window"),
        option.get("offset", 1),
        option.get("padding"),
        option.get("mask"),
        option.get("bias"),
        option.get("slopes"),
    )
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)
    assert out_lo.numel() == 0
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("name", OPTIONS)
def test_explicit_backward_is_the_derivative(name, dropout_p):
    option = dict(OPTIONS[name])
    tensors = [t.requires_grad_() for t in qkv(6, 7)]
    if "bias" in option:
        option["bias"] = option["bias"].clone().requires_grad_()
        tensors.append(option["bias"])
    seed = torch.tensor(11) if dropout_p else None
    out, lse, out_lo = call(dense.attention_fwd, tensors[:3], option, (dropout_p, seed, False))
    dout, dlse = randn(*out.shape, seed=5), randn(*lse.shape, seed=6)
    finite = torch.where(lse == -torch.inf, 0.0, lse)
    expected = torch.autograd.grad((out * dout).sum() + (finite * dlse).sum(), tensors)
    with torch.no_grad():
        got = call(
            dense.attention_bwd,
            (dout, dlse, *tensors[:3], out, lse, out_lo),
            option,
            (dropout_p, seed, "bias" in option),
        )
    for name, g, e in zip(("dq", "dk", "dv", "dbias"), got, expected, strict=False):
        torch.testing.assert_close(g, e, msg=lambda text, name=name: f"{name}: {text}")
    assert "bias" in option or got[3].numel() == 0


@pytest.mark.parametrize("h", [2, 1])
def test_gradcheck_twice(h):
    q, k, v = (t[:1, :h, :3, :2].clone().requires_grad_() for t in qkv(4, 4))
    k, v = k[:, :1].detach().requires_grad_(), v[:, :1].detach().requires_grad_()
    bias = randn(h, 1, 3).requires_grad_()
    mask = torch.tensor([[False, True, True]])

    def run(q, k, v, bias):
        out, lse = F.attention(q, k, v, window=2, bias=bias, key_padding_mask=mask, return_lse=True)
        return out, lse[..., 1:]

    with fastgpt.backend("reference"):
        assert torch.autograd.gradcheck(run, (q, k, v, bias))
        assert torch.autograd.gradgradcheck(run, (q, k, v, bias))


def test_half_precision_rounds_once():
    tensors = [t.bfloat16() for t in qkv(6, 7)]
    out, lse, out_lo = call(dense.attention_fwd, tensors, {}, (0.0, None, True))
    wide, wide_lse, _ = call(
        dense.attention_fwd, [t.float() for t in tensors], {}, (0.0, None, True)
    )
    assert torch.equal(out, wide.bfloat16())
    assert torch.equal(out_lo, (wide - out.float()).bfloat16())
    assert torch.equal(lse, wide_lse)


def test_hidden_keys_and_blind_rows_leak_nothing():
    q, k, v = qkv(6, 7)
    poison = ~PADDING[:, None, :, None]
    q[:, :, 0] = torch.nan  # sees no key: offset -3 and window 2
    k, v = k.masked_fill(poison, torch.nan), v.masked_fill(poison, torch.inf)
    option = {"padding": PADDING, "offset": -3, "window": 2}
    clean = [torch.nan_to_num(t, 0.0, 0.0) for t in (q, k, v)]
    results = []
    for tensors in ((q, k, v), clean):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out, lse, lo = call(dense.attention_fwd, leaves, option, (0.0, None, True))
        torch.where(lse == -torch.inf, 0.0, lse + out.sum(-1)).sum().backward()
        with torch.no_grad():
            explicit = call(
                dense.attention_bwd,
                (torch.ones_like(out), torch.ones_like(lse), *leaves, out, lse, lo),
                option,
                (0.0, None, False),
            )
        results.append([out.detach(), *(t.grad for t in leaves), *explicit[:3]])
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
        assert got.isfinite().all()


@pytest.mark.parametrize(("sq", "sk"), [(0, 3), (3, 0), (0, 0)])
def test_zero_sizes(sq, sk):
    tensors = qkv(sq, sk)
    out, lse, lo = call(dense.attention_fwd, tensors, {"offset": sk - sq}, (0.0, None, True))
    assert torch.equal(out, torch.zeros(B, H, sq, D, dtype=out.dtype))
    assert torch.equal(lse, torch.full((B, H, sq), -torch.inf, dtype=out.dtype))
    grads = call(dense.attention_bwd, (out, None, *tensors, out, lse, lo), {}, (0.0, None, False))
    assert all(not g.any() for g in grads)


CU_Q, CU_K = (0, 3, 3, 8, 9), (0, 4, 6, 9, 9)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 2])
def test_packed_documents_are_separate_calls(causal, window):
    q, k, v = randn(10, H, D), randn(11, HK, D), randn(11, HK, D, seed=3)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    offsets = [torch.tensor(cu, dtype=torch.int32) for cu in (CU_Q, CU_K)]
    options = (*offsets, 5, 4, 0.3, causal, window)
    out, lse, lo = varlen.varlen_attention_fwd(*leaves, *options, True)
    expected_out, expected_lse = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(CU_Q), itertools.pairwise(CU_K), strict=True):
        one, one_lse, _ = dense.attention_fwd(
            *(t[a:b].transpose(0, 1)[None] for t, a, b in zip(
                leaves, (q0, k0, k0), (q1, k1, k1), strict=True
            )),
            0.3, causal, window, (k1 - k0) - (q1 - q0), None, None, None, None, 0.0, None, False,
        )  # fmt: skip
        expected_out[q0:q1] = one[0].transpose(0, 1)
        expected_lse[:, q0:q1] = one_lse[0]
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)
    dout, dlse = randn(*out.shape, seed=5), randn(*lse.shape, seed=6)
    finite = torch.where(lse == -torch.inf, 0.0, lse)
    expected = torch.autograd.grad((out * dout).sum() + (finite * dlse).sum(), leaves)
    got = varlen.varlen_attention_bwd(dout, dlse, q, k, v, out, lse, lo, *options)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g.detach(), e)


def test_a_poisoned_document_stays_alone():
    q, k, v = randn(9, H, D), randn(9, HK, D), randn(9, HK, D, seed=3)
    cu = torch.tensor([0, 4, 6], dtype=torch.int32)
    for tensor in (q, k, v):
        tensor[4:] = torch.nan  # the second document, and the tokens after it
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out, lse, lo = varlen.varlen_attention_fwd(*leaves, cu, cu, 4, 4, 0.3, True, None, True)
    assert out[:4].isfinite().all()
    assert not out[6:].any()
    grads = torch.autograd.grad(out[:4].sum(), leaves, retain_graph=True)
    assert all(g[:4].isfinite().all() and not g[6:].any() for g in grads)
    explicit = varlen.varlen_attention_bwd(
        torch.ones_like(out), None, q, k, v, out, lse, lo, cu, cu, 4, 4, 0.3, True, None
    )
    assert all(g[:4].isfinite().all() and not g[6:].any() for g in explicit)
