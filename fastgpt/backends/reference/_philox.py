"""Philox-4x32-10, the counter-based generator behind dropout, in plain torch.

Source: Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Words4 = tuple[Tensor, Tensor, Tensor, Tensor]


def _mul_hi_lo(multiplier: int, x: Tensor) -> tuple[Tensor, Tensor]:
    # Halves of 16 bits keep each product below 2^48, inside the signed 64-bit integers of torch.
    low = multiplier * (x & 0xFFFF)
    high = multiplier * (x >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_4x32(counter: Words4, key: tuple[Tensor, Tensor]) -> Words4:
    """Four random 32-bit words per counter; all words are int64 tensors of one broadcast shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _mul_hi_lo(_MULTIPLIERS[0], c0)
        high1, low1 = _mul_hi_lo(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + _KEY_STEPS[0]) & _WORD
        k1 = (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def dropout_keep(seed: Tensor, b: int, h: int, sq: int, sk: int, p: float) -> Tensor:
    """Which of the `(b, h, sq, sk)` probabilities dropout keeps, bool, on the device of `seed`.

    The counter is (column / 4, row, batch * h + head, 0) and the lane column % 4, rows and columns
    counted from the start of q and k, so that no tiling changes the mask.
    """
    device = seed.device
    seed = seed.reshape(())
    groups = torch.arange((sk + 3) // 4, device=device).view(1, 1, -1)
    rows = torch.arange(sq, device=device).view(1, -1, 1)
    heads = torch.arange(b * h, device=device).view(-1, 1, 1)
    counter = torch.broadcast_tensors(groups, rows, heads, torch.zeros_like(groups))
    words = philox_4x32(counter, (seed & _WORD, (seed >> 32) & _WORD))
    lanes = torch.stack(words, dim=-1).flatten(-2)[..., :sk]  # (b * h, sq, sk)
    return (lanes >= round(p * 2**32)).view(b, h, sq, sk)
