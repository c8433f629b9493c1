"""One training step of a model beside the same step on torch's own layers: speed, memory, logits.

Times are taken in turn in one process, so that both see the same machine. Peak memory is read in
a process of its own for each: `python -m fastgpt.compare fastgpt|torch FOLDER BATCH CONTEXT DEVICE`
prints it as JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import fastgpt
from fastgpt.model import GPT
from fastgpt.peer import TorchGPT
from fastgpt.train import TrainOptions, adamw, training_step

VARIANTS = ("fastgpt", "torch")


@dataclass(frozen=True)
class Comparison:
    """What was measured, by variant: `fastgpt` and `torch`."""

    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    tokens: int
    """Tokens of one step."""
    logit_difference: float
    logit_size: float
    """The largest absolute logit, to judge the difference by."""

    def tokens_per_second(self, variant: str) -> float:
        """Tokens of a training step a second: forward, loss, backward, clip, AdamW."""
        return self.tokens / self.seconds[variant]


def compare(model: GPT, folder: Path, input_ids: Tensor, rounds: int = 7) -> Comparison:
    """Measure a training step on `input_ids` (b, s); `model` as saved in `folder` is left as is.

    The time is the median over `rounds`, the variants taking turns, after one round to warm up.
    """
    options = TrainOptions(batch=input_ids.shape[0], context=input_ids.shape[1])
    device = str(input_ids.device)
    models = {variant: _build(variant, folder, device) for variant in VARIANTS}
    with torch.no_grad():
        ours = models["fastgpt"].eval()(input_ids).logits.float()
        theirs = models["torch"].eval()(input_ids).logits.float()
    difference = float((ours - theirs).abs().max())
    size = float(theirs.abs().max())
    del ours, theirs
    optimizers = {variant: adamw(models[variant].train(), options) for variant in VARIANTS}
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for round_ in range(rounds + 1):
        for variant in VARIANTS if round_ % 2 else reversed(VARIANTS):
            _synchronize(device)
            begin = time.perf_counter()
            training_step(models[variant], optimizers[variant], input_ids, options)
            _synchronize(device)
            if round_:
                times[variant].append(time.perf_counter() - begin)
    return Comparison(
        seconds={variant: statistics.median(times[variant]) for variant in VARIANTS},
        peak_bytes={
            variant: _peak_in_child(variant, folder, input_ids.shape, device)
            for variant in VARIANTS
        },
        tokens=input_ids.numel(),
        logit_difference=difference,
        logit_size=size,
    )


def _build(variant: str, folder: Path, device: str) -> GPT | TorchGPT:
    model = GPT.from_pretrained(folder)
    return (model if variant == "fastgpt" else TorchGPT.like(model)).to(device)


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _peak_in_child(variant: str, folder: Path, shape: torch.Size, device: str) -> int:
    arguments = [variant, str(folder), *map(str, shape), device]
    package_parent = str(Path(fastgpt.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-m", "fastgpt.compare", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(f"the memory of {variant} could not be measured: {result.stderr}")
    return int(json.loads(result.stdout)["peak_bytes"])


def peak_bytes(variant: str, folder: Path, batch: int, context: int, device: str) -> int:
    """Peak memory that two training steps add to this process: weights, optimizer and all."""
    options = TrainOptions(batch=batch, context=context)
    before = _high_water(device)
    model = _build(variant, folder, device).train()
    input_ids = torch.arange(batch * context, device=device).remainder(model.config.vocab_size)
    optimizer = adamw(model, options)
    for _ in range(2):
        training_step(model, optimizer, input_ids.view(batch, context), options)
    return _high_water(device) - before


def _high_water(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss would count the parent that this process was forked from
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on every platform

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    name, where, b, s, place = sys.argv[1:]
    print(json.dumps({"peak_bytes": peak_bytes(name, Path(where), int(b), int(s), place)}))
