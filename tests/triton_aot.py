"""Compiles every Triton kernel for GPUs that are not here and reads what the compiler made of it.

The ops run on meta tensors while `_launch.recording` collects their launches, and each distinct one
is compiled as the launch would. A process of its own: the interpreter and the compiler exclude one
another. `python -m tests.triton_aot [op ...] [target ...]` prints a table of all or some.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt import functional as F

SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""target -> bytes of shared memory that a program may have."""

OPS = tuple(op for op, row in dispatch.TABLE.items() if "triton" in row)

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
EVERY = os.environ.get("FASTGPT_EVERY_TILE") == "1"
"""Whether the tests, too, compile all that there is: minutes for a target. CI does for sm_90."""

SHORT = {BF16: "bf16", F16: "f16", F32: "f32"}


@dataclass(frozen=True)
class Call:
    """One call of an op, whose kernels are compiled."""

    label: str
    run: Callable[[], Any]
    may_spill: bool = False


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch. Registers are those of a thread, spills its bytes."""

    op: str
    call: str
    kernel: str
    target: str
    registers: int
    spills: int
    shared: int
    num_warps: int
    may_spill: bool


# --- the calls ----------------------------------------------------------------------------------


def empty(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    floating = dtype.is_floating_point
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=floating)


def with_backward(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    outputs = function(*args, **kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.requires_grad]
    gradients = [torch.empty_like(out) for out in outputs]
    torch.autograd.grad(outputs, leaves, gradients, materialize_grads=True)


def calls(op: str, target: str, every: bool) -> Iterator[Call]:
    """What is compiled of an op for a target: all that matters, or a sample that takes seconds,
    larger for sm_90 and gfx942. float16 takes the code of bfloat16 but for the conversions."""
    larger = every or target in ("sm_90", "gfx942")
    if op in ROWS:
        first, *middle, last = LENGTHS.get(op, (768, 5140, 50257))
        rows = [(BF16, last)]
        if larger:
            rows += [(BF16, first)]
        if every:
            rows += [(F16, first), *((F32, n) for n in (first, *middle, last))]
            rows += [(BF16, n) for n in middle]
        for dtype, n in rows:
            yield Call(f"{SHORT[dtype]} n={n}", functools.partial(ROWS[op], n, dtype))
        return
    heads = [(BF16, 128, 256)]
    if larger and (every or op != "varlen_attention"):
        heads += [(BF16, 64, None)]
    if every:
        heads += [(BF16, 128, None), (BF16, 256, None), (F32, 64, None)]
    if every and op != "varlen_attention":  # whose tiles are those of attention
        heads += [(BF16, 80, None), (BF16, 96, None), (F16, 64, None), (F32, 128, 256)]
    for dtype, d, window in heads:
        name = f"{SHORT[dtype]} d={d} {'dense' if window is None else 'window'}"
        run = functools.partial(HEADS[op], d, dtype, window)
        yield Call(name, run, may_spill=dtype == F32 or d > 128)
    if op == "attention" and every:
        for d in (64, 128):
            yield Call(f"bf16 d={d} bias", functools.partial(biased_attention, d, BF16))
            yield Call(f"bf16 d={d} laden", functools.partial(laden_attention, d, BF16))


def masked_softmax(n: int, dtype: torch.dtype) -> None:
    with_backward(F.masked_softmax, empty(4, 256, n, dtype=dtype))
    with_backward(F.masked_softmax, empty(4, 256, n, dtype=dtype), window=256)


def layer_norm(n: int, dtype: torch.dtype) -> None:
    x, w, b = empty(4096, n, dtype=dtype), empty(n, dtype=dtype), empty(n, dtype=dtype)
    with_backward(F.layer_norm, x, n, w, b)
    with_backward(F.layer_norm, x, n)


def add_layer_norm(n: int, dtype: torch.dtype) -> None:
    x, r = empty(4096, n, dtype=dtype), empty(4096, n, dtype=dtype)
    with_backward(F.add_layer_norm, x, r, n, empty(n, dtype=dtype), empty(n, dtype=dtype))


def bias_gelu(n: int, dtype: torch.dtype) -> None:
    for approximate in ("tanh", "none"):
        x, bias = empty(4096, n, dtype=dtype), empty(n, dtype=dtype)
        with_backward(F.bias_gelu, x, bias, approximate=approximate)


def cross_entropy(n: int, dtype: torch.dtype) -> None:
    target = empty(4096, dtype=torch.int64)
    with_backward(F.cross_entropy, empty(4096, n, dtype=dtype), target)
    with_backward(F.cross_entropy, empty(4096, n, dtype=dtype), target, label_smoothing=0.1)


def linear_cross_entropy(n: int, dtype: torch.dtype) -> None:
    x, weight = empty(4096, 768, dtype=dtype), empty(n, 768, dtype=dtype)
    with_backward(F.linear_cross_entropy, x, weight, empty(4096, dtype=torch.int64))


LENGTHS = {"masked_softmax": (768, 5140), "bias_gelu": (3072, 20560)}

ROWS: dict[str, Callable[[int, torch.dtype], None]] = {
    "softmax": lambda n, dtype: with_backward(F.softmax, empty(4096, n, dtype=dtype)),
    "masked_softmax": masked_softmax,
    "layer_norm": layer_norm,
    "add_layer_norm": add_layer_norm,
    "bias_gelu": bias_gelu,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
}


def attention(d: int, dtype: torch.dtype, window: int | None) -> None:
    q, k, v = (empty(2, heads, 1024, d, dtype=dtype) for heads in (8, 4, 4))
    with_backward(F.attention, q, k, v, window=window)


def biased_attention(d: int, dtype: torch.dtype) -> None:
    q, k, v = (empty(2, heads, 1024, d, dtype=dtype) for heads in (8, 4, 4))
    with_backward(F.attention, q, k, v, bias=empty(1, 8, 1024, 1024, dtype=dtype))


def laden_attention(d: int, dtype: torch.dtype) -> None:
    q, k, v = (empty(2, heads, 1024, d, dtype=dtype) for heads in (8, 4, 4))
    with_backward(
        F.attention,
        *(q, k, v),
        key_padding_mask=empty(2, 1024, dtype=torch.bool),
        alibi_slopes=empty(8).detach(),
        dropout_p=0.1,
        dropout_seed=empty(dtype=torch.int64),
    )


def varlen_attention(d: int, dtype: torch.dtype, window: int | None) -> None:
    q, k, v = (empty(2048, heads, d, dtype=dtype) for heads in (8, 4, 4))
    ends = empty(4, dtype=torch.int32)
    with_backward(F.varlen_attention, q, k, v, ends, ends, 1024, 1024, window=window)


@torch.no_grad()
def decode_attention(d: int, dtype: torch.dtype, window: int | None) -> None:
    for h, t in ((4, 1), (16, 1), (32, 16)) if d == 128 else ((4, 1), (16, 1)):
        q, k = empty(2, h, t, d, dtype=dtype), empty(2, 4, 4096, d, dtype=dtype)
        new, lengths = empty(2, 4, t, d, dtype=dtype), empty(2, dtype=torch.int32)
        F.decode_attention(q, k, k, lengths, k_new=new, v_new=new, window=window)


HEADS: dict[str, Callable[[int, torch.dtype, int | None], None]] = {
    "attention": attention,
    "varlen_attention": varlen_attention,
    "decode_attention": decode_attention,
}


# --- compiling ----------------------------------------------------------------------------------


def launches(call: Call, target: str) -> list[Any]:
    """Every launch that the call makes, forward and backward."""
    from fastgpt.backends.triton import _launch

    before, dispatch.pick = dispatch.pick, lambda op, tensor, **features: "triton"
    try:
        with _launch.recording(target) as recorded:
            call.run()
    finally:
        dispatch.pick = before
    return recorded


POINTERS = {
    torch.float64: "*fp64",
    F32: "*fp32",
    BF16: "*bf16",
    F16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


def specialised(argument: Any, parameter: Any, amd: bool) -> tuple[str, Any, list[list[Any]]]:
    """(type, value if it becomes a constant, attributes) of an argument, as in Triton's launch."""
    by_value = not parameter.do_not_specialize
    divisible = [["tt.divisibility", 16]]
    if argument is None:
        return "constexpr", None, []
    if isinstance(argument, Tensor):
        # Tensors of up to 2 GB may be addressed with offsets of 32 bits.
        small = amd and argument.numel() * argument.element_size() < 2**31
        return POINTERS[argument.dtype], None, divisible + [["tt.pointer_range", 32]] * small
    if isinstance(argument, bool):
        return "u1", None, []
    if isinstance(argument, float):
        return "fp32", None, []
    if argument == 1 and by_value:
        return "constexpr", 1, []
    align = by_value and not parameter.do_not_specialize_on_alignment and argument % 16 == 0
    return "i32" if -(2**31) <= argument < 2**31 else "i64", None, divisible if align else []


def source(launch: Any, amd: bool) -> Any:
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    arguments = iter(launch.args)
    for i, parameter in enumerate(launch.kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = launch.constants[parameter.name]
            continue
        kind, value, attribute = specialised(next(arguments), parameter, amd)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(i,)] = value
        if attribute:
            attributes[(i,)] = attribute
    assert next(arguments, None) is None, (
        f"{launch.kernel.__name__}: more arguments than parameters"
    )
    return ASTSource(launch.kernel, signature, constants, attributes)


def gpu(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if target.startswith("gfx"):
        return GPUTarget("hip", target, 64)
    return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)


def compiled(op: str, target: str, every: bool = False) -> Iterator[Compiled]:
    """Each distinct kernel that the calls of `op` launch, compiled for `target`."""
    import triton

    seen: set[Any] = set()
    for call in calls(op, target, every):
        for launch in launches(call, target):
            made = source(launch, amd=target.startswith("gfx"))
            options = {
                "num_warps": launch.num_warps,
                "num_stages": launch.num_stages,
                "enable_fp_fusion": True,
            }
            key = made.name, made.hash(), *options.values()
            if key in seen:
                continue
            seen.add(key)
            try:
                kernel = triton.compile(made, target=gpu(target), options=options)
            except Exception as error:
                where = f"{made.name} ({call.label}) for {target}"
                raise RuntimeError(f"{op}: cannot compile {where}: {error}") from error
            registers, spills = resources(kernel.asm)
            yield Compiled(
                op, call.label, made.name, target, registers, spills,
                kernel.metadata.shared, launch.num_warps, call.may_spill,
            )  # fmt: skip


def resources(code: Any) -> tuple[int, int]:
    """(registers of a thread, bytes that it keeps in memory instead)."""
    if "amdgcn" in code:

        def count(name: str) -> int:
            return int(re.search(rf"\.{name}:\s+(\d+)", code["amdgcn"])[1])

        spilled = 4 * count("vgpr_spill_count")
        return count("vgpr_count"), max(spilled, count("private_segment_fixed_size"))
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__path__[0], "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    registers, stack, local = map(int, found)
    return registers, stack + local


def missing_tool(error: BaseException) -> str | None:
    """The reason if nothing can be compiled for the target: older Tritons need ROCm's linker."""
    return str(error) if "linker" in str(error) and "not found" in str(error) else None


# --- serving and printing -----------------------------------------------------------------------


def serve() -> None:
    """Answer each line `op target` with a line of JSON: compiled, skipped or failed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        op, target = line.split()
        try:
            answer: dict[str, Any] = {"compiled": [asdict(c) for c in compiled(op, target, EVERY)]}
        except Exception as error:
            reason = missing_tool(error)
            answer = {"skipped": reason} if reason else {"failed": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


def table(kernels: list[Compiled]) -> str:
    head = ["kernel", "call", "target", "warps", "registers", "spilled bytes", "shared KB"]
    rows = [
        [k.kernel, k.call, k.target, k.num_warps, k.registers, k.spills, f"{k.shared / 1024:.1f}"]
        for k in kernels
    ]
    lines = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def main(*wanted: str) -> None:
    found: list[Compiled] = []
    for op in [w for w in wanted if w not in SHARED] or OPS:
        for target in [w for w in wanted if w in SHARED] or SHARED:
            try:
                found += compiled(op, target, every=True)
            except Exception as error:
                reason = missing_tool(error)
                if reason is None:
                    raise
                print(f"{op} for {target} skipped: {reason}", file=sys.stderr)
    print(table(found))


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("tests.triton_aot: TRITON_INTERPRET is set, which replaces the compiler")
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TRITON_CACHE_DIR", folder)
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
        serve() if sys.argv[1:] == ["--serve"] else main(*sys.argv[1:])
