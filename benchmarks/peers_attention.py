"""Who is measured beside us at attention: dense and banded, of packed documents, over a cache.

`exact_*` is the formula as a float64 reference computes it, where the plain one would not fit in
memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as T
from torch.utils.checkpoint import checkpoint

from benchmarks.peer import Function, Peer, compiled, module, on_cuda
from benchmarks.shapes import Attention, Decode, Documents
from fastgpt import functional as F
from fastgpt.peer import band_mask

Visible = Callable[[Tensor, Tensor], Tensor]
"""Query and key positions, which broadcast -> where the query sees the key."""


def causal(s: int, window: int | None) -> Visible:
    window = window or s
    return lambda i, j: (j <= i) & (i - j < window)


def _within_documents(shape: Documents, device: torch.device) -> Visible:
    lengths = torch.tensor(shape.lengths, device=device)
    document = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
    window = shape.window or shape.total
    return lambda i, j: (document[i] == document[j]) & (j <= i) & (i - j < window)


def positions(s: int, device: torch.device) -> tuple[Tensor, Tensor]:
    i = torch.arange(s, device=device)
    return i[:, None], i[None]


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """The formula: softmax(q k^T / sqrt(d)) v over the keys that are seen."""
    group = q.shape[1] // k.shape[1]
    k, v = (x if group == 1 else x.repeat_interleave(group, 1) for x in (k, v))
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return T.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    )


def _forced(backend: str | None, function: Function) -> Function:
    """`function` with SDPA held to one of its backends."""
    if backend is None:
        return function
    choice = getattr(torch.nn.attention.SDPBackend, backend)

    def run(*inputs: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(choice):
            return function(*inputs)

    return run


def _head_by_head(function: Function) -> Function:
    """One key head after another, recomputed in backward: float64 fits for any length."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = [
            checkpoint(function, *x, use_reentrant=False)
            for x in zip(*(x.chunk(k.shape[1], 1) for x in (q, k, v)), strict=True)
        ]
        return torch.cat(heads, 1)

    return run


def _flex(
    visible: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    sizes: tuple[int | None, int, int],
    device: torch.device,
    grouped: bool,
) -> Function:
    """FlexAttention, compiled, over the blocks of a mask of (batch or None, queries, keys)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    b, sq, sk = sizes
    blocks = create_block_mask(visible, b, None, sq, sk, device=str(device))
    flex = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: flex(q, k, v, block_mask=blocks, enable_gqa=grouped)


# --- dense and banded attention -----------------------------------------------------------------


def _fastgpt_attention(shape: Attention, device: torch.device) -> Function:
    return lambda q, k, v: F.attention(q, k, v, window=shape.window)


def _torch_attention(backend: str | None) -> Peer:
    def build(shape: Attention, device: torch.device) -> Function:
        mask = None if shape.window is None else band_mask(shape.s, shape.window, device)
        return _forced(backend, lambda q, k, v: _sdpa(q, k, v, mask, mask is None))

    return build


def _attention_formula(shape: Attention, device: torch.device) -> Function:
    visible = causal(shape.s, shape.window)
    return lambda q, k, v: _attend(q, k, v, visible(*positions(shape.s, device)))


def _flex_attention(shape: Attention, device: torch.device) -> Function:
    visible = causal(shape.s, shape.window)
    sizes = (None, shape.s, shape.s)
    return _flex(lambda b, h, i, j: visible(i, j), sizes, device, shape.h != shape.hk)


def _flash_attn(shape: Attention, device: torch.device) -> Function:
    function = module("flash_attn").flash_attn_func
    left = -1 if shape.window is None else shape.window - 1

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(*(x.transpose(1, 2) for x in (q, k, v)), causal=True, window_size=(left, 0))
        return out.transpose(1, 2)

    return run


ATTENTION: dict[str, Peer] = {
    "fastgpt": _fastgpt_attention,
    "torch_sdpa": _torch_attention(None),
    "torch_math": _torch_attention("MATH"),
    "torch_flash": _torch_attention("FLASH_ATTENTION"),
    "torch_efficient": _torch_attention("EFFICIENT_ATTENTION"),
    "torch_cudnn": _torch_attention("CUDNN_ATTENTION"),
    "torch_compile": compiled(_attention_formula),
    "torch_flex": _flex_attention,
    "flash_attn": on_cuda(_flash_attn, "flash-attn"),
}


def exact_attention(shape: Attention, device: torch.device) -> Function:
    return _head_by_head(ATTENTION["torch_math"](shape, device))


# --- packed documents ---------------------------------------------------------------------------


def _packed(function: Function) -> Function:
    """A function of (1, h, t, d) as one of (t, h, d)."""

    def run(q: Tensor, k: Tensor, v: Tensor, *offsets: Tensor) -> Tensor:
        out = function(*(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)))
        return out.squeeze(0).transpose(0, 1)

    return run


def _fastgpt_varlen(shape: Documents, device: torch.device) -> Function:
    longest = max(shape.lengths)
    return lambda q, k, v, offsets: F.varlen_attention(
        q, k, v, offsets, offsets, longest, longest, window=shape.window
    )


def _documents_in_turn(
    backend: str | None, wrap: Callable[[Function], Function] = lambda function: function
) -> Peer:
    """SDPA document by document."""

    def build(shape: Documents, device: torch.device) -> Function:
        window, longest = shape.window, max(shape.lengths)
        band = None if window is None else band_mask(longest, window, device)

        def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            n = q.shape[2]
            return _sdpa(q, k, v, None if band is None else band[:n, :n], band is None)

        function = wrap(_forced(backend, one))

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            documents = zip(*(x.split(shape.lengths, 2) for x in (q, k, v)), strict=True)
            return torch.cat([function(*document) for document in documents], 2)

        return _packed(run)

    return build


def _masked_documents(shape: Documents, device: torch.device) -> Function:
    """One SDPA over all tokens, with a dense mask that keeps the documents apart."""
    mask = _within_documents(shape, device)(*positions(shape.total, device))
    return _packed(lambda q, k, v: _sdpa(q, k, v, mask, False))


def _documents_formula(shape: Documents, device: torch.device) -> Function:
    visible = _within_documents(shape, device)
    return _packed(lambda q, k, v: _attend(q, k, v, visible(*positions(shape.total, device))))


def _flex_documents(shape: Documents, device: torch.device) -> Function:
    visible = _within_documents(shape, device)
    sizes = (None, shape.total, shape.total)
    return _packed(_flex(lambda b, h, i, j: visible(i, j), sizes, device, shape.h != shape.hk))


def _torch_varlen(shape: Documents, device: torch.device) -> Function:
    function = module("torch.nn.attention.varlen").varlen_attn
    longest, grouped = max(shape.lengths), shape.h != shape.hk
    left = -1 if shape.window is None else shape.window - 1

    def run(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
        return function(
            q, k, v, offsets, offsets, longest, longest, window_size=(left, 0), enable_gqa=grouped
        )

    return run


def _flash_varlen(shape: Documents, device: torch.device) -> Function:
    function = module("flash_attn").flash_attn_varlen_func
    longest, left = max(shape.lengths), -1 if shape.window is None else shape.window - 1
    return lambda q, k, v, offsets: function(
        q, k, v, offsets, offsets, longest, longest, causal=True, window_size=(left, 0)
    )


VARLEN_ATTENTION: dict[str, Peer] = {
    "fastgpt": _fastgpt_varlen,
    "torch_loop": _documents_in_turn(None),
    "torch_mask": _masked_documents,
    "torch_compile": compiled(_documents_formula),
    "torch_flex": _flex_documents,
    "torch_varlen": on_cuda(_torch_varlen, "torch's varlen_attn"),
    "flash_attn": on_cuda(_flash_varlen, "flash-attn"),
}

exact_varlen_attention = _documents_in_turn("MATH", _head_by_head)


# --- one new token over a cache -----------------------------------------------------------------


def _fastgpt_decode(shape: Decode, device: torch.device) -> Function:
    return lambda q, k, v, lengths: F.decode_attention(q, k, v, lengths, window=shape.window)


def _seen_in_cache(shape: Decode, lengths: Tensor, device: torch.device) -> Tensor:
    """(b, 1, 1, keys): the keys that the newest query of each sequence sees."""
    j, end = torch.arange(shape.keys, device=device), lengths[:, None]
    return ((j < end) & (j >= end - (shape.window or shape.keys)))[:, None, None]


def _torch_decode(backend: str | None) -> Peer:
    """SDPA over the visible slice of the cache; over all of it with a mask where lengths differ."""

    def build(shape: Decode, device: torch.device) -> Function:
        mask, first = None, shape.keys - (shape.window or shape.keys)
        if shape.ragged:
            mask, first = (
                _seen_in_cache(shape, torch.tensor(shape.lengths, device=device), device),
                0,
            )

        def run(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
            return _sdpa(q, k[:, :, first:], v[:, :, first:], mask, False)

        return _forced(backend, run)

    return build


def _decode_formula(shape: Decode, device: torch.device) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return _attend(q, k, v, _seen_in_cache(shape, lengths, device))

    return run


def _flex_decode(shape: Decode, device: torch.device) -> Function:
    end = torch.tensor(shape.lengths, device=device)
    window = shape.window or shape.keys

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j < end[b]) & (j >= end[b] - window)

    flex = _flex(visible, (shape.b, 1, shape.keys), device, shape.h != shape.hk)
    return lambda q, k, v, lengths: flex(q, k, v)


def _flash_decode(shape: Decode, device: torch.device) -> Function:
    function = module("flash_attn").flash_attn_with_kvcache
    left = -1 if shape.window is None else shape.window - 1

    def run(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        tokens = (x.transpose(1, 2) for x in (q, k, v))
        out = function(*tokens, cache_seqlens=lengths, causal=True, window_size=(left, 0))
        return out.transpose(1, 2)

    return run


DECODE_ATTENTION: dict[str, Peer] = {
    "fastgpt": _fastgpt_decode,
    "torch_sdpa": _torch_decode(None),
    "torch_math": _torch_decode("MATH"),
    "torch_compile": compiled(_decode_formula),
    "torch_flex": _flex_decode,
    "flash_attn": on_cuda(_flash_decode, "flash-attn"),
}
