"""torch's flash attention ops on our kernels, as `activate_flash_attention_impl("FASTGPT")` has it.

Without a GPU the kernels are registered for CPU tensors, where aten has none for these ops: all but
torch's choice of them is real, aten's own autograd and the compiler's shapes included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import functional as F
from fastgpt.integrate import sdpa
from tests.attention_in_torch import attend, band
from tests.contract import Case, Inputs, OpSpec, check_contract
from tests.emulator import backend as emulator
from tests.ops import test_attention, test_varlen_attention
from tests.test_import import PACKAGE, output

attention = pytest.importorskip("torch.nn.attention")
if not hasattr(attention, "register_flash_attention_impl"):
    pytest.skip("torch has no registry of flash attention", allow_module_level=True)

aten = torch.ops.aten
RUNS = (
    ("cpu", torch.float32),
    ("cpu", torch.bfloat16),
    ("cpu", torch.float16),
    (emulator.NAME, torch.bfloat16),
)


@pytest.fixture(autouse=True)
def _on_cpu_tensors() -> Iterator[None]:
    handle = sdpa._install("CPU")
    yield
    handle.remove()


# --- the registry -------------------------------------------------------------------------------


def test_import_makes_the_name_known_and_activates_nothing() -> None:
    code = (
        "import torch, fastgpt\n"
        "from torch.nn import attention\n"
        "print(attention.list_flash_attention_impls(), attention.current_flash_attention_impl())\n"
        "kernels = torch._C._dispatch_get_registrations_for_dispatch_key('CUDA')\n"
        "print([name for name in kernels if 'flash_attention' in name])\n"
    )
    names, overridden = output(PACKAGE.parent, "-c", code).splitlines()
    assert "'FASTGPT'" in names
    assert names.endswith("] None")
    assert overridden == "[]" or torch.version.cuda is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_activation_without_a_gpu_raises_the_reason() -> None:
    with pytest.raises(RuntimeError, match=r"expected a GPU .*is_available\(\) is False"):
        attention.activate_flash_attention_impl("FASTGPT")
    assert attention.current_flash_attention_impl() is None


def test_activation_on_a_gpu_of_no_backend_raises_each_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sdpa.dispatch, "refusal", lambda op, backend, *args: f"{backend}'s reason")
    with pytest.raises(RuntimeError, match="cuda cuda's reason; triton triton's reason"):
        attention.activate_flash_attention_impl("FASTGPT")


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA kernels of its own")
def test_activation_overrides_cuda_until_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    def overridden() -> set[str]:
        names = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
        return {name for name in names if "flash_attention" in name}

    monkeypatch.setattr(sdpa, "_refusals", list)
    before = overridden()
    attention.activate_flash_attention_impl("FASTGPT")
    assert attention.current_flash_attention_impl() == "FASTGPT"
    assert overridden() - before == {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_backward",
        "aten::_flash_attention_forward",
        "aten::_flash_attention_backward",
    }
    attention.restore_flash_attention_impl()
    assert attention.current_flash_attention_impl() is None
    assert overridden() == before


# --- results ------------------------------------------------------------------------------------


def without(case: Case, **options: Any) -> Case:
    """The case, with only what the op of aten returns or takes."""
    return replace(case, make=lambda g, dtype: case.make(g, dtype) | options, hidden=None)


def by_sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, **_: Any) -> Tensor:
    op = aten._scaled_dot_product_flash_attention
    return op(q, k, v, 0.0, causal, False, scale=scale)[0].transpose(1, 2).contiguous()


def as_sides(causal: bool, window: int | None) -> dict[str, int | None]:
    """The window as flash attention counts it, without the query's own key."""
    left = None if window is None else window - 1
    return {"window_size_left": left, "window_size_right": -1 if causal else left}


def by_flash(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float | None, **_: Any
) -> Tensor:
    tokens = (x.transpose(1, 2) for x in (q, k, v))
    lengths = (None, None, q.shape[2], k.shape[2])
    options = {"scale": scale, **as_sides(causal, window)}
    out = aten._flash_attention_forward(*tokens, *lengths, 0.0, causal, False, **options)[0]
    return out.contiguous()


def by_packed_flash(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, causal: bool, window: int | None, scale: float | None,
    **_: Any,
) -> Tensor:  # fmt: skip
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = {"scale": scale, **as_sides(causal, window)}
    out = aten._flash_attention_forward(q, k, v, *lengths, 0.0, causal, False, **options)[0]
    return out.contiguous()


def low(**inputs: Any) -> Tensor:
    return test_attention.low(**inputs).transpose(1, 2).contiguous()


DENSE = replace(
    test_attention.SPEC,
    function=by_sdpa,
    low=low,
    gradients=("q", "k", "v"),
    storage={},
    cancellation=lambda inputs, results: test_attention.cancellation(
        inputs, results | {"outgoing_out": results["outgoing_out"].transpose(1, 2)}
    ),
)
WINDOWED = replace(DENSE, function=by_flash)
PACKED = replace(test_varlen_attention.SPEC, function=by_packed_flash)
CASES = (
    (DENSE, "two_heads_per_key_head"),
    (DENSE, "short_queries_bottom_right"),
    (DENSE, "queries_that_see_no_key"),
    (DENSE, "all_keys"),
    (DENSE, "scale"),
    (DENSE, "peaked"),  # breaks the rule where the output's rounding error is lost
    (WINDOWED, "one_key_head"),
    (WINDOWED, "window_inside_block"),
    (WINDOWED, "two_sided_window"),
    (PACKED, "empty_documents"),
    (PACKED, "queries_that_see_no_key"),
    (PACKED, "window"),
    (PACKED, "two_sided_window"),
)


@pytest.mark.parametrize(
    ("spec", "case"),
    [pytest.param(s, c, id=f"{s.function.__name__}-{c}") for s, c in CASES],
)
@pytest.mark.parametrize(
    ("backend", "dtype"), [pytest.param(*run, id=f"{run[0]}-{str(run[1])[6:]}") for run in RUNS]
)
def test_contract(backend: str, spec: OpSpec, case: str, dtype: torch.dtype) -> None:
    check_contract(spec, backend, dtype, without(spec.case(case), return_lse=False))


def tensors(b=2, h=4, hk=2, sq=9, sk=9, d=16, dtype=torch.bfloat16, grad=True) -> list[Tensor]:
    shapes = ((b, h, sq, d), (b, hk, sk, d), (b, hk, sk, d))
    return [torch.randn(*shape, dtype=dtype, requires_grad=grad) for shape in shapes]


@pytest.mark.parametrize("causal", [True, False])
def test_the_same_as_torchs_own_for_cpus(causal: bool) -> None:
    q, k, v = tensors(hk=4, dtype=torch.float32)
    ours = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    theirs = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    dout = torch.randn_like(theirs[0])
    torch.testing.assert_close(ours[:2], theirs[:2])
    for got, want in zip(
        torch.autograd.grad(ours[0], (q, k, v), dout),
        torch.autograd.grad(theirs[0], (q, k, v), dout),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_dropout_has_one_mask_forward_and_backward() -> None:
    q, k, v = tensors(sq=17, sk=23)
    torch.manual_seed(5)
    out, *_, state, _, _ = aten._scaled_dot_product_flash_attention(q, k, v, 0.3, False)
    torch.manual_seed(5)
    again = aten._scaled_dot_product_flash_attention(q, k, v, 0.3, False)
    other = aten._scaled_dot_product_flash_attention(q, k, v, 0.3, False)
    assert torch.equal(out, again[0])
    assert not torch.equal(out, other[0])
    seed = state.view(torch.int64)[0].clone()
    want = F.attention(q, k, v, causal=False, dropout_p=0.3, dropout_seed=seed)
    assert torch.equal(out, want)
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), dout)
    assert all(map(torch.equal, got, torch.autograd.grad(want, (q, k, v), dout)))


@pytest.mark.parametrize("layout", ["contiguous", "token_major", "slice_of_qkv"])
@pytest.mark.parametrize("op", ["sdpa", "flash"])
def test_strides_are_those_of_torchs_fakes(op: str, layout: str) -> None:
    """A compiled graph asserts them."""
    b, h, s, d = 2, 4, 9, 16
    q = {
        "contiguous": torch.randn(b, h, s, d),
        "token_major": torch.randn(b, s, h, d).transpose(1, 2),
        "slice_of_qkv": torch.randn(b, s, 3, h, d)[:, :, 1].transpose(1, 2),
    }[layout]

    def run(q: Tensor) -> tuple[Any, ...]:
        if op == "sdpa":
            found = aten._scaled_dot_product_flash_attention(q, q, q, 0.0, True)
            return found, aten._scaled_dot_product_flash_attention_backward(
                found[0], q, q, q, *found[:6], 0.0, True, *found[6:8]
            )
        q = q.transpose(1, 2)
        found = aten._flash_attention_forward(q, q, q, None, None, s, s, 0.0, True, False)
        return found, aten._flash_attention_backward(
            found[0], q, q, q, *found[:2], None, None, s, s, 0.0, True, *found[2:4]
        )

    def described(results: tuple[Any, ...]) -> list[Any]:
        return [
            (tuple(x.shape), x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in results
        ]

    real = run(q)
    fake = run(q.to("meta"))
    for ours, promised in zip(real, fake, strict=True):
        assert described(ours) == described(promised)


def test_compiled() -> None:
    """Outputs are equal; the gradients come from the rounded output, see the module's head."""
    q, k, v = tensors(sq=33, sk=33)

    def attend_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
        return aten._scaled_dot_product_flash_attention(out, k, v, 0.0, True)[0]

    eager = attend_twice(q, k, v)
    compiled = torch.compile(attend_twice, fullgraph=True)(q, k, v)
    assert torch.equal(compiled, eager)
    dout = torch.randn_like(eager)
    for got, want in zip(
        torch.autograd.grad(compiled, (q, k, v), dout),
        torch.autograd.grad(eager, (q, k, v), dout),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_the_rounding_error_travels_only_where_autograd_records() -> None:
    q, k, v = tensors()
    assert aten._scaled_dot_product_flash_attention(q, k, v)[7].shape == q.shape
    with torch.no_grad():
        assert aten._scaled_dot_product_flash_attention(q, k, v)[7].shape == ()
    q, k, v = tensors(dtype=torch.float32)
    assert aten._scaled_dot_product_flash_attention(q, k, v)[7].shape == ()


@pytest.mark.parametrize(("sides", "window"), [((-1, 0), None), ((3, 0), 4)])
def test_torchs_varlen(sides: tuple[int, int], window: int | None) -> None:
    """Its backward drops the rounding error, so that only the output is equal."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    q, k, v = (torch.randn(20, 4, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    packed = (q, k, v, *[torch.tensor([0, 8, 20], dtype=torch.int32)] * 2, 12, 12)
    out = varlen.varlen_attn(*packed, window_size=sides)
    want = F.varlen_attention(*packed, window=window)
    assert torch.equal(out, want)
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), dout)
    for ours, exact in zip(got, torch.autograd.grad(want, (q, k, v), dout), strict=True):
        torch.testing.assert_close(ours, exact, rtol=2e-2, atol=2e-2)


def test_lse() -> None:
    q, k, v = tensors(sq=21, sk=9, dtype=torch.float32, grad=False)
    lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[1]
    assert torch.equal(lse, F.attention(q, k, v, return_lse=True)[1])
    torch.testing.assert_close(lse, attend(q, k, v, band(21, 9, True, None))[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_plain_sdpa_on_a_gpu(dropout_p: float) -> None:
    q, k, v = (x.detach().cuda().requires_grad_() for x in tensors(sq=130, sk=130, d=64))
    options = {"dropout_p": dropout_p, "is_causal": True, "enable_gqa": True}
    attention.activate_flash_attention_impl("FASTGPT")
    try:
        with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
            torch.manual_seed(5)
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
            dout = torch.randn_like(out)
            got = torch.autograd.grad(out, (q, k, v), dout)
    finally:
        attention.restore_flash_attention_impl()
    seed = None
    if dropout_p:
        torch.manual_seed(5)
        seed = torch.randint(2**63 - 1, (2,), device="cuda")[0]
    want = F.attention(q, k, v, dropout_p=dropout_p, dropout_seed=seed)
    assert torch.equal(out, want)
    assert all(map(torch.equal, got, torch.autograd.grad(want, (q, k, v), dout)))


# --- what is not served -------------------------------------------------------------------------


def flash(**options: Any) -> Any:
    q, k, v = (x.transpose(1, 2) for x in tensors(hk=4, grad=False))
    given: Inputs = {
        "query": q, "key": k, "value": v, "cum_seq_q": None, "cum_seq_k": None, "max_q": 9,
        "max_k": 9, "dropout_p": 0.0, "is_causal": True, "return_debug_mask": False,
    }  # fmt: skip
    return aten._flash_attention_forward(**(given | options))


OFFSETS = torch.tensor([0, 9], dtype=torch.int32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"return_debug_mask": True}, "return_debug_mask: .*serves False alone, got True"),
        ({"alibi_slopes": torch.ones(4)}, "alibi_slopes: .*serves None alone, got a Tensor"),
        ({"seqused_k": OFFSETS}, "seqused_k: .*serves None alone, got a Tensor"),
        ({"num_splits": 4}, "num_splits: .*serves None alone, got 4"),
        ({"dropout_p": 1.0}, r"dropout_p: expected a probability in \[0, 1\), got 1.0"),
        ({"cum_seq_q": OFFSETS}, "cum_seq_k: expected offsets as for the other, got None"),
        ({"cum_seq_q": OFFSETS, "cum_seq_k": OFFSETS}, "q: expected 3 dimensions"),
        (
            {"cum_seq_q": OFFSETS, "cum_seq_k": OFFSETS, "dropout_p": 0.1},
            "dropout_p: .*serves 0.0 alone, got 0.1",
        ),
        (
            {"window_size_left": 3, "window_size_right": 2, "is_causal": False},
            "window_size_left, window_size_right: .*got 3 and 2",
        ),
        ({"key": torch.ones(2, 9, 4, 8)}, r"key: expected shape .* with b and d of query"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_not_served_raises(options: dict[str, Any], message: str) -> None:
    assert flash()[0].shape == (2, 9, 4, 16)
    with pytest.raises(ValueError, match=message):
        flash(**options)


def test_other_dtypes_raise() -> None:
    q, k, v = (x.transpose(1, 2) for x in tensors(hk=4, grad=False))
    with pytest.raises(TypeError, match=r"key: expected dtype torch\.bfloat16 as query"):
        flash(key=k.float())
    with pytest.raises(TypeError, match="query: expected dtype float32"):
        flash(query=q.int(), key=k.int(), value=v.int())
