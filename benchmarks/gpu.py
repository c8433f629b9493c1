"""`make gpu` after the build: the tests on the GPU, then the benchmarks as `make bench` runs them.

Writes benchmarks/results/<gpu>/: info.txt, tests.txt, benchmarks.txt, and the figures and plots.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import machine

ROOT = Path(__file__).resolve().parent.parent


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


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("make gpu: this torch sees no GPU; install a CUDA build of torch")
    folder = machine.folder_of(torch.device("cuda"))
    folder.mkdir(parents=True, exist_ok=True)
    python = [sys.executable, "-m"]
    run([*python, "fastgpt", "info"], folder / "info.txt")
    tests = run([*python, "pytest", "-q", "-p", "no:benchmark", "tests"], folder / "tests.txt")
    command = [*python, "benchmarks", "--device=cuda", *sys.argv[1:]]
    benchmarks = run(command, folder / "benchmarks.txt")
    sys.exit(tests or benchmarks)


if __name__ == "__main__":
    main()
