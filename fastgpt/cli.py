"""The command line: info, explain, demo, train, generate, bench."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer
from rich.console import Console

from fastgpt.info import EXAMPLES, explain_call, report

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fused kernels for GPT-style decoders: look at them, train with them, measure them.",
)
console = Console(highlight=False, soft_wrap=True)

# Typer reads these annotations at run time, on Python 3.10 too: Optional and not `| None`.
Texts = Annotated[
    Optional[list[Path]],  # noqa: UP045
    typer.Option("--text", help="Files or folders of UTF-8 text. Default: Python's own library."),
]
MoreTexts = Annotated[
    Optional[list[Path]],  # noqa: UP045
    typer.Argument(help="More files or folders, after the one that follows --text."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N. Default: a GPU if there is one.")]
Steps = Annotated[int, typer.Option(min=1, help="Training steps.")]
Seed = Annotated[int, typer.Option(help="Of the split, the weights, the batches and the draws.")]


@contextmanager
def _errors_as_one_line() -> Iterator[None]:
    """The library's own errors end the command with their message, not with a traceback."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise _failure(str(error)) from None
    except ModuleNotFoundError as error:
        raise _failure(f"{error.name} is missing; pip install 'fastgpt[cli]'") from None


def _failure(message: str) -> typer.Exit:
    screen = Console(stderr=True, highlight=False, soft_wrap=True)
    screen.print(f"fastgpt: {message}", style="red", markup=False)
    return typer.Exit(1)


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: {name} asked for, but torch sees no GPU here")
    return str(device)


@app.command()
def info() -> None:
    """Versions, the op library or why there is none, CPU and GPUs, what every backend runs."""
    typer.echo(report())


@app.command()
def explain(
    op: Annotated[str, typer.Argument(help=f"One of: {', '.join(EXAMPLES)}.")],
    shape: Annotated[str, typer.Option(help="Sizes with commas: 2,12,1024,64 for attention.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, float64.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; it need not be here.")] = "cpu",
    window: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Keys a query sees; none: dense."),
    ] = None,
    causal: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(help="Whether later keys are hidden; by default they are."),
    ] = None,
) -> None:
    """Which backend and kernel variant would run an op at a shape, and why no other."""
    with _errors_as_one_line():
        try:
            sizes = [int(size) for size in shape.replace("x", ",").split(",")]
        except ValueError:
            raise ValueError(f"--shape: expected numbers with commas, got {shape!r}") from None
        typer.echo(explain_call(op, sizes, dtype, device, window=window, causal=causal))


@app.command()
def demo(
    text: Texts = None,
    more: MoreTexts = None,
    steps: Steps = 320,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder for model, figures and curve.")] = Path(
        "fastgpt-demo"
    ),
    device: Device = "auto",
) -> None:
    """Train a small decoder on real text, let it write, and compare it with torch's own layers."""
    with _errors_as_one_line():
        from fastgpt.demo import DemoOptions, run

        options = DemoOptions(
            texts=(*(text or []), *(more or [])),
            steps=steps,
            seed=seed,
            out=out,
            device=_device(device),
        )
        run(options, console)


@app.command()
def train(
    text: Texts = None,
    more: MoreTexts = None,
    preset: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A published shape, as gpt3-small. Default: the demo's small decoder."),
    ] = None,
    config: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A JSON file of GPTConfig fields, instead of --preset."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint.")] = Path("fastgpt-model"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    steps: Steps = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 4,
    context: Annotated[int, typer.Option(min=2, help="Tokens a sequence.")] = 512,
    vocab_size: Annotated[int, typer.Option(min=257, help="Tokens of the BPE.")] = 4096,
    learning_rate: Annotated[float, typer.Option(help="Peak of the schedule.")] = 1e-3,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 by autocast.")] = "float32",
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Train a decoder from scratch on text: tokenizer, model and optimizer land in --out."""
    with _errors_as_one_line():
        from fastgpt import console as screen
        from fastgpt import text as corpus
        from fastgpt.config import GPTConfig
        from fastgpt.model import GPT
        from fastgpt.train import Trainer, TrainOptions, small_config

        if preset is not None and config is not None:
            raise ValueError("--preset and --config: expected one of them, got both")
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"--dtype: expected float32 or bfloat16, got {dtype!r}")
        options = TrainOptions(
            steps=steps,
            batch=batch,
            context=context,
            learning_rate=learning_rate,
            warmup=max(1, min(100, steps // 10)),
            seed=seed,
            eval_every=max(1, steps // 20),
            dtype=getattr(torch, dtype),
        )
        data = corpus.read_corpus([*(text or []), *(more or [])], limit=1 << 30, seed=seed)
        console.print(data.describe())
        if resume:
            tokenizer, model = corpus.load_tokenizer(out), GPT.from_pretrained(out)
        else:
            tokenizer = corpus.train_tokenizer(data.train, vocab_size)
            vocab_size = tokenizer.get_vocab_size()
            if config is not None:
                shape = GPTConfig.from_json(config.read_text())
            elif preset is not None:
                shape = GPTConfig.preset(preset)
            else:
                shape = small_config(vocab_size, context)
            torch.manual_seed(seed)
            model = GPT(dataclasses.replace(shape, vocab_size=vocab_size))
        if context > model.config.n_positions:
            raise ValueError(
                f"--context: expected at most n_positions = {model.config.n_positions}, "
                f"got {context}"
            )
        tokens = corpus.encode(tokenizer, data.train), corpus.encode(tokenizer, data.held_out)
        trainer = Trainer(model, *tokens, options, _device(device))
        if resume:
            trainer.resume(out)
        screen.train(trainer, console, save=lambda: trainer.save(out, tokenizer))
        console.print(f"model, tokenizer and optimizer state are in {out}")


@app.command()
def generate(
    model: Annotated[Path, typer.Option(help="Folder of a model with its tokenizer.json.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to draw at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="Below 1 sharper, above 1 wilder.")] = 0.8,
    top_k: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Draw among this many tokens."),
    ] = 50,
    top_p: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Draw among the likeliest tokens of this total probability."),
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Continue a prompt with a trained model, token by token."""
    with _errors_as_one_line():
        from fastgpt import console as screen
        from fastgpt.model import GPT
        from fastgpt.text import load_tokenizer

        place = _device(device)
        tokenizer, decoder = load_tokenizer(model), GPT.from_pretrained(model).to(place).eval()
        room = decoder.config.n_positions - 1 - len(tokenizer.encode(prompt).ids)
        if room < 1:
            raise ValueError(
                f"--prompt: expected fewer than n_positions = {decoder.config.n_positions} tokens, "
                f"got {decoder.config.n_positions - room}"
            )
        screen.stream(
            decoder,
            tokenizer,
            prompt,
            console,
            min(max_new_tokens, room),
            do_sample=not greedy,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=torch.Generator(place).manual_seed(seed),
        )


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    json_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--json", help="Write the figures to this file."),
    ] = None,
) -> None:
    """Time the ops beside torch's; further arguments go to pytest (as -k attention)."""
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    with _errors_as_one_line():
        if not (folder / "conftest.py").is_file():
            raise ValueError(
                "the benchmarks are part of a checkout of fastgpt, not of the installed package"
            )
    command = [sys.executable, "-m", "pytest", str(folder), "-q", *context.args]
    if json_file is not None:
        command.append(f"--benchmark-json={json_file.resolve()}")
    raise typer.Exit(subprocess.run(command, cwd=folder.parent, check=False).returncode)
