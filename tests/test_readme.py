"""The README tells the truth: its matrix is the table's, its Python runs."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from fastgpt import GPTConfig
from fastgpt.dispatch import support_matrix

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MATRIX = re.compile(
    r"(<!-- support matrix: begin [^\n]*-->\n).*?(<!-- support matrix: end -->)", re.S
)
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


def test_support_matrix() -> None:
    text = README.read_text()
    current = MATRIX.sub(lambda match: f"{match[1]}{support_matrix()}\n{match[2]}", text)
    if os.environ.get("FASTGPT_WRITE_README") == "1":
        README.write_text(current)
    else:
        assert text == current, "make readme brings it up to date"


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{len(block)}_characters")
def test_python_of_the_readme(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    smaller = {"n_layer": 2, "n_embd": 48, "n_head": 4, "head_dim": None}
    preset = GPTConfig.preset
    monkeypatch.setattr(GPTConfig, "preset", lambda name: preset(name, **smaller))
    exec(compile(block, str(README), "exec"), {})
