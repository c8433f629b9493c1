"""What is measured, and why each shape is in the list: the first word of its name is the reason.

Within a list the cheap shapes come first: what a peer takes for them says which of the others it
is too slow for.
"""

from __future__ import annotations

from dataclasses import dataclass


def band_pairs(s: int, window: int | None) -> int:
    """Query-key pairs that a causal band of s tokens holds."""
    w = s if window is None else min(window, s)
    return w * (w + 1) // 2 + (s - w) * w


def _band(window: int | None) -> str:
    return "dense" if window is None else f"w{window}"


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
        return f"{self.reason}-b{self.b}-h{self.h}-s{self.s}-d{self.d}-{_band(self.window)}"

    @property
    def pairs(self) -> int:
        """Visible pairs of one sequence and head."""
        return band_pairs(self.s, self.window)


@dataclass(frozen=True)
class Documents:
    """q (t, h, d), k and v (t, hk, d): documents of these lengths, packed, causal within each."""

    reason: str
    lengths: tuple[int, ...]
    h: int
    hk: int
    d: int
    window: int | None = None

    def __str__(self) -> str:
        return (
            f"{self.reason}-n{len(self.lengths)}-t{self.total}-h{self.h}-d{self.d}"
            f"-{_band(self.window)}"
        )

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @property
    def pairs(self) -> int:
        """Visible pairs of one head, over all documents."""
        return sum(band_pairs(length, self.window) for length in self.lengths)


@dataclass(frozen=True)
class Decode:
    """One new query a sequence, q (b, h, 1, d), over caches (b, hk, keys, d).

    The caches are full, or with `ragged` filled to lengths that rise evenly from a quarter.
    """

    reason: str
    b: int
    h: int
    hk: int
    keys: int
    d: int
    window: int | None = None
    ragged: bool = False

    def __str__(self) -> str:
        return f"{self.reason}-b{self.b}-h{self.h}-k{self.keys}-d{self.d}-{_band(self.window)}"

    @property
    def lengths(self) -> list[int]:
        if not self.ragged:
            return [self.keys] * self.b
        steps = max(self.b - 1, 1)
        return [self.keys // 4 + (self.keys - self.keys // 4) * i // steps for i in range(self.b)]

    @property
    def visible(self) -> int:
        """Keys that the queries of one head see, over all sequences."""
        window = self.keys if self.window is None else self.window
        return sum(min(length, window) for length in self.lengths)


@dataclass(frozen=True)
class Rows:
    """A matrix of rows (r, n)."""

    reason: str
    r: int
    n: int

    def __str__(self) -> str:
        return f"{self.reason}-r{self.r}-n{self.n}"


@dataclass(frozen=True)
class Scores:
    """Attention scores (bh, s, s), causal; `window` None is dense."""

    reason: str
    bh: int
    s: int
    window: int | None = None

    def __str__(self) -> str:
        return f"{self.reason}-bh{self.bh}-s{self.s}-{_band(self.window)}"

    @property
    def pairs(self) -> int:
        """Visible scores of one matrix."""
        return band_pairs(self.s, self.window)


@dataclass(frozen=True)
class Projection:
    """Hidden states (r, c) that are projected onto v classes."""

    reason: str
    r: int
    v: int
    c: int

    def __str__(self) -> str:
        return f"{self.reason}-r{self.r}-v{self.v}-c{self.c}"


ATTENTION = {
    "cpu": [
        Attention("demo", 4, 4, 4, 512, 64),
        Attention("gpt3_small", 1, 12, 12, 2048, 64),
        Attention("long_band", 1, 2, 2, 4096, 64, window=256),
    ],
    "cuda": [
        Attention("gpt3_xl", 4, 24, 24, 2048, 128, window=256),
        Attention("gpt3_xl", 4, 24, 24, 2048, 128),
        Attention("gpt3_2_7b", 4, 32, 32, 2048, 80),
        Attention("long_band", 1, 16, 16, 8192, 128, window=256),
        Attention("long", 1, 16, 16, 8192, 128),
        Attention("grouped", 1, 32, 8, 8192, 128),
        Attention("gpt_j", 4, 16, 16, 2048, 256),
    ],
}

_MIXED = (512, 64, 384, 128, 256, 32, 480, 192)  # 2048 tokens

VARLEN_ATTENTION = {
    "cpu": [
        Documents("many_short", (64,) * 32, 4, 4, 64),
        Documents("mixed", _MIXED, 4, 4, 64),
        Documents("one_long_band", (64, 1920, 64), 4, 4, 64, window=256),
    ],
    "cuda": [
        Documents("many_short", (128,) * 128, 24, 24, 128),
        Documents("mixed", _MIXED * 4, 24, 24, 128),
        Documents("one_long_band", (256, 7680, 256), 24, 24, 128, window=256),
        Documents("one_long", (256, 7680, 256), 24, 24, 128),
        Documents("grouped", _MIXED * 4, 32, 8, 128),
    ],
}

DECODE_ATTENTION = {
    "cpu": [
        Decode("band", 4, 12, 12, 2048, 64, window=256),
        Decode("one_stream", 1, 12, 12, 2048, 64),
        Decode("ragged", 4, 12, 12, 2048, 64, ragged=True),
        Decode("grouped", 4, 32, 8, 2048, 64),
    ],
    "cuda": [
        Decode("band", 16, 24, 24, 8192, 128, window=256),
        Decode("one_stream", 1, 24, 24, 8192, 128),
        Decode("ragged", 16, 24, 24, 8192, 128, ragged=True),
        Decode("batch", 16, 24, 24, 8192, 128),
        Decode("grouped", 32, 32, 8, 8192, 128),
    ],
}

_WIDTHS = {
    "cpu": [Rows("demo", 2048, 256), Rows("gpt3_small", 4096, 768), Rows("gpt3_xl", 4096, 2048)],
    "cuda": [
        Rows("gpt3_small", 16384, 768),
        Rows("gpt3_xl", 16384, 2048),
        Rows("gpt3_13b", 16384, 5140),
        Rows("gpt3_175b", 8192, 12288),
    ],
}

LAYER_NORM = _WIDTHS

ADD_LAYER_NORM = {"cpu": _WIDTHS["cpu"][:2], "cuda": _WIDTHS["cuda"]}

BIAS_GELU = {
    "cpu": [Rows("demo", 2048, 1024), Rows("gpt3_small", 2048, 3072)],
    "cuda": [
        Rows("gpt3_small", 16384, 3072),
        Rows("gpt3_xl", 16384, 8192),
        Rows("gpt3_175b", 4096, 49152),
    ],
}

SOFTMAX = {
    "cpu": [Rows("scores", 4096, 512), Rows("gpt2_vocabulary", 64, 50257)],
    "cuda": [
        Rows("scores", 65536, 2048),
        Rows("gpt2_vocabulary", 4096, 50257),
        Rows("large_vocabulary", 1024, 131072),
    ],
}

MASKED_SOFTMAX = {
    "cpu": [Scores("demo_band", 4, 1024, window=256), Scores("demo", 4, 1024)],
    "cuda": [
        Scores("gpt3_xl_band", 96, 2048, window=256),
        Scores("gpt3_xl", 96, 2048),
        Scores("long_band", 4, 8192, window=256),
    ],
}

CROSS_ENTROPY = {
    "cpu": [Rows("demo", 2048, 4096), Rows("gpt2_vocabulary", 256, 50257)],
    "cuda": [Rows("gpt2_vocabulary", 8192, 50257), Rows("large_vocabulary", 4096, 131072)],
}

LINEAR_CROSS_ENTROPY = {
    "cpu": [Projection("demo", 512, 4096, 256), Projection("gpt2_vocabulary", 256, 50257, 768)],
    "cuda": [
        Projection("gpt2_vocabulary", 8192, 50257, 768),
        Projection("gpt3_xl", 8192, 50257, 2048),
        Projection("large_vocabulary", 4096, 131072, 4096),
    ],
}
