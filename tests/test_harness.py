"""The harness beyond its error rule: faults of memory, layout and order, planted and caught.

Wrong values are planted in test_planted_faults.py; here every value is right, or would be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contract import Raw, check_contract, expected, planted
from tests.numerics import violations
from tests.specs import SPECS

Fault = Callable[..., Any]


def leaves_a_row_unwritten(raw: Raw, *args: Any) -> Any:
    y, *statistics = raw(*args)
    memory = torch.empty_like(y)
    memory[:-1] = y[:-1]
    return memory, *statistics


def assumes_contiguous_rows(raw: Raw, x: Tensor, *rest: Any) -> Any:
    return raw(x.as_strided(x.shape, (x.shape[1], 1)), *rest)


def overwrites_its_input(raw: Raw, dy: Tensor, x: Tensor, *rest: Any) -> Any:
    results = raw(dy, x, *rest)
    x.zero_()
    return results


def overwrites_the_gradient(raw: Raw, dy: Tensor, *rest: Any) -> Any:
    results = raw(dy, *rest)
    dy.zero_()
    return results


def differs_from_run_to_run(raw: Raw, *args: Any) -> Any:
    y, *statistics = raw(*args)
    return torch.where(torch.rand_like(y) < 0.5, y, y.nextafter(torch.zeros_like(y))), *statistics


def returns_another_dtype(raw: Raw, *args: Any) -> Any:
    y, *statistics = raw(*args)
    return y.double(), *statistics


def returns_other_strides(raw: Raw, *args: Any) -> Any:
    out, *rest = raw(*args)
    return out.contiguous(), *rest


def reads_padded_keys(raw: Raw, q: Tensor, k: Tensor, *rest: Any) -> Any:
    out, lse, out_lo = raw(q, k, *rest)
    return out + 0 * k.sum(), lse, out_lo


FAULTS: list[tuple[str, str, str, Fault, str]] = [
    ("layer_norm", "prime", "layer_norm_fwd", leaves_a_row_unwritten, "nan"),
    ("layer_norm", "prime", "layer_norm_fwd", assumes_contiguous_rows, "_misaligned arguments"),
    ("layer_norm", "prime", "layer_norm_bwd", overwrites_its_input, "arguments after the call"),
    ("layer_norm", "prime", "layer_norm_bwd", overwrites_the_gradient, "gradient was overwritten"),
    ("layer_norm", "prime", "layer_norm_fwd", differs_from_run_to_run, "second run"),
    ("layer_norm", "prime", "layer_norm_fwd", returns_another_dtype, "dtype torch.float64"),
    ("attention", "prime", "attention_fwd", returns_other_strides, "out: strides"),
    ("attention", "padding_holes", "attention_fwd", reads_padded_keys, "garbage where nothing"),
]


@pytest.mark.parametrize(
    ("op", "case", "name", "fault", "message"), FAULTS, ids=[fault[3].__name__ for fault in FAULTS]
)
def test_fault_is_caught(op: str, case: str, name: str, fault: Fault, message: str) -> None:
    spec, found_case = SPECS[op], SPECS[op].case(case)
    # The expectation is made before the fault is planted, and from a case of this test alone:
    # some faults overwrite what they are given.
    expected.cache_clear()
    expected(spec, found_case, torch.float32)

    def wrap(raw_name: str, raw: Raw) -> Raw:
        return raw if raw_name != name else lambda *args: fault(raw, *args)

    with planted(wrap), pytest.raises(AssertionError, match=message):
        check_contract(spec, "reference", torch.float32, found_case)
    expected.cache_clear()


def test_without_a_fault_nothing_is_caught() -> None:
    for op in ("layer_norm", "attention"):
        expected(SPECS[op], SPECS[op].case("prime"), torch.float32)
        with planted(lambda name, raw: raw):
            check_contract(SPECS[op], "reference", torch.float32, SPECS[op].case("prime"))


ONE = torch.ones(4, dtype=torch.float64)
INF = float("inf")


@pytest.mark.parametrize(
    ("got", "ref"),
    [
        ([1.0, INF, 1.0, 1.0], ONE),
        ([1.0, float("nan"), 1.0, 1.0], ONE),
        (ONE, [1.0, INF, 1.0, 1.0]),
        ([1.0, -INF, 1.0, 1.0], [1.0, INF, 1.0, 1.0]),
        ([1.0, INF, 1.0, 1.0], [1.0, float("nan"), 1.0, 1.0]),
        ([1.0, 1.0, 1.0], ONE),
    ],
    ids=["inf", "nan", "finite_for_inf", "other_sign", "inf_for_nan", "other_shape"],
)
def test_rule_compares_what_is_not_finite(got: Any, ref: Any) -> None:
    got, ref = (torch.as_tensor(x, dtype=torch.float64) for x in (got, ref))
    assert violations("x", got.float(), ref, ref, ref)
    assert not violations("x", ref.float(), ref, ref, ref)


def test_rule_has_the_figures_of_the_design() -> None:
    ref = torch.zeros(1000, dtype=torch.float64)
    ref[0] = 1.0
    off = ref + 1e-6
    eps, c = 2**-23, 8 * 2**-23 * 3.0
    for cancel, bound in ((0.0, 2e-6 + eps), (3.0, 2e-6 + eps + c)):
        for excess, accepted in ((0.99, True), (1.01, False)):
            got = torch.where(ref == 1.0, ref, excess * bound).float()
            assert (not violations("x", got, ref, off, ref, cancel=cancel)) == accepted
    low = ref + 1.0  # so that the max rule says nothing
    ideal = (ref + 1e-3 * torch.randn(1000, dtype=torch.float64)).bfloat16().double()
    rms = (ideal - ref).square().mean().sqrt()
    for factor in (2.0, 3.0):
        for excess, accepted in ((0.95, True), (1.05, False)):
            got = (ref + excess * factor * rms).bfloat16()
            assert (not violations("x", got, ref, low, ideal, factor=factor)) == accepted
