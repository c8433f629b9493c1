"""Builds fastgpt: one extension, made by CMake. Metadata lives in pyproject.toml.

Environment: FASTGPT_NATIVE=0 installs pure Python on purpose; FASTGPT_CUDA=0|1 switches the CUDA
kernels off or insists on them; FASTGPT_CUDA_ARCHS ("80;90") chooses GPU architectures;
FASTGPT_SANITIZE names sanitizers (address,undefined); MAX_JOBS limits parallel compilers.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BYTES_PER_JOB = 1.5e9  # what one compiler needs at its largest file


def compiler() -> str | None:
    """The C++ compiler that CMake would use, None if there is none."""
    return next(
        filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None
    )


def nvcc() -> str | None:
    """The CUDA compiler, None if there is none or FASTGPT_CUDA=0."""
    wanted = os.environ.get("FASTGPT_CUDA")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    places = (f"{home}/bin/nvcc" if home else "nvcc", "nvcc", "/usr/local/cuda/bin/nvcc")
    found = next(filter(None, map(shutil.which, places)), None)
    if wanted == "1" and found is None:
        sys.exit("fastgpt: FASTGPT_CUDA=1, but nvcc is neither on PATH nor in CUDA_HOME/bin")
    return found


def jobs() -> int:
    """Parallel compilers: MAX_JOBS, else as many as cores and memory allow."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), int(memory / BYTES_PER_JOB)))


def reason_for_pure_python() -> str | None:
    """Why no native code is built here; None if it is."""
    if os.environ.get("FASTGPT_NATIVE") == "0":
        return "FASTGPT_NATIVE=0"
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        here = f"{sys.platform} on {platform.machine()}"
        return f"native kernels are built for Linux on x86-64 only, this is {here}"
    if compiler() is None:
        return "no C++ compiler found (for example: apt-get install g++)"
    return None


class CMakeBuild(build_ext):
    """Configures with CMake, builds with Ninja, installs beside the Python files."""

    def run(self) -> None:
        reason = reason_for_pure_python()
        if reason is not None:
            if os.environ.get("FASTGPT_CUDA") == "1":
                sys.exit(f"fastgpt: FASTGPT_CUDA=1, but {reason}")
            self.warn(f"fastgpt installs as pure Python: {reason}")
            return
        # pip may run without the environment's scripts, cmake and ninja among them, on PATH.
        path = f"{os.environ.get('PATH', '')}{os.pathsep}{Path(sys.executable).parent}"
        torch = importlib.util.find_spec("torch")
        pybind11 = importlib.util.find_spec("pybind11")
        cmake, ninja = (shutil.which(tool, path=path) for tool in ("cmake", "ninja"))
        if None in (torch, pybind11, cmake, ninja):
            sys.exit("fastgpt: building needs: pip install torch cmake ninja pybind11")
        build = Path(self.build_temp).resolve()
        target = ROOT if self.inplace else Path(self.build_lib).resolve()
        cuda = nvcc()
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",  # the last build's may be gone with pip's environment
            f"-DCMAKE_CXX_COMPILER={compiler()}",
            f"-DFASTGPT_PYTHON={sys.executable}",
            f"-DFASTGPT_TORCH_DIR={Path(str(torch.origin)).parent}",
            f"-DFASTGPT_VERSION={self.distribution.get_version()}",
            f"-DFASTGPT_WITH_CUDA={'ON' if cuda else 'OFF'}",
            f"-DFASTGPT_SANITIZE={os.environ.get('FASTGPT_SANITIZE', '')}",
            f"-Dpybind11_DIR={Path(str(pybind11.origin)).parent / 'share/cmake/pybind11'}",
        ]  # fmt: skip
        if cuda:
            archs = os.environ.get("FASTGPT_CUDA_ARCHS")
            configure.append(f"-DCMAKE_CUDA_COMPILER={cuda}")
            configure.append(f"-DFASTGPT_CUDA_ARCHS={archs}" if archs else "-UFASTGPT_CUDA_ARCHS")
        build.mkdir(parents=True, exist_ok=True)
        for command in (
            configure,
            ["cmake", "--build", str(build), "-j", str(jobs())],
            ["cmake", "--install", str(build), "--prefix", str(target)],
        ):
            print("fastgpt:", " ".join(command), flush=True)
            subprocess.run(command, check=True, env={**os.environ, "PATH": path})

    def get_outputs(self) -> list[str]:
        return [str(path) for path in Path(self.build_lib).glob("fastgpt/*.so")]

    def get_source_files(self) -> list[str]:
        return ["CMakeLists.txt", *(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.*"))]


setup(ext_modules=[Extension("fastgpt._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
