"""scaled_dot_product_attention answers as torch's does, over many combinations of arguments."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.attention.bias import causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa

import fastgpt
from fastgpt import dispatch
from fastgpt import functional as F

BACKENDS = [
    name
    for name in dispatch.TABLE["attention"]
    if dispatch.refusal("attention", name, "cpu", torch.float32) is None
]
B, H, D = 2, 4, 20
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-12}

MASKS = {
    "none": lambda sq, sk: None,
    "bool_2d": lambda sq, sk: torch.rand(sq, sk) > 0.4,
    "bool_padding": lambda sq, sk: torch.rand(B, 1, 1, sk) > 0.4,
    "bool_padding_expanded": lambda sq, sk: (torch.rand(B, 1, 1, sk) > 0.4).expand(B, H, sq, sk),
    "bool_per_head": lambda sq, sk: torch.rand(1, H, sq, sk) > 0.4,
    "bool_rows": lambda sq, sk: torch.rand(sq, 1) > 0.4,
    "bool_nothing": lambda sq, sk: torch.zeros(sq, sk, dtype=torch.bool),
    "float_2d": lambda sq, sk: torch.randn(sq, sk),
    "float_per_head": lambda sq, sk: torch.randn(H, 1, sk),
    "float_expanded": lambda sq, sk: torch.randn(B, 1, 1, sk).expand(B, H, sq, sk),
    "float_hides": lambda sq, sk: torch.randn(sq, sk).masked_fill(
        torch.rand(sq, 1) > 0.5, -torch.inf
    ),
}


def inputs(sq=9, sk=11, hk=H, dtype=torch.float32, b=B):
    shapes = ((b, H, sq, D), (b, hk, sk, D), (b, hk, sk, D))
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def assert_same(tensors, mask, **options):
    """Output and all gradients equal torch's."""
    leaves = [*tensors]
    if mask is not None and mask.requires_grad:
        leaves.append(mask)
    ours = F.scaled_dot_product_attention(*tensors, mask, **options)
    theirs = torch_sdpa(*tensors, mask, **options)
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    dout = torch.randn_like(theirs)
    tolerance = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for got, expected in zip(
        torch.autograd.grad(ours, leaves, dout),
        torch.autograd.grad(theirs, leaves, dout),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=4 * tolerance, atol=8 * tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("sq", "sk"), [(9, 11), (11, 9), (1, 7)], ids=["wide", "tall", "one_row"])
def test_masks(backend, mask, sq, sk):
    made = MASKS[mask](sq, sk)
    with fastgpt.backend(backend):
        assert_same(inputs(sq, sk), made)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", [name for name in MASKS if name.startswith("float")])
def test_float_masks_are_differentiable(backend, mask):
    made = MASKS[mask](9, 11)
    if "expanded" in mask:
        leaf = made[:, :1, :1].clone().requires_grad_()
        made = leaf.expand(made.shape)
    else:
        made = made.requires_grad_()
    with fastgpt.backend(backend):
        assert_same(inputs(), made)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("hk", [H, 2, 1])
@pytest.mark.parametrize(("sq", "sk"), [(9, 11), (11, 9), (9, 9)], ids=["wide", "tall", "square"])
def test_causal_is_top_left(backend, sq, sk, hk, scale):
    with fastgpt.backend(backend):
        tensors = inputs(sq, sk, hk)
        assert_same(tensors, None, is_causal=True, scale=scale, enable_gqa=hk != H)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(backend, dtype):
    if (why := dispatch.refusal("attention", backend, "cpu", dtype)) is not None:
        pytest.skip(why)
    mask = torch.randn(9, 11, dtype=dtype)
    with fastgpt.backend(backend):
        assert_same(inputs(dtype=dtype), mask)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_negative_scale(backend, dtype):
    with fastgpt.backend(backend):
        assert_same(inputs(40, 70, dtype=dtype), None, scale=-0.4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_that_a_mask_hides_from_every_query_may_hold_anything(backend, dtype):
    tensors, mask = inputs(40, 70, dtype=dtype), torch.rand(40, 70) > 0.3
    hidden = torch.arange(70) % 7 == 2
    mask[:, hidden] = False
    mask[5] = False  # a query that sees no key
    dout = torch.randn(B, H, 40, D, dtype=dtype)
    results = []
    for fill in (0.0, torch.nan):
        q, k, v = (x.detach().clone() for x in tensors)
        k[:, :, hidden] = v[:, :, hidden] = q[:, :, 5] = fill
        leaves = [x.requires_grad_() for x in (q, k, v)]
        filled = dout.clone()
        filled[:, :, 5] = fill
        with fastgpt.backend(backend):
            out = F.scaled_dot_product_attention(*leaves, mask)
            results.append([out, *torch.autograd.grad(out, leaves, filled)])
    for clean, filled in zip(*results, strict=True):
        assert torch.equal(clean, filled)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_mask_on_half_precision(backend):
    with fastgpt.backend(backend):
        assert_same(inputs(dtype=torch.bfloat16), torch.randn(9, 11))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("window", [1, 3, 100])
def test_window_is_a_mask_of_torch(backend, window, is_causal):
    tensors = inputs()
    distance = torch.arange(9)[:, None] - torch.arange(11)
    mask = (distance.abs() < window) & (distance >= 0 if is_causal else True)
    with fastgpt.backend(backend):
        ours = F.scaled_dot_product_attention(*tensors, is_causal=is_causal, window=window)
    torch.testing.assert_close(ours, torch_sdpa(*tensors, mask))


@pytest.mark.parametrize("backend", BACKENDS)
def test_window_with_a_mask(backend):
    tensors, mask = inputs(), torch.rand(9, 11) > 0.4
    band = (torch.arange(9)[:, None] - torch.arange(11)).abs() < 3
    with fastgpt.backend(backend):
        ours = F.scaled_dot_product_attention(*tensors, mask, window=3)
    torch.testing.assert_close(ours, torch_sdpa(*tensors, mask & band))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_repeatable_and_unbiased(backend):
    q, k, v = inputs(64, 64)
    v = torch.ones_like(v)
    with fastgpt.backend(backend), torch.no_grad():
        outs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outs.append(F.scaled_dot_product_attention(q, k, v, dropout_p=0.25))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert abs(outs[0].mean().item() - 1.0) < 0.02


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    q, k, v = inputs()
    with fastgpt.backend(backend), torch.autocast("cpu", torch.bfloat16):
        out = F.scaled_dot_product_attention(q, k, v.double().float(), torch.randn(9, 11))
        assert out.dtype == torch.bfloat16
        assert_same((q, k, v), None, is_causal=True)


# What our kernels do not serve goes to torch, whose answer or error is then the same.
UNSERVED = {
    "three_dims": (lambda q, k, v: (q[0], k[0], v[0]), {}),
    "five_dims": (lambda q, k, v: (q[None], k[None], v[None]), {}),
    "value_dim": (lambda q, k, v: (q, k, v[..., :7]), {}),
    "broadcast_batch": (lambda q, k, v: (q, k[:1], v[:1]), {}),
    "broadcast_heads": (lambda q, k, v: (q, k[:, :1], v[:, :1]), {}),
    "groups_undeclared": (lambda q, k, v: (q, k[:, :2], v[:, :2]), {}),
    "groups_do_not_divide": (lambda q, k, v: (q, k[:, :3], v[:, :3]), {"enable_gqa": True}),
    "mixed_dtypes": (lambda q, k, v: (q, k.bfloat16(), v), {}),
    "integers": (lambda q, k, v: (q.int(), k.int(), v.int()), {}),
    "dropout_1": (lambda q, k, v: (q, k, v), {"dropout_p": 1.0}),
    "dropout_above_1": (lambda q, k, v: (q, k, v), {"dropout_p": 1.5}),
    "mask_double": (lambda q, k, v: (q, k, v), {"attn_mask": torch.zeros(9, 11).double()}),
    "mask_int": (lambda q, k, v: (q, k, v), {"attn_mask": torch.ones(9, 11).int()}),
    "mask_shape": (lambda q, k, v: (q, k, v), {"attn_mask": torch.zeros(3, 11)}),
    "mask_one_dim": (lambda q, k, v: (q, k, v), {"attn_mask": torch.zeros(11)}),
    "mask_and_causal": (
        lambda q, k, v: (q, k, v),
        {"attn_mask": torch.zeros(9, 11), "is_causal": True},
    ),
    "mask_without_elements": (
        lambda q, k, v: (q, k, v),
        {"attn_mask": causal_upper_left(9, 11)},
    ),
}


def outcome(function, *args, **options):
    try:
        return function(*args, **options)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("name", UNSERVED)
def test_unserved_calls_go_to_torch(name):
    change, options = UNSERVED[name]
    with torch.no_grad():
        tensors = change(*inputs())
        ours = outcome(F.scaled_dot_product_attention, *tensors, **options)
        theirs = outcome(torch_sdpa, *tensors, **options)
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    else:
        assert ours == theirs


@pytest.mark.parametrize("name", UNSERVED)
def test_unserved_calls_with_a_window_raise(name):
    change, options = UNSERVED[name]
    with torch.no_grad(), pytest.raises((ValueError, TypeError), match="expected"):
        F.scaled_dot_product_attention(*change(*inputs()), **options, window=4)


def test_the_reason_for_torch_is_explained():
    q, k, v = inputs()
    explanation = fastgpt.explain(F.scaled_dot_product_attention, q, k, v[..., :7])
    assert str(explanation).startswith("scaled_dot_product_attention: torch (")
    assert "value: expected shape" in str(explanation)


def test_explaining_draws_no_random_number():
    before = torch.get_rng_state()
    fastgpt.explain(F.scaled_dot_product_attention, *inputs(b=0), dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("window", [0, -3])
def test_window_below_one(window):
    with pytest.raises(ValueError, match=r"window: expected None or an int >= 1, got"):
        F.scaled_dot_product_attention(*inputs(), window=window)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    for sq, sk, b in itertools.product((0, 3), (0, 5), (0, 2)):
        tensors = inputs(sq, sk, b=b)
        with fastgpt.backend(backend):
            ours = F.scaled_dot_product_attention(*tensors)
        torch.testing.assert_close(ours, torch_sdpa(*tensors))


def test_nested_tensors_go_to_torch():
    tokens = [torch.randn(s, H, D) for s in (3, 5)]
    q = torch.nested.nested_tensor(tokens, layout=torch.jagged).transpose(1, 2)
    ours, theirs = (f(q, q, q) for f in (F.scaled_dot_product_attention, torch_sdpa))
    for got, want in zip(ours.unbind(), theirs.unbind(), strict=True):
        assert torch.equal(got, want)
    explanation = fastgpt.explain(F.scaled_dot_product_attention, q, q, q)
    assert "query: expected a dense tensor" in str(explanation)
