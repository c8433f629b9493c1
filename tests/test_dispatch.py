"""Which backend runs: the table, pick, the forced backend, explain, and the environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastgpt
from fastgpt import dispatch
from fastgpt import functional as F
from fastgpt.backends import native, triton
from tests.contract import device_of

ROWS = torch.randn(3, 8)
Q = torch.randn(1, 2, 4, 8)
CELLS = [(op, backend) for op, row in dispatch.TABLE.items() for backend in dispatch.BACKENDS]
COMPILED = "cpu" if native.MISSING is None else "reference"


def first_line(*args, **kwargs) -> str:
    return str(fastgpt.explain(*args, **kwargs)).splitlines()[0]


@pytest.mark.parametrize("op", dispatch.TABLE)
def test_every_op_has_a_reference_for_every_float_dtype(op: str) -> None:
    assert {torch.float32, torch.bfloat16, torch.float16, torch.float64} <= set(
        dispatch.TABLE[op]["reference"].dtypes
    )
    assert "cpu" in dispatch.TABLE[op]


@pytest.mark.parametrize("op", dispatch.TABLE)
def test_first_choice_is_the_compiled_backend(op: str) -> None:
    assert dispatch.pick(op, ROWS) == COMPILED
    assert dispatch.pick(op, ROWS.double()) == "reference"
    assert dispatch.pick(op, ROWS.to("meta")) == "reference"


def test_head_dim_beyond_the_kernels_goes_to_the_reference() -> None:
    q = torch.randn(1, 1, 3, 257)
    assert dispatch.pick("attention", q, head_dim=256) == COMPILED
    assert dispatch.pick("attention", q, head_dim=257) == "reference"
    assert F.attention(q, q, q).shape == q.shape


@pytest.mark.parametrize(("op", "backend"), CELLS)
def test_forced_backend_runs_or_raises(op: str, backend: str) -> None:
    reason = dispatch.refusal(op, backend, "cpu", torch.float32)
    with fastgpt.backend(backend):
        if reason is None:
            assert dispatch.pick(op, ROWS) == backend
            return
        with pytest.raises(RuntimeError) as caught:
            dispatch.pick(op, ROWS)
    for part in (op, repr(backend), reason):
        assert part in str(caught.value)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_forced_gpu_backend_refuses_cpu_tensors(backend: str) -> None:
    if backend == "triton" and triton.interpreted():
        pytest.skip("Triton's interpreter takes them")
    with fastgpt.backend(backend), pytest.raises(RuntimeError, match=backend):
        F.layer_norm(ROWS, 8)


def test_forced_cpu_refuses_what_it_has_no_kernel_for() -> None:
    with fastgpt.backend("cpu"):
        with pytest.raises(RuntimeError, match="float64"):
            F.softmax(ROWS.double())
        with pytest.raises(RuntimeError, match="257"):
            F.attention(*[torch.randn(1, 1, 3, 257)] * 3)
        with pytest.raises(RuntimeError, match="torch"):
            F.cross_entropy(ROWS, ROWS.softmax(1))


def test_backend_names_what_there_is() -> None:
    with pytest.raises(ValueError, match="name: expected one of cuda, cpu, triton, reference"):
        with fastgpt.backend("opencl"):
            pass


def test_backend_nests_and_survives_errors() -> None:
    with fastgpt.backend("reference"):
        with pytest.raises(ZeroDivisionError), fastgpt.backend("cuda"):
            raise ZeroDivisionError
        assert dispatch.pick("softmax", ROWS) == "reference"
    assert dispatch.pick("softmax", ROWS) == COMPILED


CALLS = {
    "attention": lambda: (F.attention, (Q, Q, Q), {"window": 3}),
    "scaled_dot_product_attention": lambda: (F.scaled_dot_product_attention, (Q, Q, Q), {}),
    "varlen_attention": lambda: (
        F.varlen_attention,
        (Q[0].transpose(0, 1),) * 3 + (torch.tensor([0, 4]).int(),) * 2 + (4, 4),
        {},
    ),
    "decode_attention": lambda: (F.decode_attention, (Q, Q, Q, torch.tensor([4]).int()), {}),
    "layer_norm": lambda: (F.layer_norm, (ROWS, 8), {}),
    "add_layer_norm": lambda: (F.add_layer_norm, (ROWS, ROWS, 8), {}),
    "softmax": lambda: (F.softmax, (ROWS,), {}),
    "masked_softmax": lambda: (F.masked_softmax, (ROWS,), {"window": 2}),
    "bias_gelu": lambda: (F.bias_gelu, (ROWS,), {}),
    "cross_entropy": lambda: (F.cross_entropy, (ROWS, torch.tensor([0, 1, 2])), {}),
    "linear_cross_entropy": lambda: (
        F.linear_cross_entropy,
        (ROWS, torch.randn(5, 8), torch.tensor([0, 1, 2])),
        {},
    ),
}


def test_every_function_is_explained_below() -> None:
    assert set(CALLS) == set(F.__all__)


@pytest.mark.parametrize("name", CALLS)
def test_explain_names_op_backend_and_variant(name: str, monkeypatch) -> None:
    """Nothing is computed: the raw ops are not even looked up."""

    def no_kernel(*args):
        raise AssertionError(f"explain ran {args}")

    monkeypatch.setattr(dispatch, "kernel", no_kernel)
    function, args, kwargs = CALLS[name]()
    op = "attention" if name == "scaled_dot_product_attention" else name
    text = str(fastgpt.explain(function, *args, **kwargs))
    assert text.splitlines()[0].startswith(f"{op}: {COMPILED} (")
    assert text.splitlines()[0].endswith(")")
    for other in set(dispatch.BACKENDS) - {COMPILED}:
        assert f"not {other}: " in text
    if "window" in kwargs:
        assert f"window={kwargs['window']}" in text


@pytest.mark.skipif(native.EXTENSION_MISSING is not None, reason="what _C knows")
@pytest.mark.parametrize(
    ("capability", "compiled", "arguments", "variant"),
    [
        ((9, 0), ("sm_80", "sm_90"), {}, "sm_90 wgmma, causal"),
        ((9, 0), ("sm_80", "sm_90"), {"window": 2}, "sm_90 wgmma, causal, window=2"),
        ((9, 0), ("sm_80",), {}, "sm_90 mma.sync, causal"),
        ((8, 0), ("sm_80", "sm_90"), {}, "sm_80 mma.sync, causal"),
        ((9, 0), ("sm_90",), {"dtype": torch.float32}, "sm_90 mma.sync, causal"),
        ((9, 0), ("sm_90",), {"head_dim": 256}, "sm_90 wgmma, causal"),
        ((9, 0), ("sm_90",), {"head_dim": 8}, "sm_90 mma.sync, causal"),
        ((9, 0), ("sm_90",), {"dropout_p": 0.5}, "sm_90 mma.sync, causal, dropout"),
        ((9, 0), ("sm_90",), {"scale": -1.0}, "sm_90 mma.sync, causal, negative_scale"),
    ],
)
def test_explain_names_the_tensor_cores_of_a_gpu(
    capability, compiled, arguments, variant, monkeypatch
) -> None:
    monkeypatch.setattr(dispatch, "_choice", lambda *_: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(native, "gpu_architectures", lambda: compiled)
    arguments = dict(arguments)
    dtype, d = arguments.pop("dtype", torch.bfloat16), arguments.pop("head_dim", 64)
    q = torch.randn(1, 2, 4, d, dtype=dtype)
    assert first_line(F.attention, q, q, q, **arguments) == f"attention: cuda ({variant})"
    assert first_line(F.layer_norm, ROWS, 8).startswith("layer_norm: cuda (sm_")


@pytest.mark.parametrize(
    ("dtype", "capability", "fits", "beyond"),
    [
        (torch.bfloat16, (8, 9), 128, 136),
        (torch.float32, (12, 0), 96, 128),
        (torch.bfloat16, (8, 0), 256, None),
        (torch.float32, (9, 0), 256, None),
    ],
)
def test_heads_beyond_the_shared_memory_of_a_gpu_go_to_triton(
    dtype, capability, fits, beyond, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(dispatch, "_unavailable", lambda _: None)
    assert dispatch._first_of_table("attention", "cuda", dtype, fits) == "cuda"
    assert dispatch.refusal("attention", "cuda", "cuda", dtype, fits) is None
    if beyond is not None:
        assert dispatch._first_of_table("attention", "cuda", dtype, beyond) == "triton"
        reason = dispatch.refusal("varlen_attention", "cuda", "cuda", dtype, beyond)
        assert reason == f"has shared memory for head_dim up to {fits} on this GPU, got {beyond}"
        assert dispatch._first_of_table("decode_attention", "cuda", dtype, beyond) == "cuda"


def test_explain_follows_the_forced_backend() -> None:
    with fastgpt.backend("reference"):
        assert first_line(F.layer_norm, ROWS, 8) == "layer_norm: reference (plain torch)"


def test_explain_reports_what_goes_to_torch() -> None:
    explanation = str(fastgpt.explain(F.cross_entropy, ROWS, ROWS.softmax(1)))
    assert explanation.startswith("cross_entropy: torch (")
    assert "probabilities" in explanation
    three = Q[0]
    explanation = str(fastgpt.explain(F.scaled_dot_product_attention, three, three, three))
    assert explanation.startswith("scaled_dot_product_attention: torch (")


def test_explain_raises_what_the_call_would() -> None:
    with pytest.raises(ValueError, match="window"):
        fastgpt.explain(F.attention, Q, Q, Q, window=0)


def test_explain_of_what_is_compiled() -> None:
    x = torch.randn(3, 8)

    def function(x: torch.Tensor) -> torch.Tensor:
        return F.softmax(F.layer_norm(x, 8))

    compiled = torch.compile(function, backend="eager")
    compiled(x)
    assert str(fastgpt.explain(compiled, x)) == str(fastgpt.explain(function, x)) != ""
    assert str(fastgpt.explain(torch.compile(F.softmax), x)) == str(fastgpt.explain(F.softmax, x))


def test_explain_lists_every_op_of_a_function() -> None:
    def block(x):
        return F.softmax(F.layer_norm(x, 8))

    lines = [line for line in str(fastgpt.explain(block, ROWS)).splitlines() if line[0] != " "]
    assert [line.split(":")[0] for line in lines] == ["layer_norm", "softmax"]


def test_support_matrix_has_every_cell() -> None:
    matrix = dispatch.support_matrix()
    head, _, *lines = matrix.splitlines()
    assert [cell.strip() for cell in head.split("|")[2:-1]] == list(dispatch.BACKENDS)
    assert len(lines) == len(dispatch.TABLE)
    for line, (op, row) in zip(lines, dispatch.TABLE.items(), strict=True):
        name, *cells = (cell.strip() for cell in line.split("|")[1:-1])
        assert name == f"`{op}`"
        assert [bool(cell) for cell in cells] == [b in row for b in dispatch.BACKENDS]


def test_devices_of_the_backends() -> None:
    """What `check_contract` runs where, and what the table refuses, must be the same."""
    for backend in dispatch.BACKENDS:
        reason = dispatch.refusal("layer_norm", backend, device_of(backend), torch.float32)
        assert reason is None or "tensors, got one on" not in reason


def in_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    own = {"PYTHONPATH": str(Path(fastgpt.__file__).parents[1]), "TRITON_INTERPRET": "0"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | own | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_environment_forces_and_logs() -> None:
    done = in_process(
        "import torch, fastgpt\n"
        "from fastgpt import functional as F\n"
        "x = torch.randn(3, 8)\n"
        "print(fastgpt.explain(F.layer_norm, x, 8))\n"
        "F.softmax(x); F.softmax(x)\n",
        FASTGPT_BACKEND="reference",
        FASTGPT_LOG="1",
    )
    assert done.returncode == 0, done.stderr
    assert "layer_norm: reference (plain torch)" in done.stdout
    logged = (done.stdout + done.stderr).count("fastgpt: softmax: reference (plain torch)")
    assert logged == 1


def test_environment_never_falls_back() -> None:
    done = in_process(
        "import torch, fastgpt\nfastgpt.functional.softmax(torch.randn(3, 8))",
        FASTGPT_BACKEND="triton",
    )
    assert done.returncode != 0
    assert "RuntimeError: softmax: backend 'triton' is forced, but" in done.stderr


ON_A_GPU = """
import importlib.metadata, json, sys
import torch
from torch._subclasses import FakeTensorMode

def version(name, installed=importlib.metadata.version):
    if name != "triton" or TRITON == "installed":
        return installed(name)
    if TRITON is None:
        raise importlib.metadata.PackageNotFoundError(name)
    return TRITON

importlib.metadata.version = version

import fastgpt
from fastgpt import dispatch
from fastgpt import functional as F

with FakeTensorMode():
    x = torch.empty(3, 8, device="cuda")
    found = {op: dispatch.pick(op, x, head_dim=8) for op in dispatch.TABLE}
    found["explained"] = str(fastgpt.explain(F.softmax, x))
    try:
        with fastgpt.backend("triton"):
            found["forced"] = dispatch.pick("softmax", x)
    except RuntimeError as error:
        found["forced"] = str(error)
print(json.dumps(found))
"""
"""What runs where there is a CUDA device but no op library; TRITON is the version installed."""


def on_a_gpu(version: str | None) -> dict[str, str]:
    done = in_process(f"TRITON = {version!r}\n{ON_A_GPU}", FASTGPT_NATIVE="0")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(triton.missing() is not None, reason=str(triton.missing()))
def test_without_the_library_a_gpu_runs_triton() -> None:
    found = on_a_gpu("installed")
    for op, row in dispatch.TABLE.items():
        assert found[op] == ("triton" if "triton" in row else "reference"), op
    first, *reasons = found["explained"].splitlines()
    assert first == "softmax: triton (triton)"
    assert any("not cuda: " in line and "FASTGPT_NATIVE" in line for line in reasons), reasons
    assert found["forced"] == "triton"


@pytest.mark.parametrize(
    ("version", "why"),
    [
        (None, "Triton is not installed (pip install 'triton>=3.4')"),
        ("3.3.1", "needs Triton 3.4 or later, found 3.3.1 (pip install 'triton>=3.4')"),
    ],
    ids=["absent", "too_old"],
)
def test_without_triton_a_gpu_runs_the_reference_and_learns_the_remedy(version, why) -> None:
    found = on_a_gpu(version)
    assert {found[op] for op in dispatch.TABLE} == {"reference"}
    assert found["explained"].startswith("softmax: reference (plain torch)\n")
    assert f"  not triton: {why}" in found["explained"].splitlines()
    assert found["forced"] == (
        f"softmax: backend 'triton' is forced, but cannot run this call: {why}"
    )


@pytest.mark.skipif(
    native.cpu_isa() is None, reason=str(native.MISSING or native.EXTENSION_MISSING)
)
def test_environment_lowers_the_instruction_set() -> None:
    done = in_process(
        "import torch, fastgpt\n"
        "from fastgpt import functional as F\n"
        "x = torch.randn(3, 40)\n"
        "torch.testing.assert_close(F.softmax(x), x.softmax(-1))\n"
        "print(fastgpt.explain(F.softmax, x))\n",
        FASTGPT_BACKEND="cpu",
        FASTGPT_CPU_ISA="baseline",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("softmax: cpu (baseline)")
