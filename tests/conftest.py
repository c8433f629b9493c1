"""Shared by all tests: what runs here, at the head of the report, and a clean slate for each."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Before fastgpt is imported: without a GPU the Triton kernels run under Triton's interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fastgpt import dispatch
from fastgpt.backends import native
from tests.contract import device_of
from tests.emulator import backend as emulator

emulator.add_to_table()  # before the tests are collected, which run over every cell of it


def pytest_report_header() -> list[str]:
    lines = [f"torch {torch.__version__}, {torch.get_num_threads()} threads"]
    for name in dispatch.BACKENDS:
        reason = dispatch.refusal("softmax", name, device_of(name), torch.float32)
        runs = f"runs ({native.cpu_isa() or 'ISA unknown'})" if name == "cpu" else "runs"
        lines.append(f"fastgpt {name}: {reason or runs}")
    lines.append(f"fastgpt {emulator.NAME}: {emulator.missing() or 'runs'}")
    return lines


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first, or one worker would end alone with it."""
    items.sort(key=lambda item: item.path.name != "test_triton_compile.py")


@pytest.fixture(autouse=True)
def _clean_slate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Seeded, and without a backend that the environment or an earlier test forced."""
    monkeypatch.delenv("FASTGPT_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "_forced", None)
    torch.manual_seed(0)
    yield
    assert dispatch._forced is None, "a test left a backend forced"
