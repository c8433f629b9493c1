"""Which backend runs an op: the table, the choice, and its explanation.

The table has one row per op and one cell per backend that has a kernel for it; a cell says which
devices, dtypes and head dimensions the kernel takes. `pick` is the only place that chooses.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastgpt import backends
from fastgpt.backends import native, triton

F = TypeVar("F", bound=Callable[..., Any])
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REFERENCE_DTYPES = (*NATIVE_DTYPES, torch.float64)


@dataclass(frozen=True)
class Cell:
    """What one backend's kernel of one op accepts."""

    dtypes: tuple[torch.dtype, ...]
    max_head_dim: int | None = None

    def accepts(self, dtype: torch.dtype, head_dim: int) -> bool:
        return dtype in self.dtypes and (self.max_head_dim is None or head_dim <= self.max_head_dim)

    def refusal(self, dtype: torch.dtype, head_dim: int) -> str | None:
        if dtype not in self.dtypes:
            names = ", ".join(_name(d) for d in self.dtypes)
            return f"takes {names}, got {_name(dtype)}"
        if self.max_head_dim is not None and head_dim > self.max_head_dim:
            return f"takes head_dim up to {self.max_head_dim}, got {head_dim}"
        return None


_ROWS = {
    "cpu": Cell(NATIVE_DTYPES),
    "cuda": Cell(NATIVE_DTYPES),
    "triton": Cell(NATIVE_DTYPES),
    "reference": Cell(REFERENCE_DTYPES),
}
_HEADS = {
    "cpu": Cell(NATIVE_DTYPES, max_head_dim=256),
    "cuda": Cell(NATIVE_DTYPES, max_head_dim=256),
    "triton": Cell(NATIVE_DTYPES, max_head_dim=256),
    "reference": Cell(REFERENCE_DTYPES),
}

TABLE: dict[str, dict[str, Cell]] = {
    "attention": _HEADS,
    "varlen_attention": _HEADS,
    "decode_attention": _HEADS,
    "layer_norm": _ROWS,
    "add_layer_norm": _ROWS,
    "softmax": _ROWS,
    "masked_softmax": _ROWS,
    "bias_gelu": _ROWS,
    "cross_entropy": _ROWS,
    "linear_cross_entropy": _ROWS,
}
"""op -> backend -> what its kernel accepts. Absent cell: no such kernel."""

MODULES = {"add_layer_norm": "layer_norm"}
"""Ops that live in the files of another op."""

BACKENDS = ("cuda", "cpu", "triton", "reference")
_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

# The next three are open: the tests add a backend, which nothing but a forced choice ever takes.
DEVICES: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu",),
    "cuda": ("cuda",),
    "triton": ("cuda", "xpu", "cpu") if triton.interpreted() else ("cuda", "xpu"),
}
"""backend -> the devices of its tensors. Absent: all."""

MISSING: dict[str, Callable[[], str | None]] = {
    "cpu": lambda: native.MISSING,
    "cuda": lambda: native.MISSING or native.cuda_refusal(),
    "triton": triton.missing,
    "reference": lambda: None,
}
"""backend -> why it cannot run on this machine at all; None if it can."""

NAMESPACES = {"cpu": "fastgpt", "cuda": "fastgpt"}
"""backend made of compiled ops -> where they are in torch.ops."""


def _constant(function: F) -> F:
    """What torch.compiler.assume_constant_result does, which imports the whole compiler for it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def _unavailable(backend: str) -> str | None:
    """Why `backend` cannot run on this machine at all; None if it can."""
    return _probe(backend)


@functools.cache
def _probe(backend: str) -> str | None:
    return MISSING[backend]()


@_constant
def _most_head_dim(wide: bool) -> int:
    return native.most_head_dim(wide)


def _too_wide(op: str, backend: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a kernel that this machine can run has no room for such heads; None if it has."""
    if backend != "cuda" or op not in ("attention", "varlen_attention"):
        return None
    most = _most_head_dim(dtype == torch.float32)
    if head_dim <= most:
        return None
    return f"has shared memory for head_dim up to {most} on this GPU, got {head_dim}"


def refusal(
    op: str, backend: str, device: str, dtype: torch.dtype, head_dim: int = 0
) -> str | None:
    """Why `backend` would not run `op` on such a tensor; None if it would."""
    if backend not in MISSING:
        return f"no such backend; there are {', '.join(BACKENDS)}"
    cell = TABLE[op].get(backend)
    if cell is None:
        return f"has no {op} kernel"
    if backend in DEVICES and device not in DEVICES[backend]:
        return f"runs on {' and '.join(DEVICES[backend])} tensors, got one on {device}"
    reason = cell.refusal(dtype, head_dim) or _unavailable(backend)
    return reason or _too_wide(op, backend, dtype, head_dim)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# The forced backend is a plain global, so that traced code guards on its value alone.
_forced: str | None = os.environ.get("FASTGPT_BACKEND") or None


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend for every op called inside: `cuda`, `cpu`, `triton` or `reference`.

    A forced backend never falls back: an op that it cannot run raises RuntimeError with the
    reason. The environment variable FASTGPT_BACKEND forces one for the whole process.

    Raises:
        ValueError: `name` is not a backend.
    """
    global _forced
    if name not in MISSING:
        raise ValueError(f"name: expected one of {', '.join(BACKENDS)}, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@dataclass(frozen=True)
class Choice:
    """One decision: which backend runs an op, as which variant, and why no other one does."""

    op: str
    backend: str
    variant: str
    reasons: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend} ({self.variant})"]
        lines += [f"  not {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    """The decisions behind one call, in the order in which its ops run."""

    choices: tuple[Choice, ...]

    def __str__(self) -> str:
        return "\n".join(str(choice) for choice in self.choices)


class _DryRun(BaseException):
    """Ends an explained call of an op at the moment its backend is known."""


_observer: Callable[[Choice], None] | None = None
_logging = os.environ.get("FASTGPT_LOG") == "1"
_logged: set[tuple[str, str, str]] = set()


def _variant(op: str, backend: str, tensor: Tensor, head_dim: int, features: dict[str, Any]) -> str:
    base = {"cpu": native.cpu_isa() or "generic", "reference": "plain torch"}.get(backend, backend)
    if backend == "cuda":
        more = any(features[name] for name in features.keys() - {"causal", "window"})
        base = native.cuda_kernel(op, tensor, head_dim, more)
    parts = [
        name if value is True else f"{name}={value}"
        for name, value in features.items()
        if value is not None and value is not False
    ]
    return ", ".join([base, *parts])


def _observe(choice: Choice) -> None:
    if _observer is not None:
        _observer(choice)
    key = (choice.op, choice.backend, choice.variant)
    if _logging and key not in _logged:
        _logged.add(key)
        print(f"fastgpt: {choice}", flush=True)


def _first_of_table(op: str, device: str, dtype: torch.dtype, head_dim: int) -> str:
    row = TABLE[op]
    for name in _ORDER.get(device, ("triton", "reference")):
        cell = row.get(name)
        if (
            cell is not None
            and device in DEVICES.get(name, (device,))
            and cell.accepts(dtype, head_dim)
            and _unavailable(name) is None
            and _too_wide(op, name, dtype, head_dim) is None
        ):
            return name
    return "reference"


_choice = functools.cache(_first_of_table)


def pick(op: str, tensor: Tensor, *, head_dim: int = 0, **features: Any) -> str:
    """The backend that runs `op` on `tensor`: the first of the table that takes it.

    `features` (window, causal, ...) describe the call; they only name the variant in `explain`.

    Raises:
        RuntimeError: the forced backend cannot run it; the message says why.
    """
    device, dtype = "cpu" if tensor.is_cpu else tensor.device.type, tensor.dtype
    if _forced is not None:
        reason = refusal(op, _forced, device, dtype, head_dim)
        if reason is not None:
            raise RuntimeError(
                f"{op}: backend {_forced!r} is forced, but cannot run this call: {reason}"
            )
        chosen = _forced
    elif torch.compiler.is_compiling() or type(head_dim) is not int:  # a SymInt has no hash
        chosen = _first_of_table(op, device, dtype, head_dim)
    else:
        chosen = _choice(op, device, dtype, head_dim)
    if (_observer is not None or _logging) and not torch.compiler.is_compiling():
        reasons = {
            name: "another backend is forced" if _forced else why or f"{chosen} comes first"
            for name in BACKENDS
            if name != chosen
            for why in [refusal(op, name, device, dtype, head_dim)]
        }
        variant = _variant(op, chosen, tensor, head_dim, features)
        _observe(Choice(op, chosen, variant, reasons))
    return chosen


def report_fallback(op: str, reason: str) -> None:
    """Record that a call goes to torch's own implementation, which no kernel of ours serves.

    Raises:
        RuntimeError: a backend is forced.
    """
    if _forced is not None and _forced != "reference":
        raise RuntimeError(
            f"{op}: backend {_forced!r} is forced, but this call needs torch: {reason}"
        )
    if (_observer is not None or _logging) and not torch.compiler.is_compiling():
        _observe(Choice(op, "torch", "torch's own kernel", {"fastgpt": reason}))


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """What torch.compile made runs as it was written: its graph no longer makes our decisions."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend and kernel variant would run `function(*args, **kwargs)`, and why no other.

    For a function of `fastgpt.functional` nothing is computed: the arguments are checked, the
    decision is made, and the call ends there. Anything else (a module, a model, your own
    function) is run once without gradients, and every decision on its way is listed.

    The first line of the result's text is `<op>: <backend> (<variant>)`.

    Raises:
        What the call itself would raise for its arguments.
    """
    global _observer
    choices: list[Choice] = []
    dry = getattr(function, "__module__", "").startswith("fastgpt.ops.")

    def observe(choice: Choice) -> None:
        choices.append(choice)
        if dry:
            raise _DryRun

    before, _observer = _observer, observe
    try:
        with _uncompiled():
            if dry:
                with contextlib.suppress(_DryRun):
                    function(*args, **kwargs)
            else:
                with torch.no_grad():
                    function(*args, **kwargs)
    finally:
        _observer = before
    return Explanation(tuple(choices))


_CONTENT_ERROR = re.compile(r"fastgpt\.ValueError: ([^\n]*)")


def _call_native(overload: torch._ops.OpOverload, *args: Any) -> Any:
    try:
        return overload(*args)
    except RuntimeError as error:
        content = _CONTENT_ERROR.search(str(error))
        if content is None:
            raise
        raise ValueError(content[1].strip()) from None


def _overload(namespace: str, name: str) -> torch._ops.OpOverload:
    overload: torch._ops.OpOverload = getattr(getattr(torch.ops, namespace), name).default
    return overload


@functools.cache
def _native_kernel(namespace: str, name: str) -> Callable[..., Any]:
    return functools.partial(_call_native, _overload(namespace, name))


@_constant
def _load(backend: str, module: str) -> None:
    importlib.import_module(f"fastgpt.backends.{backend}.{module}")


@functools.cache
def _python_kernel(op: str, backend: str, name: str) -> Callable[..., Any]:
    module = MODULES.get(op, op)
    _load(backend, module)
    return getattr(getattr(getattr(backends, backend), module), name)


def kernel(op: str, backend: str, name: str) -> Callable[..., Any]:
    """The raw op `name` (as `layer_norm_fwd`) of `op` on `backend`; all share its schema."""
    namespace = NAMESPACES.get(backend)
    if torch.compiler.is_compiling():
        # The caches are for eager calls: the tracer would look through them, with a warning.
        if namespace is None:
            return _python_kernel.__wrapped__(op, backend, name)
        return _overload(namespace, name)
    if namespace is None:
        return _python_kernel(op, backend, name)
    return _native_kernel(namespace, name)


def support_matrix() -> str:
    """The table as Markdown: what each backend runs, for the README and `fastgpt info`."""
    head = "| op | " + " | ".join(BACKENDS) + " |"
    lines = [head, "|---" * (len(BACKENDS) + 1) + "|"]
    for op, row in TABLE.items():
        cells = []
        for name in BACKENDS:
            cell = row.get(name)
            if cell is None:
                cells.append("")
                continue
            text = ", ".join(_SHORT[d] for d in cell.dtypes)
            if cell.max_head_dim is not None:
                text += f"; head_dim <= {cell.max_head_dim}"
            cells.append(text)
        lines.append(f"| `{op}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


_SHORT = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float64: "f64",
}
