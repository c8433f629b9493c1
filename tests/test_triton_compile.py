"""Every Triton kernel is compiled for GPUs that are not here: it builds, fits and does not spill.

`python -m tests.triton_aot` prints registers, spills and shared memory of all of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastgpt.backends import triton

if (MISSING := triton.missing()) is not None:
    pytest.skip(MISSING, allow_module_level=True)

from tests.triton_aot import OPS, SHARED, Compiled, table

# The other targets take what the tests have no time for: CI gives it.
TARGETS = SHARED if os.environ.get("FASTGPT_EVERY_TARGET") == "1" else ("sm_90",)
ROOT = Path(__file__).resolve().parents[1]


class Compiler:
    """A process that has Triton's compiler, where this one may have its interpreter.

    It serves all tests of a worker: to import torch takes longer than to compile a small op.
    """

    def __init__(self, cache: Path) -> None:
        own = {
            "PYTHONPATH": str(ROOT),
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": str(cache),
            "CUDA_VISIBLE_DEVICES": "",
        }
        self.log = (cache / "stderr.txt").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.triton_aot", "--serve"],
            cwd=ROOT,
            env=os.environ | own,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def __call__(self, op: str, target: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{op} {target}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.log.seek(0)
            tail = self.log.read()[-4000:]
            pytest.fail(f"{op} for {target}: the compiler died with {self.process.wait()}\n{tail}")
        return json.loads(answer)


@pytest.fixture(scope="module")
def started() -> Iterator[list[Compiler]]:
    compilers: list[Compiler] = []
    yield compilers
    for compiler in compilers:
        compiler.process.kill()
        compiler.process.communicate()
        compiler.log.close()


@pytest.fixture
def compiler(started: list[Compiler], tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    """The one that runs, or a new one after a crash."""
    if not started or started[-1].process.poll() is not None:
        started.append(Compiler(tmp_path_factory.mktemp("triton")))
    return started[-1]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", OPS)
def test_compiles_fits_and_does_not_spill(compiler: Compiler, op: str, target: str) -> None:
    """float32 attention and heads of more than 128 may spill; which of them do is printed."""
    answer = compiler(op, target)
    if "skipped" in answer:
        pytest.skip(answer["skipped"])
    assert "failed" not in answer, answer["failed"]
    kernels = [Compiled(**fields) for fields in answer["compiled"]]
    assert kernels
    too_much = [k for k in kernels if k.shared > SHARED[target]]
    assert not too_much, "more shared memory than the GPU has:\n" + table(too_much)
    spilling = [k for k in kernels if k.spills]
    if spilling:
        print(table(spilling))
    forbidden = [k for k in spilling if not k.may_spill]
    assert not forbidden, "registers spill:\n" + table(forbidden)
