"""The training loop: AdamW, warm-up and cosine, held-out loss, checkpoints that can be resumed."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.checkpoint import replace_file
from fastgpt.config import GPTConfig
from fastgpt.model import GPT
from fastgpt.ops._checks import check_number
from fastgpt.text import TOKENIZER_FILE, check_length, even_batches, random_batch

STATE_FILE = "trainer.pt"
HISTORY_FILE = "history.json"

_LEAST = {
    "steps": 1,
    "batch": 1,
    "context": 2,
    "warmup": 0,
    "seed": -(2**63),
    "eval_every": 1,
    "eval_batches": 1,
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class TrainOptions:
    """What the loop needs to know besides the model and the tokens.

    Raises:
        ValueError: a field has an impossible value; the message names it.
        TypeError: a field has the wrong type.
    """

    steps: int = 200
    batch: int = 4
    context: int = 512
    learning_rate: float = 1e-3
    warmup: int = 20
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    eval_every: int = 20
    eval_batches: int = 4
    dtype: torch.dtype = torch.float32
    """bfloat16 or float16: the forward runs under autocast; weights stay float32."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an int >= {least}, got {value!r}")
            if value < least:
                raise ValueError(f"{name}: expected an int >= {least}, got {value}")
        if self.seed >= 2**64:
            raise ValueError(f"seed: expected an int < 2**64, got {self.seed}")
        for name in ("learning_rate", "weight_decay", "clip"):
            check_number(name, getattr(self, name))
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(
                f"learning_rate: expected a finite number > 0, got {self.learning_rate}"
            )
        if not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"weight_decay: expected a finite number >= 0, got {self.weight_decay}"
            )
        if not self.clip > 0.0:
            raise ValueError(f"clip: expected a number > 0, got {self.clip}")
        if self.dtype not in _DTYPES:
            raise TypeError(f"dtype: expected one of {_DTYPES}, got {self.dtype!r}")

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up to the peak, then half a cosine down to a tenth of it."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))


@dataclass(frozen=True)
class Progress:
    """What one step reports; `held_out` only after the steps that evaluate."""

    step: int
    loss: float
    held_out: float | None
    tokens_per_second: float


@dataclass(frozen=True)
class SavedRun:
    """What `Trainer.save` wrote into a folder beside the model and its tokenizer."""

    step: int
    options: TrainOptions
    texts: tuple[Path, ...]
    """What the tokens were read from; none: Python's own library."""
    optimizer: dict[str, Any]
    generator: Tensor
    history: list[dict[str, float]]

    @classmethod
    def load(cls, folder: Path) -> SavedRun:
        """The run in `folder`; ValueError if it was not written by `Trainer.save`."""
        path = folder / STATE_FILE
        if not path.is_file():
            raise ValueError(f"--resume: {folder} has no {STATE_FILE}; it was not written by train")
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # torch.load documents none
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{path}: expected the state of a run, got: {reason}") from None
        kinds = {
            "step": int,
            "options": dict,
            "texts": list,
            "optimizer": dict,
            "generator": Tensor,
        }
        if not isinstance(state, dict):
            raise ValueError(f"{path}: expected a dict, got {type(state).__name__}")
        wrong = [name for name, kind in kinds.items() if not isinstance(state.get(name), kind)]
        if wrong:
            raise ValueError(
                f"{path}: expected the state of a run, got no valid {', '.join(wrong)}"
            )
        try:
            options = TrainOptions(**state["options"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None
        return cls(
            state["step"],
            options,
            tuple(Path(text) for text in state["texts"]),
            state["optimizer"],
            state["generator"],
            _load_history(folder / HISTORY_FILE),
        )


def _load_history(path: Path) -> list[dict[str, float]]:
    try:
        history = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected the losses of a run, got: {error}") from None
    if not isinstance(history, list):
        raise ValueError(f"{path}: expected a list of losses, got {type(history).__name__}")
    return history


def adamw(model: nn.Module, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, as GPT-3 (Brown et al. 2020, appendix B)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95), fused=True)


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """The autocast region of a low-precision `dtype`; none for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, input_ids: Tensor, options: TrainOptions
) -> Tensor:
    """Forward, backward, clipped update; returns the loss, detached."""
    with autocast(input_ids.device, options.dtype):
        loss: Tensor = model(input_ids, labels=input_ids, return_logits=False).loss
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), options.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


class Trainer:
    """Trains `model` on a row of tokens (n,) and watches its loss on another.

    The same seed, tokens and options give the same run, resumed or not.
    """

    def __init__(
        self, model: GPT, train: Tensor, held_out: Tensor, options: TrainOptions, device: str
    ) -> None:
        check_length("training", train, options.context)
        check_length("held-out", held_out, options.context)
        self.model = model.to(device)
        self.options = options
        self.device = torch.device(device)
        self.train_tokens = train
        self.held_out = even_batches(held_out, options.batch, options.context, options.eval_batches)
        self.optimizer = adamw(model, options)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.step = 0
        self.history: list[dict[str, float]] = []

    def batch(self) -> Tensor:
        """The next random batch (b, s) on the device."""
        options = self.options
        ids = random_batch(self.train_tokens, options.batch, options.context, self.generator)
        return ids.to(self.device)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean loss in nats a token on the held-out batches."""
        self.model.eval()
        total, count = 0.0, 0
        for ids in self.held_out:
            with autocast(self.device, self.options.dtype):
                ids = ids.to(self.device)
                loss = self.model(ids, labels=ids, return_logits=False).loss
            total += float(loss) * ids.shape[0]
            count += ids.shape[0]
        self.model.train()
        return total / count

    def run(
        self, report: Callable[[Progress], None], save: Callable[[], None] | None = None
    ) -> None:
        """Train to the last step; `report` after each, `save` after each evaluation."""
        options = self.options
        if self.step == 0:
            self._record(math.nan, self.held_out_loss(), report, 0.0)
        self.model.train()
        while self.step < options.steps:
            begin = time.perf_counter()
            for group in self.optimizer.param_groups:
                group["lr"] = options.learning_rate_at(self.step)
            loss = float(training_step(self.model, self.optimizer, self.batch(), options))
            if not math.isfinite(loss):
                raise RuntimeError(f"step {self.step}: the loss is {loss}; lower the learning rate")
            speed = options.batch * options.context / (time.perf_counter() - begin)
            self.step += 1
            due = self.step % options.eval_every == 0 or self.step == options.steps
            self._record(loss, self.held_out_loss() if due else None, report, speed)
            if due and save is not None:
                save()

    def _record(
        self,
        loss: float,
        held_out: float | None,
        report: Callable[[Progress], None],
        speed: float,
    ) -> None:
        entry = {"step": float(self.step)}
        if math.isfinite(loss):
            entry["loss"] = loss
        if held_out is not None:
            entry["held_out"] = held_out
        self.history.append(entry)
        report(Progress(self.step, loss, held_out, speed))

    def save(self, folder: Path, tokenizer: Any, texts: Sequence[Path] = ()) -> None:
        """Write the model, its tokenizer, the history, and what `resume` needs.

        Each file appears only when complete.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder)
        history = json.dumps(self.history)
        replace_file(folder / TOKENIZER_FILE, lambda path: tokenizer.save(str(path)))
        replace_file(folder / HISTORY_FILE, lambda path: path.write_text(history))
        state = {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "options": asdict(self.options),
            "texts": [str(path.resolve()) for path in texts],
        }
        replace_file(folder / STATE_FILE, lambda path: torch.save(state, path))

    def resume(self, saved: SavedRun) -> None:
        """Continue the run whose model this is: optimizer, draws, step."""
        self.optimizer.load_state_dict(saved.optimizer)
        self.generator.set_state(saved.generator)
        self.step = saved.step
        self.history = list(saved.history)


def small_config(vocab_size: int, context: int) -> GPTConfig:
    """The decoder that the demo trains: four layers, dense and banded in turn, width 256."""
    return GPTConfig(
        vocab_size=vocab_size,
        n_positions=context,
        n_layer=4,
        n_embd=256,
        n_head=4,
        window=min(128, context),
        attention_pattern=("dense", "banded"),
        dropout=0.0,
    )


def plot_losses(history: list[dict[str, float]], path: Path, title: str) -> None:
    """Draw the training and held-out loss against the step into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=120)
    for key, label, style in (
        ("loss", "training", {"linewidth": 1.0, "alpha": 0.6}),
        ("held_out", "held out", {"linewidth": 2.0, "marker": "o", "markersize": 3}),
    ):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
