"""The JSON file of a run: what it keeps, and the table of it."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GROUP = re.compile(r"(?P<op>\w+) (?P<shape>\S+) torch\.(?P<dtype>\w+) (?P<direction>\S+)")
STATS = ("min", "max", "mean", "stddev", "median", "iqr", "rounds", "iterations")
COMMIT = ("id", "time", "dirty")


@dataclass(frozen=True)
class Figure:
    """One peer of one group."""

    op: str
    shape: str
    dtype: str
    direction: str
    peer: str
    seconds: float
    bytes: int
    flops: int


def slim(document: dict[str, Any]) -> None:
    """Keep of a pytest-benchmark document what is read again, and nothing that names the host."""
    commit = document["commit_info"]
    document["commit_info"] = {key: commit[key] for key in COMMIT if key in commit}
    document["benchmarks"] = [
        {
            "group": entry["group"],
            "extra_info": entry["extra_info"],
            "stats": {key: entry["stats"][key] for key in STATS},
        }
        for entry in document["benchmarks"]
    ]


def load(path: Path) -> tuple[dict[str, Any], list[Figure]]:
    """The machine, and the figures in the order in which they were measured.

    Raises:
        ValueError: `path` is not the file of a run.
    """
    try:
        document = json.loads(path.read_text())
        return document["machine_info"], list(_figures(path, document["benchmarks"]))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected JSON, got: {error}") from None
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected the benchmarks.json of a run ({error!r})") from None


def _figures(path: Path, entries: list[dict[str, Any]]) -> Iterator[Figure]:
    for entry in entries:
        group = GROUP.fullmatch(entry["group"])
        if group is None:
            raise ValueError(f"{path}: the group {entry['group']!r} is not one of ours")
        info = entry["extra_info"]
        yield Figure(
            **group.groupdict(),
            peer=info["peer"],
            seconds=entry["stats"]["median"],
            bytes=info["bytes"],
            flops=info["flops"],
        )


def table(figures: list[Figure]) -> str:
    """Every group: the median of each peer in milliseconds, and the best peer's over ours."""
    ops: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for f in figures:
        ops[f.op][f"{f.dtype} {f.direction} {f.shape}"][f.peer] = f.seconds
    lines = []
    for op, groups in ops.items():
        peers = list(dict.fromkeys(peer for row in groups.values() for peer in row))
        if "fastgpt" in peers:
            peers = ["fastgpt", *(peer for peer in peers if peer != "fastgpt")]
        width = max(len(group) for group in groups)
        head = "".join(f"{peer:>{_column(peer)}}" for peer in peers)
        lines += ["", f"{op + ', ms':<{width}}{head}   best peer / fastgpt"]
        for group, row in groups.items():
            cells = "".join(f"{_ms(row.get(peer)):>{_column(peer)}}" for peer in peers)
            lines.append(f"{group:<{width}}{cells}   {_ratio(row)}")
    return "\n".join(lines[1:])


def _column(peer: str) -> int:
    return max(len(peer), 9) + 2


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3f}"


def _ratio(row: dict[str, float]) -> str:
    others = {peer: seconds for peer, seconds in row.items() if peer != "fastgpt"}
    if "fastgpt" not in row or not others:
        return "-"
    best = min(others, key=others.__getitem__)
    return f"{others[best] / row['fastgpt']:.2f} {best}"
