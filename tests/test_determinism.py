"""The same bits on any number of threads and in any batch, of every compiled backend.

The reference backend is exempt from both: it is made of torch's matrix products and sums, whose
blocking depends on the shape of the whole batch and on the threads. So is linear_cross_entropy but
on the CPU, for its matrix products.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastgpt
from fastgpt import functional as F
from tests.contract import (
    LOW_DTYPES,
    Case,
    OpSpec,
    device_of,
    make,
    outgoing_for,
    run,
    same_bits,
    skip_unless_runs,
    threads,
)
from tests.specs import every

# These differ in whether work is split over rows, over tiles of one head, or over keys.
MANY_TILES = {
    "attention": ("just_over_block", "window_across_blocks", "one_query", "everything"),
    "decode_attention": ("just_over_block",),
    "varlen_attention": ("just_over_block", "prime_lengths"),
    "linear_cross_entropy": ("prime", "ignored_rows", "several_blocks_of_classes"),
}

OWN_KERNELS = [
    param
    for param in every(compiled_only=True)
    if param.values[0].op != "linear_cross_entropy" or param.values[1] == "cpu"
]


# The others leave the threads of torch alone.
THREADED = [param for param in OWN_KERNELS if param.values[1] == "cpu"]


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("spec", "backend"), THREADED)
def test_thread_count_changes_no_bit(spec: OpSpec, backend: str, dtype) -> None:
    skip_unless_runs(spec.op, backend, dtype)
    for name in MANY_TILES.get(spec.op, spec.rows.cases):
        case = spec.case(name)
        inputs, outgoing = make(spec, case, dtype), outgoing_for(spec, case, dtype)
        with fastgpt.backend(backend):
            with threads(1):
                alone = run(spec, spec.function, inputs, outgoing, device_of(backend))
            for count in (2, 3):
                with threads(count):
                    several = run(spec, spec.function, inputs, outgoing, device_of(backend))
                same_bits(f"{name} on {count} threads", several, alone)


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("spec", "backend"), OWN_KERNELS)
def test_batch_changes_no_bit(spec: OpSpec, backend: str, dtype) -> None:
    skip_unless_runs(spec.op, backend, dtype)
    for name in spec.rows.cases:
        check_elements(spec, backend, dtype, spec.case(name))


def check_elements(spec: OpSpec, backend: str, dtype, case: Case) -> None:
    """The first and the last element of the batch, each alone, have the bits they have in it."""
    rows = spec.rows
    inputs, outgoing = make(spec, case, dtype), outgoing_for(spec, case, dtype)
    device = device_of(backend)
    with fastgpt.backend(backend):
        together = run(spec, spec.function, inputs, outgoing, device)
        for i in (0, rows.count(inputs) - 1):

            def own_outgoing(name, output, i=i):
                own = rows.of_result(inputs, name, outgoing(name, together[name]), i)
                return own.to(output.device)

            alone = run(spec, spec.function, rows.of_inputs(inputs, i), own_outgoing, device)
            want = {
                name: own
                for name, result in together.items()
                if (own := rows.of_result(inputs, name, result, i)) is not None
            }
            same_bits(f"{case.id}, element {i} alone", alone, want)


ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "add_layer_norm": lambda x: torch.stack(F.add_layer_norm(x, x.neg() / 2, x.shape[-1:]), 1),
    "softmax": lambda x: F.softmax(x),
    "bias_gelu": lambda x: F.bias_gelu(x, torch.linspace(-1, 1, x.shape[-1])),
    "cross_entropy": lambda x: F.cross_entropy(x, torch.full(x.shape[:1], 7), reduction="none"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ROWS)
def test_what_is_written_past_the_caches_has_the_same_bits(op: str, dtype: torch.dtype) -> None:
    """As the cpu kernels write results beyond 24 MiB: of all rows at once, and of three."""
    skip_unless_runs(op, "cpu", dtype)
    x, dy = (torch.randn(2048, 4096).to(dtype) for _ in range(2))

    def both_ways(rows: slice) -> tuple[Tensor, Tensor]:
        leaf = x[rows].clone().requires_grad_()
        y = ROWS[op](leaf)
        outgoing = dy[rows].view(-1, *[1] * (y.dim() - 2), 4096) if y.dim() > 1 else dy[rows, 0]
        return y.detach(), torch.autograd.grad(y, leaf, outgoing.expand_as(y).to(y.dtype))[0]

    with fastgpt.backend("cpu"):
        whole = both_ways(slice(None))
        for first in (0, 700, 1023, 2045):
            rows = slice(first, first + 3)
            for got, alone in zip(whole, both_ways(rows), strict=True):
                assert torch.equal(got[rows], alone)
