"""What every autograd.Function of the ops shares."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd must record: grad mode is on and one of `tensors` requires a gradient.

    Also inside forward-mode differentiation, where the op's autograd.Function, having no such
    rule, raises instead of dropping the tangent.
    """
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def record(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`, without the Python wrapper around it where that has no work to do.

    The wrapper serves functorch's transforms and costs half of what recording a tiny call costs.
    """
    if torch.compiler.is_compiling():
        return function.apply(*_distinct(args))
    if torch._C._are_functorch_transforms_active():
        op = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", function.__name__.strip("_")).lower()
        raise RuntimeError(
            f"{op}: torch.func's transforms do not reach into this fused kernel; "
            'run it under fastgpt.backend("reference"), which they do'
        )
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def _distinct(args: tuple[Any, ...]) -> list[Any]:
    """`args`, each tensor an object of its own: torch.compile refuses an autograd.Function that
    gets one twice, as in attention(x, x, x)."""
    seen: list[Any] = []
    for arg in args:
        again = isinstance(arg, Tensor) and any(arg is other for other in seen)
        seen.append(arg.view_as(arg) if again else arg)
    return seen


_NOTHING = contextlib.nullcontext()


def without_grad() -> contextlib.AbstractContextManager[Any]:
    """torch.no_grad() where it changes something: a backward runs without grad mode, except for
    `create_graph=True`, and entering no_grad costs as much as a tiny kernel."""
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, count: int, *tensors: Tensor | None) -> Any:
        ctx.op = op
        return tuple(None if g is None else g.view_as(g) for g in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{ctx.op}: the gradient of this fused kernel cannot be differentiated again; "
            'run the forward under fastgpt.backend("reference"), which supports it'
        )


def once(
    op: str, sources: Sequence[Tensor | None], *grads: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Mark the gradients that a backward returns: differentiating them raises RuntimeError.

    Without it a gradient penalty would treat them as constants and be silently wrong. `sources`
    are the tensors that they were computed from: each must lead to the error, also where autograd
    is asked for its gradient alone.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return grads
    return _Once.apply(op, len(sources), *sources, *grads)
