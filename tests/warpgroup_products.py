"""Where the products of the warpgroup kernels take their first factors: of the compiled loops.

A product (HGMMA) reads its first factor from shared memory or from registers. In the loop of a
kernel registers are `invariant` (written before the loop alone), `fresh` (written in each round
before the product) or `carried` (written in a round after it, for the next). A source says how many
of each it has; nvcc 13.0 has been seen to give an invariant factor registers that the loop writes,
which makes it look carried, and the results wrong from the second round on. And how many `waits` a
round has: where ptxas does not understand how products overlap, it adds one after each.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from tests import cuda_resources

WRITES_NOTHING = re.compile(
    r"(ST|RED|BAR|BRA|BSYNC|BSSY|EXIT|NOP|DEPBAR|LDGSTS|LDGDEPBAR|WARP|FENCE|MEMBAR|[FIU]*SETP|PLOP3)"
)
WIDTHS = {"64": 2, "128": 4, "WIDE": 2}
"""Part of an instruction -> the registers that it writes."""


def written(instruction: str) -> range:
    """The registers that an instruction writes."""
    code, _, operands = re.sub(r"^@!?\w+ +", "", instruction).partition(" ")
    first = re.match(r"\s*(?:U?P\w+, )*R(\d+)", operands)
    if first is None or WRITES_NOTHING.match(code):
        return range(0)
    parts, start = code.split("."), int(first[1])
    if parts[0] == "HGMMA":
        shape = re.search(r"64x(\d+)x16", code)
        assert shape is not None, instruction
        return range(start, start + int(shape[1]) // 2)
    if parts[0] == "LDSM":
        return range(start, start + (int(parts[-1]) if parts[-1].isdigit() else 1))
    return range(start, start + max((WIDTHS.get(part, 1) for part in parts[1:]), default=1))


def kinds(loop: Sequence[str]) -> Counter[str]:
    """How many products of a loop take their first factor from where, and how many waits it has."""
    writes = [set(written(instruction)) for instruction in loop]
    found: Counter[str] = Counter()
    for at, instruction in enumerate(loop):
        found["waits"] += "WARPGROUP.DEPBAR" in instruction
        if "HGMMA" not in instruction:
            continue
        factor = re.search(r"HGMMA\S* R\d+, R(\d+), gdesc", instruction)
        if factor is None:
            found["shared"] += 1
            continue
        registers = set(range(int(factor[1]), int(factor[1]) + 4))
        rounds = [i for i, changed in enumerate(writes) if changed & registers]
        before = any(i < at for i in rounds)
        found["invariant" if not rounds else "fresh" if before else "carried"] += 1
    return +found


def largest_loop(code: Sequence[tuple[int, str]]) -> list[str]:
    """The longest loop with a product, of a kernel as (address, instruction)."""
    places = {address: i for i, (address, _) in enumerate(code)}
    loops = []
    for i, (_, instruction) in enumerate(code):
        target = re.search(r"\bBRA\b.*0x([0-9a-f]+)$", instruction)
        begin = places.get(int(target[1], 16), i) if target else i
        body = [text for _, text in code[begin : i + 1]]
        if begin < i and any("HGMMA" in text for text in body):
            loops.append(body)
    return max(loops, key=len, default=[])


def product_loops(arch: str, *files: Path) -> dict[str, Counter[str]]:
    """symbol -> the kinds of its loop, of each kernel that has one with products."""
    code: dict[str, list[tuple[int, str]]] = defaultdict(list)
    symbol = ""
    for _, line in cuda_resources.lines(files, "-arch", arch, "-sass"):
        if "Function : " in line:
            symbol = line.partition("Function : ")[2].strip()
        elif statement := re.match(r"\s+/\*([0-9a-f]+)\*/\s+(.*?) *;", line):
            code[symbol].append((int(statement[1], 16), statement[2]))
    loops = {symbol: largest_loop(lines) for symbol, lines in code.items()}
    return {symbol: kinds(loop) for symbol, loop in loops.items() if loop}
