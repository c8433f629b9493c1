"""The demo at a tiny size: the loss falls, the files are there, ours and torch's logits agree."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("tokenizers", "rich", "matplotlib"):
    pytest.importorskip(package)

from rich.console import Console

from fastgpt import GPT, GPTConfig
from fastgpt.demo import DemoOptions, run
from fastgpt.peer import TorchGPT
from fastgpt.text import encode, load_tokenizer, read_corpus
from fastgpt.train import STATE_FILE, SavedRun, Trainer, TrainOptions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a tiny demo writes."""
    out = tmp_path_factory.mktemp("demo")
    options = DemoOptions(
        steps=12,
        out=out,
        batch=2,
        context=64,
        vocab_size=320,
        text_bytes=300_000,
        new_tokens=24,
        rounds=1,
    )
    with (out / "screen.txt").open("w") as screen:
        run(options, Console(file=screen, width=100))
    return out


def test_what_it_shows(folder: Path) -> None:
    shown = (folder / "screen.txt").read_text()
    for expected in ("dense, band of 64", "held-out loss", "def", "tokens/s", "peak memory"):
        assert expected in shown, shown
    assert "largest logit difference" in shown


def test_the_held_out_loss_falls(folder: Path) -> None:
    figures = json.loads((folder / "demo.json").read_text())
    assert figures["last_held_out_loss"] < figures["first_held_out_loss"] - 0.2


def test_ours_and_torch_agree(folder: Path) -> None:
    figures = json.loads((folder / "demo.json").read_text())
    assert figures["logit_difference"] <= 1e-4 * max(1.0, figures["logit_size"])
    assert min(figures["peak_bytes"].values()) > 4 * GPT.from_pretrained(folder).num_parameters()
    assert min(figures["seconds"].values()) > 0


def test_what_it_writes(folder: Path) -> None:
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    model = GPT.from_pretrained(folder)
    tokenizer = load_tokenizer(folder, model.config.vocab_size)
    assert model.config.vocab_size == tokenizer.get_vocab_size()
    assert tokenizer.decode(tokenizer.encode("for x in y:").ids) == "for x in y:"


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_the_peer_is_the_same_decoder(norm: str) -> None:
    config = GPTConfig(61, 40, 3, 32, 2, window=7, norm=norm, bias=norm == "pre")
    model = GPT(config)
    peer = TorchGPT.like(model)
    ids = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(0))
    ours, theirs = model(ids, labels=ids), peer(ids, labels=ids)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss)


def test_a_resumed_run_is_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = read_corpus(limit=60_000)
    from fastgpt.text import train_tokenizer

    tokenizer = train_tokenizer(data.train, 300)
    tokens = encode(tokenizer, data.train), encode(tokenizer, data.held_out)
    config = GPTConfig(300, 32, 2, 32, 2, window=8)
    options = TrainOptions(steps=6, batch=2, context=32, warmup=2, eval_every=3, eval_batches=1)

    def start() -> GPT:
        torch.manual_seed(0)
        return GPT(config)

    whole = Trainer(start(), *tokens, options, "cpu")

    def stop() -> None:
        whole.save(tmp_path, tokenizer, [Path("texts")])
        if whole.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        whole.run(lambda _: None, save=stop)
    resumed = Trainer(GPT.from_pretrained(tmp_path), *tokens, options, "cpu")
    saved = SavedRun.load(tmp_path)
    assert saved.options == options
    assert saved.texts == (Path("texts").resolve(),)
    resumed.resume(saved)
    assert resumed.step == 3

    def breaks_off(_: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", breaks_off)
    with pytest.raises(OSError, match="no space left"):
        whole.save(tmp_path, tokenizer)
    assert SavedRun.load(tmp_path).step == 3
    assert not list(tmp_path.glob("*.partial"))
    whole.run(lambda _: None)
    resumed.run(lambda _: None)
    assert resumed.history == whole.history
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("steps", 0, ValueError),
        ("steps", 1.5, TypeError),
        ("batch", True, TypeError),
        ("context", 1, ValueError),
        ("learning_rate", 0.0, ValueError),
        ("learning_rate", math.nan, ValueError),
        ("learning_rate", math.inf, ValueError),
        ("learning_rate", "1", TypeError),
        ("warmup", -3, ValueError),
        ("weight_decay", -0.1, ValueError),
        ("weight_decay", math.inf, ValueError),
        ("clip", -1.0, ValueError),
        ("clip", math.nan, ValueError),
        ("seed", None, TypeError),
        ("seed", 2**64, ValueError),
        ("dtype", torch.int8, TypeError),
    ],
)
def test_bad_options_are_named(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^{name}: expected .* got "):
        TrainOptions(**{name: value})


def test_options_at_their_bounds() -> None:
    TrainOptions(steps=1, context=2, warmup=0, weight_decay=0, clip=math.inf, seed=2**64 - 1)


def test_too_few_tokens_are_counted() -> None:
    small = torch.arange(10)
    model = GPT(GPTConfig(300, 32, 1, 32, 2))
    with pytest.raises(ValueError, match="the training part has 10 tokens"):
        Trainer(model, small, small, TrainOptions(context=32), "cpu")


def test_a_run_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no trainer\.pt"):
        SavedRun.load(tmp_path)
    file = tmp_path / STATE_FILE
    for content in (b"", b"no state"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"trainer\.pt: expected the state of a run, got: \S"):
            SavedRun.load(tmp_path)
    state = {"step": 1, "options": {}, "texts": [], "optimizer": {}, "generator": torch.ones(1)}
    for name in state:
        torch.save({key: value for key, value in state.items() if key != name}, file)
        with pytest.raises(ValueError, match=rf"trainer\.pt: .* got no valid {name}$"):
            SavedRun.load(tmp_path)
    torch.save({**state, "options": {"steps": 0}}, file)
    with pytest.raises(ValueError, match=r"trainer\.pt: steps: expected"):
        SavedRun.load(tmp_path)
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"history\.json: expected the losses of a run"):
        SavedRun.load(tmp_path)
