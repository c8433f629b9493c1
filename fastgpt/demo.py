"""`fastgpt demo`: the whole job in small. Train, watch the loss fall, write, compare with torch."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fastgpt import console as screen
from fastgpt import text as corpus
from fastgpt.compare import Comparison, compare
from fastgpt.config import GPTConfig
from fastgpt.model import GPT
from fastgpt.train import Trainer, TrainOptions, plot_losses, small_config

CURVE_FILE = "loss.png"
FIGURES_FILE = "demo.json"


@dataclass(frozen=True)
class DemoOptions:
    """What the command line sets; a test sets the sizes too."""

    texts: tuple[Path, ...] = ()
    steps: int = 320
    seed: int = 0
    out: Path = Path("fastgpt-demo")
    device: str = "cpu"
    batch: int = 4
    context: int = 512
    vocab_size: int = 4096
    text_bytes: int = 8_000_000
    new_tokens: int = 160
    rounds: int = 7
    prompt: str = "import os\n\n\ndef"


def run(options: DemoOptions, console: Console) -> Comparison:
    """Run the demo; what it shows also lands in `options.out`.

    Raises:
        ValueError: a text is missing, empty, not UTF-8 or too small.
    """
    begin = time.perf_counter()
    data = corpus.read_corpus(options.texts, limit=options.text_bytes, seed=options.seed)
    console.print(data.describe(), highlight=False, soft_wrap=True)
    tokenizer = corpus.train_tokenizer(data.train, options.vocab_size)
    train_tokens = corpus.encode(tokenizer, data.train)
    held_out_tokens = corpus.encode(tokenizer, data.held_out)
    vocab_size = tokenizer.get_vocab_size()
    console.print(
        f"byte-level BPE of {vocab_size} tokens: {train_tokens.numel():,} tokens to train on, "
        f"{held_out_tokens.numel():,} held out",
        highlight=False,
        soft_wrap=True,
    )
    torch.manual_seed(options.seed)
    model = GPT(small_config(vocab_size, options.context))
    console.print(_describe(model, options.device), highlight=False, soft_wrap=True)
    training = TrainOptions(
        steps=options.steps,
        batch=options.batch,
        context=options.context,
        learning_rate=2e-3,
        warmup=max(1, options.steps // 10),
        seed=options.seed,
        eval_every=max(1, options.steps // 8),
    )
    trainer = Trainer(model, train_tokens, held_out_tokens, training, options.device)
    screen.train(trainer, console)
    trainer.save(options.out, tokenizer)
    plot_losses(
        trainer.history,
        options.out / CURVE_FILE,
        f"{model.config.n_layer} layers, width {model.config.n_embd}, dense and banded in turn",
    )

    console.print("\nThe model goes on from a prompt, token by token through its cache:")
    drawing = time.perf_counter()
    count = screen.stream(
        model.eval(),
        tokenizer,
        options.prompt,
        console,
        min(options.new_tokens, options.context - 1 - len(tokenizer.encode(options.prompt).ids)),
        temperature=0.7,
        top_k=40,
        generator=torch.Generator(options.device).manual_seed(options.seed),
    )
    drawing = time.perf_counter() - drawing
    console.print(f"{count} tokens in {drawing:.1f} s", highlight=False, soft_wrap=True)

    console.print("\nThe same training step with torch's own layers, in turn with ours:")
    comparison = compare(model, options.out, trainer.batch(), options.rounds)
    console.print(_table(comparison))
    minutes = (time.perf_counter() - begin) / 60
    figures = {
        "torch": torch.__version__,
        "device": options.device,
        "threads": torch.get_num_threads(),
        "config": model.config.to_dict(),
        "minutes": round(minutes, 2),
        "first_held_out_loss": trainer.history[0]["held_out"],
        "last_held_out_loss": trainer.history[-1]["held_out"],
        **asdict(comparison),
    }
    (options.out / FIGURES_FILE).write_text(json.dumps(figures, indent=2))
    console.print(
        f"{minutes:.1f} minutes. In {options.out}: model and tokenizer, {CURVE_FILE} (the loss "
        f"curve), {FIGURES_FILE} (these figures).\n"
        f"More of its writing: fastgpt generate --model {options.out} --prompt class",
        highlight=False,
        soft_wrap=True,
    )
    return comparison


def _describe(model: GPT, device: str) -> str:
    config: GPTConfig = model.config
    windows = [config.window_of(layer) for layer in range(config.n_layer)]
    layers = ", ".join("dense" if w is None else f"band of {w}" for w in windows)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    return (
        f"decoder: {count:.1f} M parameters, {config.n_layer} layers ({layers}), "
        f"width {config.n_embd}, {config.n_head} heads, context {config.n_positions}, on {device}"
    )


def _table(comparison: Comparison) -> Table:
    speed = {v: comparison.tokens_per_second(v) for v in ("fastgpt", "torch")}
    peak = comparison.peak_bytes
    seconds = comparison.seconds
    table = Table(title="one training step: forward, loss, backward, AdamW")
    for name in ("", "fastgpt", "torch", "fastgpt against torch"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row(
        "tokens/s",
        f"{speed['fastgpt']:,.0f}",
        f"{speed['torch']:,.0f}",
        f"{speed['fastgpt'] / speed['torch']:.2f}x",
    )
    table.add_row(
        "ms a step",
        f"{seconds['fastgpt'] * 1e3:,.0f}",
        f"{seconds['torch'] * 1e3:,.0f}",
        f"{seconds['fastgpt'] / seconds['torch']:.2f}x",
    )
    table.add_row(
        "peak memory",
        f"{peak['fastgpt'] / 2**20:,.0f} MiB",
        f"{peak['torch'] / 2**20:,.0f} MiB",
        f"{peak['fastgpt'] / peak['torch']:.2f}x",
    )
    table.add_row(
        "largest logit difference",
        "",
        "",
        f"{comparison.logit_difference:.1e} (largest logit {comparison.logit_size:.1f})",
    )
    return table
