"""What is measured, and why each shape is in the list."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Attention:
    """q (b, h, s, d), k and v (b, hk, s, d), causal; `window` None is dense."""

    reason: str
    b: int
    h: int
    hk: int
    s: int
    d: int
    window: int | None = None

    def __str__(self) -> str:
        band = "dense" if self.window is None else f"w{self.window}"
        return f"{self.reason}-b{self.b}-h{self.h}-s{self.s}-d{self.d}-{band}"

    @property
    def pairs(self) -> int:
        """Visible query-key pairs of one head: what a kernel cannot avoid."""
        w = self.s if self.window is None else min(self.window, self.s)
        return w * (w + 1) // 2 + (self.s - w) * w

    def flops(self, backward: bool) -> int:
        """Two products forward, five backward, two operations a multiply-add."""
        return (10 if backward else 4) * self.b * self.h * self.d * self.pairs

    def bytes(self, dtype: torch.dtype, backward: bool) -> int:
        """Every tensor read or written once."""
        q, kv = self.b * self.h * self.s * self.d, self.b * self.hk * self.s * self.d
        elements = 4 * q + 4 * kv if backward else 2 * q + 2 * kv
        return elements * dtype.itemsize


@dataclass(frozen=True)
class Rows:
    """A matrix of rows (r, n)."""

    reason: str
    r: int
    n: int

    def __str__(self) -> str:
        return f"{self.reason}-r{self.r}-n{self.n}"

    def bytes(self, dtype: torch.dtype, tensors: int) -> int:
        """`tensors` of this size, each read or written once."""
        return tensors * self.r * self.n * dtype.itemsize


ATTENTION = {
    "cpu": [
        Attention("demo", 4, 4, 4, 512, 64),
        Attention("demo", 4, 4, 4, 512, 64, window=128),
        Attention("gpt3_small", 1, 12, 12, 512, 64),
        Attention("gpt3_small", 1, 12, 12, 2048, 64),
        Attention("long_band", 1, 4, 4, 4096, 64, window=256),
    ],
    "cuda": [
        Attention("gpt3_xl", 4, 24, 24, 2048, 128),
        Attention("gpt3_xl", 4, 24, 24, 2048, 128, window=256),
        Attention("gpt3_2_7b", 4, 32, 32, 2048, 80),
        Attention("long", 1, 16, 16, 8192, 128),
        Attention("long_band", 1, 16, 16, 8192, 128, window=256),
        Attention("grouped", 1, 32, 8, 8192, 128),
    ],
}

LAYER_NORM = {
    "cpu": [Rows("demo", 2048, 256), Rows("gpt3_small", 4096, 768), Rows("gpt3_xl", 4096, 2048)],
    "cuda": [
        Rows("gpt3_small", 16384, 768),
        Rows("gpt3_xl", 16384, 2048),
        Rows("gpt3_13b", 16384, 5140),
        Rows("gpt3_175b", 8192, 12288),
    ],
}

CROSS_ENTROPY = {
    "cpu": [Rows("demo", 2048, 4096), Rows("gpt2_vocabulary", 512, 50257)],
    "cuda": [Rows("gpt2_vocabulary", 8192, 50257), Rows("large_vocabulary", 4096, 131072)],
}
