"""The command line: each command once, its errors as one line, and life without its packages."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")

from typer.testing import CliRunner

from fastgpt import GPTConfig
from fastgpt.cli import app
from fastgpt.dispatch import TABLE
from fastgpt.info import EXAMPLES
from fastgpt.train import SavedRun

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
        (["demo", "--device", "nope"], "--device: expected cpu, cuda or cuda:N, got 'nope'"),
        (["demo", "--out", "README.md"], "--out: expected a folder, got README.md"),
        (["train", "--out", "README.md/model"], "--out: expected a folder, got README.md/model"),
        (["train", "--preset", "gpt5", "--text", "no"], "--preset: expected one of gpt1,"),
        (["train", "--config", "no.json"], "--config: no.json cannot be read (No such file"),
        (["train", "--config", "README.md"], "--config: README.md is no JSON of GPTConfig"),
        (["train", "--learning-rate", "nan", "--text", "no"], "learning_rate: expected a finite"),
        (["train", "--dtype", "int8", "--text", "no"], "--dtype: expected float32 or bfloat16"),
        (["train", "--preset", "gpt2", "--context", "2000"], "--context: expected at most n_pos"),
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


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, and the model of four steps on them."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text").mkdir()
    for index in range(12):
        text = f"the quick brown fox {index} jumps over it. " * 40
        (folder / "text" / f"{index}.txt").write_text(text)
    shape = GPTConfig(vocab_size=1, n_positions=32, n_layer=2, n_embd=32, n_head=2, window=8)
    (folder / "config.json").write_text(shape.to_json())
    code, output = invoke(
        "train", "--text", str(folder / "text"), "--config", str(folder / "config.json"),
        "--out", str(folder / "model"), "--device", "cpu", "--context", "32", "--batch", "2",
        "--vocab-size", "300", "--steps", "4", "--seed", "5", "--dtype", "bfloat16",
    )  # fmt: skip
    assert code == 0, output
    assert "held-out loss" in output
    return folder


@pytest.fixture
def model(run: Path, tmp_path: Path) -> Path:
    """A copy of that model."""
    return Path(shutil.copytree(run / "model", tmp_path / "model"))


def resume(model: Path, *arguments: str) -> tuple[int, str]:
    return invoke("train", "--resume", "--out", str(model), "--device", "cpu", *arguments)


def test_resume_goes_on_with_the_options_of_the_run(run: Path, model: Path) -> None:
    before = SavedRun.load(model)
    code, output = resume(model, "--steps", "6", "--batch", "3")
    assert code == 0, output
    assert f"{run / 'text'}: " in output
    assert "step     6" in output
    assert "step     4" not in output
    after = SavedRun.load(model)
    assert after.options == dataclasses.replace(before.options, steps=6, batch=3)
    assert (after.options.seed, after.options.dtype) == (5, torch.bfloat16)
    assert after.texts == before.texts


def test_resume_reads_the_split_of_the_run(
    run: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []

    def read_corpus(*arguments: Any, seed: int, **options: Any) -> Any:
        seeds.append(seed)
        raise ValueError("read")

    monkeypatch.setattr("fastgpt.text.read_corpus", read_corpus)
    assert resume(model, "--steps", "6")[0] == 1
    assert resume(model, "--steps", "6", "--seed", "5")[0] == 1
    assert seeds == [5, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "gpt2"], "--preset: expected none with --resume"),
        (["--config", "no.json", "--vocab-size", "300"], "--config, --vocab-size: expected none"),
        (["--seed", "3", "--steps", "6"], "--seed: expected 5 as the run in"),
        (["--steps", "2"], "--steps: expected more than the 4 that the run in"),
        ([], "--steps: expected more than the 4 that the run in"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_resume_refuses_what_the_run_has_settled(
    model: Path, arguments: list[str], message: str
) -> None:
    code, output = resume(model, *arguments)
    assert code == 1
    assert message in output
    assert len(output.splitlines()) == 1


@pytest.mark.parametrize("name", ["trainer.pt", "tokenizer.json", "history.json"])
def test_resume_of_a_broken_run_is_one_line(model: Path, name: str) -> None:
    (model / name).write_bytes(b"")
    code, output = resume(model, "--steps", "6")
    assert code == 1
    assert f"{model / name}: expected" in output
    assert len(output.splitlines()) == 1


def test_generate(model: Path) -> None:
    arguments = ["generate", "--model", str(model), "--device", "cpu", "--max-new-tokens", "8"]
    code, greedy = invoke(*arguments, "--prompt", "the quick", "--greedy")
    assert code == 0, greedy
    assert greedy.startswith("the quick")
    code, output = invoke(*arguments, "--prompt", "the quick brown " * 20)
    assert code == 1
    assert "expected fewer than n_positions = 32 tokens" in output
    for option in ("--temperature", "--top-k", "--top-p"):
        code, output = invoke(*arguments, "--prompt", "the quick", option, "0")
        assert code == 1
        assert output.startswith(f"fastgpt: {option[2:].replace('-', '_')}: expected")


def test_demo_takes_several_texts_after_one_option(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("too small")
    code, output = invoke(
        "demo", "--text", str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), "--device", "cpu"
    )
    assert code == 1
    assert "b.txt" in "".join(output.split())


def test_demo_with_too_little_text_advises_what_it_can(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("too small")
    code, output = invoke("demo", "--text", str(tmp_path / "a.txt"), "--device", "cpu")
    assert code == 1
    assert output.rstrip().endswith("; add text")
