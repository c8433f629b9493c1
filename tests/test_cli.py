"""The command line: each command once, its errors as one line, and life without its packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")

from typer.testing import CliRunner

from fastgpt.cli import app
from fastgpt.dispatch import TABLE
from fastgpt.info import EXAMPLES

ROOT = Path(__file__).resolve().parent.parent


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_info() -> None:
    code, output = invoke("info")
    assert code == 0
    for expected in ("fastgpt", "torch", "op library", "triton", "| op | "):
        assert expected in output
    for op in TABLE:
        assert f"`{op}`" in output


def test_info_says_why_there_is_no_library() -> None:
    result = python("-m", "fastgpt", "info", FASTGPT_NATIVE="0")
    assert result.returncode == 0, result.stderr
    assert "op library" in result.stdout
    assert "FASTGPT_NATIVE=0" in result.stdout
    assert "reference backend" in result.stdout


WITHOUT_TYPER = """
import sys
sys.modules["typer"] = None
sys.argv = ["fastgpt", *{arguments!r}]
from fastgpt.__main__ import main
main()
"""


def test_info_without_typer() -> None:
    result = python("-c", WITHOUT_TYPER.format(arguments=["info"]))
    assert result.returncode == 0, result.stderr
    assert "op library" in result.stdout


def test_other_commands_without_typer() -> None:
    result = python("-c", WITHOUT_TYPER.format(arguments=["demo"]))
    assert result.returncode == 1
    assert result.stderr == "fastgpt: typer is missing; pip install 'fastgpt[cli]'\n"


SHAPES = {
    "b,h,s,d": "2,4,64,16",
    "t,h,d": "64,4,16",
    "b,h,s_max,d": "2,4,64,16",
    "...,n": "8,64",
    "...,sq,sk": "2,8,8",
    "n,v": "8,100",
    "n,c,v": "8,16,100",
}


@pytest.mark.parametrize("op", EXAMPLES)
def test_explain(op: str) -> None:
    code, output = invoke("explain", op, "--shape", SHAPES[EXAMPLES[op][0]])
    assert code == 0, output
    ran = "attention" if op == "scaled_dot_product_attention" else op
    assert output.startswith(f"{ran}: "), output
    assert "not cuda: " in output


def test_explain_a_device_that_is_not_here() -> None:
    code, output = invoke(
        "explain", "attention", "--shape", "2,12,1024,64", "--dtype", "bfloat16",
        "--device", "cuda", "--window", "256",
    )  # fmt: skip
    assert code == 0, output
    assert output.startswith("attention: ")
    assert "not cpu: " in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "atention", "--shape", "1"], "op: expected one of attention,"),
        (["explain", "attention", "--shape", "1,2,3"], "--shape: expected b,h,s,d for attention"),
        (["explain", "attention", "--shape", "a,b"], "--shape: expected numbers with commas"),
        (["explain", "softmax", "--shape", "4,4", "--dtype", "int"], "--dtype: expected"),
        (["explain", "attention", "--shape", "1,1,8,8", "--window", "0"], "window: expected"),
        (
            ["explain", "softmax", "--shape", "4,4", "--window", "2"],
            "--window: softmax has no such",
        ),
        (["explain", "layer_norm", "--shape", "4,4", "--no-causal"], "--causal: layer_norm has no"),
        (["demo", "--text", "no/such/file"], "there is no file or folder no/such/file"),
        (["demo", "--device", "cuda:99"], "--device"),
        (["train", "--preset", "gpt5", "--text", "README.md"], "name: expected one of gpt1,"),
        (["train", "--preset", "gpt2", "--config", "x.json"], "expected one of them, got both"),
        (["generate", "--model", "no/such/folder"], "no/such/folder"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_errors_are_one_line(arguments: list[str], message: str) -> None:
    os.chdir(ROOT)
    code, output = invoke(*arguments)
    assert code == 1
    last = output.strip().splitlines()[-1]
    assert "Traceback" not in output
    assert message in " ".join(output.split()), last


def test_train_generate_resume(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for index in range(12):
        (text / f"{index}.txt").write_text(f"the quick brown fox {index} jumps over it. " * 40)
    shape = tmp_path / "config.json"
    shape.write_text(
        json.dumps(
            {
                "vocab_size": 1,
                "n_positions": 32,
                "n_layer": 2,
                "n_embd": 32,
                "n_head": 2,
                "window": 8,
            }
        )
    )
    model = str(tmp_path / "model")
    sizes = ["--config", str(shape), "--context", "32", "--batch", "2", "--vocab-size", "300"]
    common = ["train", "--text", str(text), "--out", model, "--device", "cpu", *sizes]
    code, output = invoke(*common, "--steps", "4")
    assert code == 0, output
    assert "held-out loss" in output
    code, output = invoke(*common, "--steps", "6", "--resume")
    assert code == 0, output
    assert "step     6" in output
    assert "step     4" not in output
    arguments = ["generate", "--model", model, "--device", "cpu", "--max-new-tokens", "8"]
    code, greedy = invoke(*arguments, "--prompt", "the quick", "--greedy")
    assert code == 0, greedy
    assert greedy.startswith("the quick")
    code, output = invoke(*arguments, "--prompt", "the quick brown " * 20)
    assert code == 1
    assert "expected fewer than n_positions = 32 tokens" in output


def test_demo_takes_several_texts_after_one_option(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("too small")
    code, output = invoke(
        "demo", "--text", str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), "--device", "cpu"
    )
    assert code == 1
    assert "b.txt" in "".join(output.split())
