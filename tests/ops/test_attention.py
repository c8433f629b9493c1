"""attention against whole matrices in plain torch, over the contract grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastgpt
from fastgpt import dispatch
from fastgpt import functional as F
from fastgpt.backends.reference._philox import dropout_keep
from tests.attention_in_torch import attend, band
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
    rounded,
    skip_unless_runs,
)
from tests.numerics import worst


def hidden(inputs: Inputs) -> Inputs:
    """Padded keys and values hold NaN and inf."""
    padded = ~inputs["key_padding_mask"][:, None, :, None]
    return inputs | {
        "k": inputs["k"].masked_fill(padded, float("nan")),
        "v": inputs["v"].masked_fill(padded, float("-inf")),
    }


def padding(kind: str, b: int, sk: int) -> Tensor:
    """(b, sk), True = may be seen; the first element of the batch sees all keys, the last none."""
    keys = torch.arange(sk)
    lengths = torch.linspace(sk, 0, b).round().long()[:, None]
    if kind == "left":
        return keys >= sk - lengths
    if kind == "right":
        return keys < lengths
    return (keys * 7 % sk) < lengths  # holes


def case(
    id: str,
    b: int,
    h: int,
    hk: int,
    sq: int,
    sk: int,
    d: int,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    pad: str | None = None,
    bias: tuple[int, ...] | None = None,
    bias_dtype: torch.dtype | None = None,
    bias_hides: bool = False,
    alibi: bool = False,
    dropout_p: float = 0.0,
    lse: bool = False,
    peak: float = 1.0,
    dtypes: tuple[torch.dtype, ...] = LOW_DTYPES,
) -> Case:
    """q (b, h, sq, d) and k, v (b, hk, sk, d); `peak` scales the scores."""

    def make(g: torch.Generator, dtype: torch.dtype) -> Inputs:
        added = None
        if bias is not None:
            added = normal(g, *bias, dtype=bias_dtype or dtype)
            if bias_hides:
                added[..., 2::5] = float("-inf")
        return {
            "q": normal(g, b, h, sq, d, dtype=dtype, scale=peak),
            "k": normal(g, b, hk, sk, d, dtype=dtype),
            "v": normal(g, b, hk, sk, d, dtype=dtype),
            "causal": causal,
            "window": window,
            "scale": scale,
            "key_padding_mask": None if pad is None else padding(pad, b, sk),
            "bias": added,
            "alibi_slopes": 0.5 ** torch.arange(1.0, h + 1) if alibi else None,
            "dropout_p": dropout_p,
            "dropout_seed": torch.tensor(2**40 + 12345) if dropout_p else None,
            "return_lse": lse,
        }

    return Case(id, make, hidden if pad else None, dtypes=dtypes)


HALVES = (torch.bfloat16, torch.float16)

CASES = (
    case("one_key", 1, 1, 1, 1, 1, 16),
    case("no_batch", 0, 2, 2, 4, 4, 16),
    case("no_queries", 1, 2, 2, 0, 5, 16),
    case("no_keys", 1, 2, 2, 3, 0, 16, lse=True),
    case("prime", 3, 2, 2, 37, 37, 17, lse=True),
    case("just_over_block", 1, 2, 2, 129, 129, 64, lse=True),
    case("two_heads_per_key_head", 2, 4, 2, 40, 40, 32),
    case("one_key_head", 1, 5, 1, 33, 33, 16),
    case("one_query", 2, 4, 2, 1, 150, 64, lse=True),
    case("short_queries_bottom_right", 1, 2, 2, 5, 131, 32, lse=True),
    case("queries_that_see_no_key", 1, 2, 2, 21, 9, 16, lse=True),
    case("window_1_sees_itself", 1, 2, 2, 20, 20, 16, window=1),
    case("window_inside_block", 1, 2, 2, 70, 70, 16, window=7, lse=True),
    case("window_across_blocks", 1, 2, 1, 200, 200, 32, window=65),
    case("window_is_s", 1, 2, 2, 50, 50, 16, window=50),
    case("window_beyond_s", 1, 2, 2, 50, 50, 16, window=1000),
    case("window_of_rectangle", 1, 2, 2, 30, 90, 16, window=33),
    case("two_sided_window", 1, 2, 2, 90, 90, 16, causal=False, window=11),
    case("two_sided_window_of_rectangle", 1, 2, 2, 90, 40, 16, causal=False, window=11, lse=True),
    case("all_keys", 1, 2, 2, 45, 70, 16, causal=False),
    case("padding_left", 3, 2, 2, 33, 33, 16, pad="left", lse=True),
    case("padding_right", 3, 2, 1, 33, 70, 16, pad="right", causal=False),
    case("padding_holes", 3, 2, 2, 40, 40, 16, pad="holes", window=9),
    case("padding_of_one_query", 3, 2, 2, 1, 70, 16, pad="left"),
    case("bias_full", 2, 2, 2, 20, 33, 16, bias=(2, 2, 20, 33)),
    case("bias_of_keys", 2, 2, 2, 20, 33, 16, bias=(1, 2, 1, 33), lse=True),
    case("bias_of_heads", 2, 3, 1, 20, 20, 16, bias=(3, 1, 1), causal=False),
    case("bias_that_hides", 2, 2, 2, 20, 20, 16, bias=(20, 20), bias_hides=True),
    case("bias_float32", 1, 2, 2, 20, 20, 16, bias=(1, 1, 20, 20), bias_dtype=torch.float32),
    case("alibi", 2, 4, 2, 40, 70, 16, alibi=True),
    case("dropout", 2, 2, 2, 37, 45, 16, dropout_p=0.2),
    case("dropout_of_few_keys", 1, 2, 2, 33, 33, 64, window=2, dropout_p=0.1),
    case("everything", 2, 2, 1, 37, 45, 24, window=20, pad="holes", bias=(2, 1, 37, 45), alibi=True,
         dropout_p=0.1, lse=True),
    case("scale", 1, 2, 2, 30, 30, 16, scale=0.7),
    case("peaked", 1, 2, 2, 60, 60, 64, peak=8.0),
    case("head_dim_1", 1, 2, 2, 19, 19, 1),
    case("head_dim_of_gpt3_2.7b", 1, 2, 2, 70, 70, 80),
    case("head_dim_of_gpt3_large", 1, 2, 2, 70, 70, 96),
    case("head_dim_of_gpt3_xl", 1, 2, 2, 70, 70, 128, window=40),
    case("head_dim_256", 1, 1, 1, 40, 40, 256),
    case("head_dim_of_gpt_j", 1, 1, 1, 70, 130, 256, dtypes=HALVES),
    case("head_dim_250", 1, 2, 1, 70, 130, 250, window=60, lse=True, dtypes=HALVES),
    case("head_dim_136", 1, 1, 1, 100, 40, 136, causal=False, dtypes=HALVES),
    # where kernels for tensor cores take larger tiles
    case("many_keys", 1, 1, 1, 70, 1100, 64, lse=True, dtypes=HALVES),
    case("many_keys_of_gpt3_xl", 1, 1, 1, 33, 1061, 128, dtypes=HALVES),
    case("many_queries", 1, 2, 1, 1040, 70, 64, causal=False, dtypes=HALVES),
)  # fmt: skip


def pieces(inputs: Inputs) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What plain torch needs of the options: seen, added to the scores, dropout's factor on p."""
    q, k = inputs["q"], inputs["k"]
    (b, h, sq, _), sk = q.shape, k.shape[2]
    seen = band(sq, sk, inputs["causal"], inputs["window"])
    if inputs["key_padding_mask"] is not None:
        seen = seen & inputs["key_padding_mask"][:, None, None, :]
    added = inputs["bias"]
    if inputs["alibi_slopes"] is not None:
        distance = (torch.arange(sq)[:, None] + sk - sq - torch.arange(sk)).abs()
        alibi = -inputs["alibi_slopes"][..., None, None] * distance
        added = alibi if added is None else added + alibi
    p = inputs["dropout_p"]
    kept = dropout_keep(inputs["dropout_seed"], b, h, sq, sk, p).double() / (1 - p) if p else None
    return seen, added, kept


def low(**inputs: Any) -> Any:
    seen, added, kept = pieces(inputs)
    out, lse, _ = attend(inputs["q"], inputs["k"], inputs["v"], seen, inputs["scale"], added, kept)
    wide = torch.promote_types(lse.dtype, torch.float32)
    return (out, lse.to(wide)) if inputs["return_lse"] else out


def cancellation(inputs: Inputs, results: Results) -> dict[str, float]:
    """dS = P (dP - delta) and, in P's exponent, s - lse: where one key has all the weight, the
    terms are equal."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    if q.numel() == 0 or k.numel() == 0:
        return {}
    seen, added, kept = pieces(inputs)
    _, lse, p = attend(q, k, v, seen, inputs["scale"], added, kept)
    group, dout = q.shape[1] // k.shape[1], results["outgoing_out"]
    dp = dout @ v.repeat_interleave(group, 1).transpose(-1, -2)
    dp = dp if kept is None else dp * kept
    terms = (p * dp).abs().max().item()
    scale = q.shape[-1] ** -0.5 if inputs["scale"] is None else inputs["scale"]
    scores = (q.abs() @ k.abs().repeat_interleave(group, 1).transpose(-1, -2)).max().item()
    return {
        "dq": scale * terms * k.abs().max().item(),
        "dk": scale * terms * q.abs().max().item(),
        "dv": worst(lse) * worst(p.transpose(-1, -2) @ dout.abs()),
        "dbias": terms,
        "lse": scale * scores,
    }


def stored(outputs: tuple[Any, ...], args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """out is kept as the pair of its value and its rounding error, lse in float32."""
    out, lse, _ = outputs
    high = rounded(out, dtype)
    return high + rounded(out - high, dtype), rounded(lse), out.new_empty(0)


SPEC = OpSpec(
    op="attention",
    function=F.attention,
    low=low,
    outputs=("out", "lse"),
    gradients=("q", "k", "v", "bias"),
    cases=CASES,
    rows=first_axis(
        ("prime", "padding_left", "padding_holes", "one_query"), ("q", "k", "v", "key_padding_mask")
    ),
    stored={"attention_fwd": stored},
    cancellation=cancellation,
    storage={"out": (0, 2, 1, 3)},
)


@pytest.mark.parametrize(("backend", "dtype", "case"), grid(SPEC))
def test_contract(backend: str, dtype: torch.dtype, case: Case) -> None:
    check_contract(SPEC, backend, dtype, case)


BACKENDS = pytest.mark.parametrize("backend", dispatch.TABLE["attention"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@BACKENDS
@DTYPES
@pytest.mark.parametrize("window", [None, 9])
def test_a_hidden_value_of_any_size_changes_no_gradient(
    backend: str, dtype: torch.dtype, window: int | None
) -> None:
    """Its product with dout overflows where no query that sees it has a gradient."""
    skip_unless_runs("attention", backend, dtype)
    g, first = torch.Generator().manual_seed(0), 50
    q, k, v, dout = (normal(g, 1, 2, 70, 64, dtype=dtype).to(device_of(backend)) for _ in range(4))
    dout *= 1e4
    dout[:, :, first:] = 0
    large = v.clone()
    large[:, :, first:] = 1e36
    results = []
    for values in (v, large):
        leaves = [x.clone().requires_grad_() for x in (q, k, values)]
        with fastgpt.backend(backend):
            out = F.attention(*leaves, window=window)
            results.append(torch.autograd.grad(out, leaves, dout))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got[:, :, :first], want[:, :, :first])


@BACKENDS
@DTYPES
def test_no_finite_bias_hides(backend: str, dtype: torch.dtype) -> None:
    """A row whose keys all have the least bias, as of an additive mask, averages them."""
    skip_unless_runs("attention", backend, dtype)
    g = torch.Generator().manual_seed(0)
    q, k, v = (normal(g, 1, 2, 20, 16, dtype=dtype).to(device_of(backend)) for _ in range(3))
    bias = torch.zeros(20, 20, device=q.device)
    bias[3], bias[7, :5] = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with fastgpt.backend(backend):
        out = F.attention(*leaves, causal=False, bias=bias)
        gradients = torch.autograd.grad(out, leaves, out.detach())
    tolerance = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(out[:, :, 3], v.mean(2), **tolerance)
    torch.testing.assert_close(out[:, :, 7], v[:, :, :5].mean(2), **tolerance)
    assert all(gradient.isfinite().all() for gradient in gradients)
