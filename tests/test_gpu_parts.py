"""`make gpu` as far as it goes without a GPU: its arguments, refusals, limits, and its table."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_bench, machine
from benchmarks.gpu_bench import Measured, Row
from benchmarks.shapes import Rows
from fastgpt import dispatch
from tests import every_kernel
from tests.test_benchmarks import SMALL

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
ROOFS = {"copy_gb_per_s": 10.0, "matmul_tflop_per_s": {"float32": 0.1, "bfloat16": 0.1}}
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


# --- the parts ----------------------------------------------------------------------------------


def test_arguments_name_parts_and_what_is_for_one_of_them() -> None:
    assert gpu.parsed([]) == (["tests", "sanitize", "bench"], 540.0, [])
    assert gpu.parsed(["bench", "--seconds=60"]) == (["bench"], 60.0, [])
    assert gpu.parsed(["bench", "--only", "tests"]) == (["bench"], 540.0, ["--only", "tests"])
    with pytest.raises(SystemExit):
        gpu.parsed(["--only", "attention"])


@without_gpu
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["bench"]) == 1
    assert "this torch sees no GPU" in capsys.readouterr().out


@without_gpu
@pytest.mark.parametrize("target", ["gpu", "gpu-tests", "gpu-sanitize", "gpu-bench"])
def test_make_says_what_is_missing(target: str) -> None:
    if shutil.which("make") is None or shutil.which("nvidia-smi") is not None:
        pytest.skip("needs make, and no driver of a GPU")
    done = subprocess.run(["make", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode
    assert "there is no NVIDIA GPU here" in done.stdout


def test_what_is_not_installed_is_named() -> None:
    assert gpu.lacking("torch") is None
    reason = gpu.lacking("torch", "no_such_package", "nor_this")
    assert reason == "needs no_such_package, nor_this: pip install no_such_package nor_this"


def test_output_is_shown_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.txt"
    for status in (0, 3):
        code = f"import sys; print('line', {status}); sys.exit({status})"
        assert gpu.run([sys.executable, "-c", code], log, 60) == status
    assert log.read_text() == "line 0\nline 3\n"
    assert capsys.readouterr().out == "line 0\nline 3\n"


def test_a_part_ends_in_time_and_tells_what_it_knew(tmp_path: Path) -> None:
    script = """
        trap 'echo so far; kill $!; exit 1' INT
        echo begun
        sleep 60 > /dev/null &
        wait
    """
    log, begin = tmp_path / "log.txt", time.monotonic()
    assert gpu.run(["sh", "-c", script], log, 2) == gpu.ENDED_BY_US
    assert time.monotonic() - begin < 30
    assert log.read_text() == "begun\nso far\n"


def test_the_sanitizer_runs_primitives_and_cases_or_says_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.txt"
    monkeypatch.setattr(gpu, "sanitizer", lambda: None)
    assert gpu.sanitize(log, 60, []) == 0
    assert "compute-sanitizer is not here" in capsys.readouterr().out
    ran = []
    monkeypatch.setattr(gpu, "sanitizer", lambda: "compute-sanitizer")
    monkeypatch.setattr(gpu, "run", lambda command, *rest: ran.append(command) or len(ran) // 2)
    monkeypatch.setattr(gpu, "CASES", log)
    log.touch()
    assert gpu.sanitize(log, 60, ["--only", "softmax"]) == 1
    assert [command[2] for command in ran] == ["memcheck", "memcheck", "racecheck", "racecheck"]
    assert ran[0][-1] == str(log)
    assert ran[1][-2:] == ["--only", "softmax"]


def test_cases_for_the_sanitizer_take_turns() -> None:
    ops = [spec.op for spec, _, _ in every_kernel.calls("cpu")]
    assert len(set(ops[: len(set(ops))])) == len(set(ops))


# --- the table ----------------------------------------------------------------------------------


def test_every_op_is_in_the_plan_on_every_device() -> None:
    for device in (CPU, torch.device("cuda")):
        planned = list(gpu_bench.rows(device))
        assert {row.op for row in planned} == set(dispatch.TABLE)
        assert len({str(row) for row in planned}) == len(planned)


def test_counts_of_a_backward_are_what_it_adds() -> None:
    shape = gpu_bench.op_of("layer_norm").shapes["cuda"][0]
    forward, backward = (
        gpu_bench.counts(Row("layer_norm", shape, torch.bfloat16, way)) for way in ("fwd", "bwd")
    )
    assert forward.bytes == (2 * shape.r + 2) * shape.n * 2
    assert backward.bytes == (3 * shape.r + 3) * shape.n * 2


def test_the_roof_is_the_slower_of_bytes_and_products() -> None:
    roofs = {"copy_gb_per_s": 1000.0, "matmul_tflop_per_s": {"float32": 1.0, "bfloat16": 100.0}}
    (dense,) = (s for s in gpu_bench.op_of("attention").shapes["cuda"] if s.reason == "long")
    for dtype, tflops in ((torch.bfloat16, 100.0), (torch.float32, 1.0)):
        row = Row("attention", dense, dtype, "fwd")
        products = 4 * 16 * 128 * (8192 * 8193 // 2)
        assert gpu_bench.roof_seconds(row, roofs) == pytest.approx(products / tflops / 1e12)
    row = Row("softmax", gpu_bench.op_of("softmax").shapes["cuda"][0], torch.float32, "fwd")
    assert gpu_bench.roof_seconds(row, roofs) == pytest.approx(2 * 65536 * 2048 * 4 / 1e12)


def test_lines_of_the_table() -> None:
    both = Measured("softmax a fwd", 3_000_000, 0, 1e-6)
    both.seconds = {"fastgpt": 2e-6, "fastgpt_triton": 1e-6, "torch_eager": 4e-6, "liger": 3e-6}
    alone = Measured("attention b fwd", 1000, 10**9, 1e-3, {"fastgpt": 2e-3})
    failed = Measured("attention c bwd", 1, 1, absent={"fastgpt": "breaks the error rule"})
    head, first, second, third = gpu_bench.table([both, alone, failed]).splitlines()
    assert head.split() == ["ours", "ms", "best", "peer", "ms", "ratio", "rate", "roof"]
    words = ["softmax", "a", "fwd", "0.002", "0.003", "liger", "1.50x", "1500.0", "GB/s", "50%"]
    assert first.split() == [*words, "triton", "0.001"]
    assert second.split() == ["attention", "b", "fwd", "2.000", "0.50", "TFLOP/s", "50%"]
    assert third.endswith("failed: breaks the error rule")


@pytest.mark.parametrize("name", ["^layer_norm demo.*bfloat16", "^decode.*band"])
def test_on_the_cpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it but the GPU: inputs, the error rule, turns, the file."""
    pytest.importorskip("cpuinfo")
    monkeypatch.setattr(gpu_bench, "SECONDS_A_PEER", 0.0)
    monkeypatch.setattr(gpu_bench, "COMPILED", ())
    monkeypatch.setattr(machine, "roofs", lambda device: ROOFS)
    arguments = ["--device=cpu", f"--only={name}", f"--folder={tmp_path}"]
    assert gpu_bench.main(arguments) == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert len(rows) == (1 if "decode" in name else 2)
    plain = "torch_sdpa" if "decode" in name else "torch_eager"
    for row in rows:
        assert {"fastgpt", plain} <= row["seconds"].keys()
        assert all(seconds > 0 for seconds in row["seconds"].values())
    assert gpu_bench.main([*arguments, "--seconds=0"]) == 0
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert (document["rows"], len(document["no_time_for"])) == ([], len(rows))


def test_a_pattern_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_bench.main(["--device=cpu", "--only=("])
    assert "--only: expected a regular expression, got '('" in capsys.readouterr().err


def test_every_op_is_measured_in_every_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_bench, "SECONDS_A_PEER", 0.0)
    monkeypatch.setattr(gpu_bench, "COMPILED", ())
    clock = gpu_bench.Clock(CPU)
    for op, ways, dtypes in gpu_bench.PLAN:
        shape = SMALL.get(op, [Rows("small", 3, 5)])[0]
        for way in ways:
            found = gpu_bench.measure(Row(op, shape, dtypes[0], way), clock, ROOFS, math.inf)
            assert found.ours is not None, found
            assert found.best_peer is not None, found


def test_a_wrong_peer_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = gpu_bench.op_of("softmax").shapes["cpu"][0]
    row = Row("softmax", shape, torch.float32, "fwd")
    monkeypatch.setattr(gpu_bench, "SECONDS_A_PEER", 0.0)
    monkeypatch.setitem(
        gpu_bench.op_of("softmax").peers, "torch_eager", lambda s, d: lambda x: x.softmax(-1) * 1.01
    )
    case = gpu_bench.Case("softmax", gpu_bench.op_of("softmax"), shape, torch.float32, False, CPU)
    exact = [case.inputs[0].double().softmax(-1)]
    monkeypatch.setattr(gpu_bench.Case, "expected", (exact, []))
    monkeypatch.setattr(gpu_bench.Case, "plain", [exact[0].float()])
    found = gpu_bench.measure(row, gpu_bench.Clock(CPU), ROOFS, math.inf)
    assert "breaks the error rule" in found.absent["torch_eager"]
    assert found.ours is not None
    assert "torch_eager" not in found.seconds
