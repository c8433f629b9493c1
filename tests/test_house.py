"""The rules of the house (CONTRIBUTING.md), read off the tree and off the built library."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastgpt import dispatch
from fastgpt.backends import native

ROOT = Path(__file__).resolve().parents[1]
CODE = (".py", ".h", ".cpp", ".cu", ".cuh", ".txt", ".toml", ".sh", ".md", "")
OPS = list(dispatch.TABLE)
LIBRARY = native.OP_LIBRARY


def tracked() -> list[Path]:
    """The files of the repository: what git knows or would not ignore."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def sources(*folders: str) -> Iterator[tuple[str, str]]:
    """(path from the root, text) of every code file in `folders`."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix in CODE[:5]:
                yield path.relative_to(ROOT).as_posix(), path.read_text()


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)


def matches(pattern: str, *folders: str) -> dict[str, list[str]]:
    """file -> what `pattern` finds in its code, comments left out."""
    found = {}
    for path, text in sources(*folders):
        hits = [m.group(0) for m in re.finditer(pattern, without_comments(text))]
        if hits:
            found[path] = hits
    return found


def outside(found: dict[str, list[str]], *allowed: str) -> dict[str, list[str]]:
    return {path: hits for path, hits in found.items() if not path.startswith(allowed)}


# --- rooms --------------------------------------------------------------------------------------


def test_top_level_entries() -> None:
    allowed = {
        "csrc", "fastgpt", "benchmarks", "tests", "examples", ".ci", "assets",
        "setup.py", "CMakeLists.txt", "pyproject.toml", "Makefile", "README.md", "LICENSE",
        "CONTRIBUTING.md", "CHANGELOG.md", ".clang-format", ".gitignore", "MANIFEST.in",
    }  # fmt: skip
    assert {path.relative_to(ROOT).parts[0] for path in tracked()} <= allowed


def test_rooms_of_csrc() -> None:
    rooms = {path.split("/")[1] for path, _ in sources("csrc")}
    assert rooms == {"ops", "common", "cpu", "cuda", "torch"}


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_file_in_every_room(op: str) -> None:
    module = dispatch.MODULES.get(op, op)
    row = dispatch.TABLE[op]
    rooms = {
        f"fastgpt/ops/{module}.py",
        f"fastgpt/backends/reference/{module}.py",
        f"tests/ops/test_{op}.py",
        f"csrc/torch/{module}.cpp",
    }
    if "triton" in row:
        rooms.add(f"fastgpt/backends/triton/{module}.py")
    assert not [path for path in sorted(rooms) if not (ROOT / path).is_file()]
    assert list((ROOT / "csrc/cpu").glob(f"{module}*.cpp"))
    assert "cuda" not in row or list((ROOT / "csrc/cuda").glob(f"{module}*.cu"))
    assert f"def {op}(" in (ROOT / f"fastgpt/ops/{module}.py").read_text()


def test_no_file_of_an_op_that_the_table_lacks() -> None:
    known = {dispatch.MODULES.get(op, op) for op in OPS} | {"scaled_dot_product_attention"}
    for folder in ("fastgpt/ops", "fastgpt/backends/reference", "fastgpt/backends/triton"):
        here = {path.stem for path in (ROOT / folder).glob("*.py") if path.stem[0] != "_"}
        assert here <= known


def test_no_file_over_500_lines() -> None:
    long = {
        path.relative_to(ROOT).as_posix(): lines
        for path in tracked()
        if path.suffix in CODE and (lines := len(path.read_text().splitlines())) > 500
    }
    assert not {path for path in long if path not in ("LICENSE", "CHANGELOG.md")}


def test_setup_is_short() -> None:
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 120


# --- who may include, launch, import ------------------------------------------------------------


def test_torch_headers_only_in_csrc_torch() -> None:
    headers = matches(r'#include\s*[<"](torch|ATen|c10|pybind11)/[^>"]*', "csrc")
    assert headers
    assert not outside(headers, "csrc/torch/")


def test_torch_headers_are_of_the_stable_abi() -> None:
    stable = r"(torch/csrc/stable/|torch/headeronly/|torch/csrc/inductor/aoti_torch/)"
    for path, hits in matches(r'#include\s*[<"](torch|ATen|c10)/[^>"]*', "csrc").items():
        assert not [hit for hit in hits if not re.search(stable, hit)], path


def test_cuda_headers_only_in_csrc_cuda() -> None:
    headers = matches(r'#include\s*[<"](cuda|cub|thrust|cooperative_groups)[^>"]*', "csrc")
    assert not outside(headers, "csrc/cuda/")


def test_common_and_ops_include_no_backend() -> None:
    included = matches(r'#include\s*"csrc/(cpu|cuda|torch)/[^"]*', "csrc/common", "csrc/ops")
    assert not included
    assert not matches(r'#include\s*"csrc/(cuda|torch)/[^"]*', "csrc/cpu")
    assert not matches(r'#include\s*"csrc/(cpu|torch)/[^"]*', "csrc/cuda")


def test_inline_ptx_only_in_four_files() -> None:
    assembly = matches(r"\basm\s*(volatile)?\s*\(", "csrc")
    allowed = [f"csrc/cuda/{name}.cuh" for name in ("copy", "mma", "reduce", "wgmma")]
    assert not outside(assembly, *allowed)


def test_one_file_launches() -> None:
    launches = matches(r"<<<|cudaLaunchKernel", "csrc")
    assert set(launches) == {"csrc/cuda/launch.cuh"}


def test_shared_memory_only_by_the_macros_of_arch_h() -> None:
    """For a CPU compiler, which the emulator is built with, __shared__ means nothing."""
    assert set(matches(r"\b__shared__\b", "csrc")) == {"csrc/cuda/arch.h"}


def test_the_emulator_is_known_where_it_must_be() -> None:
    known = matches(r"\bFASTGPT_EMULATED\b|\bemulator::", "csrc")
    primitives = {f"csrc/cuda/{name}.cuh" for name in ("copy", "launch", "mma", "reduce", "wgmma")}
    bindings = {"csrc/torch/common.h", "csrc/torch/cuda_stream.h"}
    assert set(known) == {"csrc/cuda/arch.h", *primitives, *bindings}
    assert "emulat" not in "".join(text.lower() for _, text in sources("fastgpt"))


def test_no_atomics_on_floats() -> None:
    assert not matches(r"\batomicAdd\s*\(|std::atomic<float>", "csrc")


def test_no_stl_templates_in_cpu_kernels() -> None:
    """Their instances are weak symbols: the linker would merge levels into one."""
    allowed = r"std::(memcpy|memset|memmove|memcmp|u?int\d+_t|size_t|ptrdiff_t|align_val_t)\b"
    once = ("isa.cpp", "isa_level.cpp", "pages.cpp")  # compiled for the baseline alone
    exempt = tuple(f"csrc/cpu/{name}" for name in once)
    for path, hits in outside(
        matches(r"std::\w+", "csrc/cpu", "csrc/common", "csrc/ops"), *exempt
    ).items():
        assert not [hit for hit in hits if not re.fullmatch(allowed, hit)], path
    headers = matches(r"#include\s*<[^>]*>", "csrc/cpu", "csrc/common", "csrc/ops")
    plain = {"cstdint", "cstddef", "cstring", "cmath", "immintrin.h", "new", "type_traits"}
    for path, hits in outside(headers, *exempt, "csrc/cpu/parallel.h").items():
        assert {hit.split("<")[1][:-1] for hit in hits} <= plain, path


def test_no_exception_in_kernels() -> None:
    thrown = matches(r"\b(throw|try|catch)\b", "csrc/cpu", "csrc/cuda", "csrc/common", "csrc/ops")
    assert not outside(thrown, "csrc/cuda/launch.cuh")  # a failed launch, on the caller's thread


def test_no_fast_math() -> None:
    flag = "-ffast" + "-math"
    for path in tracked():
        if path.suffix in CODE and path.name not in ("CONTRIBUTING.md", "test_house.py"):
            text = path.read_text()
            assert flag not in text, path
            assert "-Ofast" not in text, path


def test_optional_packages_are_imported_in_their_rooms() -> None:
    optional = ("triton", "transformers", "kernels", "tokenizers", "matplotlib", "rich", "typer")
    imports = rf"(?m)^\s*(?:import|from) ({'|'.join(optional)})\b"
    rooms = {
        "kernels": ("fastgpt/integrate/kernels_hub/",),
        "triton": ("fastgpt/backends/triton/",),
        "transformers": ("fastgpt/integrate/hugging_face/",),
    }
    for path, text in sources("fastgpt"):
        for found in re.finditer(imports, text):
            name = found.group(1)
            assert path.startswith(rooms.get(name, ("fastgpt/",))), f"{path} imports {name}"


def test_backends_do_not_import_one_another() -> None:
    for name in ("reference", "triton"):
        for path, text in sources(f"fastgpt/backends/{name}"):
            others = re.findall(r"(?m)^\s*(?:from|import) fastgpt\.backends\.(\w+)", text)
            assert set(others) <= {name}, path
            assert "dispatch" not in re.findall(r"fastgpt(?:\.| import )(\w+)", text), path


# --- one place for each decision ------------------------------------------------------------------


def test_every_schema_is_defined_once_and_implemented() -> None:
    defined = Counter(
        name for _, text in sources("fastgpt") for name in re.findall(r'\bdefine\(\s*"(\w+)"', text)
    )
    assert set(defined.values()) == {1}
    implemented = [
        name for _, text in sources("csrc") for name in re.findall(r'm\.impl\(\s*"(\w+)"', text)
    ]
    assert set(implemented) == set(defined)
    assert not matches(r"TORCH_LIBRARY(_FRAGMENT)?\(", "csrc")
    assert list(matches(r"\bm\.def\(", "csrc")) == ["csrc/torch/module.cpp"]  # pybind11's


def test_cmake_is_the_only_list_of_sources_and_flags() -> None:
    listed = re.findall(r"csrc/[\w/]+\.(?:cpp|cu)\b", (ROOT / "CMakeLists.txt").read_text())
    compiled = {path for path, _ in sources("csrc") if path.endswith((".cpp", ".cu"))}
    assert set(listed) == compiled
    assert "-march" not in (ROOT / "setup.py").read_text()


def test_the_thread_sanitizer_sees_every_entry_point() -> None:
    table = (ROOT / "csrc/cpu/isa.cpp").read_text()
    entry = re.findall(r"(?m)^\w+ (\w+)\(const \w+& p\) \{", table)
    called = {hit for hits in matches(r"\bcpu::\w+\(", "tests/threads").values() for hit in hits}
    assert entry
    assert called == {f"cpu::{name}(" for name in entry}


def test_no_open_ends() -> None:
    mark = re.compile(r"\b(TO" + "DO|FIX" + "ME|XX" + r"X)\b")
    for path in tracked():
        if path.suffix in CODE:
            assert not mark.search(path.read_text()), path


def test_skips_give_their_reason() -> None:
    for path, text in sources("tests"):
        assert not re.search(r"pytest\.skip\(\s*\)|mark\.skip\b(?!if)", text), path


# --- the built library ----------------------------------------------------------------------------

built = pytest.mark.skipif(native.MISSING is not None, reason=str(native.MISSING))


def disassembled() -> Iterator[tuple[str, str]]:
    """(mangled name, instructions) of every function of the library."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    done = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(LIBRARY)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    parts = re.split(r"(?m)^[0-9a-f]+ <([^>]+)>:$", done.stdout)[1:]
    yield from zip(parts[::2], parts[1::2], strict=True)


@built
def test_each_level_keeps_its_instructions_to_itself() -> None:
    """AVX only in the namespaces of the levels that have it, so no symbol is shared with less."""
    seen = Counter()
    for name, body in disassembled():
        level = re.search(r"7fastgpt\d+(baseline|v3|v4_bf16|v4)", name)
        level = level.group(1) if level else "no level"
        seen[level] += 1
        if level not in ("v4", "v4_bf16"):
            assert "%zmm" not in body, f"{name} has AVX-512 outside of v4"
            assert "%k1" not in body, f"{name} has AVX-512 masks outside of v4"
        if level not in ("v3", "v4", "v4_bf16"):
            assert "%ymm" not in body, f"{name} has AVX outside of v3"
            assert "vfmadd" not in body, f"{name} has FMA outside of v3"
        if level != "v4_bf16":
            assert "vdpbf16ps" not in body, f"{name} has AVX512-BF16 outside of v4_bf16"
    if seen["v4"]:
        assert all(seen[level] > 20 for level in ("baseline", "v3", "v4", "v4_bf16"))


@built
def test_no_weak_symbol_of_ours() -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    done = subprocess.run(
        ["nm", "-C", "--defined-only", str(LIBRARY)], capture_output=True, text=True, check=True
    )
    weak = [
        line
        for line in done.stdout.splitlines()
        if re.match(r"\w+ [WVu] (non-virtual )?fastgpt", line)
    ]
    assert not weak


@built
def test_the_library_is_free_of_python() -> None:
    done = subprocess.run(["nm", "-D", "-u", str(LIBRARY)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip("nm is not installed")
    assert not re.search(r" U (_?Py[A-Z_])", done.stdout)
    assert not re.search(r" U \S*(N2at|N3c10)\S*", done.stdout), "more than the stable ABI"
