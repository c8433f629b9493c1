"""What the compiler made of the CUDA kernels: registers, shared memory, spills, instructions.

It is read off files that have the kernels, by cuobjdump; nothing is compiled for it.
`python -m tests.cuda_resources [file ...]` prints every kernel of the op library, or of other
libraries or object files; with `--write` it brings the table in CONTRIBUTING.md up to date.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgpt.backends import native

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
TABLE = re.compile(r"(<!-- cuda kernels: begin [^\n]*-->\n).*?(<!-- cuda kernels: end -->)", re.S)
RESERVED = 1024
"""Bytes that the system takes of a block with shared memory; from sm_90 on they are counted."""
TYPES = {"__nv_bfloat16": "bf16", "__half": "f16", "float": "f32", "double": "f64"}


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture. `spills` and `shared` (static) count bytes."""

    name: str
    source: str
    """Its .cu file without suffix; empty if a header has the kernel."""
    arch: str
    registers: int
    spills: int
    shared: int
    symbol: str

    @property
    def family(self) -> str:
        return self.name.partition("<")[0]


# --- cuobjdump ----------------------------------------------------------------------------------


@functools.cache
def cuobjdump() -> Path | None:
    """The toolkit's, or the one in Triton's package."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [Path(home) / "bin" for home in homes if home]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.submodule_search_locations:
        places.append(Path(triton.submodule_search_locations[0], "backends/nvidia/bin"))
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, places)])
    found = shutil.which("cuobjdump", path=path)
    return Path(found) if found else None


def missing() -> str | None:
    """Why the kernels of the op library cannot be read; None if they can."""
    if native.MISSING is not None:
        return native.MISSING
    if not native.gpu_architectures():
        return "the op library has no CUDA kernels; with nvcc: FASTGPT_CUDA=1 make test"
    if cuobjdump() is None:
        return "cuobjdump is neither in a CUDA toolkit nor in Triton's package"
    return None if shutil.which("c++filt") else "c++filt is not installed (binutils)"


def lines(files: Sequence[Path], *options: str) -> Iterator[tuple[str, str]]:
    """(architecture, line) of what cuobjdump prints, which can be hundreds of megabytes."""
    for file in files or (native.OP_LIBRARY,):
        yield from _lines_of(file, *options)


def _lines_of(file: Path, *options: str) -> Iterator[tuple[str, str]]:
    command = [str(cuobjdump()), *options, str(file)]
    arch = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("arch = "):
                arch = line.removeprefix("arch = ").strip()
            else:
                yield arch, line
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def readable(symbols: Sequence[str]) -> list[str]:
    """softmax_fwd_kernel<bf16, f32, 8, true>, of the mangled name."""
    command = ["c++filt", "--no-params", *symbols]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for long, short in TYPES.items():
        names = re.sub(rf"\b{long}\b", short, names)
    names = re.sub(r"fastgpt::(cuda::)?|\(anonymous namespace\)::|(?m:^void )", "", names)
    return names.splitlines()


def kernels(*files: Path) -> list[Kernel]:
    """Every kernel of the files, or of the op library, once for each architecture it is for."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    symbol = ""
    for arch, line in lines(files, "--dump-resource-usage"):
        if heading := re.match(r" *Function (\w+):", line):
            symbol = heading[1]
        elif "REG:" in line:
            usage = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            found[arch, symbol] = usage  # a kernel of a header comes once for each source
    names = readable([symbol for _, symbol in found])
    return [
        Kernel(
            name, _source(symbol), arch, usage["REG"], usage["STACK"] + usage["LOCAL"],
            _of_the_kernel(usage["SHARED"], arch), symbol,
        )
        for name, ((arch, symbol), usage) in zip(names, found.items(), strict=True)
    ]  # fmt: skip


def _of_the_kernel(shared: int, arch: str) -> int:
    number = int(re.sub(r"\D", "", arch))
    return shared - RESERVED if shared and number >= 90 else shared


def _source(symbol: str) -> str:
    """nvcc puts the file into the name of an anonymous namespace."""
    found = re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+)_cu_[0-9a-f]{8}", symbol)
    return found[1] if found else ""


def instructions(arch: str, *files: Path) -> dict[str, Counter[str]]:
    """symbol -> how often each instruction stands in the kernel for an architecture, as sm_90.

    To disassemble the op library takes half a minute for each.
    """
    found: dict[str, Counter[str]] = defaultdict(Counter)
    symbol = ""
    statement = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+ +)?([A-Z][\w.]*)")
    for _, line in lines(files, "-arch", arch, "-sass"):
        if code := statement.match(line):
            found[symbol][code[1]] += 1
        elif "Function : " in line:
            symbol = line.partition("Function : ")[2].strip()
    return found


# --- tables -------------------------------------------------------------------------------------


def listing(found: Iterable[Kernel]) -> str:
    """One line for each kernel."""
    return "\n".join(
        f"{k.arch:7} {k.registers:3} registers {k.shared:6} shared {k.spills:5} spilled  {k.name}"
        for k in found
    )


def table(found: Sequence[Kernel], compiler: str) -> str:
    """One row for each kernel of the sources, over all of its variants."""
    archs = sorted({k.arch.rstrip("a") for k in found})  # sm_90a runs where sm_90 does
    heads = [f"registers {arch}" for arch in archs]
    lines = [
        " | ".join([f"| kernel, by nvcc {compiler}", "variants", *heads, "shared", "spilled |"]),
        "|---|" + "---:|" * (len(heads) + 3),
    ]
    families: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in found:
        families[kernel.family].append(kernel)
    for family, variants in sorted(families.items()):
        registers = [
            _range([k.registers for k in variants if k.arch.rstrip("a") == arch]) for arch in archs
        ]
        count = len({k.name for k in variants})
        shared, spills = (
            _range([getattr(k, field) for k in variants]) for field in ("shared", "spills")
        )
        cells = [f"`{family}`", str(count), *registers, shared, spills]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _range(values: Sequence[int]) -> str:
    if not values:
        return "-"
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def compiler() -> str:
    """The nvcc that made the op library, as 13.0."""
    return ".".join(str(native.build_info()["cuda_version"]).split(".")[:2])


def updated(page: str, found: Sequence[Kernel]) -> str:
    """The page with the table of these kernels in it."""
    return TABLE.sub(lambda match: f"{match[1]}{table(found, compiler())}\n{match[2]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="*", metavar="file")
    parser.add_argument("--write", action="store_true", help=f"the table into {PAGE.name}")
    options = parser.parse_args()
    if (reason := missing()) is not None and not options.files:
        print(f"tests.cuda_resources: {reason}")
        return
    found = kernels(*options.files)
    if options.write:
        PAGE.write_text(updated(PAGE.read_text(), found))
    else:
        print(listing(found))


if __name__ == "__main__":
    main()
