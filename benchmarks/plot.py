"""Draw benchmark JSON files: GB/s and TFLOP/s of every peer per shape, the machine's roof dashed.

    python -m benchmarks.plot benchmarks/results/<machine>/*.json [--out FOLDER]

One PNG per op, dtype and direction, named after them, beside the first JSON file or in FOLDER.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

GROUP = re.compile(r"(?P<op>\w+) (?P<shape>\S+) torch\.(?P<dtype>\w+) (?P<direction>\S+)")


def load(paths: list[Path]) -> tuple[dict[str, Any], dict[str, dict[str, dict[str, float]]]]:
    """The machine, and title -> peer -> shape -> rate (TFLOP/s if flops are known, else GB/s)."""
    machine: dict[str, Any] = {}
    figures: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for path in paths:
        document = json.loads(path.read_text())
        machine = document["machine_info"]
        for entry in document["benchmarks"]:
            group = GROUP.fullmatch(entry["group"])
            if group is None:
                raise ValueError(f"{path}: the group {entry['group']!r} is not one of ours")
            info, seconds = entry["extra_info"], entry["stats"]["median"]
            unit = "TFLOP/s" if info["flops"] else "GB/s"
            rate = (info["flops"] / 1e12 if info["flops"] else info["bytes"] / 1e9) / seconds
            title = f"{group['op']} {group['dtype']} {group['direction']}, {unit}"
            figures[title][entry["params"]["peer"]][group["shape"]] = rate
    return machine, figures


def draw(
    title: str, peers: dict[str, dict[str, float]], machine: dict[str, Any], folder: Path
) -> Path:
    """Grouped bars, one group per shape, and the roof that was measured in the same run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(shape for rates in peers.values() for shape in rates))
    roof = machine["matmul_tflop_per_s" if title.endswith("TFLOP/s") else "copy_gb_per_s"]
    figure, axes = pyplot.subplots(figsize=(2 + 1.6 * len(shapes), 4.2), dpi=120)
    width = 0.8 / len(peers)
    for index, (peer, rates) in enumerate(peers.items()):
        places = [i + (index - (len(peers) - 1) / 2) * width for i in range(len(shapes))]
        axes.bar(places, [rates.get(shape, 0.0) for shape in shapes], width, label=peer)
    axes.axhline(roof, linestyle="--", color="gray", linewidth=1)
    axes.set_xticks(range(len(shapes)), shapes, rotation=15, ha="right", fontsize=7)
    axes.set(ylabel=title.rsplit(", ", 1)[1], title=f"{title}\n{machine['device']}")
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    path = folder / (re.sub(r"\W+", "_", title.rsplit(",", 1)[0]) + ".png")
    figure.savefig(path)
    pyplot.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    folder = arguments.out or arguments.json[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    machine, figures = load(arguments.json)
    for title, peers in figures.items():
        print(draw(title, peers, machine, folder))


if __name__ == "__main__":
    main()
