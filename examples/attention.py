"""Dense and banded attention as functions: which kernel runs, and what a band costs."""

import time

import torch

import fastgpt
from fastgpt import functional as F


def seconds(window: int | None, s: int) -> float:
    """One forward and backward of (1, 4, s, 64), the best of three."""
    q, k, v = (torch.randn(1, 4, s, 64, requires_grad=True) for _ in range(3))
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        F.attention(q, k, v, window=window).sum().backward()
        times.append(time.perf_counter() - begin)
    return min(times)


def main() -> None:
    q = torch.randn(1, 4, 1024, 64)
    print(fastgpt.explain(F.attention, q, q, q, window=256))
    print(f"{'s':>6} {'dense ms':>10} {'band of 256 ms':>16}")
    for s in (512, 1024, 2048):
        print(f"{s:6d} {seconds(None, s) * 1e3:10.1f} {seconds(256, s) * 1e3:16.1f}")


if __name__ == "__main__":
    main()
