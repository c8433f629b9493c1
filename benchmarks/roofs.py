"""The limits of this machine that the CPU kernels can be held against.

benchmarks/cpu_roofs.cpp measures them, compiled for the instruction set level in use;
`python -m benchmarks.roofs` prints them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from fastgpt.backends import native

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "roofs"
UNITS = {"_gflops": "GFLOP/s", "_gb_s": "GB/s"}
ONE = "_1_thread"


def _program(level: str) -> Path:
    """The program of a level, compiled if it is not up to date; RuntimeError says why not."""
    # pip's cmake and ninja lie beside the interpreter, whose folder need not be on PATH.
    path = f"{os.environ.get('PATH', '')}{os.pathsep}{Path(sys.executable).parent}"
    cmake, ninja = (shutil.which(tool, path=path) for tool in ("cmake", "ninja"))
    if cmake is None:
        raise RuntimeError("cmake is not installed")
    target = f"fastgpt_cpu_roofs_{level}"
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    configure = [cmake, "-S", str(ROOT), "-B", str(BUILD), "-DFASTGPT_WITH_TORCH=OFF", *generator]
    commands = [configure, [cmake, "--build", str(BUILD), "--target", target]]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise RuntimeError(f"{' '.join(command)} failed: {' '.join(said[-5:])}")
    return BUILD / target


def cpu_roofs() -> dict[str, float]:
    """Rates of this machine at the level in use, on torch's threads and (`..._1_thread`) on one.

    `threads`; `fma_gflops`, float32 multiply-adds in registers; `tile_product_gflops`, the product
    of one tile of attention; `bf16_dot_gflops` and `tile_product_bf16_gflops` where the level
    multiplies pairs of bfloat16; `read_gb_s`, `copy_gb_s` and `copy_nt_gb_s`, bytes read plus bytes
    written, the last with non-temporal stores. Empty, with a warning, where nothing can be
    compiled.
    """
    level = native.cpu_isa()
    try:
        if level is None:
            raise RuntimeError(native.MISSING or native.EXTENSION_MISSING)
        command = [str(_program(level)), str(torch.get_num_threads())]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        warnings.warn(f"the roofs of the CPU are not measured: {error}", stacklevel=2)
        return {}
    return {name: float(value) for name, value in json.loads(done.stdout).items()}


def table(roofs: dict[str, float]) -> str:
    """One line per limit: on all threads, on one."""
    lines = [f"{native.cpu_isa()}{'':24}{int(roofs['threads'])} threads    1 thread"]
    for name, value in roofs.items():
        for suffix, unit in UNITS.items():
            if name.endswith(suffix):
                what = name.removesuffix(suffix).replace("_", " ")
                lines.append(f"{what:20} {unit:7} {value:9.1f} {roofs[name + ONE]:11.1f}")
    return "\n".join(lines)


def main() -> None:
    roofs = cpu_roofs()
    if not roofs:
        sys.exit(1)
    print(table(roofs))


if __name__ == "__main__":
    main()
