"""What the compiler made of the CUDA kernels: no spills, and the instructions they are written for.

The evidence on them that needs no GPU: it is read off the op library, where nvcc built it.
"""

from __future__ import annotations

import os
import re
from collections import Counter

import pytest

from fastgpt.backends import native
from tests import cuda_resources, warpgroup_products
from tests.cuda_resources import Kernel

if (MISSING := cuda_resources.missing()) is not None:
    pytest.skip(MISSING, allow_module_level=True)

MAY_SPILL = {
    r"attention_fwd_kernel<\w+, 256, \w+>": "256 columns fill the registers",
    r"attention_fwd_kernel<b?f16, 128, false>": "on sm_90, which runs attention_fwd_sm90",
    r"attention_bwd_(dq|dkv)_kernel<\w+, \w+, 256, \w+>": "256 columns fill the registers",
    r"attention_bwd_dbias_kernel<\w+, f32, (64|128|256)>": "float32 products, off the common path",
}
"""A pattern of names -> why. It is for float32 attention and heads of more than 128: an entry for
anything else is work that is left.
"""

# The arguments of a row kernel that moves 16 bytes at a time: four float32, eight of 16 bits.
PACKS = r"<(f32, (f32, )?4|\w+, (\w+, )?8)\b.*>"
MATRICES = "HMMA LDSM LDGSTS.128"
WARPGROUPS = "HGMMA LDGSTS.128"

CLAIMS: dict[str, dict[str, str]] = {
    "attention_fwd": {r"attention_fwd_kernel<b?f16, .*>": MATRICES},
    "attention_bwd": {r"attention_bwd_delta_kernel<.*>": "LDG SHFL"},
    "attention_bwd_dbias": {r"attention_bwd_dbias_kernel<\w+, b?f16, .*>": MATRICES},
    "attention_bwd_dkv": {r"attention_bwd_dkv_kernel<\w+, b?f16, .*>": MATRICES},
    "attention_bwd_dq": {r"attention_bwd_dq_kernel<\w+, b?f16, .*>": MATRICES},
    "attention_fwd_sm90": {
        r"attention_fwd_sm90_kernel<\w+, (64|80|96|128), \d+>": WARPGROUPS + " LDSM",
        r"attention_fwd_sm90_kernel<\w+, 256, \d+>": WARPGROUPS,
    },
    "attention_bwd_dkv_sm90": {"attention_bwd_dkv_sm90_kernel<.*>": WARPGROUPS},
    "attention_bwd_dq_sm90": {
        r"attention_bwd_dq_sm90_kernel<\w+, (64|256)>": WARPGROUPS,
        r"attention_bwd_dq_sm90_kernel<\w+, (80|96|128)>": WARPGROUPS + " LDSM",
    },
    "bias_gelu": {"bias_gelu_(fwd|bwd)_kernel" + PACKS: "LDG.128 STG.128"},
    "cross_entropy": {
        "absorb_kernel" + PACKS: "LDG.128",
        "cross_entropy_bwd_kernel" + PACKS: "LDG.128 STG.128",
    },
    "decode_attention": {
        "decode_attention_kernel<b?f16, .*>": MATRICES,
        "decode_attention_kernel<f32, .*>": "LDGSTS.128",
        "decode_attention_merge_kernel<.*>": "LDG.128",
    },
    "layer_norm": {
        "layer_norm_(fwd|bwd|bwd_long)_kernel" + PACKS: "LDG.128 STG.128",
        "layer_norm_bwd_kernel<b?f16, b?f16, 4>": "LDG.64 STG.64",
    },
    "linear_cross_entropy": {r"add_scaled_kernel<\w+, 4>": "LDG.128"},
    "masked_softmax": {"masked_softmax_(fwd|bwd)_kernel" + PACKS: "LDG.128 STG.128"},
    "softmax": {
        "softmax_fwd_kernel" + PACKS: "LDG.128 STG.128",
        # 16 bytes of float32 become 8 of a narrower gradient
        "softmax_bwd_kernel" + PACKS: "LDG.128 STG.128|STG.64",
    },
}
"""source -> kernels -> what each of them must hold: copies of 16 bytes (LDG, STG), products on the
tensor cores (HMMA; HGMMA of warpgroups), ldmatrix (LDSM), cp.async (LDGSTS). `|` separates
alternatives.
"""

PRODUCT_LOOPS = {
    "attention_fwd_sm90_kernel": lambda d, keys: {
        "shared" if d == 256 else "invariant": d // 16,
        "carried": keys // 16 * (2 if d == 256 else 1),
        "waits": 2,
    },
    "attention_bwd_dkv_sm90_kernel": lambda d, queries, dk, dv: {
        "shared": (1 + dk) * d // 16,
        "fresh": (dk + dv) * queries // 16 * (2 if d == 256 else 1),
        "waits": 2 + dk,
    },
    "attention_bwd_dq_sm90_kernel": lambda d: {
        "shared" if d in (64, 256) else "invariant": 2 * d // 16,
        "fresh": 6 if d == 256 else 4,
        "waits": 3 if d == 256 else 2,
    },
}
"""Kernel for warpgroups -> of what its name says behind the type (head_dim, rows that it takes at
once, whether it computes dk and dv) -> where the products of its loop take their first factors, and
the waits in the loop.
"""

SOURCES = [  # that have kernels
    path.stem
    for path in sorted((cuda_resources.ROOT / "csrc/cuda").glob("*.cu"))
    if "__global__" in path.read_text()
]


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    return cuda_resources.kernels()


@pytest.fixture(scope="module")
def instructions(kernels: list[Kernel]) -> dict[str, dict[str, Counter[str]]]:
    """architecture -> symbol -> what the kernel holds: of the newest, or of all.

    All of them take minutes: with FASTGPT_EVERY_ARCH=1.
    """
    archs = {kernel.arch for kernel in kernels}
    if os.environ.get("FASTGPT_EVERY_ARCH") != "1":
        newest = max(int(re.sub(r"\D", "", arch)) for arch in archs)
        archs = {arch for arch in archs if str(newest) in arch}
    return {arch: cuda_resources.instructions(arch) for arch in archs}


@pytest.fixture(scope="module")
def read(
    kernels: list[Kernel], instructions: dict[str, dict[str, Counter[str]]]
) -> list[tuple[Kernel, Counter[str]]]:
    """Every kernel whose code was read, and what it holds."""
    return [(k, instructions[k.arch][k.symbol]) for k in kernels if k.arch in instructions]


def test_every_source_is_there_for_every_architecture(kernels: list[Kernel]) -> None:
    found = {(k.source, k.arch) for k in kernels if k.source}
    missing = {
        (source, arch)
        for source in SOURCES
        for arch in native.gpu_architectures()
        if "_sm" not in source and (source, arch) not in found
    }
    assert not missing
    assert {source for source, _ in found} == set(SOURCES)


def test_only_what_is_listed_spills(kernels: list[Kernel]) -> None:
    spilling = [k for k in kernels if k.spills]
    allowed = [k for k in spilling if any(re.fullmatch(name, k.name) for name in MAY_SPILL)]
    new = [k for k in spilling if k not in allowed]
    assert not new, "registers spill:\n" + cuda_resources.listing(new)
    for name in MAY_SPILL:
        assert any(re.fullmatch(name, k.name) for k in allowed), f"{name} spills no longer"


def holds(found: Counter[str], wanted: str) -> bool:
    """LDG.128 is there as LDG.E.128.CONSTANT, say."""
    return any(
        set(one.split(".")) <= set(code.split(".")) for one in wanted.split("|") for code in found
    )


@pytest.mark.parametrize("source", SOURCES)
def test_instructions_are_those_that_are_claimed(
    read: list[tuple[Kernel, Counter[str]]], source: str
) -> None:
    assert source in CLAIMS, f"{source}.cu claims nothing"
    for name, wanted in CLAIMS[source].items():
        claimed = [(k, f) for k, f in read if k.source == source and re.fullmatch(name, k.name)]
        assert claimed, f"{source}.cu has no kernel {name}"
        for kernel, found in claimed:
            lacking = [one for one in wanted.split() if not holds(found, one)]
            assert not lacking, f"{kernel.name} for {kernel.arch} lacks {lacking}"


def test_factors_are_not_overwritten_and_products_overlap(kernels: list[Kernel]) -> None:
    named = {k.symbol: k for k in kernels if k.family in PRODUCT_LOOPS}
    assert {k.family for k in named.values()} == set(PRODUCT_LOOPS)
    found = warpgroup_products.product_loops("sm_90a")
    assert found.keys() == named.keys()
    for symbol, kernel in named.items():
        said = re.findall(r", (\d+|true|false)", kernel.name)
        sizes = [int(one) if one.isdigit() else one == "true" for one in said]
        wanted = PRODUCT_LOOPS[kernel.family](*sizes)
        assert found[symbol] == wanted, kernel.name


def test_an_overwritten_factor_is_seen() -> None:
    product = "HGMMA.64x64x16.F32.BF16 R24, R{}, gdesc[UR8], R24"
    loop = [
        product.format(120),
        product.format(124),
        "@!P0 FADD R60, R24, -R18.reuse",
        "F2FP.BF16.F32.PACK_AB R130, R57, R60",
        product.format(128),
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24",
        "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    ]
    assert warpgroup_products.kinds(loop) == {"invariant": 2, "fresh": 1, "shared": 1, "waits": 1}
    loop[3] = loop[3].replace("R130", "R125")
    assert warpgroup_products.kinds(loop)["carried"] == 1


def test_local_memory_is_counted_where_the_code_uses_it(
    read: list[tuple[Kernel, Counter[str]]],
) -> None:
    """Spills and local arrays alike: no kernel goes there that is said to spill nothing."""
    for kernel, found in read:
        assert bool(kernel.spills) >= holds(found, "STL|LDL"), kernel.name


def test_table_of_the_kernels(kernels: list[Kernel]) -> None:
    page = cuda_resources.PAGE.read_text()
    head = re.search(r"\| kernel, by nvcc (\S+) (.*)", page)
    assert head, f"{cuda_resources.PAGE.name} has no table of the CUDA kernels"
    written = {head[1], *re.findall(r"registers (\w+)", head[2])}
    built = {cuda_resources.compiler(), *native.gpu_architectures()}
    if written != built:
        pytest.skip(f"the table is of {sorted(written)}, the op library of {sorted(built)}")
    assert page == cuda_resources.updated(page, kernels), "make readme brings it up to date"
