"""Text to tokens: files, the split, the tokenizer, batches, and what is said of bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastgpt import text as corpus

pytest.importorskip("tokenizers")


def test_the_library_is_split_by_file() -> None:
    data = corpus.read_corpus(limit=400_000, seed=3)
    assert len(data.train) >= 10
    assert data.held_out
    assert not set(data.train) & set(data.held_out)
    assert sum(len(t.encode()) for t in data.train + data.held_out) <= 400_000


def test_the_split_follows_the_seed() -> None:
    first, again, other = (corpus.read_corpus(limit=200_000, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first.train != other.train


def test_a_single_file_holds_out_its_tail(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("abcdefghij" * 100)
    data = corpus.read_corpus([file], held_out=0.1)
    assert data.train[0] + data.held_out[0] == file.read_text()
    assert len(data.held_out[0]) == 100


def test_tokens_decode_to_the_text() -> None:
    texts = ["def f(x):\n\treturn x  # é 漢字\n"] * 3
    tokenizer = corpus.train_tokenizer(texts, 300)
    ids = corpus.encode(tokenizer, texts[:1]).tolist()
    assert ids[-1] == tokenizer.token_to_id(corpus.END_OF_TEXT)
    assert tokenizer.decode(ids) == texts[0]


def test_batches_lie_inside_the_tokens() -> None:
    tokens = torch.arange(21)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([corpus.random_batch(tokens, 8, 5, generator) for _ in range(20)])
    assert drawn.shape == (160, 5)
    assert torch.equal(drawn - drawn[:, :1], torch.arange(5).expand(160, 5))
    assert drawn.min() == 0
    assert drawn.max() == 20
    even = corpus.even_batches(tokens, 3, 5, 10)
    assert [batch.shape for batch in even] == [(3, 5), (1, 5)]
    assert even[0][0, 0] == 0
    assert even[-1][-1, -1] == 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file or folder"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"caf\xe9 ole", "is not UTF-8 text .byte 3."),
    ],
    ids=["missing", "empty", "blank", "latin1"],
)
def test_bad_files_are_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "input.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        corpus.read_corpus([file])
    assert str(file) in str(error.value)


def test_a_folder_skips_what_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 50)
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe\x00\x01")
    data = corpus.read_corpus([tmp_path])
    assert data.skipped == 1
    assert "1 files that are not UTF-8 skipped" in data.describe()
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ValueError, match="holds no UTF-8 text"):
        corpus.read_corpus([tmp_path])


def test_too_little_text_says_how_much_is_needed() -> None:
    with pytest.raises(ValueError, match="has 9 tokens and a context of 16 needs at least 17"):
        corpus.check_length("training", torch.arange(9), 16)


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a tokenizer in tokenizer\.json"):
        corpus.load_tokenizer(tmp_path, 300)


def test_a_tokenizer_that_does_not_serve(tmp_path: Path) -> None:
    file = tmp_path / corpus.TOKENIZER_FILE
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected a tokenizer, got: "):
        corpus.load_tokenizer(tmp_path, 300)
    corpus.train_tokenizer(["some text"], 300).save(str(file))
    size = corpus.load_tokenizer(tmp_path, 300).get_vocab_size()
    expected = rf"at most the model's vocab_size = {size - 1} tokens, got {size}"
    with pytest.raises(ValueError, match=expected):
        corpus.load_tokenizer(tmp_path, size - 1)
    file.write_text(file.read_text().replace(corpus.END_OF_TEXT, "<|other|>"))
    with pytest.raises(ValueError, match=r"with the token <\|endoftext\|>, found none"):
        corpus.load_tokenizer(tmp_path, 300)
