"""Times tile sizes of the Triton attention kernels on the GPU that is here: into tuning.json.

    python -m benchmarks.tune_triton [kind ...] [--head-dim D] [--jobs N] [--dry-run]

For every kind of kernel, head_dim class, window class and width of the dtype, each candidate is
compiled and timed; one that does not compile, or asks for more shared memory than there is, is
left out. The fastest that obeys the error rule replaces what is used now if it is more than
2 % faster. The kinds are tuned in order, so that a backward kernel is timed beside the best other
one; entries for laden scores stay as they are. There are several hundred candidates: --jobs
processes compile them before they are timed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

import fastgpt
from benchmarks import bench_attention, shapes
from benchmarks.measure import Case, check_error
from fastgpt import functional as F

Tiles = tuple[int, int, int, int]
"""(block_m, block_n, num_warps, num_stages)"""
Table = dict[str, dict[str, dict[str, list[int]]]]

CUDA = torch.device("cuda")
FASTER = 0.98
REGISTERS = 192
"""Floats of accumulators that a thread may hold: with more, everything else is spilled."""


@dataclass(frozen=True)
class Key:
    """One entry of the table."""

    kind: str
    head_dim: int
    narrow: bool
    wide: bool

    def __str__(self) -> str:
        window, bits = "narrow" if self.narrow else "dense", 32 if self.wide else 16
        return f"{self.head_dim} {window} {bits}"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.wide else torch.bfloat16

    def shape(self, b: int, h: int, s: int) -> shapes.Attention:
        window = min(256, s // 3) if self.narrow else None
        return shapes.Attention("tune", b, h, h, s, self.head_dim, window)


def _accumulators(kind: str, block_m: int, block_n: int, head_dim: int) -> int:
    """Floats that a program of a kernel accumulates, its tile of scores included."""
    held = {
        "attention_fwd": block_m * head_dim,
        "attention_bwd_dkv": 2 * block_n * head_dim,
        "attention_bwd_dq": block_m * head_dim,
    }
    return held[kind] + block_m * block_n * (1 if kind == "attention_fwd" else 2)


KINDS = ("attention_fwd", "attention_bwd_dkv", "attention_bwd_dq")


def keys(kinds: list[str], head_dims: list[int]) -> Iterator[Key]:
    for kind, head_dim, narrow, wide in itertools.product(
        kinds, head_dims, (False, True), (False, True)
    ):
        yield Key(kind, head_dim, narrow, wide)


def candidates(key: Key) -> list[Tiles]:
    """Every combination whose accumulators fit into the registers and keep them busy."""
    found = []
    for block_m, block_n, num_warps, num_stages in itertools.product(
        (32, 64, 128), (32, 64, 128), (4, 8), (2, 3)
    ):
        floats = _accumulators(key.kind, block_m, block_n, key.head_dim) / (32 * num_warps)
        # The tiles that are walked over, two of them a stage.
        walked = block_m if key.kind == "attention_bwd_dkv" else block_n
        shared = 2 * walked * key.head_dim * key.dtype.itemsize * num_stages
        if 48 <= floats <= REGISTERS and shared <= 200 << 10:
            found.append((block_m, block_n, num_warps, num_stages))
    return found


# --- the choice ---------------------------------------------------------------------------------


def choose(
    tiles: list[Tiles],
    now: Tiles,
    seconds: Callable[[Tiles], float],
    check: Callable[[Tiles], None],
    report: Callable[[str], None],
) -> Tiles:
    """The fastest of `tiles` that `check` accepts; `now` unless that is clearly faster.

    `seconds` raises for tiles that do not run; `check` raises AssertionError for wrong results.
    """
    times: dict[Tiles, float] = {}
    for candidate in dict.fromkeys([now, *tiles]):
        try:
            times[candidate] = seconds(candidate)
        except Exception as error:  # whatever the compiler or the driver has against it
            lines = str(error).strip().splitlines() or [type(error).__name__]
            report(f"{candidate} left out: {lines[0][:80]}")
    for candidate in sorted(times, key=lambda tiles: times[tiles]):
        if candidate != now and now in times and times[candidate] > FASTER * times[now]:
            break
        try:
            check(candidate)
        except AssertionError as error:
            report(f"{candidate} is wrong: {error}")
            continue
        report(f"{candidate} {times[candidate] * 1e3:.3f} ms, {now} {times.get(now, 0) * 1e3:.3f}")
        return candidate
    return now


# --- the table ----------------------------------------------------------------------------------


def table_file() -> Path:
    from fastgpt.backends.triton import _tuning

    return Path(_tuning.__file__).with_name("tuning.json")


def dump(table: Table) -> str:
    """The text of the table: JSON with one combination to a line."""
    text = json.dumps(table, indent=2)
    return re.sub(r"\[\s+([\d,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text) + "\n"


def now_used(key: Key, architecture: str) -> Tiles:
    from fastgpt.backends.triton import _tuning

    window = _tuning.NARROW if key.narrow else None
    return _tuning.attention_tiles(key.kind, architecture, key.head_dim, window, key.dtype)


@contextlib.contextmanager
def using(key: Key, architecture: str, tiles: Tiles) -> Iterator[None]:
    """The kernels take these tiles inside."""
    from fastgpt.backends.triton import _tuning

    row = _tuning._table().setdefault(architecture, {}).setdefault(key.kind, {})
    before = row.get(str(key))
    row[str(key)] = list(tiles)
    _forget(_tuning)
    try:
        yield
    finally:
        if before is None:
            del row[str(key)]
        else:
            row[str(key)] = before
        _forget(_tuning)


def _forget(tuning: ModuleType) -> None:
    """Empty the caches of what was read from the table, but for the table itself."""
    for function in vars(tuning).values():
        if hasattr(function, "cache_clear") and function is not tuning._table:
            function.cache_clear()


# --- on the GPU ---------------------------------------------------------------------------------


def step_of(key: Key, b: int, h: int, s: int) -> Callable[[], object]:
    """One call of the kernel's op, or of its backward alone."""
    shape = key.shape(b, h, s)
    q, k, v = (
        torch.randn(b, h, s, key.head_dim, device=CUDA, dtype=key.dtype, requires_grad=True)
        for _ in range(3)
    )
    if key.kind == "attention_fwd":
        return torch.no_grad()(lambda: F.attention(q, k, v, window=shape.window))
    out = F.attention(q, k, v, window=shape.window)
    dout = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)


def compile_in_process(key: Key, architecture: str, tiles: Tiles) -> None:
    """Leaves the binary in Triton's cache on disk, whatever becomes of the call."""
    with contextlib.suppress(Exception), fastgpt.backend("triton"):
        with using(key, architecture, tiles):
            step_of(key, 1, 1, 256)()


def milliseconds(step: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(step, warmup=20, rep=80, return_mode="median"))


def check(key: Key) -> None:
    """The error rule on a small shape, of the results that the kernel has a part in."""
    shape, backward = key.shape(1, 2, 300), key.kind != "attention_fwd"
    case = Case("attention", bench_attention.OP, shape, key.dtype, backward, CUDA)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.attention(q, k, v, window=shape.window)

    got = case.results(attention, case.leaves())
    for i, (x, y) in enumerate(zip(got, case.expected[0], strict=True)):
        check_error(x, y, lambda i=i: case.plain[i])  # type: ignore[misc]


def tune(key: Key, architecture: str, pool: ProcessPoolExecutor) -> Tiles:
    tiles, now = candidates(key), now_used(key, architecture)
    for done in [pool.submit(compile_in_process, key, architecture, t) for t in tiles]:
        done.result()
    s = 2048 if key.wide else 4096

    def seconds(candidate: Tiles) -> float:
        with using(key, architecture, candidate):
            return milliseconds(step_of(key, 2, 16, s)) / 1e3

    def accept(candidate: Tiles) -> None:
        with using(key, architecture, candidate):
            check(key)

    return choose(tiles, now, seconds, accept, lambda line: print(f"  {line}", flush=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="kind", help=", ".join(KINDS))
    parser.add_argument("--head-dim", type=int, action="append", choices=(64, 96, 128, 256))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--dry-run", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    if not set(options.kinds) <= set(KINDS):
        parser.error(f"kind: expected some of {', '.join(KINDS)}, got {' '.join(options.kinds)}")
    if not torch.cuda.is_available():
        sys.exit("tune_triton: this torch sees no GPU")

    from fastgpt.backends.triton import _launch

    architecture = _launch.architecture(CUDA)
    file = table_file()
    spawn = multiprocessing.get_context("spawn")
    with (
        fastgpt.backend("triton"),
        ProcessPoolExecutor(options.jobs, mp_context=spawn) as pool,
        contextlib.ExitStack() as found,
    ):
        for key in keys(options.kinds or list(KINDS), options.head_dim or [64, 96, 128, 256]):
            print(f"{architecture} {key.kind} {key}", flush=True)
            tiles = tune(key, architecture, pool)
            found.enter_context(using(key, architecture, tiles))
            if not options.dry_run:
                table: Table = json.loads(file.read_text())
                table.setdefault(architecture, {}).setdefault(key.kind, {})[str(key)] = list(tiles)
                file.write_text(dump(table))


if __name__ == "__main__":
    main()
