"""Attention within each of several documents packed into one sequence.

The documents are unpacked to a padded batch, attended there and packed again, so that none of
them meets the values of another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.backends.reference._attend import attend, attend_bwd, rounding_error, unrounded
from fastgpt.backends.reference._band import visible, zero_where_not
from fastgpt.ops._checks import statistics_dtype


class _Packing:
    """Between packed (total, h, d) and padded (n, h, longest, d) tokens of n documents."""

    def __init__(self, cu_seqlens: Tensor, total: int, longest: int) -> None:
        offsets = cu_seqlens.long()
        device = cu_seqlens.device
        self.lengths = offsets.diff()
        positions = torch.arange(longest, device=device)
        self.valid = positions < self.lengths[:, None]  # (n, longest)
        last = max(total - 1, 0)
        self.token = (offsets[:-1, None] + positions).clamp(0, last)  # (n, longest)
        tokens = torch.arange(total, device=device)
        document = torch.searchsorted(offsets[1:].contiguous(), tokens, right=True)
        self.used = document < self.lengths.shape[0]  # (total,), False after the last document
        self.document = document.clamp(max=max(self.lengths.shape[0] - 1, 0))
        self.position = (tokens - offsets[self.document]).clamp(0, max(longest - 1, 0))

    def unpack(self, packed: Tensor) -> Tensor:
        """(total, ...) -> (n, longest, ...), zeros behind each document's end."""
        if packed.shape[0] == 0:
            return _constant(packed, (*self.valid.shape, *packed.shape[1:]), 0.0)
        return zero_where_not(_like(self.valid, packed.dim() + 1), packed[self.token])

    def pack(self, padded: Tensor, fill: float = 0.0) -> Tensor:
        """(n, longest, ...) -> (total, ...), `fill` behind the last document."""
        if padded.shape[0] == 0 or padded.shape[1] == 0:
            return _constant(padded, (self.used.shape[0], *padded.shape[2:]), fill)
        packed = padded[self.document, self.position]
        return torch.where(_like(self.used, packed.dim()), packed, fill)


def _constant(empty: Tensor, shape: tuple[int, ...], fill: float) -> Tensor:
    """A tensor of one value that autograd can trace to `empty`, which has no elements."""
    return empty.sum() + empty.new_full(shape, fill)


def _like(mask: Tensor, dims: int) -> Tensor:
    return mask[(...,) + (None,) * (dims - mask.dim())]


def _documents(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    window: int | None,
) -> tuple[_Packing, _Packing, Tensor | None]:
    """How to unpack queries and keys, and what is visible, (n, 1, max_seqlen_q, max_seqlen_k)."""
    of_q = _Packing(cu_seqlens_q, q.shape[0], max_seqlen_q)
    of_k = _Packing(cu_seqlens_k, k.shape[0], max_seqlen_k)
    offset = (of_k.lengths - of_q.lengths)[:, None, None, None]
    rows = torch.arange(max_seqlen_q, device=q.device)[:, None] + offset
    columns = torch.arange(max_seqlen_k, device=q.device)
    in_q, in_k = of_q.valid[:, None, :, None], of_k.valid[:, None, None, :]
    return of_q, of_k, visible(rows, columns, causal, window, in_q & in_k)


def varlen_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    window: int | None,
    need_out_lo: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """q (tq, h, d), k and v (tk, hk, d) -> out (tq, h, d), lse (h, tq) and out_lo."""
    wide = statistics_dtype(q)
    of_q, of_k, seen = _documents(
        q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window
    )
    padded_out, padded_lse = attend(
        of_q.unpack(q.to(wide)).transpose(1, 2),
        of_k.unpack(k.to(wide)).transpose(1, 2),
        of_k.unpack(v.to(wide)).transpose(1, 2),
        scale,
        seen,
    )
    out_wide = of_q.pack(padded_out.transpose(1, 2))
    lse = of_q.pack(padded_lse.transpose(1, 2), -torch.inf).t().contiguous()
    out = out_wide.to(q.dtype)
    return out, lse, rounding_error(out_wide, out, need_out_lo)


def varlen_attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    out_lo: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (tq, h, d), dk and dv (tk, hk, d)."""
    wide = statistics_dtype(q)
    of_q, of_k, seen = _documents(
        q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window
    )
    padded_lse = of_q.unpack(lse.t()).transpose(1, 2)
    padded_lse = torch.where(of_q.valid[:, None], padded_lse, -torch.inf)
    dq, dk, dv, _ = attend_bwd(
        of_q.unpack(dout.to(wide)).transpose(1, 2),
        None if dlse is None else of_q.unpack(dlse.t()).transpose(1, 2),
        of_q.unpack(q.to(wide)).transpose(1, 2),
        of_k.unpack(k.to(wide)).transpose(1, 2),
        of_k.unpack(v.to(wide)).transpose(1, 2),
        of_q.unpack(unrounded(out, out_lo, wide)).transpose(1, 2),
        padded_lse,
        scale,
        seen,
    )
    return (
        of_q.pack(dq.transpose(1, 2)).to(q.dtype),
        of_k.pack(dk.transpose(1, 2)).to(k.dtype),
        of_k.pack(dv.transpose(1, 2)).to(v.dtype),
    )
