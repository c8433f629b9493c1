"""The newest queries of each sequence over its cache of keys and values.

Query row i of t stands at position p_i = total - t + i, where total counts the keys including the
appended ones; it sees position p iff cache_start <= p <= p_i and p_i - p < window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.backends.reference._attend import attend, token_major
from fastgpt.backends.reference._band import visible
from fastgpt.ops._checks import statistics_dtype


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    k_new: Tensor | None,
    v_new: Tensor | None,
    scale: float,
    window: int | None,
    cache_start: Tensor | None,
    ring: bool,
) -> tuple[Tensor, Tensor]:
    """q (b, h, t, d), caches (b, hk, capacity, d) -> out (b, h, t, d), lse (b, h, t).

    Writes k_new and v_new into the caches first; the index arithmetic drops what does not fit.
    """
    capacity = k_cache.shape[2]
    lengths = cache_lengths.long()[:, None]
    slots = torch.arange(capacity, device=q.device)
    if k_new is not None and v_new is not None:
        _append(k_cache, k_new, slots - lengths, ring)
        _append(v_cache, v_new, slots - lengths, ring)
        lengths = lengths + k_new.shape[2]
    if ring:
        # A slot holds the newest position that is congruent to it.
        slots = lengths - 1 - (lengths - 1 - slots).remainder(capacity)
    rows = lengths + torch.arange(-q.shape[2], 0, device=q.device)  # (b, t)
    positions = slots.view(-1, 1, 1, capacity)
    started = None if cache_start is None else positions >= cache_start[:, None, None, None]
    seen = visible(rows[:, None, :, None], positions, True, window, positions >= 0, started)
    wide = statistics_dtype(q)
    out, lse = attend(q.to(wide), k_cache.to(wide), v_cache.to(wide), scale, seen)
    return token_major(out.to(q.dtype)), lse


def _append(cache: Tensor, new: Tensor, source: Tensor, ring: bool) -> None:
    """cache[..., slot, :] = new[..., source[slot], :] wherever that row exists; source (b, cap)."""
    t = new.shape[2]
    if t == 0:
        return
    if ring:
        source = source.remainder(cache.shape[2])
    written = ((source >= 0) & (source < t))[:, None, :, None]
    index = source.clamp(0, t - 1)[:, None, :, None].expand(-1, cache.shape[1], -1, cache.shape[3])
    cache.copy_(torch.where(written, new.gather(2, index), cache))
