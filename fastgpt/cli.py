"""The command line: info, explain, demo, train, generate, bench."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import torch
import typer
from rich.console import Console

from fastgpt.info import EXAMPLES, explain_call, report

if TYPE_CHECKING:
    from fastgpt.config import GPTConfig
    from fastgpt.train import TrainOptions

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

TRAINING = {
    "steps": 1000,
    "batch": 4,
    "context": 512,
    "learning_rate": 1e-3,
    "dtype": "float32",
    "seed": 0,
}
"""What `train` takes where neither the command line nor a resumed run says anything else."""
VOCAB_SIZE = 4096


def _unset(default: object, help: str, **bounds: Any) -> Any:
    """An option that is None where the command line does not give it."""
    return typer.Option(help=f"{help} Default: {default}.", **bounds)


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
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: {name} asked for, but torch sees no GPU here")
    return str(device)


def _check_out(out: Path) -> None:
    """ValueError unless `out` is a folder to write in, or can become one."""
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"--out: expected a folder, got {out}, but {nearest} is a file")
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"--out: expected a folder that can be written, got {out}")


def _shape(preset: str | None, config: Path | None) -> GPTConfig | None:
    """The decoder that --preset or --config names, if one of them is given."""
    from fastgpt.config import PRESETS, GPTConfig

    if preset is not None and config is not None:
        raise ValueError("--preset and --config: expected one of them, got both")
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(f"--preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
        return GPTConfig.preset(preset)
    if config is None:
        return None
    try:
        return GPTConfig.from_json(config.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config: {config} cannot be read ({error.strerror})") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"--config: {config} is no JSON of GPTConfig fields ({error})") from None


def _options(given: Mapping[str, Any]) -> TrainOptions:
    """The options of a new run."""
    from fastgpt.train import TrainOptions

    values = {**TRAINING, **given}
    return TrainOptions(
        **{**values, "dtype": _dtype(values["dtype"])},
        warmup=max(1, min(100, values["steps"] // 10)),
        eval_every=_eval_every(values["steps"]),
    )


def _resumed_options(
    given: Mapping[str, Any], saved: TrainOptions, done: int, out: Path
) -> TrainOptions:
    """The options of the run in `out`, `done` steps of which are done; `given` ones replace them.

    Another seed would draw another split, and train on what was held out.
    """
    if given.get("seed", saved.seed) != saved.seed:
        raise ValueError(f"--seed: expected {saved.seed} as the run in {out}, got {given['seed']}")
    changes = dict(given)
    if "dtype" in given:
        changes["dtype"] = _dtype(given["dtype"])
    if "steps" in given:
        changes["eval_every"] = _eval_every(given["steps"])
    options = dataclasses.replace(saved, **changes)
    if options.steps <= done:
        raise ValueError(
            f"--steps: expected more than the {done} that the run in {out} has done, "
            f"got {options.steps}"
        )
    return options


def _dtype(name: str) -> torch.dtype:
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype: expected float32 or bfloat16, got {name!r}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _eval_every(steps: int) -> int:
    return max(1, steps // 20)


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

        _check_out(out)
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
    steps: Annotated[
        Optional[int],  # noqa: UP045
        _unset(TRAINING["steps"], "Training steps.", min=1),
    ] = None,
    batch: Annotated[
        Optional[int],  # noqa: UP045
        _unset(TRAINING["batch"], "Sequences a step.", min=1),
    ] = None,
    context: Annotated[
        Optional[int],  # noqa: UP045
        _unset(TRAINING["context"], "Tokens a sequence.", min=2),
    ] = None,
    vocab_size: Annotated[
        Optional[int],  # noqa: UP045
        _unset(VOCAB_SIZE, "Tokens of the BPE.", min=257),
    ] = None,
    learning_rate: Annotated[
        Optional[float],  # noqa: UP045
        _unset(TRAINING["learning_rate"], "Peak of the schedule."),
    ] = None,
    dtype: Annotated[
        Optional[str],  # noqa: UP045
        _unset(TRAINING["dtype"], "float32, or bfloat16 by autocast."),
    ] = None,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        _unset(TRAINING["seed"], "Of the split, the weights and the batches."),
    ] = None,
    device: Device = "auto",
) -> None:
    """Train a decoder from scratch on text: tokenizer, model and optimizer land in --out.

    With --resume, the text and the options that are not given are those of the run in --out.
    """
    with _errors_as_one_line():
        from fastgpt import console as screen
        from fastgpt import text as corpus
        from fastgpt.model import GPT
        from fastgpt.train import SavedRun, Trainer, small_config

        values = {
            "steps": steps,
            "batch": batch,
            "context": context,
            "learning_rate": learning_rate,
            "dtype": dtype,
            "seed": seed,
        }
        given = {name: value for name, value in values.items() if value is not None}
        fixed = {"--preset": preset, "--config": config, "--vocab-size": vocab_size}
        texts = [*(text or []), *(more or [])]
        place = _device(device)
        _check_out(out)
        if resume:
            clash = [name for name, value in fixed.items() if value is not None]
            if clash:
                raise ValueError(
                    f"{', '.join(clash)}: expected none with --resume, "
                    f"which goes on with the model in {out}"
                )
            saved = SavedRun.load(out)
            options = _resumed_options(given, saved.options, saved.step, out)
            texts = texts or list(saved.texts)
            model = GPT.from_pretrained(out)
            tokenizer = corpus.load_tokenizer(out, model.config.vocab_size)
            shape: GPTConfig | None = model.config
        else:
            options, shape = _options(given), _shape(preset, config)
        if shape is not None and options.context > shape.n_positions:
            raise ValueError(
                f"--context: expected at most n_positions = {shape.n_positions}, "
                f"got {options.context}"
            )
        data = corpus.read_corpus(texts, limit=1 << 30, seed=options.seed)
        console.print(data.describe())
        if not resume:
            tokenizer = corpus.train_tokenizer(data.train, vocab_size or VOCAB_SIZE)
            size = tokenizer.get_vocab_size()
            shape = shape or small_config(size, options.context)
            torch.manual_seed(options.seed)
            model = GPT(dataclasses.replace(shape, vocab_size=size))
        tokens = corpus.encode(tokenizer, data.train), corpus.encode(tokenizer, data.held_out)
        trainer = Trainer(model, *tokens, options, place)
        if resume:
            trainer.resume(saved)
        screen.train(trainer, console, save=lambda: trainer.save(out, tokenizer, texts))
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
        decoder = GPT.from_pretrained(model).to(place).eval()
        tokenizer = load_tokenizer(model, decoder.config.vocab_size)
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
