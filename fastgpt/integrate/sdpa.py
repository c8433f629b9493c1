"""torch's own `scaled_dot_product_attention` on our kernels, in any model, by one line.

    torch.nn.attention.activate_flash_attention_impl("FASTGPT")     # torch 2.11 or later, on a GPU
    torch.nn.attention.restore_flash_attention_impl()               # torch's own kernels again

`import fastgpt` makes the name known and activates nothing. torch chooses among its backends as
before; where it takes flash attention (float16 or bfloat16 on a GPU, no mask), and in
`torch.nn.attention.varlen` and nested tensors, these four ops of aten are ours:

    _scaled_dot_product_flash_attention[_backward]     q (b, h, sq, d), k and v (b, hk, sk, d)
    _flash_attention_forward, _flash_attention_backward     (b, s, h, d), or packed (t, h, d)

In all of them is_causal aligns the last query with the last key (`torch.nn.attention.bias` relies
on it; `scaled_dot_product_attention` itself calls them with sq = sk when causal). The dropout mask
is drawn from torch's generator, but is not the one that torch's kernel would draw. The fp8
overloads, and the inference-only `_flash_attention_forward_no_dropout_inplace`, stay torch's.

aten stores the output in 16 bits alone, and our gradients need its rounding error to keep to the
error rule of CONTRIBUTING.md. In eager mode it travels in the op's return value `unused`. Compiled
graphs, and the backward of `torch.nn.attention.varlen`, have a fixed layout with no place for it:
there the gradients come from the rounded output, as those of other flash attention kernels do.

Verified on CPU tensors, for which the tests register the functions: under aten's own autograd,
eager and compiled, and through torch.nn.attention.varlen, over our CPU kernels and over the CUDA
sources compiled for a CPU. Not yet run: the activation on a GPU and torch's choice of flash
attention there, nested tensors, CUDA graphs, ROCm.

Model: torch/nn/attention/_fa4.py, by which torch plugs in FlashAttention-4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.ops._attention_checks import check_qkv
from fastgpt.ops._autograd import needs_grad
from fastgpt.ops._checks import check_float, check_same_device, check_same_dtype
from fastgpt.ops._rows import unit_stride
from fastgpt.ops.varlen_attention import check_offsets_on_host, check_packed

NAME = "FASTGPT"
_RESTORE = "torch.nn.attention.restore_flash_attention_impl() brings back torch's own kernel"
_NAMES = ("query", "key", "value")

# What torch's kernels return as the state of the generator: seed and offset, on ROCm the seed.
_STATE_SHAPE, _STATE_DTYPE = ((), torch.int64) if torch.version.hip else ((2,), torch.uint64)


def register() -> None:
    """Make "FASTGPT" known to torch's registry; nothing happens where torch has none."""
    register_impl = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if register_impl is not None:
        register_impl(NAME, register_fn=_activate)


class _Handle:
    """Keeps the kernels registered until torch removes it."""

    def __init__(self, library: torch.library.Library) -> None:
        self.library: torch.library.Library | None = library

    def remove(self) -> None:
        self.library = None


def _activate() -> _Handle:
    """Called by torch; RuntimeError if none of our attention kernels runs on this GPU."""
    reasons = _refusals()
    if reasons:
        raise RuntimeError(
            f'"{NAME}": expected a GPU that a backend of fastgpt runs on; ' + "; ".join(reasons)
        )
    return _install("CUDA")


def _refusals() -> list[str]:
    """Why no backend of ours can serve the ops on this machine; empty if one can."""
    if not torch.cuda.is_available():
        return ["torch.cuda.is_available() is False"]
    reasons = []
    for backend in ("cuda", "triton"):
        ops = ("attention", "varlen_attention")
        refused = [dispatch.refusal(op, backend, "cuda", torch.bfloat16, 64) for op in ops]
        reason = next(filter(None, refused), None)
        if reason is None:
            return []
        reasons.append(f"{backend} {reason}")
    return reasons


def _install(key: str) -> _Handle:
    """Override the four ops for tensors of one dispatch key."""
    library = torch.library.Library("aten", "IMPL", key)
    library.impl("_scaled_dot_product_flash_attention", _sdpa_forward, key)
    library.impl("_scaled_dot_product_flash_attention_backward", _sdpa_backward, key)
    library.impl("_flash_attention_forward", _flash_forward, key)
    library.impl("_flash_attention_backward", _flash_backward, key)
    return _Handle(library)


# --- aten's functions -----------------------------------------------------------------------------


def _sdpa_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    _refuse("return_debug_mask", return_debug_mask, False)
    out, lse, state, unused = _forward(query, key, value, dropout_p, is_causal, None, scale)
    out = _laid_out_like(query, out)
    lengths = (None, None, query.shape[2], key.shape[2])
    return out, lse, *lengths, state, unused, query.new_empty(0)


def _sdpa_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    saved = (query, key, value, out, logsumexp, philox_seed, philox_offset)
    grads = _backward(grad_out, *saved, dropout_p, is_causal, None, scale)
    return tuple(map(_laid_out_like, (query, key, value), grads))


def _flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, ...]:
    _refuse("return_debug_mask", return_debug_mask, False)
    _refuse("seqused_k", seqused_k, None)
    _refuse("alibi_slopes", alibi_slopes, None)
    _refuse("block_table", block_table, None)
    _refuse("num_splits", num_splits, None, 0, 1)  # which 0 leaves to the kernel; ours suit 1 also
    band = _band(is_causal, window_size_left, window_size_right)
    if cum_seq_q is None and cum_seq_k is None:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out, lse, state, unused = _forward(q, k, v, dropout_p, *band, scale)
        out = out.transpose(1, 2)
    else:
        _refuse("dropout_p", dropout_p, 0.0)
        packed = (query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
        out, lse, unused = _packed_forward(*packed, *band, scale)
        state = query.new_empty(_STATE_SHAPE, dtype=_STATE_DTYPE)
    return _laid_out_like(query, out), lse, state, unused, query.new_empty(0)


def _flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    band = _band(is_causal, window_size_left, window_size_right)
    if cum_seq_q is None and cum_seq_k is None:
        dout, q, k, v, out = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
        saved = (q, k, v, out, logsumexp, rng_state, unused)
        grads = _backward(dout, *saved, dropout_p, *band, scale)
        grads = tuple(grad.transpose(1, 2) for grad in grads)
    else:
        _refuse("dropout_p", dropout_p, 0.0)
        packed = (query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k)
        grads = _packed_backward(grad_out, *packed, unused, *band, scale)
    return tuple(map(_laid_out_like, (query, key, value), grads))


# --- our kernels ----------------------------------------------------------------------------------


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    causal: bool,
    window: int | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, state of the generator, `unused`) of q (b, h, sq, d), k and v (b, hk, sk, d)."""
    check_qkv(q, k, v, _NAMES)
    _check_together(q, k, v)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")
    state, seed = q.new_empty(_STATE_SHAPE, dtype=_STATE_DTYPE), None
    if dropout_p > 0.0:
        state = torch.randint(2**63 - 1, _STATE_SHAPE, device=q.device).view(_STATE_DTYPE)
        seed = _seed_of(state)
    backend = _pick("attention", q, causal, window, dropout=dropout_p > 0.0)
    out, lse, out_lo = dispatch.kernel("attention", backend, "attention_fwd")(
        *map(unit_stride, (q, k, v)),
        q.shape[-1] ** -0.5 if scale is None else scale,
        causal,
        window,
        k.shape[2] - q.shape[2],
        *(None, None, None, None),
        dropout_p,
        seed,
        _has_backward(q, k, v),
    )
    return out, lse, state, _to_unused(out_lo)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    state: Tensor,
    unused: Tensor,
    dropout_p: float,
    causal: bool,
    window: int | None,
    scale: float | None,
) -> tuple[Tensor, ...]:
    """(dq, dk, dv) in the shapes of q (b, h, sq, d), k and v (b, hk, sk, d)."""
    backend = _pick("attention", q, causal, window, dropout=dropout_p > 0.0)
    grads: tuple[Tensor, ...] = dispatch.kernel("attention", backend, "attention_bwd")(
        unit_stride(dout),
        None,
        *map(unit_stride, (q, k, v, out)),
        lse.contiguous(),
        _from_unused(unused, q),
        q.shape[-1] ** -0.5 if scale is None else scale,
        causal,
        window,
        k.shape[2] - q.shape[2],
        *(None, None, None, None),
        dropout_p,
        _seed_of(state) if dropout_p > 0.0 else None,
        False,
    )
    return grads[:3]


def _packed_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_q: int,
    max_k: int,
    causal: bool,
    window: int | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, `unused`) of q (tq, h, d), k and v (tk, hk, d)."""
    cu_q, cu_k = _both(cu_seqlens_q, cu_seqlens_k)
    check_packed(q, k, v, cu_q, cu_k, max_q, max_k)
    _check_together(q, k, v)
    backend = _pick("varlen_attention", q, causal, window)
    check_offsets_on_host(backend, q, k, cu_q, cu_k, max_q, max_k)
    out, lse, out_lo = dispatch.kernel("varlen_attention", backend, "varlen_attention_fwd")(
        *map(unit_stride, (q, k, v)),
        *(cu_q.contiguous(), cu_k.contiguous(), max_q, max_k),
        q.shape[-1] ** -0.5 if scale is None else scale,
        causal,
        window,
        _has_backward(q, k, v),
    )
    return out, lse, _to_unused(out_lo)


def _packed_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_q: int,
    max_k: int,
    unused: Tensor,
    causal: bool,
    window: int | None,
    scale: float | None,
) -> tuple[Tensor, ...]:
    """(dq, dk, dv) in the shapes of q (tq, h, d), k and v (tk, hk, d)."""
    cu_q, cu_k = _both(cu_seqlens_q, cu_seqlens_k)
    backend = _pick("varlen_attention", q, causal, window)
    run = dispatch.kernel("varlen_attention", backend, "varlen_attention_bwd")
    grads: tuple[Tensor, ...] = run(
        unit_stride(dout),
        None,
        *map(unit_stride, (q, k, v, out)),
        lse.contiguous(),
        _from_unused(unused, q),
        *(cu_q.contiguous(), cu_k.contiguous(), max_q, max_k),
        q.shape[-1] ** -0.5 if scale is None else scale,
        causal,
        window,
    )
    return grads


# --- between the two ------------------------------------------------------------------------------


def _refuse(name: str, value: object, *served: object) -> None:
    if not any(value is one or value == one for one in served):
        shown = f"a {type(value).__name__}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f'{name}: "{NAME}" serves {served[0]} alone, got {shown}; {_RESTORE}')


def _band(is_causal: bool, left: int | None, right: int | None) -> tuple[bool, int | None]:
    """(causal, window) of the keys i' - left to i' + right, where None or below 0 is no limit."""
    before = None if left is None or left < 0 else left
    after = 0 if is_causal else None if right is None or right < 0 else right
    if after == 0 or before == after:
        return after == 0, None if before is None else before + 1
    raise ValueError(
        f'window_size_left, window_size_right: "{NAME}" serves right = 0 (causal) and left = right '
        f"(two-sided) alone, got {left} and {right}; {_RESTORE}"
    )


def _both(cum_seq_q: Tensor | None, cum_seq_k: Tensor | None) -> tuple[Tensor, Tensor]:
    if cum_seq_q is None or cum_seq_k is None:
        missing = "cum_seq_q" if cum_seq_q is None else "cum_seq_k"
        raise ValueError(f"{missing}: expected offsets as for the other, got None; {_RESTORE}")
    return cum_seq_q, cum_seq_k


def _check_together(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_float("query", q)
    for name, tensor in (("key", k), ("value", v)):
        check_same_device(name, tensor, "query", q)
        check_same_dtype(name, tensor, "query", q)


def _pick(op: str, q: Tensor, causal: bool, window: int | None, **features: Any) -> str:
    return dispatch.pick(op, q, head_dim=q.shape[-1], causal=causal, window=window, **features)


def _has_backward(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether autograd records this call, of tensors whose output is rounded."""
    return q.dtype != torch.float32 and needs_grad(q, k, v)


def _to_unused(out_lo: Tensor) -> Tensor:
    """The rounding error of the output where there is one, else what torch's fakes promise."""
    return out_lo if out_lo.numel() else out_lo.new_empty((), dtype=_STATE_DTYPE)


def _from_unused(unused: Tensor, q: Tensor) -> Tensor:
    carried = unused.dtype == q.dtype and unused.shape == q.shape
    return unused if carried else q.new_empty(0)


def _seed_of(state: Tensor) -> Tensor:
    """The first word of the generator's state as the int64 tensor that our kernels take."""
    return state.view(torch.int64).reshape(-1)[0]


def _laid_out_like(like: Tensor, x: Tensor) -> Tensor:
    """x with the strides of `torch.empty_like(like)`: torch's fakes promise them, and compiled
    graphs assert them. No copy for heads that are views of (b, s, h, d), as models have them."""
    if x.stride() == like.stride():
        return x
    promised = torch.empty_like(like, device="meta").stride()
    return x if x.stride() == promised else torch.empty_like(like).copy_(x)
