"""The benchmarks: one for each op, honest counts, and no clock for a peer that is wrong or slow."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import figures, machine, measure, plot
from benchmarks.__main__ import main as bench
from benchmarks.measure import Case, Counts, Draw, History, Op, prepare
from benchmarks.peer import COMPILING, Absent, always
from benchmarks.shapes import Attention, Decode, Documents, Projection, Rows, Scores
from fastgpt import dispatch

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
OPS = list(dispatch.TABLE)

SMALL: dict[str, list[Any]] = {
    "attention": [
        Attention("grouped", 2, 4, 2, 7, 8),
        Attention("band", 2, 2, 2, 9, 8, window=3),
        Attention("wide_band", 1, 2, 2, 5, 8, window=8),
    ],
    "varlen_attention": [
        Documents("grouped", (3, 5, 1), 4, 2, 8),
        Documents("band", (6, 2, 9), 2, 2, 8, window=3),
    ],
    "decode_attention": [
        Decode("full", 2, 2, 2, 12, 8),
        Decode("band", 2, 2, 2, 12, 8, window=5),
        Decode("ragged_grouped", 3, 4, 2, 16, 8, ragged=True),
        Decode("ragged_band", 3, 2, 2, 16, 8, window=6, ragged=True),
    ],
    "masked_softmax": [Scores("dense", 2, 6), Scores("band", 2, 7, window=3)],
    "linear_cross_entropy": [Projection("small", 4, 11, 6)],
}


def op_of(name: str) -> Op:
    return importlib.import_module(f"benchmarks.bench_{name}").OP


def small_shapes() -> list[Any]:
    return [
        pytest.param(name, shape, id=f"{name}-{shape}")
        for name in OPS
        for shape in SMALL.get(name, [Rows("small", 3, 5)])
    ]


def case_of(name: str, shape: Any, backward: bool, dtype: torch.dtype = torch.float32) -> Case:
    return Case(name, op_of(name), shape, dtype, backward, CPU)


# --- every op is measured -----------------------------------------------------------------------


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_its_benchmark(name: str) -> None:
    module = importlib.import_module(f"benchmarks.bench_{name}")
    assert callable(getattr(module, f"bench_{name}"))
    op: Op = module.OP
    assert {"fastgpt", op.plain, "torch_compile"} <= set(op.peers)
    assert set(op.shapes) == {"cpu", "cuda"}
    for shapes in op.shapes.values():
        names = [str(shape) for shape in shapes]
        assert len(set(names)) == len(names) > 1
        assert all(shape.reason for shape in shapes)
    for shape in SMALL.get(name, [Rows("small", 3, 5)]):
        for backward in (False, True):
            assert figures.GROUP.fullmatch(str(case_of(name, shape, backward)))


def test_no_benchmark_of_an_op_that_the_table_lacks() -> None:
    here = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert here == set(OPS)


# --- the counts ---------------------------------------------------------------------------------


def band(i: int, j: int, window: int | None) -> bool:
    return j <= i and (window is None or i - j < window)


def visible_pairs(shape: Any) -> int:
    """Visible pairs of all heads and sequences, one by one."""
    if isinstance(shape, Attention):
        lengths, many = [shape.s], shape.b * shape.h
    elif isinstance(shape, Scores):
        lengths, many = [shape.s], shape.bh
    else:
        lengths, many = list(shape.lengths), shape.h
    return many * sum(band(i, j, shape.window) for n in lengths for i in range(n) for j in range(n))


def visible_keys(shape: Decode) -> int:
    return sum(band(n - 1, j, shape.window) for n in shape.lengths for j in range(shape.keys))


def nbytes(*tensors: Tensor) -> int:
    """Of all tensors, each memory once."""
    return sum({x.data_ptr(): x.nbytes for x in tensors}.values())


def read_by_backward(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
    """Beside the gradients of the outputs."""
    return {
        "attention": lambda: [*inputs, *outputs],
        "varlen_attention": lambda: [*inputs, *outputs],
        "layer_norm": lambda: inputs[:2],
        "add_layer_norm": lambda: [outputs[1], inputs[2]],
        "softmax": lambda: outputs,
        "bias_gelu": lambda: inputs,
        "cross_entropy": lambda: inputs,
        "linear_cross_entropy": lambda: inputs,
    }[name]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("name", "shape"), small_shapes())
def test_bytes_are_those_of_the_tensors(name: str, shape: Any, dtype: torch.dtype) -> None:
    op, size = op_of(name), dtype.itemsize
    case = case_of(name, shape, op.differentiable, dtype)
    inputs = case.leaves()
    with torch.set_grad_enabled(op.differentiable):
        out = op.peers["fastgpt"](shape, CPU)(*inputs)
    outputs = list(out) if isinstance(out, tuple) else [out]
    once = op.counts(shape, size, False).bytes
    if name == "masked_softmax":
        assert once == visible_pairs(shape) * size + nbytes(*outputs)
    elif name == "decode_attention":
        caches = 2 * visible_keys(shape) * shape.hk * shape.d * size
        assert once == nbytes(inputs[0], inputs[3], *outputs) + caches
    else:
        assert once == nbytes(*inputs, *outputs)
    if not op.differentiable:
        return
    douts = [torch.ones_like(x) for x in outputs]
    grads = torch.autograd.grad(outputs, [x for x in inputs if x.requires_grad], douts)
    back = op.counts(shape, size, True).bytes - once
    if name == "masked_softmax":
        assert back == 2 * visible_pairs(shape) * size + nbytes(*grads)
    else:
        assert back == nbytes(*douts, *grads, *read_by_backward(name, inputs, outputs))


@pytest.mark.parametrize(("name", "shape"), small_shapes())
def test_flops_are_those_of_the_products(name: str, shape: Any) -> None:
    op = op_of(name)
    forward, both = (op.counts(shape, 4, backward).flops for backward in (False, True))
    if name == "decode_attention":
        assert forward == 2 * (2 * shape.h * visible_keys(shape) * shape.d)
    elif name in ("attention", "varlen_attention"):
        product = 2 * visible_pairs(shape) * shape.d
        assert (forward, both) == (2 * product, (2 + 5) * product)
    else:
        for backward, flops in ((False, forward), (True, both)):
            case = case_of(name, shape, backward)
            _ = case.expected  # computed here, and not counted
            with FlopCounterMode(display=False) as counter:
                case.results(op.peers[op.plain](shape, CPU), case.leaves())
            assert flops == counter.get_total_flops()


# --- the error rule -----------------------------------------------------------------------------


def peers_here() -> list[Any]:
    """Every peer of every op that needs no compiler, on each small shape."""
    return [
        pytest.param(*param.values, peer, id=f"{param.id}-{peer}")
        for param in small_shapes()
        for peer in op_of(param.values[0]).peers
        if peer not in COMPILING
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("name", "shape", "peer"), peers_here())
def test_peers_obey_the_error_rule(name: str, shape: Any, peer: str, dtype: torch.dtype) -> None:
    backward = op_of(name).differentiable
    prepare(case_of(name, shape, backward, dtype), peer, History())()


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return -dy


def identity(x: Tensor) -> Tensor:
    return x.clone()


def two_results(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.clone(), x * 2


def planted(peer: Callable[..., Any], plain: Callable[..., Any] = identity) -> Op:
    """An op of which `peer` is measured beside plain torch."""

    def inputs(shape: Rows, draw: Draw) -> tuple[Tensor, ...]:
        return (draw.normal(shape.r, shape.n),)

    def counts(shape: Rows, size: int, backward: bool) -> Counts:
        return Counts(shape.r * shape.n * size)

    shapes = {"cpu": [Rows("small", 3, 5)], "cuda": []}
    everyone = {"torch_eager": always(plain), "peer": always(peer), "fastgpt": always(peer)}
    return Op(shapes, everyone, inputs, counts)


def planted_case(op: Op, backward: bool = False, n: int = 5) -> Case:
    return Case("planted", op, Rows("small", 3, n), torch.float32, backward, CPU)


FAULTS = {
    "off by 1 %": (lambda x: 1.01 * x, False, "breaks the error rule"),
    "a gradient of the wrong sign": (WrongGradient.apply, True, "breaks the error rule"),
    "not a number": (lambda x: x.where(x < 0, float("nan")), False, "not finite"),
    "another shape": (lambda x: x[:-1], False, "expected"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_peer_fails(fault: str) -> None:
    peer, backward, message = FAULTS[fault]
    with pytest.raises(AssertionError, match=message):
        prepare(planted_case(planted(peer), backward), "peer", History())


def test_a_wrong_second_result_fails() -> None:
    op = planted(lambda x: (x.clone(), x * 3), two_results)
    with pytest.raises(AssertionError, match="breaks the error rule"):
        prepare(planted_case(op), "peer", History())
    prepare(planted_case(planted(two_results, two_results), True), "peer", History())()


def test_plain_torch_is_computed_only_where_rounding_is_not_enough() -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)

    def never() -> Tensor:
        raise AssertionError("asked for")

    measure.check_error(exact.float(), exact, never)
    measure.check_error(exact.float() * 1.01, exact, lambda: exact.float() * 1.006)
    with pytest.raises(AssertionError, match="breaks the error rule"):
        measure.check_error(exact.float() * 1.01, exact, lambda: exact.float() * 1.004)


def test_a_peer_cannot_spoil_the_inputs_of_the_next() -> None:
    case = planted_case(planted(lambda x: x.clone() + x.zero_()))
    prepare(case, "peer", History())
    assert case.inputs[0].abs().min() > 0


# --- peers that cannot, or not in time ----------------------------------------------------------


def test_a_peer_that_is_absent_or_raises_is_skipped() -> None:
    def absent(shape: Any, device: torch.device) -> Any:
        raise Absent("not installed")

    def raises(x: Tensor) -> Tensor:
        raise NotImplementedError("no such kernel\nand more")

    op = dataclasses.replace(planted(raises), peers={**planted(raises).peers, "absent": absent})
    with pytest.raises(pytest.skip.Exception, match="not installed"):
        prepare(planted_case(op), "absent", History())
    with pytest.raises(pytest.skip.Exception, match=r"does not run here: no such kernel$"):
        prepare(planted_case(op), "peer", History())
    with pytest.raises(NotImplementedError):
        prepare(planted_case(op), "fastgpt", History())


def test_a_slow_peer_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "TOO_SLOW", 0.02)

    def slow(x: Tensor) -> Tensor:
        time.sleep(0.001 * x.shape[1])
        return x.clone()

    op, history = planted(slow), History()
    with pytest.raises(pytest.skip.Exception, match=r"too slow here: .* s a call \(peer, planted"):
        prepare(planted_case(op, n=30), "peer", history)
    with pytest.raises(pytest.skip.Exception, match=r"by that of small-r3-n30 \(peer, planted"):
        prepare(planted_case(op, n=300), "peer", history)
    prepare(planted_case(op, n=3), "peer", history)()  # less work is tried
    prepare(planted_case(op, n=300), "torch_eager", history)()  # and so are the others


# --- what is kept of a run ----------------------------------------------------------------------


def entry(peer: str, median: float, group: str = "softmax scores-r2-n3 torch.float32 fwd") -> Any:
    return {
        "group": group,
        "fullname": f"{ROOT}/benchmarks/bench_softmax.py",
        "params": {"shape": "UNSERIALIZABLE"},
        "extra_info": {"bytes": 48, "flops": 0, "peer": peer, "device": "cpu"},
        "stats": dict.fromkeys(figures.STATS, median) | {"data": [median] * 5000},
    }


def document() -> dict[str, Any]:
    medians = {"torch_eager": 0.004, "fastgpt": 0.002, "torch_compile": 0.003}
    roofs = {"copy_gb_per_s": 10.0, "matmul_tflop_per_s": {"float32": 0.1, "bfloat16": 0.1}}
    return {
        "machine_info": {"device": "a CPU", "threads": 2, **roofs},
        "commit_info": {"id": "abc", "project": ROOT.name, "branch": "mine", "dirty": False},
        "benchmarks": [entry(peer, median) for peer, median in medians.items()],
    }


def test_json_is_small_and_names_no_place() -> None:
    kept = document()
    figures.slim(kept)
    text = json.dumps(kept)
    assert len(text) < 2000
    assert str(ROOT) not in text
    assert kept["commit_info"] == {"id": "abc", "dirty": False}
    assert "data" not in kept["benchmarks"][0]["stats"]


def test_table_and_plot_of_a_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    kept = document()
    figures.slim(kept)
    path = tmp_path / "benchmarks.json"
    path.write_text(json.dumps(kept))
    head, row = figures.table(figures.load(path)[1]).splitlines()
    assert head.split()[:4] == ["softmax,", "ms", "fastgpt", "torch_eager"]
    assert row.split()[-5:] == ["2.000", "4.000", "3.000", "1.50", "torch_compile"]
    (drawn,) = plot.draw_all([path], tmp_path)
    assert drawn == tmp_path / "softmax.png"
    assert drawn.stat().st_size > 1000


def test_machine_has_a_name_for_its_folder() -> None:
    pytest.importorskip("cpuinfo")
    assert machine.folder_of(CPU).name.replace("-", "").isalnum()


def test_a_run_of_pytest_writes_such_a_file(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "benchmarks.json"
    # A worker of xdist tells its children, where pytest-benchmark then measures nothing.
    alone = {key: value for key, value in os.environ.items() if "XDIST" not in key}
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "benchmarks/bench_softmax.py", "-q", "--device=cpu",
            "-k", "scores and float32 and (fastgpt or eager or compile) and not fwd_bwd",
            "--benchmark-max-time=0.01", f"--benchmark-json={path}", "-p", "no:cacheprovider",
        ],
        cwd=ROOT, env=alone, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "compiles at run time; measured with --compile" in done.stdout
    measured, timed = figures.load(path)
    assert [figure.peer for figure in timed] == ["fastgpt", "torch_eager"]
    assert measured["copy_gb_per_s"] > 0
    text = path.read_text()
    assert len(text) < 5000
    assert str(ROOT) not in text
    known = {"device", "threads", "fastgpt", "torch", "copy_gb_per_s", "matmul_tflop_per_s"}
    assert set(measured) == known  # and no name of the host


@pytest.mark.parametrize("name", ["nope", "meta", "cuda:99"])
def test_a_device_that_is_not_here_is_refused(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench(["--device", name])
    assert "error: --device: " in capsys.readouterr().err


def test_help_of_the_benchmarks_is_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        bench(["--help"])
    assert "go to pytest" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("{", "expected JSON, got: "),
        ("[]", "expected the benchmarks.json of a run"),
        ('{"limits": 1}', "expected the benchmarks.json of a run"),
    ],
    ids=["missing", "broken", "list", "other"],
)
def test_a_file_that_cannot_be_plotted_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        plot.main([str(path)])
    error = capsys.readouterr().err
    assert str(path) in error
    assert message in error


def test_a_whole_model_is_measured_before_and_after() -> None:
    pytest.importorskip("transformers")
    from benchmarks import whole_models
    from tests.hf_models import build

    spec = whole_models.Model("GPT-2", lambda: build("gpt2"), batch=1, length=24)
    row = whole_models.measure(spec, rounds=1)
    assert row.generate is not None
    for pair in (row.train, row.generate):
        assert pair.ratio == pytest.approx(pair.after / pair.before)
    first, *rest = whole_models.line(row).split()
    assert first == "GPT-2"
    assert len(rest) == 7
