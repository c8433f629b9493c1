"""varlen_attention: packed documents, each against plain torch on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import functional as F
from tests.attention_in_torch import attend, band
from tests.contract import Case, Inputs, OpSpec, Results, Rows, check_contract, grid, normal
from tests.numerics import worst
from tests.ops.test_attention import stored


def hidden(inputs: Inputs) -> Inputs:
    """Keys and values behind the last document hold NaN and inf."""
    k, v = inputs["k"].clone(), inputs["v"].clone()
    end = int(inputs["cu_seqlens_k"][-1])
    k[end:], v[end:] = float("nan"), float("inf")
    return inputs | {"k": k, "v": v}


def case(
    id: str,
    lengths: tuple[tuple[int, int], ...],
    h: int = 2,
    hk: int = 2,
    d: int = 16,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    lse: bool = False,
    unused: int = 0,
) -> Case:
    """Documents of (queries, keys) each, and `unused` tokens behind the last one."""

    def make(g: torch.Generator, dtype: torch.dtype) -> Inputs:
        queries, keys = (torch.tensor([0, *(pair[side] for pair in lengths)]) for side in (0, 1))
        tq, tk = int(queries.sum()) + unused, int(keys.sum()) + unused
        return {
            "q": normal(g, tq, h, d, dtype=dtype),
            "k": normal(g, tk, hk, d, dtype=dtype),
            "v": normal(g, tk, hk, d, dtype=dtype),
            "cu_seqlens_q": queries.cumsum(0).int(),
            "cu_seqlens_k": keys.cumsum(0).int(),
            "max_seqlen_q": int(queries.max()),
            "max_seqlen_k": int(keys.max()),
            "causal": causal,
            "window": window,
            "scale": scale,
            "return_lse": lse,
        }

    return Case(id, make, hidden if unused else None)


CASES = (
    case("one_token", ((1, 1),)),
    case("no_documents", ()),
    case("one_document", ((37, 37),), lse=True),
    case("prime_lengths", ((13, 13), (1, 1), (31, 31), (7, 7)), lse=True),
    case("just_over_block", ((129, 129), (3, 3)), d=64),
    case("empty_documents", ((0, 0), (9, 9), (0, 0), (5, 5), (0, 0)), lse=True),
    case("short_queries_bottom_right", ((3, 40), (1, 9), (5, 5))),
    case("queries_that_see_no_key", ((9, 4), (6, 6), (5, 0)), lse=True),
    case("two_heads_per_key_head", ((20, 20), (11, 11)), h=4, hk=2),
    case("window", ((50, 50), (6, 6), (20, 33)), window=9, lse=True),
    case("two_sided_window", ((50, 50), (6, 6)), causal=False, window=9),
    case("all_keys", ((20, 33), (6, 6)), causal=False),
    case("unused_tail", ((12, 12), (9, 9)), unused=5, lse=True),
    case("head_dim_of_gpt3_xl", ((40, 40), (25, 25)), d=128, scale=0.05),
    case("head_dim_of_gpt_j", ((20, 20), (9, 70)), h=2, hk=1, d=256),
    case("long_one_beside", ((20, 150), (9, 1100)), h=1, hk=1, d=64, lse=True),
)


def documents(inputs: Inputs) -> list[tuple[slice, slice]]:
    """The rows of q and of k that each document takes."""
    q, k = inputs["cu_seqlens_q"].tolist(), inputs["cu_seqlens_k"].tolist()
    return [(slice(q[i], q[i + 1]), slice(k[i], k[i + 1])) for i in range(len(q) - 1)]


def by_document(inputs: Inputs) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """out (s, h, d), lse (h, s) and p (1, h, sq, sk) of each document."""
    found: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for own_q, own_k in documents(inputs):
        q, k, v = (
            inputs[name][own].transpose(0, 1)[None]
            for name, own in (("q", own_q), ("k", own_k), ("v", own_k))
        )
        seen = band(q.shape[2], k.shape[2], inputs["causal"], inputs["window"])
        out, lse, p = attend(q, k, v, seen, inputs["scale"])
        for parts, part in zip(found, (out[0].transpose(0, 1), lse[0], p), strict=True):
            parts.append(part)
    return found


def low(**inputs: Any) -> Any:
    """Tokens behind the last document see no key."""
    q = inputs["q"]
    outs, lses, _ = by_document(inputs)
    unused = q.shape[0] - sum(len(out) for out in outs)
    out = torch.cat([*outs, q.new_zeros(unused, *q.shape[1:])])
    lse = torch.cat([*lses, q.new_full((q.shape[1], unused), float("-inf"))], 1)
    wide = torch.promote_types(lse.dtype, torch.float32)
    return (out, lse.to(wide)) if inputs["return_lse"] else out


def cancellation(inputs: Inputs, results: Results) -> dict[str, float]:
    """As for attention, over all documents."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    if q.numel() == 0 or k.numel() == 0:
        return {}
    group = q.shape[1] // k.shape[1]
    terms, exponents = 0.0, 0.0
    _, lses, ps = by_document(inputs)
    for (own_q, own_k), lse, p in zip(documents(inputs), lses, ps, strict=True):
        dout = results["outgoing_out"][own_q].transpose(0, 1)
        dp = dout @ v[own_k].repeat_interleave(group, 1).permute(1, 2, 0)
        terms = max(terms, worst(p[0] * dp))
        exponents = max(exponents, worst(lse) * worst(p[0].transpose(-1, -2) @ dout.abs()))
    scale = q.shape[-1] ** -0.5 if inputs["scale"] is None else inputs["scale"]
    largest_q, largest_k = worst(q), worst(k)
    return {
        "dq": scale * terms * largest_k,
        "dk": scale * terms * largest_q,
        "dv": exponents,
        "lse": scale * worst(q.abs().sum(-1)) * largest_k,
    }


def of_inputs(inputs: Inputs, i: int) -> Inputs:
    own_q, own_k = documents(inputs)[i]
    return inputs | {
        "q": inputs["q"][own_q],
        "k": inputs["k"][own_k],
        "v": inputs["v"][own_k],
        "cu_seqlens_q": torch.tensor([0, own_q.stop - own_q.start]).int(),
        "cu_seqlens_k": torch.tensor([0, own_k.stop - own_k.start]).int(),
        "max_seqlen_q": own_q.stop - own_q.start,
        "max_seqlen_k": own_k.stop - own_k.start,
    }


def of_result(inputs: Inputs, name: str, result: Tensor, i: int) -> Tensor | None:
    own_q, own_k = documents(inputs)[i]
    if name == "lse":
        return result[:, own_q]
    return result[own_k if name in ("dk", "dv") else own_q]


SPEC = OpSpec(
    op="varlen_attention",
    function=F.varlen_attention,
    low=low,
    outputs=("out", "lse"),
    gradients=("q", "k", "v"),
    cases=CASES,
    rows=Rows(
        ("prime_lengths", "window", "long_one_beside"),
        lambda inputs: len(inputs["cu_seqlens_q"]) - 1,
        of_inputs,
        of_result,
    ),
    stored={"varlen_attention_fwd": stored},
    cancellation=cancellation,
)


@pytest.mark.parametrize(("backend", "dtype", "case"), grid(SPEC))
def test_contract(backend: str, dtype: torch.dtype, case: Case) -> None:
    check_contract(SPEC, backend, dtype, case)
