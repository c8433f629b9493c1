"""Text to tokens: which files to read, the split, the byte-level BPE, batches for training."""

from __future__ import annotations

import os
import random
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"

_LIBRARY_SUFFIXES = {".py", ".txt", ".rst", ".md"}
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}
_SKIPPED_PACKAGES = {"encodings"}  # tables of code points, not text
_FILES_TO_SPLIT_BY = 10


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents held out, and where they come from."""

    train: list[str]
    held_out: list[str]
    source: str
    skipped: int = 0
    """Files of a folder that are not UTF-8 text."""

    def describe(self) -> str:
        """One line: the source, the sizes in MB and the numbers of documents."""
        sizes = [sum(len(t.encode()) for t in texts) / 1e6 for texts in (self.train, self.held_out)]
        line = (
            f"{self.source}: {sizes[0]:.1f} MB in {len(self.train)} texts to train on, "
            f"{sizes[1]:.1f} MB in {len(self.held_out)} held out"
        )
        return line + (
            f" ({self.skipped} files that are not UTF-8 skipped)" if self.skipped else ""
        )


def library_files() -> list[Path]:
    """The sources and docs of the running Python's standard library, tests left out."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in _walk(root, _SKIPPED_FOLDERS | _SKIPPED_PACKAGES)
        if path.suffix in _LIBRARY_SUFFIXES and path.stat().st_size > 0
    ]
    if not files:
        raise ValueError(f"{root} holds no library text; name your own files with --text PATH")
    return files


def read_corpus(
    paths: Sequence[Path] = (), *, limit: int = 8_000_000, held_out: float = 0.06, seed: int = 0
) -> Corpus:
    """Read `paths` (files or folders; none: Python's own library) and split off held-out text.

    At most `limit` bytes are read, chosen file by file in an order drawn from `seed`. The split is
    by file; with fewer than ten files the tail of each file is held out instead. A path that is
    missing, empty or not UTF-8 raises ValueError; files in a folder that are not UTF-8 are skipped.
    """
    if paths:
        documents, skipped = _read_named(paths)
        source = ", ".join(str(p) for p in paths)
    else:
        documents, skipped = _read_all(library_files())
        source = "the Python library's own text"
    random.Random(seed).shuffle(documents)
    documents = list(_take(documents, limit))
    if len(documents) < _FILES_TO_SPLIT_BY:
        cuts = [max(1, int(len(text) * (1 - held_out))) for text in documents]
        train = [text[:cut] for text, cut in zip(documents, cuts, strict=True)]
        rest = [text[cut:] for text, cut in zip(documents, cuts, strict=True) if text[cut:]]
    else:
        count = max(1, round(len(documents) * held_out))
        train, rest = documents[count:], documents[:count]
    return Corpus(train, rest, source, skipped)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Train a byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2) of `vocab_size` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(folder: Path, vocab_size: int) -> Any:
    """The tokenizer that lies beside a model of so many tokens.

    Raises:
        ValueError: the folder has none, or it does not serve: it lacks the end-of-text token, or
            has more tokens than the model.
    """
    from tokenizers import Tokenizer

    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise ValueError(f"{folder}: expected a tokenizer in {TOKENIZER_FILE}, found none")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no narrower one
        raise ValueError(f"{path}: expected a tokenizer, got: {error}") from None
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise ValueError(f"{path}: expected a tokenizer with the token {END_OF_TEXT}, found none")
    if (size := tokenizer.get_vocab_size()) > vocab_size:
        raise ValueError(
            f"{path}: expected at most the model's vocab_size = {vocab_size} tokens, got {size}"
        )
    return tokenizer


def encode(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """All texts in one row of token ids (n,), each closed by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    pieces = [
        torch.tensor([*encoding.ids, end], dtype=torch.int32)
        for encoding in tokenizer.encode_batch(list(texts))
    ]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32)


def check_length(name: str, tokens: Tensor, context: int) -> None:
    """ValueError unless `tokens` fill at least one context and its next token."""
    if tokens.numel() <= context:
        raise ValueError(
            f"--text: too small, the {name} part has {tokens.numel()} tokens and a context of "
            f"{context} needs at least {context + 1}; add text"
        )


def random_batch(tokens: Tensor, batch: int, context: int, generator: torch.Generator) -> Tensor:
    """`batch` windows of `context` tokens at random places: (b, s) int64."""
    starts = torch.randint(tokens.numel() - context + 1, (batch,), generator=generator)
    return torch.stack([tokens[i : i + context] for i in starts.tolist()]).long()


def even_batches(tokens: Tensor, batch: int, context: int, count: int) -> list[Tensor]:
    """Up to `count` batches (b, s) of windows spread evenly over `tokens`, always the same ones."""
    windows = min(batch * count, tokens.numel() // context)
    last = tokens.numel() - context
    starts = [round(i * last / max(1, windows - 1)) for i in range(windows)]
    rows = [tokens[i : i + context].long() for i in starts]
    return [torch.stack(rows[i : i + batch]) for i in range(0, windows, batch)]


def _walk(root: Path, skipped: set[str]) -> list[Path]:
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in skipped and not f.startswith("."))
        files += [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
    return [path for path in files if path.is_file()]


def _read_all(files: Iterable[Path]) -> tuple[list[str], int]:
    texts, skipped = [], 0
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            skipped += 1
            continue
        if "\0" in text:
            skipped += 1
        elif text.strip():
            texts.append(text)
    return texts, skipped


def _read_named(paths: Sequence[Path]) -> tuple[list[str], int]:
    documents: list[str] = []
    skipped = 0
    for path in paths:
        if path.is_dir():
            texts, unread = _read_all(_walk(path, {"__pycache__"}))
            if not texts:
                raise ValueError(f"--text: the folder {path} holds no UTF-8 text")
            documents += texts
            skipped += unread
        elif not path.exists():
            raise ValueError(f"--text: there is no file or folder {path}")
        else:
            documents.append(_read_one(path))
    return documents, skipped


def _read_one(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text: {path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ValueError(f"--text: {path} cannot be read ({error.strerror})") from None
    if not text.strip():
        raise ValueError(f"--text: {path} is empty")
    return text


def _take(documents: Iterable[str], limit: int) -> Iterable[str]:
    """Whole documents while they fit into `limit` bytes; a first one too large is cut."""
    left = limit
    for text in documents:
        size = len(text.encode())
        if size <= left:
            left -= size
            yield text
        elif left == limit:
            yield text.encode()[:limit].decode(errors="ignore")
            return
