"""How the row ops cut their rows: as many whole short rows to a program as fill its lanes."""

from __future__ import annotations

from dataclasses import dataclass

from fastgpt.backends.triton._launch import next_power_of_2, remembered

WHOLE_ROW = 16384
"""The longest row that a program holds in registers: 32 floats a thread of 16 warps."""
LONG_BLOCK = 4096
TILE = 1024
"""Elements that a program of short rows takes together."""


@dataclass(frozen=True)
class RowsConfig:
    """WHOLE: a row fits one block. A function of n alone, or bits would depend on the batch."""

    whole: bool
    rows: int
    block: int
    num_warps: int

    @property
    def constants(self) -> dict[str, int | bool]:
        return {"WHOLE": self.whole, "ROWS": self.rows, "BLOCK": self.block}


@remembered
def rows_config(n: int) -> RowsConfig:
    whole = n <= WHOLE_ROW
    block = next_power_of_2(max(n, 1)) if whole else LONG_BLOCK
    rows = max(1, TILE // block)
    return RowsConfig(whole, rows, block, num_warps=min(16, max(4, rows * block // 512)))
