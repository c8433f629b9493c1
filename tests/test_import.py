"""Importing works without triton, without a compiler, without the library, and stays light."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastgpt
from fastgpt.backends import native

PACKAGE = Path(fastgpt.__file__).parent
TRAIN = """
import torch, fastgpt
from fastgpt import functional as F
q = torch.randn(1, 2, 5, 8, requires_grad=True)
F.attention(q, q, q, window=3).sum().backward()
assert q.grad.isfinite().all()
print(str(fastgpt.explain(F.attention, q, q, q)))
"""


def in_process(where: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(where)} | environment
    environment.pop("FASTGPT_BACKEND", None)
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=where, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


def output(where: Path, *command: str, **environment: str) -> str:
    done = in_process(where, *command, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def copied(tmp_path: Path, *, libraries: bool) -> Path:
    """A copy of the package, with or without what the compiler made."""
    ignored = shutil.ignore_patterns("__pycache__", *(() if libraries else ("*.so",)))
    shutil.copytree(PACKAGE, tmp_path / "fastgpt", ignore=ignored)
    return tmp_path


def test_without_the_library_the_reference_runs_and_info_says_so(tmp_path: Path) -> None:
    where = copied(tmp_path, libraries=False)
    said = output(where, "-c", TRAIN)
    assert said.startswith("attention: reference (plain torch")
    assert "not cpu: libfastgpt_ops.so is not in the package" in said
    info = output(where, "-m", "fastgpt", "info", COLUMNS="300")
    assert "libfastgpt_ops.so is not in the package" in " ".join(info.split())
    assert "compiler" in info


def test_forced_cpu_without_the_library_raises_the_reason(tmp_path: Path) -> None:
    where = copied(tmp_path, libraries=False)
    done = in_process(
        where,
        "-c",
        "import torch, fastgpt\nwith fastgpt.backend('cpu'):\n"
        "    fastgpt.functional.softmax(torch.ones(2, 2))",
    )
    assert "RuntimeError: softmax: backend 'cpu' is forced, but" in done.stderr
    assert "compiler" in done.stderr


def test_a_library_that_does_not_load_is_a_reason_not_an_error(tmp_path: Path) -> None:
    where = copied(tmp_path, libraries=False)
    (where / "fastgpt" / native.OP_LIBRARY.name).write_bytes(b"not a library")
    said = output(where, "-c", TRAIN)
    assert said.startswith("attention: reference")
    assert "does not load" in said


@pytest.mark.skipif(native.MISSING is not None, reason=str(native.MISSING))
def test_a_broken_extension_module_does_not_disable_the_kernels(tmp_path: Path) -> None:
    where = copied(tmp_path, libraries=True)
    for module in (where / "fastgpt").glob("_C*.so"):
        module.write_bytes(b"not a module")
    assert output(where, "-c", TRAIN).startswith("attention: cpu (")


def test_native_can_be_switched_off() -> None:
    said = output(PACKAGE.parent, "-c", TRAIN, FASTGPT_NATIVE="0")
    assert said.startswith("attention: reference")
    assert "FASTGPT_NATIVE=0" in said


def test_import_needs_and_loads_no_optional_package() -> None:
    optional = ("triton", "transformers", "kernels", "tokenizers", "typer", "rich", "matplotlib")
    code = (
        "import sys\n"
        f"for name in {optional}: sys.modules[name] = None\n"
        "import fastgpt, fastgpt.model, fastgpt.nn\n"
    )
    output(PACKAGE.parent, "-c", code + TRAIN)


def test_import_leaves_torchs_compiler_alone() -> None:
    """It takes as long to import as the rest of torch."""
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import fastgpt, fastgpt.model, fastgpt.nn\n"
        "print([m for m in set(sys.modules) - before if m.startswith('torch._dynamo')])\n"
        "f, g = lambda: None, lambda: None\n"
        "assert vars(fastgpt.dispatch._constant(f)) == "
        "vars(torch.compiler.assume_constant_result(g))\n"
    )
    assert output(PACKAGE.parent, "-c", code).strip() == "[]"


def test_public_names_are_there() -> None:
    for module in (fastgpt, fastgpt.functional, fastgpt.nn):
        for name in module.__all__:
            assert getattr(module, name) is not None


@pytest.mark.skipif(native.MISSING is not None, reason="the op library is not loaded")
def test_an_isa_level_that_is_not_used_is_not_silent(tmp_path: Path) -> None:
    where = copied(tmp_path, libraries=True)
    done = in_process(where, "-c", "import fastgpt", FASTGPT_CPU_ISA="avx2")
    assert done.returncode == 0
    assert "FASTGPT_CPU_ISA: expected one of baseline" in done.stderr
    assert "got 'avx2'" in done.stderr
    done = in_process(where, "-c", "import fastgpt", FASTGPT_CPU_ISA="baseline")
    assert "FASTGPT_CPU_ISA" not in done.stderr
