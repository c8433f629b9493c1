"""How the row ops cut their rows: as many whole short rows to a program as fill its lanes; and the
sums over rows, by one partial sum per program and a second kernel that adds them in order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.backends.triton import interpreted
from fastgpt.backends.triton._launch import ceil_div, launch, next_power_of_2, remembered

WHOLE_ROW = 16384
"""The longest row that a program holds in registers: 32 floats a thread of 16 warps."""
LONG_BLOCK = 4096
TILE = 1024
"""Elements that a program of short rows takes together."""
SPLIT_ROW = 8192
SPLIT_TILE = 2048
WIDEST = 16
"""Elements after which nothing is gained by knowing that a length is a multiple of more."""


@dataclass(frozen=True)
class RowsConfig:
    """WHOLE: a row fits one block. A function of n alone, or bits would depend on the batch."""

    whole: bool
    rows: int
    block: int
    num_warps: int
    tail: int = 0

    @property
    def constants(self) -> dict[str, int | bool]:
        return {"WHOLE": self.whole, "ROWS": self.rows, "BLOCK": self.block}


@remembered
def rows_config(n: int, tile: int = TILE) -> RowsConfig:
    whole = n <= WHOLE_ROW
    block = next_power_of_2(max(n, 1)) if whole else LONG_BLOCK
    rows = max(1, tile // block)
    return RowsConfig(whole, rows, block, num_warps=min(16, max(4, rows * block // 512)))


@remembered
def split_rows_config(n: int) -> RowsConfig:
    """For kernels that keep several values of an element: 16 elements a thread.

    A row beyond SPLIT_ROW is that many elements and a tail, 12288 as 8192 and 4096: the next power
    of two would idle a quarter of the registers, and there are not enough.
    """
    if n > WHOLE_ROW:
        return rows_config(n)
    block, tail = next_power_of_2(max(n, 1)), 0
    if n > SPLIT_ROW:
        block, tail = SPLIT_ROW, next_power_of_2(n - SPLIT_ROW)
    rows = max(1, SPLIT_TILE // block)
    return RowsConfig(True, rows, block, min(16, rows * block // 512), tail)


def unit(*counts: int) -> int:
    """The largest power of two up to WIDEST that divides all.

    Kernels write `n // UNIT * UNIT` for n, which tells the compiler how wide it may read. Triton
    itself asks for 16 alone, and would read rows of 5140 (GPT-3 13B) element by element.
    """
    size = WIDEST
    while any(count % size for count in counts):
        size //= 2
    return size


def length_unit(*counts: int) -> int:
    """`unit` of lengths of sequences: traced, all or nothing, as each answer is a compilation. So
    is each way to it: first should come what the others are multiples of."""
    if torch.compiler.is_compiling():
        return 1 if any(count % WIDEST for count in counts) else WIDEST
    return unit(*counts)


PARTIALS = 512
"""Programs of a backward pass that also sums over rows: four on each multiprocessor of an H100,
a constant because the order of summation follows from it."""
PARTIAL_TILES = 4
"""The fewest tiles that one of them takes, or writing its sums would cost more than reading."""


def partial_tiles(r: int, rows: int, programs: int = PARTIALS) -> tuple[int, int]:
    """How many tiles of `rows` rows each program takes, and how many programs that makes."""
    tiles = ceil_div(r, rows)
    each = min(max(PARTIAL_TILES, ceil_div(tiles, programs)), max(tiles, 1))
    return each, ceil_div(tiles, each)


SUM_ROWS, FEW_ROWS = 256, 16
SUM_COLUMNS = 1024 if interpreted() else 32
"""Few on a GPU, so that also narrow rows give work to many multiprocessors."""


@triton.jit(do_not_specialize=["r"])
def column_sums_kernel(
    g_x, g_sum, r, n, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    n = n // UNIT * UNIT
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, r, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        seen = (rows < r) & (columns < n)
        total += tl.load(g_x + rows.to(tl.int64) * n + columns, mask=seen, other=0.0)
    sums = tl.sum(total, axis=0, keep_dims=True)
    tl.store(g_sum + columns, sums, mask=columns < n)


def column_sums(x: Tensor) -> Tensor:
    """x (r, n) contiguous float32 -> its sums over the rows (n,), in an order that r decides."""
    r, n = x.shape
    sums = x.new_empty(n, dtype=torch.float32)
    programs = ceil_div(n, SUM_COLUMNS)
    # Two sizes, not every power of two: each would be compiled anew, and the graph around it too.
    rows = SUM_ROWS if r > FEW_ROWS else FEW_ROWS
    constants = {"UNIT": unit(n), "ROWS": rows, "BLOCK": SUM_COLUMNS}
    launch(column_sums_kernel, programs, x, sums, r, n, **constants, num_warps=8)
    return sums
