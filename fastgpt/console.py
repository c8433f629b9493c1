"""What the commands show on a terminal: training progress, streamed text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor

from fastgpt.model import GPT
from fastgpt.text import END_OF_TEXT
from fastgpt.train import Progress, Trainer


def train(trainer: Trainer, console: Console, save: Callable[[], None] | None = None) -> None:
    """Run the trainer behind a progress bar; one line stays for every evaluation."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=trainer.options.steps, completed=trainer.step, state="")

        def report(progress: Progress) -> None:
            state = f"loss {progress.loss:.3f}, {progress.tokens_per_second:,.0f} tokens/s"
            bar.update(task, completed=progress.step, state=state)
            if progress.held_out is None:
                return
            line = f"step {progress.step:5d}   held-out loss {progress.held_out:.3f}"
            if math.isfinite(progress.loss):
                line += (
                    f"   training loss {progress.loss:.3f}"
                    f"   {progress.tokens_per_second:,.0f} tokens/s"
                )
            console.print(line, highlight=False)

        trainer.run(report, save)


def stream(
    model: GPT, tokenizer: Any, prompt: str, console: Console, max_new_tokens: int, **options: Any
) -> int:
    """Continue `prompt` token by token as the model draws them; returns how many it drew.

    The prompt follows an end-of-text token, as every text did in training; the next one ends it.
    It is shown with the first token.
    """
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [end, *tokenizer.encode(prompt).ids]
    device = next(model.parameters()).device
    drawn: list[int] = []
    shown = 0

    def show(token: Tensor) -> None:
        nonlocal shown
        if not drawn:
            console.out(prompt, end="", style="bold", highlight=False)
        drawn.append(int(token.reshape(-1)[0]))
        text = tokenizer.decode(drawn)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character: wait for the rest
            console.out(text[shown:], end="", highlight=False)
            shown = len(text)

    model.generate(
        torch.tensor([ids], device=device),
        max_new_tokens,
        eos_token_id=end,
        on_token=show,
        **options,
    )
    console.out("")
    return len(drawn)
