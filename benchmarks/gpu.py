"""`make gpu` after the build: the tests on the GPU, the benchmarks, figures, one table.

Writes benchmarks/results/<gpu>/: info.txt, tests.txt, benchmarks.json and the plots.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.plot import GROUP, draw, load

ROOT = Path(__file__).resolve().parent.parent


def results_folder() -> Path:
    """benchmarks/results/<gpu>, the name in lower case with dashes."""
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()
    folder = ROOT / "benchmarks" / "results" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run(command: list[str], log: Path) -> int:
    """Run a command, show its output and keep it in `log`."""
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            file.write(line)
    return process.returncode


def table(path: Path) -> str:
    """Every group of the benchmarks: median of each peer, in milliseconds, ours first."""
    groups: dict[str, dict[str, float]] = {}
    for entry in json.loads(path.read_text())["benchmarks"]:
        peer = entry["params"]["peer"]
        groups.setdefault(entry["group"], {})[peer] = entry["stats"]["median"] * 1e3
    lines = []
    for group, peers in groups.items():
        assert GROUP.fullmatch(group)
        ours = peers.get("fastgpt")
        others = [f"{name} {ms:.3f}" for name, ms in peers.items() if name != "fastgpt"]
        lines.append(
            f"{group}: fastgpt {'-' if ours is None else f'{ours:.3f}'} ms; " + ", ".join(others)
        )
    return "\n".join(lines)


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("make gpu: this torch sees no GPU; install a CUDA build of torch")
    folder = results_folder()
    python = [sys.executable, "-m"]
    run([*python, "fastgpt", "info"], folder / "info.txt")
    tests = run([*python, "pytest", "-q", "-p", "no:benchmark", "tests"], folder / "tests.txt")
    figures = folder / "benchmarks.json"
    command = [*python, "pytest", "-q", "benchmarks", "--device=cuda", "--compile"]
    benchmarks = run(
        [*command, f"--benchmark-json={figures}", *sys.argv[1:]], folder / "benchmarks.txt"
    )
    if figures.is_file() and figures.stat().st_size:
        machine, rates = load([figures])
        for title, peers in rates.items():
            draw(title, peers, machine, folder)
        print(table(figures))
    print(f"results are in {folder.relative_to(ROOT)}")
    sys.exit(tests or benchmarks)


if __name__ == "__main__":
    main()
