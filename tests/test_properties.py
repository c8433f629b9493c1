"""Properties that hold for any input: of windows, of attention's many paths, of softmax and losses.

Every property is drawn by hypothesis and checked on every backend that runs here, in float32.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastgpt
from fastgpt import functional as F
from tests.contract import device_of, skip_unless_runs

BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])
ROW_BACKENDS = pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
quick = settings(max_examples=25, deadline=None, derandomize=True, database=None)
sizes = st.integers(1, 70)
seeds = st.integers(0, 2**32 - 1)
heads = st.sampled_from([(1, 1), (4, 2), (3, 1)])
head_dims = st.sampled_from([1, 8, 17, 64])


def skip_unless_runs_here(op: str, backend: str) -> None:
    skip_unless_runs(op, backend)
    if device_of(backend) != "cpu":
        pytest.skip(f"{backend} takes tensors on a GPU, these are on the CPU")


def normal(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for shape in shapes]


def qkv(seed: int, b: int, h: tuple[int, int], sq: int, sk: int, d: int) -> list[Tensor]:
    return normal(seed, (b, h[0], sq, d), (b, h[1], sk, d), (b, h[1], sk, d))


@st.composite
def windows(draw, s: int) -> int:
    """Itself alone, inside, one short of, exactly, and beyond everything there is."""
    return draw(st.sampled_from([1, 2, max(s - 1, 1), s, s + 1, 10 * s]) | st.integers(1, s))


def close(got: Tensor, want: Tensor, scale: float = 1.0) -> None:
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5 * scale)


def key_by_key(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None) -> Tensor:
    """Attention from the definition of visibility, one query at a time, in float64."""
    (_, h, sq, d), (_, hk, sk, _) = q.shape, k.shape
    out = torch.zeros(q.shape, dtype=torch.float64)
    for i in range(sq):
        at = i + sk - sq
        seen = [
            j
            for j in range(sk)
            if (j <= at or not causal) and (window is None or abs(at - j) < window)
        ]
        if not seen:
            continue
        for head in range(h):
            keys = k[:, head * hk // h, seen].double()
            scores = (keys @ q[:, head, i, :, None].double())[..., 0] / d**0.5
            out[:, head, i] = (scores.softmax(-1)[:, None] @ v[:, head * hk // h, seen].double())[
                :, 0
            ]
    return out


@BACKENDS
@quick
@given(data=st.data(), seed=seeds, sq=sizes, sk=sizes, h=heads, d=head_dims, causal=st.booleans())
def test_window_is_its_definition(backend, data, seed, sq, sk, h, d, causal) -> None:
    skip_unless_runs("attention", backend)
    window = data.draw(st.none() | windows(max(sq, sk)))
    q, k, v = qkv(seed, 1, h, sq, sk, d)
    with fastgpt.backend(backend):
        got = F.attention(q, k, v, causal=causal, window=window)
    close(got.double(), key_by_key(q, k, v, causal, window))


@BACKENDS
@quick
@given(data=st.data(), seed=seeds, s=sizes, d=head_dims)
def test_window_that_covers_everything_is_dense(backend, data, seed, s, d) -> None:
    skip_unless_runs("attention", backend)
    q, k, v = qkv(seed, 1, (2, 2), s, s, d)
    window = data.draw(st.sampled_from([s, s + 1, 5 * s]))
    with fastgpt.backend(backend):
        close(F.attention(q, k, v, window=window), F.attention(q, k, v))
        close(F.attention(q, k, v, window=1), v)  # each query sees its own key alone


@BACKENDS
@quick
@given(data=st.data(), seed=seeds, s=st.integers(2, 140), d=head_dims)
def test_future_key_changes_no_earlier_bit(backend, data, seed, s, d) -> None:
    skip_unless_runs("attention", backend)
    window = data.draw(st.none() | windows(s))
    j = data.draw(st.integers(1, s - 1))
    q, k, v = qkv(seed, 1, (2, 1), s, s, d)
    with fastgpt.backend(backend):
        before = F.attention(q, k, v, window=window, return_lse=True)
        k[:, :, j:], v[:, :, j:] = 1e4, -1e4
        after = F.attention(q, k, v, window=window, return_lse=True)
    for got, want in zip(after, before, strict=True):
        assert torch.equal(got[:, :, :j], want[:, :, :j])
    assert not torch.equal(after[0][:, :, j], before[0][:, :, j])


@BACKENDS
@quick
@given(data=st.data(), seed=seeds, s=st.integers(2, 140))
def test_key_behind_the_window_changes_no_later_bit(backend, data, seed, s) -> None:
    skip_unless_runs("attention", backend)
    window = data.draw(st.integers(1, s - 1))
    j = data.draw(st.integers(0, s - 1 - window))
    q, k, v = qkv(seed, 1, (2, 1), s, s, 16)
    with fastgpt.backend(backend):
        before = F.attention(q, k, v, window=window)
        k[:, :, : j + 1], v[:, :, : j + 1] = 1e4, -1e4
        after = F.attention(q, k, v, window=window)
    assert torch.equal(after[:, :, j + window :], before[:, :, j + window :])
    assert not torch.equal(after[:, :, j + window - 1], before[:, :, j + window - 1])


@BACKENDS
@quick
@given(data=st.data(), seed=seeds, sq=sizes, sk=sizes, h=heads, causal=st.booleans())
def test_constant_v_returns_v(backend, data, seed, sq, sk, h, causal) -> None:
    skip_unless_runs("attention", backend)
    window = data.draw(st.none() | windows(max(sq, sk)))
    q, k, v = qkv(seed, 2, h, sq, sk, 8)
    v = v[:, :, :1].expand_as(v)
    with fastgpt.backend(backend):
        out, lse = F.attention(q, k, v, causal=causal, window=window, return_lse=True)
    some = (lse > -torch.inf)[..., None]
    close(out, v[:, :, :1].repeat_interleave(h[0] // h[1], 1) * some)


@BACKENDS
@quick
@given(data=st.data(), seed=seeds, sq=st.sampled_from([1, 2, 33]), sk=st.integers(2, 300))
def test_keys_in_two_parts_merge_to_the_whole(backend, data, seed, sq, sk) -> None:
    """out = sum of exp(lse_part - lse) out_part: what every split over the keys relies on."""
    skip_unless_runs("attention", backend)
    cut = data.draw(st.integers(1, sk - 1))
    q, k, v = qkv(seed, 1, (2, 2), sq, sk, 32)
    with fastgpt.backend(backend):
        whole, lse = F.attention(q, k, v, causal=False, return_lse=True)
        parts = [
            F.attention(q, k[:, :, part], v[:, :, part], causal=False, return_lse=True)
            for part in (slice(cut), slice(cut, None))
        ]
    close(torch.logaddexp(parts[0][1], parts[1][1]), lse)
    close(sum((part_lse - lse).exp()[..., None] * out for out, part_lse in parts), whole)


@BACKENDS
@quick
@given(data=st.data(), seed=seeds, s=st.integers(1, 60), h=heads, ring=st.booleans())
def test_decode_step_is_the_row_of_the_full_forward(backend, data, seed, s, h, ring) -> None:
    """Also past the window of a ring, whose slots have been overwritten by then."""
    skip_unless_runs("decode_attention", backend)
    window = data.draw(st.integers(1, 20) if ring else st.none() | windows(s))
    t = data.draw(st.integers(1, 3))
    q, k, v = qkv(seed, 2, h, s * t, s * t, 16)
    slots = window + t - 1 if ring else s * t
    caches = torch.full((2, 2, h[1], slots, 16), float("nan"))
    steps = []
    with fastgpt.backend(backend):
        full = F.attention(q, k, v, window=window)
        for step in range(s):
            new = slice(step * t, (step + 1) * t)
            steps.append(
                F.decode_attention(
                    q[:, :, new],
                    *caches,
                    torch.full((2,), step * t, dtype=torch.int32),
                    k_new=k[:, :, new],
                    v_new=v[:, :, new],
                    window=window,
                    ring=ring,
                )
            )
    close(torch.cat(steps, 2), full)


@BACKENDS
@quick
@given(
    data=st.data(),
    seed=seeds,
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=4),
    h=heads,
    causal=st.booleans(),
)
def test_packed_documents_are_separate_attentions(backend, data, seed, lengths, h, causal) -> None:
    skip_unless_runs("varlen_attention", backend)
    window = data.draw(st.none() | windows(40))
    tq, tk = (sum(pair[side] for pair in lengths) for side in (0, 1))
    q, k, v = normal(seed, (tq, h[0], 8), (tk, h[1], 8), (tk, h[1], 8))
    ends = [torch.tensor([0, *(p[side] for p in lengths)]).cumsum(0).int() for side in (0, 1)]
    longest = [max(pair[side] for pair in lengths) for side in (0, 1)]
    with fastgpt.backend(backend):
        got = F.varlen_attention(q, k, v, *ends, *longest, causal=causal, window=window)
        for i in range(len(lengths)):
            own_q, own_k = (slice(int(end[i]), int(end[i + 1])) for end in ends)
            alone = F.attention(
                q[own_q].transpose(0, 1)[None],
                k[own_k].transpose(0, 1)[None],
                v[own_k].transpose(0, 1)[None],
                causal=causal,
                window=window,
            )
            close(got[own_q], alone[0].transpose(0, 1))


@BACKENDS
@quick
@given(data=st.data(), seed=seeds, s=sizes, causal=st.booleans())
def test_padding_is_as_if_the_keys_were_not_there(backend, data, seed, s, causal) -> None:
    skip_unless_runs("attention", backend)
    padded = data.draw(st.integers(0, s - 1))
    q, k, v = qkv(seed, 1, (2, 2), s, s, 8)
    seen = torch.arange(s)[None] >= padded
    with fastgpt.backend(backend):
        got = F.attention(q, k, v, causal=causal, key_padding_mask=seen)
        want = F.attention(q, k[:, :, padded:], v[:, :, padded:], causal=causal)
    close(got, want)


@BACKENDS
@quick
@given(seed=seeds, s=sizes, d=head_dims)
def test_key_heads_are_shared_as_if_repeated(backend, seed, s, d) -> None:
    skip_unless_runs("attention", backend)
    q, k, v = qkv(seed, 1, (6, 2), s, s, d)
    with fastgpt.backend(backend):
        repeated = (t.repeat_interleave(3, 1) for t in (k, v))
        close(F.attention(q, k, v), F.attention(q, *repeated))


@ROW_BACKENDS
@quick
@given(data=st.data(), seed=seeds, sq=sizes, sk=sizes, causal=st.booleans())
def test_masked_softmax_rows_sum_to_one_inside_the_band(backend, data, seed, sq, sk, causal):
    skip_unless_runs_here("masked_softmax", backend)
    window = data.draw(st.none() | windows(max(sq, sk)))
    (scores,) = normal(seed, (2, sq, sk))
    with fastgpt.backend(backend):
        p = F.masked_softmax(scores, causal=causal, window=window)
    i, j = torch.arange(sq)[:, None] + sk - sq, torch.arange(sk)
    seen = (j <= i) | (not causal)
    seen &= (i - j).abs() < (window or 10**9)
    assert not p[:, ~seen].any()
    close(p.sum(-1), seen.any(-1).float().expand(2, sq))


@ROW_BACKENDS
@quick
@given(seed=seeds, rows=st.integers(1, 9), n=st.integers(1, 300), shift=st.integers(-500, 500))
def test_softmax_sums_to_one_and_ignores_a_shift(backend, seed, rows, n, shift) -> None:
    skip_unless_runs_here("softmax", backend)
    (x,) = normal(seed, (rows, n))
    x = (x * 64).round() / 64  # so that adding an integer is exact
    with fastgpt.backend(backend):
        y = F.softmax(x)
        close(F.softmax(x + shift), y)
    assert (y >= 0).all()
    close(y.sum(-1), torch.ones(rows))


@ROW_BACKENDS
@quick
@given(seed=seeds, rows=st.integers(1, 9), n=st.integers(2, 300), scale=st.sampled_from([0.5, 8.0]))
def test_layer_norm_ignores_shift_and_scale(backend, seed, rows, n, scale) -> None:
    skip_unless_runs_here("layer_norm", backend)
    (x,) = normal(seed, (rows, n))
    x = x + torch.linspace(-3, 3, n)  # a variance that is never 0
    with fastgpt.backend(backend):
        y = F.layer_norm(x, n, eps=0.0)
        close(F.layer_norm(scale * x + 4, n, eps=0.0), y, 10)
    close(y.mean(-1), torch.zeros(rows), 10)
    close(y.square().mean(-1), torch.ones(rows), 10)


@ROW_BACKENDS
@quick
@given(
    data=st.data(),
    seed=seeds,
    n=st.integers(1, 20),
    v=st.integers(1, 90),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_cross_entropy_gradient_of_a_row_sums_to_zero(
    backend, data, seed, n, v, reduction, smoothing
):
    skip_unless_runs_here("cross_entropy", backend)
    (x,) = normal(seed, (n, v))
    x.requires_grad_()
    target = torch.tensor(data.draw(st.lists(st.integers(0, v - 1), min_size=n, max_size=n)))
    with fastgpt.backend(backend):
        loss = F.cross_entropy(x, target, reduction=reduction, label_smoothing=smoothing)
        dx = torch.autograd.grad(loss.sum(), x)[0]
    close(dx.sum(1), torch.zeros(n))
    assert (loss >= 0).all()


@ROW_BACKENDS
@quick
@given(data=st.data(), seed=seeds, n=st.integers(1, 40), v=st.integers(1, 90))
def test_fused_projection_is_the_loss_of_its_logits(backend, data, seed, n, v) -> None:
    skip_unless_runs_here("linear_cross_entropy", backend)
    x, weight, bias = normal(seed, (n, 12), (v, 12), (v,))
    target = torch.tensor(data.draw(st.lists(st.integers(0, v - 1), min_size=n, max_size=n)))
    with fastgpt.backend(backend):
        fused = F.linear_cross_entropy(x, weight, target, linear_bias=bias, reduction="none")
        close(fused, F.cross_entropy(x @ weight.T + bias, target, reduction="none"), 5)


@quick
@given(
    data=st.data(),
    seed=seeds,
    b=st.integers(1, 3),
    h=heads,
    sq=st.integers(0, 140),
    sk=st.integers(0, 140),
    d=head_dims,
    causal=st.booleans(),
    padded=st.booleans(),
    alibi=st.booleans(),
    bias=st.sampled_from([None, "bhqk", "hk", "bq", ""]),
    dropout_p=st.sampled_from([0.0, 0.0, 0.3]),
)
def test_any_combination_is_the_reference(
    data, seed, b, h, sq, sk, d, causal, padded, alibi, bias, dropout_p
) -> None:
    """All features of attention at once, forward and backward, against float64."""
    skip_unless_runs("attention", "cpu")
    window = data.draw(st.none() | windows(max(sq, sk, 1)))
    tensors = dict(zip("qkv", qkv(seed, b, h, sq, sk, d), strict=True))
    g = torch.Generator().manual_seed(seed)
    if bias is not None:
        full = dict(zip("bhqk", (b, h[0], sq, sk), strict=True))
        tensors["bias"] = torch.randn([n if a in bias else 1 for a, n in full.items()], generator=g)
    options = {
        "causal": causal,
        "window": window,
        "key_padding_mask": torch.rand(b, sk, generator=g) < 0.7 if padded else None,
        "alibi_slopes": 0.5 ** torch.arange(1.0, h[0] + 1) if alibi else None,
        "dropout_p": dropout_p,
        "dropout_seed": torch.tensor(seed) if dropout_p else None,
        "return_lse": True,
    }
    douts = normal(seed + 1, (b, h[0], sq, d), (b, h[0], sq))
    results = []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        leaves = {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}
        with fastgpt.backend(backend):
            outs = F.attention(**leaves, **options)
            gradients = torch.autograd.grad(
                outs, list(leaves.values()), [g.to(dtype) for g in douts], materialize_grads=True
            )
        results.append([*outs, *gradients])
    for got, want in zip(*results, strict=True):
        close(got.double(), want, 20)
