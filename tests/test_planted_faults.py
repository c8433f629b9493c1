"""The harness itself: kernels with a fault in them are rejected, the same kernels without it pass.

Each fault is one wrong raw op between the public function and its autograd, computed in float32 and
rounded as a kernel would, so that nothing but the fault differs from a good kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contract import LOW_DTYPES, Case, Raw, expected, judge, planted, run
from tests.specs import SPECS

BOTH = (torch.float32, torch.bfloat16)
Fault = Callable[..., Any]
"""(raw, *args) -> outputs: calls the right raw op, and spoils its arguments or its outputs."""


@dataclass(frozen=True)
class Plant:
    """A fault in one raw op, and the case on which it must show."""

    id: str
    op: str
    case: str
    raw: str
    fault: Fault
    dtypes: tuple[torch.dtype, ...] = BOTH


# --- layer_norm ---------------------------------------------------------------------------------


def _centered(args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    dy, x, weight, statistics = (None if a is None else a.float() for a in args[:4])
    mean, rstd = statistics
    xhat = (x - mean[:, None]) * rstd[:, None]
    return dy if weight is None else dy * weight, xhat, rstd[:, None]


def without_mean_term(raw: Raw, *args: Any) -> Any:
    dx, dweight, dbias = raw(*args)
    g, _, rstd = _centered(args)
    return (dx + rstd * g.mean(-1, keepdim=True)).to(dx.dtype), dweight, dbias


def without_projection_term(raw: Raw, *args: Any) -> Any:
    dx, dweight, dbias = raw(*args)
    g, xhat, rstd = _centered(args)
    return (dx + rstd * xhat * (g * xhat).mean(-1, keepdim=True)).to(dx.dtype), dweight, dbias


def weight_gradient_lost_a_row(raw: Raw, *args: Any) -> Any:
    dx, dweight, dbias = raw(*args)
    dy, xhat, _ = _centered((args[0], args[1], None, *args[3:]))
    return dx, dweight - dy[-1] * xhat[-1], dbias


def bias_gradient_lost_a_row(raw: Raw, *args: Any) -> Any:
    dx, dweight, dbias = raw(*args)
    return dx, dweight, dbias - args[0][-1]


def variance_over_n_minus_1(raw: Raw, x: Tensor, weight: Any, bias: Any, *rest: Any) -> Any:
    eps, float_out = rest
    wide, n = x.float(), x.shape[1]
    rstd = (wide.var(-1, correction=1) + eps).rsqrt()
    y = (wide - wide.mean(-1, keepdim=True)) * rstd[:, None]
    y = y if weight is None else y * weight.float()
    y = y if bias is None else y + bias.float()
    assert n > 1
    return y.to(torch.float32 if float_out else x.dtype), torch.stack((wide.mean(-1), rstd))


def eps_outside_the_root(raw: Raw, x: Tensor, weight: Any, bias: Any, *rest: Any) -> Any:
    eps, float_out = rest
    mean, rstd = raw(x, weight, bias, eps, True)[1]
    rstd = 1 / ((1 / rstd**2 - eps).sqrt() + 100 * eps)
    y = (x.float() - mean[:, None]) * rstd[:, None]
    y = y if weight is None else y * weight.float()
    y = y if bias is None else y + bias.float()
    return y.to(torch.float32 if float_out else x.dtype), torch.stack((mean, rstd))


def ignores_ds(raw: Raw, *args: Any) -> Any:
    return raw(*args[:4], None, *args[5:])


LAYER_NORM = (
    Plant("mean_term", "layer_norm", "prime", "layer_norm_bwd", without_mean_term),
    Plant("projection_term", "layer_norm", "prime", "layer_norm_bwd", without_projection_term),
    Plant(
        "dweight_row", "layer_norm", "just_over_a_chunk_of_rows", "layer_norm_bwd",
        weight_gradient_lost_a_row,
    ),
    Plant(
        "dbias_row", "layer_norm", "just_over_a_chunk_of_rows", "layer_norm_bwd",
        bias_gradient_lost_a_row,
    ),
    Plant(
        "variance_n_minus_1", "layer_norm", "just_over_a_chunk_of_rows", "layer_norm_fwd",
        variance_over_n_minus_1,
    ),
    Plant(
        "variance_n_minus_1_of_a_long_row", "layer_norm", "gpt3_13b", "layer_norm_fwd",
        variance_over_n_minus_1, (torch.float32,),
    ),
    Plant("eps_outside", "layer_norm", "prime", "layer_norm_fwd", eps_outside_the_root,
          (torch.float32,)),
    Plant("ds_ignored", "add_layer_norm", "prime", "layer_norm_bwd", ignores_ds),
)  # fmt: skip


# --- softmax and gelu -----------------------------------------------------------------------------


def one_percent_off(raw: Raw, scores: Tensor, scale: float, *rest: Any) -> Any:
    return raw(scores, 1.01 * scale, *rest)


def softmax_of_scaled(raw: Raw, x: Tensor, float_out: bool) -> Any:
    return raw(1.01 * x.float(), float_out)


def sum_of_all_but_the_last(raw: Raw, x: Tensor, float_out: bool) -> Any:
    y = raw(x.float(), torch.float32)
    return (y / (1 - y[:, -1:])).to(torch.float32 if float_out else x.dtype)


def without_dot(raw: Raw, dy: Tensor, y: Tensor, in_dtype: torch.dtype) -> Any:
    return (dy * y.float()).to(in_dtype)


def scale_missing(raw: Raw, dy: Tensor, y: Tensor, scale: float, *rest: Any) -> Any:
    return raw(dy, y, 1.0, *rest)


def wider_window(raw: Raw, scores: Tensor, scale: float, causal: bool, window: Any, *rest: Any):
    return raw(scores, scale, causal, window + 1, *rest)


def narrower_window(raw: Raw, scores: Tensor, scale: float, causal: bool, window: Any, *rest: Any):
    return raw(scores, scale, causal, window - 1, *rest)


def erf_for_tanh(raw: Raw, x: Tensor, bias: Any, tanh: bool, *rest: Any) -> Any:
    return raw(x, bias, not tanh, *rest)


def erf_for_tanh_bwd(raw: Raw, dy: Tensor, x: Tensor, bias: Any, tanh: bool, need: bool) -> Any:
    return raw(dy, x, bias, not tanh, need)


def gelu_without_bias(raw: Raw, x: Tensor, bias: Tensor, tanh: bool) -> Any:
    return raw(x, None, tanh)


def gelu_of_x_alone(raw: Raw, dy: Tensor, x: Tensor, bias: Tensor, tanh: bool, need: bool) -> Any:
    return raw(dy, x, torch.zeros_like(bias), tanh, need)


def dbias_lost_a_row(raw: Raw, *args: Any) -> Any:
    dx, dbias = raw(*args)
    return dx, dbias - dx[-1].float()


ELEMENTWISE = (
    Plant("softmax_scale", "softmax", "prime", "softmax_fwd", softmax_of_scaled),
    Plant("softmax_sum", "softmax", "just_over_a_vector", "softmax_fwd", sum_of_all_but_the_last),
    Plant("softmax_dot", "softmax", "prime", "softmax_bwd", without_dot),
    Plant("masked_scale", "masked_softmax", "prime", "masked_softmax_fwd", one_percent_off),
    Plant("masked_scale_of_dx", "masked_softmax", "prime", "masked_softmax_bwd", scale_missing),
    Plant("window_plus_1", "masked_softmax", "window_across_vectors", "masked_softmax_fwd",
          wider_window),
    Plant("window_minus_1", "masked_softmax", "window_across_vectors", "masked_softmax_fwd",
          narrower_window),
    Plant("erf_for_tanh", "bias_gelu", "prime", "bias_gelu_fwd", erf_for_tanh, (torch.float32,)),
    Plant("erf_for_tanh_bwd", "bias_gelu", "prime", "bias_gelu_bwd", erf_for_tanh_bwd,
          (torch.float32,)),
    Plant("bias_ignored", "bias_gelu", "prime", "bias_gelu_fwd", gelu_without_bias),
    Plant("bias_ignored_bwd", "bias_gelu", "prime", "bias_gelu_bwd", gelu_of_x_alone),
    Plant("dbias_row", "bias_gelu", "just_over_a_chunk_of_rows", "bias_gelu_bwd",
          dbias_lost_a_row),
)  # fmt: skip


# --- cross entropy --------------------------------------------------------------------------------


def unsmoothed(raw: Raw, *args: Any) -> Any:
    """label_smoothing is the last number of the forward and of the backward."""
    place = max(i for i, arg in enumerate(args) if type(arg) is float)
    return raw(*args[:place], 0.0, *args[place + 1 :])


def unweighted(raw: Raw, *args: Any) -> Any:
    x, target, weight, *rest = args
    return raw(x, target, torch.ones_like(weight), *rest)


def mean_over_all_rows(raw: Raw, x: Tensor, target: Tensor, *rest: Any) -> Any:
    loss, lse, weight_sum = raw(x, target, *rest)
    return loss * weight_sum / target.numel(), lse, weight_sum


def gradient_into_ignored(raw: Raw, dloss: Tensor, x: Tensor, target: Tensor, *rest: Any) -> Any:
    return raw(dloss, x, target.clamp(min=0), *rest)


def without_one_hot(raw: Raw, dloss: Tensor, x: Tensor, target: Tensor, *rest: Any) -> Any:
    good = raw(dloss, x, target, *rest).clone()
    good[torch.arange(len(x)), target] += dloss.to(good.dtype)
    return good


def lse_lost_a_class(raw: Raw, x: Tensor, *rest: Any) -> Any:
    shorter = x.clone()
    shorter[:, -1] = float("-inf")
    _, lse, _ = raw(shorter, *rest)
    loss, good, weight_sum = raw(x, *rest)
    return loss + (lse - good), lse, weight_sum


def dweight_lost_a_row(raw: Raw, dloss: Tensor, x: Tensor, *rest: Any) -> Any:
    weight, bias, target, lse, *options = rest
    dx, dweight, dbias = raw(dloss, x, *rest)
    own = raw(dloss[-1:], x[-1:], weight, bias, target[-1:], lse[-1:], *options)[1]
    return dx, (dweight.float() - own.float()).to(dweight.dtype), dbias


CROSS_ENTROPY = (
    Plant("smoothing", "cross_entropy", "smoothed", "cross_entropy_fwd", unsmoothed),
    Plant("smoothing_bwd", "cross_entropy", "smoothed", "cross_entropy_bwd", unsmoothed),
    Plant("class_weights", "cross_entropy", "weighted_none", "cross_entropy_fwd", unweighted),
    Plant("mean_over_all", "cross_entropy", "ignored_rows", "cross_entropy_fwd",
          mean_over_all_rows),
    Plant("ignored", "cross_entropy", "ignored_rows", "cross_entropy_bwd", gradient_into_ignored),
    Plant("one_hot", "cross_entropy", "prime", "cross_entropy_bwd", without_one_hot),
    Plant("last_class", "cross_entropy", "prime", "cross_entropy_fwd", lse_lost_a_class),
    Plant("smoothing", "linear_cross_entropy", "smoothed", "linear_cross_entropy_fwd", unsmoothed),
    Plant("smoothing_bwd", "linear_cross_entropy", "smoothed", "linear_cross_entropy_bwd",
          unsmoothed),
    Plant("dweight_row", "linear_cross_entropy", "prime", "linear_cross_entropy_bwd",
          dweight_lost_a_row),
)  # fmt: skip


# --- attention ------------------------------------------------------------------------------------

SCALE, CAUSAL, WINDOW, OFFSET, PADDING = 3, 4, 5, 6, 7  # arguments of attention_fwd
BWD = 5  # more arguments that attention_bwd has in front of them


def replaced(**changes: Callable[[Any], Any]) -> Fault:
    """The raw op with some arguments changed: scale, window or offset, forward and backward."""
    places = {"scale": SCALE, "causal": CAUSAL, "window": WINDOW, "offset": OFFSET}

    def fault(raw: Raw, *args: Any) -> Any:
        changed = list(args)
        shift = BWD if isinstance(args[SCALE], Tensor) else 0
        for name, change in changes.items():
            place = places[name] + shift
            changed[place] = change(changed[place])
        return raw(*changed)

    return fault


def top_left(raw: Raw, *args: Any) -> Any:
    return replaced(offset=lambda offset: 0)(raw, *args)


def padded_key_leaks(raw: Raw, *args: Any) -> Any:
    padding = args[PADDING].clone()
    padding[1, ~padding[1]] = torch.arange(int((~padding[1]).sum())) == 0
    return raw(*args[:PADDING], padding, *args[PADDING + 1 :])


def dq_missing_scale(raw: Raw, *args: Any) -> Any:
    dq, *rest = raw(*args)
    return (dq / args[SCALE + BWD]).to(dq.dtype), *rest


def delta_omitted(
    raw: Raw, dout: Tensor, dlse: Any, q: Any, k: Any, v: Any, out: Tensor, *rest: Any
):
    return raw(dout, dlse, q, k, v, torch.zeros_like(out), *rest)


def delta_of_rounded_out(raw: Raw, *args: Any) -> Any:
    out_lo = args[7]
    return raw(*args[:7], torch.zeros_like(out_lo), *args[8:])


def dlse_ignored(raw: Raw, dout: Tensor, dlse: Any, *rest: Any) -> Any:
    return raw(dout, None, *rest)


def wrong_key_head(raw: Raw, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    return raw(q, k.flip(1), v.flip(1), *rest)


def dead_rows_average(raw: Raw, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    out, lse, out_lo = raw(q, k, v, *rest)
    dead = (lse == -torch.inf)[..., None]
    return torch.where(dead, v.mean(2, keepdim=True), out), lse, out_lo


def dropout_of_other_columns(raw: Raw, *args: Any) -> Any:
    return raw(*args[:12], args[12] + 1, *args[13:])


def coarse_exponential(raw: Raw, *args: Any) -> Any:
    """2^x by a polynomial of degree 3: 1e-4 off, which float32 must not hide."""
    out, lse, out_lo = raw(*args)
    return (out * (1 + 1e-4)).to(out.dtype), lse, out_lo


def attention(id: str, case: str, raw: str, fault: Fault, *dtypes: torch.dtype) -> Plant:
    return Plant(id, "attention", case, f"attention_{raw}", fault, dtypes or BOTH)


ATTENTION = (
    attention("scale", "prime", "fwd", replaced(scale=lambda scale: 1.01 * scale), torch.float32),
    attention("scale_peaked", "peaked", "fwd", replaced(scale=lambda scale: 1.01 * scale)),
    attention("scale_bwd", "peaked", "bwd", replaced(scale=lambda scale: 1.01 * scale)),
    attention("window_plus_1", "window_inside_block", "fwd", replaced(window=lambda w: w + 1)),
    attention("window_minus_1", "window_inside_block", "fwd", replaced(window=lambda w: w - 1)),
    attention(
        "wide_window_plus_1", "window_across_blocks", "fwd", replaced(window=lambda w: w + 1)
    ),
    attention("window_bwd", "window_inside_block", "bwd", replaced(window=lambda w: w + 1)),
    attention("causal_plus_1", "just_over_block", "fwd", replaced(offset=lambda o: o + 1)),
    attention("causal_ignored", "just_over_block", "bwd", replaced(causal=lambda c: False)),
    attention("top_left", "short_queries_bottom_right", "fwd", top_left),
    attention("padded_key", "padding_left", "fwd", padded_key_leaks),
    attention("dq_scale", "prime", "bwd", dq_missing_scale),
    attention("delta", "prime", "bwd", delta_omitted),
    attention("delta_of_rounded_out", "peaked", "bwd", delta_of_rounded_out, torch.bfloat16),
    attention("dlse", "prime", "bwd", dlse_ignored),
    attention("key_head", "two_heads_per_key_head", "fwd", wrong_key_head),
    attention("dead_rows", "queries_that_see_no_key", "fwd", dead_rows_average),
    attention("dropout_mask", "dropout", "fwd", dropout_of_other_columns),
    attention("coarse_exponential", "prime", "fwd", coarse_exponential, torch.float32),
)

PLANTS = LAYER_NORM + ELEMENTWISE + CROSS_ENTROPY + ATTENTION


PLANTED = [
    pytest.param(plant, dtype, id=f"{plant.op}-{plant.id}-{str(dtype)[6:]}")
    for plant in PLANTS
    for dtype in plant.dtypes
]


@pytest.mark.parametrize(("plant", "dtype"), PLANTED)
def test_fault_is_rejected(plant: Plant, dtype: torch.dtype) -> None:
    spec, planted_calls = SPECS[plant.op], []
    want = expected(spec, spec.case(plant.case), dtype)

    def wrap(name: str, raw: Raw) -> Raw:
        if name != plant.raw:
            return raw
        planted_calls.append(name)
        return lambda *args: plant.fault(raw, *args)

    with planted(wrap):
        got = run(spec, spec.function, want.inputs, want.outgoing)
    assert planted_calls
    assert judge(spec, want, got)


GOOD = [
    pytest.param(op, case, dtype, id=f"{op}-{str(dtype)[6:]}-{case.id}")
    for op, spec in SPECS.items()
    for case in spec.cases
    for dtype in LOW_DTYPES
]


@pytest.mark.parametrize(("op", "case", "dtype"), GOOD)
def test_good_kernel_is_accepted(op: str, case: Case, dtype: torch.dtype) -> None:
    spec = SPECS[op]
    want = expected(spec, case, dtype)
    with planted(lambda name, raw: raw):
        got = run(spec, spec.function, want.inputs, want.outgoing)
    assert not judge(spec, want, got), "\n".join(judge(spec, want, got))
