"""Draw benchmark JSON files: GB/s or TFLOP/s of every peer per shape, the machine's roof dashed.

    python -m benchmarks.plot benchmarks/results/<machine>/benchmarks.json [--out FOLDER]

The unit is TFLOP/s where more than ten flops to a byte cannot be avoided, GB/s elsewhere; a shape
that fits in a cache can exceed the roof of the latter, which is that of memory. One PNG per op with
a panel for each dtype and direction, named after the op, beside the first JSON file or in FOLDER.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, load


def draw_all(paths: list[Path], folder: Path) -> list[Path]:
    machine: dict[str, Any] = {}
    ops: dict[str, list[Figure]] = defaultdict(list)
    for path in paths:
        machine, figures = load(path)
        for figure in figures:
            ops[figure.op].append(figure)
    folder.mkdir(parents=True, exist_ok=True)
    return [draw(op, figures, machine, folder) for op, figures in ops.items()]


def draw(op: str, figures: list[Figure], machine: dict[str, Any], folder: Path) -> Path:
    """A row of panels for each dtype, a column for each direction."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtypes, directions, shapes, peers = (
        list(dict.fromkeys(getattr(f, field) for f in figures))
        for field in ("dtype", "direction", "shape", "peer")
    )
    width = 2.5 + (0.4 + 0.2 * len(peers)) * len(shapes)
    grid, panels = pyplot.subplots(
        len(dtypes),
        len(directions),
        squeeze=False,
        figsize=(width * len(directions), 3.4 * len(dtypes) + 0.6),
        dpi=110,
        layout="constrained",
    )
    for row, dtype in zip(panels, dtypes, strict=True):
        for axes, direction in zip(row, directions, strict=True):
            part = [f for f in figures if (f.dtype, f.direction) == (dtype, direction)]
            _panel(axes, part, shapes, peers, machine)
            axes.set_title(f"{dtype} {direction}", fontsize=9)
    grid.suptitle(f"{op}, {machine['device']}, {machine['threads']} threads", fontsize=10)
    handles, labels = panels[0][0].get_legend_handles_labels()
    grid.legend(handles, labels, loc="outside lower center", ncols=9, frameon=False, fontsize=8)
    path = folder / f"{op}.png"
    grid.savefig(path)
    pyplot.close(grid)
    return path


def _panel(
    axes: Any, figures: list[Figure], shapes: list[str], peers: list[str], machine: dict[str, Any]
) -> None:
    """Grouped bars, one group per shape, and the roof that was measured in the same run."""
    by_flops = sum(f.flops for f in figures) > 10 * sum(f.bytes for f in figures)
    roof = machine["copy_gb_per_s"]
    if by_flops:
        roof = machine["matmul_tflop_per_s"][figures[0].dtype]
    rates = {
        (f.peer, f.shape): (f.flops / 1e12 if by_flops else f.bytes / 1e9) / f.seconds
        for f in figures
    }
    width = 0.8 / len(peers)
    for index, peer in enumerate(peers):
        places = [i + (index - (len(peers) - 1) / 2) * width for i in range(len(shapes))]
        axes.bar(places, [rates.get((peer, s), 0.0) for s in shapes], width, label=peer)
    axes.axhline(roof, linestyle="--", color="gray", linewidth=1)
    axes.set_xticks(range(len(shapes)), shapes, rotation=12, ha="right", fontsize=7)
    axes.set_ylabel("TFLOP/s" if by_flops else "GB/s", fontsize=8)
    axes.tick_params(axis="y", labelsize=7)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("json", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    try:
        drawn = draw_all(options.json, options.out or options.json[0].parent)
    except ValueError as error:
        parser.error(str(error))
    for path in drawn:
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
