"""The promises of the package on this machine's CPU: ours and torch, in turn in one process.

    make targets, or python -m benchmarks.targets [--only PATTERN] [--rounds N] [--no-compile]

Each row is a ratio, torch's median time over ours, beside what it must reach and what it aims at,
and our share of what the machine itself can do: useful flops of the rate of bare multiply-adds,
bytes of the rate of a copy. A whole run is kept as results/<machine>/targets.json. Exits with 1 if
a row that applies to this machine misses its must; a row marked `-` is promised for another
instruction set.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as T

from benchmarks import machine, peers, roofs, shapes
from benchmarks.measure import pattern
from fastgpt import GPT, GPTConfig
from fastgpt import functional as F
from fastgpt.backends import native
from fastgpt.peer import TorchGPT, band_mask
from fastgpt.train import TrainOptions, adamw, training_step

CPU = torch.device("cpu")
Step = Callable[[], object]
Pair = tuple[Step, Step]


@dataclass(frozen=True)
class Target:
    """A row: `build` gives our step and torch's; `aim` and `must` are torch's time over ours."""

    what: str
    must: float
    aim: float
    build: Callable[[], Pair]
    level: str = ""
    """The ISA level that the promise is made for; on another one the row is for information."""
    flops: int = 0
    """Useful operations of a call, or 0."""
    bytes: int = 0
    """Bytes that a call cannot avoid to move, or 0."""


@dataclass(frozen=True)
class Measured:
    """A row of the table; seconds are medians of one call."""

    what: str
    must: float
    aim: float
    ratio: float
    ours: float
    torch: float
    applies: bool
    share: float
    """Of the machine's own limit, measured in the same run; 0 if none is counted."""

    @property
    def holds(self) -> bool:
        return self.ratio >= self.must or not self.applies


def time_of(step: Step, calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - begin) / calls


def calls_for(step: Step, seconds: float) -> int:
    """How many calls take about `seconds`, after one to warm up."""
    step()
    once = time_of(step, 1)
    return max(1, min(10_000, round(seconds / once)))


def in_turn(ours: Step, theirs: Step, rounds: int, seconds: float = 0.03) -> tuple[float, float]:
    """Median seconds of one call of each, the two taking turns; three rounds of what is slow."""
    steps = (ours, theirs)
    begin = time.perf_counter()
    calls = [calls_for(step, seconds) for step in steps]
    if time.perf_counter() - begin > 4.0:
        rounds = min(rounds, 3)
    times: tuple[list[float], list[float]] = ([], [])
    gc.disable()
    try:
        for round_ in range(rounds):
            for which in (0, 1) if round_ % 2 else (1, 0):
                times[which].append(time_of(steps[which], calls[which]))
    finally:
        gc.enable()
    return statistics.median(times[0]), statistics.median(times[1])


def forward(function: Callable[..., Any], *inputs: Tensor) -> Step:
    def step() -> object:
        with torch.no_grad():
            return function(*inputs)

    return step


def backward(function: Callable[..., Tensor], *inputs: Tensor) -> Step:
    """The backward alone: of one recorded forward, again and again."""
    leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    out = function(*leaves)
    dout = torch.randn_like(out)
    wanted = [x for x in leaves if x.requires_grad]
    return lambda: torch.autograd.grad(out, wanted, dout, retain_graph=True)


def both(function: Callable[..., Tensor], *inputs: Tensor) -> Step:
    """Forward and backward."""
    leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    wanted = [x for x in leaves if x.requires_grad]

    def step() -> object:
        out = function(*leaves)
        return torch.autograd.grad(out, wanted, torch.ones_like(out))

    return step


def attention(
    s: int, dtype: torch.dtype, kind: Callable[..., Step], peer: str = "torch_sdpa",
    window: int | None = None, h: int = 12,
) -> Callable[[], Pair]:  # fmt: skip
    def build() -> Pair:
        shape = shapes.Attention("target", 1, h, h, s, 64, window)
        q, k, v = (torch.randn(1, h, s, 64, dtype=dtype) for _ in range(3))
        ours = peers.ATTENTION["fastgpt"](shape, CPU)
        return kind(ours, q, k, v), kind(peers.ATTENTION[peer](shape, CPU), q, k, v)

    return build


def useful(s: int, way: str, window: int | None = None) -> int:
    """Operations of a forward or a backward on visible pairs alone."""
    products = 5 if way == "bwd" else 2
    return products * 2 * 12 * 64 * shapes.band_pairs(s, window)


def rows(
    ours: Callable[..., Any], theirs: Callable[..., Any], kind: Callable[..., Step],
    dtype: torch.dtype, r: int, n: int, parameters: int = 0, inputs: int = 1,
) -> Callable[[], Pair]:  # fmt: skip
    def build() -> Pair:
        x = [torch.randn(r, n, dtype=dtype) for _ in range(inputs)]
        x += [torch.randn(n, dtype=dtype) for _ in range(parameters)]
        return kind(ours, *x), kind(theirs, *x)

    return build


def _layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w, b)


def _torch_layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return T.layer_norm(x, x.shape[-1:], w, b)


def _add_layer_norm(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return F.add_layer_norm(x, residual, x.shape[-1:], w, b)


def _torch_add_layer_norm(
    x: Tensor, residual: Tensor, w: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    s = x + residual
    return T.layer_norm(s, s.shape[-1:], w, b), s


def _softmax(x: Tensor) -> Tensor:
    return F.softmax(x, -1)


def _torch_softmax(x: Tensor) -> Tensor:
    return T.softmax(x, -1)


def _bias_gelu(x: Tensor, b: Tensor) -> Tensor:
    return F.bias_gelu(x, b)


def _torch_bias_gelu(x: Tensor, b: Tensor) -> Tensor:
    return T.gelu(x + b, approximate="tanh")


def masked_softmax(
    dtype: torch.dtype, kind: Callable[..., Step], s: int, window: int | None
) -> Callable[[], Pair]:
    def build() -> Pair:
        scores = torch.randn(4, s, s, dtype=dtype)
        visible = band_mask(s, window or s, CPU)

        def theirs(x: Tensor) -> Tensor:
            return T.softmax((x * 0.125).masked_fill(~visible, float("-inf")), -1)

        def ours(x: Tensor) -> Tensor:
            return F.masked_softmax(x, scale=0.125, window=window)

        return kind(ours, scores), kind(theirs, scores)

    return build


def cross_entropy(dtype: torch.dtype, r: int, v: int) -> Callable[[], Pair]:
    def build() -> Pair:
        x, target = torch.randn(r, v, dtype=dtype), torch.randint(v, (r,))
        return both(F.cross_entropy, x, target), both(T.cross_entropy, x, target)

    return build


def linear_cross_entropy(dtype: torch.dtype, r: int, v: int, c: int) -> Callable[[], Pair]:
    def build() -> Pair:
        x = torch.randn(r, c, dtype=dtype)
        weight, target = torch.randn(v, c, dtype=dtype) * c**-0.5, torch.randint(v, (r,))

        def theirs(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            return T.cross_entropy((x @ weight.t()).float(), target)

        return both(F.linear_cross_entropy, x, weight, target), both(theirs, x, weight, target)

    return build


def decode(dtype: torch.dtype, b: int, h: int, s: int, window: int | None) -> Callable[[], Pair]:
    def build() -> Pair:
        q = torch.randn(b, h, 1, 64, dtype=dtype)
        k, v = (torch.randn(b, h, s, 64, dtype=dtype) for _ in range(2))
        lengths = torch.full((b,), s, dtype=torch.int32)

        def ours() -> object:
            return F.decode_attention(q, k, v, lengths, window=window)

        def theirs() -> object:
            first = 0 if window is None else s - window
            return T.scaled_dot_product_attention(q, k[:, :, first:], v[:, :, first:])

        return forward(ours), forward(theirs)

    return build


def tiny(kind: str) -> Callable[[], Pair]:
    def build() -> Pair:
        x, w, b = torch.randn(1, 768), torch.ones(768), torch.zeros(768)
        if kind == "forward":
            return forward(_layer_norm, x, w, b), forward(_torch_layer_norm, x, w, b)
        x, w, b = x.requires_grad_(), w.requires_grad_(), b.requires_grad_()
        if kind == "recorded":
            return lambda: _layer_norm(x, w, b), lambda: _torch_layer_norm(x, w, b)
        return both(_layer_norm, x, w, b), both(_torch_layer_norm, x, w, b)

    return build


def tiny_op(
    ours: Callable[..., Any], theirs: Callable[..., Any], *sizes: tuple[int, ...]
) -> Callable[[], Pair]:
    def build() -> Pair:
        inputs = [torch.randn(size) for size in sizes]
        return forward(ours, *inputs), forward(theirs, *inputs)

    return build


def training(autocast: bool, width: int) -> Callable[[], Pair]:
    """A step of a GPT-3-style decoder of two layers, a dense and a banded one."""

    def build() -> Pair:
        torch.manual_seed(0)
        s = 1024 if width == 768 else 512
        config = GPTConfig(
            vocab_size=4096, n_positions=s, n_layer=2, n_embd=width, n_head=width // 64, window=128
        )
        ours = GPT(config)
        theirs = TorchGPT(config)
        theirs.load_state_dict(ours.state_dict())
        options = TrainOptions(batch=1, context=s)
        ids = torch.randint(config.vocab_size, (1, s))

        def step(model: torch.nn.Module) -> Step:
            optimizer = adamw(model.train(), options)

            def run() -> object:
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    return training_step(model, optimizer, ids, options)

            return run

        return step(ours), step(theirs)

    return build


def _name(dtype: torch.dtype) -> str:
    return "f32" if dtype == torch.float32 else "bf16"


def targets(compiled: bool) -> Iterator[Target]:
    f32, bf16 = torch.float32, torch.bfloat16
    fb = ((forward, "fwd"), (backward, "bwd"))
    # (must, aim) of S = 512 and 2048; bfloat16 is promised where the CPU multiplies it.
    dense = (
        (f32, "fwd", ((1.6, 2.4), (1.25, 1.5)), ""),
        (f32, "bwd", ((1.4, 2.0), (1.2, 1.5)), ""),
        (bf16, "fwd", ((2.5, 4.0), (2.2, 3.0)), "v4_bf16"),
        (bf16, "bwd", ((1.8, 3.0), (1.6, 2.5)), "v4_bf16"),
    )
    for dtype, way, bounds, level in dense:
        for s, (must, aim) in zip((512, 2048), bounds, strict=True):
            make = attention(s, dtype, forward if way == "fwd" else backward)
            what = f"attention dense {way} {_name(dtype)} S={s}"
            yield Target(what, must, aim, make, level, useful(s, way))
    for dtype, must, aim in ((f32, 14.0, 20.0), (bf16, 18.0, 30.0)):
        for kind, way in fb:
            if way == "bwd":
                must, aim = 6.0, 12.0
            make = attention(4096, dtype, kind, window=256)
            what = f"attention w=256 S=4096 {way} {_name(dtype)} / masked"
            yield Target(what, must, aim, make, "", useful(4096, way, 256))
    for dtype, must, aim in ((f32, 1.4, 2.0), (bf16, 2.0, 4.0)):
        if compiled:
            make = attention(4096, dtype, forward, "torch_flex", 256)
            what = f"attention w=256 S=4096 fwd {_name(dtype)} / flex"
            yield Target(what, must, aim, make, "", useful(4096, "fwd", 256))

    for dtype in (f32, bf16):
        name = _name(dtype)
        half = dtype == bf16
        for r, n in ((1024, 768), (4096, 768), (4096, 2048), (2048, 12288)):
            size = r * n * dtype.itemsize
            for kind, way in fb:
                must = 1.5 if half else 1.2 if way == "fwd" else 1.1
                make = rows(_layer_norm, _torch_layer_norm, kind, dtype, r, n, 2)
                moved = (2 if way == "fwd" else 3) * size
                what = f"layer_norm {way} {name} {r}x{n}"
                yield Target(what, must, must, make, "", 0, moved)
            make = rows(_add_layer_norm, _torch_add_layer_norm, forward, dtype, r, n, 2, 2)
            must = 1.5 if half else 1.15
            what = f"add_layer_norm fwd {name} {r}x{n}"
            yield Target(what, must, must, make, "", 0, 4 * size)
            # Of rows in the caches torch's backward alone is at the rate of torch.add already.
            for kind, way, must in (
                (forward, "fwd", 1.1),
                (both, "fwd+bwd", 1.1),
                (backward, "bwd", 0.0),
            ):
                make = rows(_softmax, _torch_softmax, kind, dtype, r, n)
                moved = {"fwd": 2, "bwd": 3, "fwd+bwd": 5}[way] * size
                yield Target(f"softmax {way} {name} {r}x{n}", must, 1.1, make, "", 0, moved)
            for kind, way in fb:
                make = rows(_bias_gelu, _torch_bias_gelu, kind, dtype, r, n, 1)
                moved = (2 if way == "fwd" else 3) * size
                yield Target(f"bias_gelu {way} {name} {r}x{n}", 1.0, 1.0, make, "", 0, moved)
        for kind, way in fb:
            for window in (None, 256):
                make = masked_softmax(dtype, kind, 1024, window)
                what = f"masked_softmax {way} {name} 4x1024x1024 w={window}"
                must = 3.0 if way == "fwd" else 1.0
                yield Target(what, must, must, make)
        for r, v in ((512, 50257), (2048, 4096), (256, 131072)):
            make = cross_entropy(dtype, r, v)
            moved = 3 * r * v * dtype.itemsize
            yield Target(f"cross_entropy fwd+bwd {name} {r}x{v}", 1.8, 1.8, make, "", 0, moved)
        # Where the CPU has no bfloat16, torch multiplies it at 1 GFLOP/s.
        r, v = (128, 4096) if half else (512, 50257)
        make = linear_cross_entropy(dtype, r, v, 768)
        flops = 6 * r * v * 768
        yield Target(f"linear_cross_entropy fwd+bwd {name} {r}x{v}", 0.0, 1.0, make, "", flops)
        for b, h, s in ((1, 12, 2048), (8, 12, 2048), (1, 96, 2048)):
            make = decode(dtype, b, h, s, None)
            moved = 2 * b * h * s * 64 * dtype.itemsize
            yield Target(f"decode {name} b={b} h={h} keys={s}", 1.3, 1.3, make, "", 0, moved)
        make = decode(dtype, 4, 12, 2048, 256)
        yield Target(f"decode {name} b=4 h=12 w=256 / slice", 1.0, 1.3, make)

    third, half_ = 1 / 3, 1 / 2
    for kind_ in ("forward", "recorded", "forward and backward"):
        yield Target(f"tiny layer_norm (1, 768) {kind_}", third, half_, tiny(kind_))
    tinies = {
        "softmax": (_softmax, _torch_softmax, (1, 768)),
        "bias_gelu": (_bias_gelu, _torch_bias_gelu, (1, 768), (768,)),
        "add_layer_norm": (
            _add_layer_norm, _torch_add_layer_norm, (1, 768), (1, 768), (768,), (768,),
        ),
        "attention": (
            lambda q, k, v: F.attention(q, k, v),
            lambda q, k, v: T.scaled_dot_product_attention(q, k, v, is_causal=True),
            (1, 2, 8, 16), (1, 2, 8, 16), (1, 2, 8, 16),
        ),
    }  # fmt: skip
    for name, (ours, theirs, *sizes) in tinies.items():
        yield Target(f"tiny {name}", third, half_, tiny_op(ours, theirs, *sizes))  # type: ignore[arg-type]
    yield Target("training step f32", 1.0, 1.5, training(False, 768))
    yield Target("training step bf16 autocast", 1.15, 1.5, training(True, 256))


def measure(target: Target, rounds: int, limits: dict[str, float]) -> Measured:
    torch.manual_seed(0)
    ours, theirs = in_turn(*target.build(), rounds)
    applies = target.level in ("", native.cpu_isa())
    share = 0.0
    if limits and target.flops:
        share = target.flops / ours / 1e9 / limits["fma_gflops"]
    elif limits and target.bytes:
        share = target.bytes / ours / 1e9 / limits["copy_gb_s"]
    ratio = theirs / ours
    return Measured(target.what, target.must, target.aim, ratio, ours, theirs, applies, share)


def line(row: Measured) -> str:
    mark = "  " if row.holds else "< "
    if not row.applies:
        mark = "- "
    return (
        f"{mark}{row.what:50s} {row.must:6.2f} {row.aim:6.2f} {row.ratio:7.2f}"
        f" {row.ours * 1e3:10.3f} {row.torch * 1e3:10.3f}"
        + (f" {row.share:6.0%}" if row.share else "")
    )


def describe(limits: dict[str, float]) -> str:
    """The limits, beside torch's matrix product, which is none of ours."""
    rates = [f"{name} {value:.1f}" for name, value in limits.items() if name != "threads"]
    n = 1024
    a = torch.randn(n, n)
    product = 2 * n**3 / min(time_of(lambda: a @ a, 3) for _ in range(5)) / 1e9
    return ", ".join([*rates, f"torch.mm float32 {product:.1f} GFLOP/s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default="", type=pattern, help="a regular expression on the name of the row"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    limits = roofs.cpu_roofs()
    print(f"{machine.name_of(CPU)}, torch {torch.__version__}")
    print(describe(limits))
    columns = ("must", "aim", "ratio", "ours ms", "torch ms", "share")
    print(" " * 52 + "{:>7s}{:>7s}{:>8s}{:>11s}{:>11s}{:>7s}".format(*columns))
    measured = []
    for target in targets(not arguments.no_compile):
        if re.search(arguments.only, target.what):
            measured.append(measure(target, arguments.rounds, limits))
            print(line(measured[-1]), flush=True)
    if not arguments.only:
        folder = machine.folder_of(CPU)
        folder.mkdir(parents=True, exist_ok=True)
        document = {
            "machine": machine.name_of(CPU),
            "level": native.cpu_isa(),
            "torch": torch.__version__,
            "limits": limits,
            "rows": [asdict(row) for row in measured],
        }
        (folder / "targets.json").write_text(json.dumps(document, indent=1) + "\n")
    sys.exit(not all(row.holds for row in measured))


if __name__ == "__main__":
    main()
