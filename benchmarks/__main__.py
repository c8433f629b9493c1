"""Every op beside every peer: `make bench`, or `python -m benchmarks [--device D] [pytest's]`.

Writes benchmarks.json and the plots into benchmarks/results/<machine>/ and prints one table. With
further arguments, as `-k attention`, it is a part that is measured, and the folder is
results/<machine>/part/, which git ignores.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks import figures, machine, plot

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = (
    "-q --compile --tb=short --show-capture=no --disable-warnings --benchmark-quiet"
    " --benchmark-disable-gc --benchmark-min-rounds=3 --benchmark-max-time=0.2"
).split()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        usage="%(prog)s [-h] [--device DEVICE] [pytest's arguments]",
        description="Time every op beside every peer; figures and plots of this machine.",
        epilog="Further arguments, as -k attention, go to pytest and measure a part.",
        allow_abbrev=False,
    )
    parser.add_argument("--device", help="cpu or cuda; a GPU if there is one")
    known, rest = parser.parse_known_args(arguments)
    try:
        device = machine.device(known.device)
    except ValueError as error:
        parser.error(str(error))
    folder = machine.folder_of(device)
    if rest:
        folder = folder / "part"
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "benchmarks.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "benchmarks", *OPTIONS, f"--device={device}"]
    command += [f"--benchmark-json={path}", *rest]
    status = subprocess.run(command, cwd=ROOT).returncode
    if not path.is_file() or not path.stat().st_size:
        print("nothing was measured")
        return status or 1
    plot.draw_all([path], folder)
    print(figures.table(figures.load(path)[1]))
    print(f"\nfigures and plots are in {folder.relative_to(ROOT)}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
