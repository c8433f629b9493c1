"""Tokens per second of whole models, before and after `fastgpt.replace_layers`.

    python -m benchmarks.whole_models                 every model here, in a quarter of an hour
    python -m benchmarks.whole_models --only neo      some, by a regular expression

"Before" is the model as transformers builds it (SDPA where it has it, eager for GPT-Neo), "after"
the same model with its layers replaced, in turn in one process. Tokens per second are of the median
time, the ratio is the median of the rounds'. A training step is forward, backward and AdamW;
generation is greedy, through the model's own cache.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers as hf

import fastgpt
from benchmarks import machine
from benchmarks.measure import pattern

CPU = torch.device("cpu")
PROMPT, NEW_TOKENS = 256, 32


@dataclass(frozen=True)
class Model:
    """A model of random weights: the sizes are those of a published one, the depth is less."""

    name: str
    build: Callable[[], Any]
    batch: int
    length: int
    generates: bool = True


@dataclass(frozen=True)
class Pair:
    """Tokens per second before and after, and how many times faster a round was."""

    before: float
    after: float
    ratio: float


@dataclass(frozen=True)
class Row:
    """What was measured of one model."""

    model: str
    attention_before: str
    train: Pair
    generate: Pair | None


def _base(**names: str) -> dict[str, Any]:
    """12 heads of 64, 6 layers, under the names that a configuration has for them."""
    sizes = {"layers": 6, "width": 768, "heads": 12}
    return {name: sizes[what] for what, name in names.items()}


_GPT2 = _base(layers="n_layer", width="n_embd", heads="n_head")
_HF = _base(layers="num_hidden_layers", width="hidden_size", heads="num_attention_heads")

MODELS = (
    Model("GPT-2", lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2)), 1, 1024),
    Model(
        "GPT-Neo (window 256)",
        lambda: hf.GPTNeoForCausalLM(
            hf.GPTNeoConfig(
                num_layers=6, hidden_size=768, num_heads=12,
                attention_types=[[["global", "local"], 3]],
            )
        ),
        1,
        2048,
    ),
    Model(
        "GPT-NeoX",
        lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_HF, intermediate_size=3072)),
        1,
        1024,
    ),
    Model("GPT-J", lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**_GPT2, rotary_dim=32)), 1, 1024),
    Model(
        "OPT", lambda: hf.OPTForCausalLM(hf.OPTConfig(**_HF, word_embed_proj_dim=768)), 1, 1024
    ),
    Model(
        "Llama (GQA 12/4)",
        lambda: hf.LlamaForCausalLM(
            hf.LlamaConfig(**_HF, num_key_value_heads=4, intermediate_size=2048)
        ),
        1,
        1024,
    ),
    Model(
        "Mistral (window 256)",
        lambda: hf.MistralForCausalLM(
            hf.MistralConfig(
                **_HF, num_key_value_heads=4, intermediate_size=2048, sliding_window=256
            )
        ),
        1,
        2048,
    ),
    Model("BERT", lambda: hf.BertForMaskedLM(hf.BertConfig(**_HF)), 4, 512, generates=False),
)  # fmt: skip


def measure(spec: Model, rounds: int) -> Row:
    """Both ways of both measurements, on one model that is switched over and back."""
    torch.manual_seed(0)
    model = spec.build()
    before = model.config._attn_implementation
    ids = torch.randint(1, model.config.vocab_size, (spec.batch, spec.length))
    prompt = ids[:1, :PROMPT]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def train() -> None:
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def generate() -> None:
        model.eval()
        options = {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
        exactly = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        model.generate(prompt, do_sample=False, **options, **exactly)

    found: dict[str, Pair] = {}
    steps = {"train": train, **({"generate": generate} if spec.generates else {})}
    for name, step in steps.items():
        times: list[list[float]] = [[], []]
        for i in range(rounds + 1):
            for after in (False, True):
                if after:
                    fastgpt.replace_layers(model)
                begin = time.perf_counter()
                step()
                taken = time.perf_counter() - begin
                if after:
                    fastgpt.restore_layers(model)
                if i:
                    times[after].append(taken)
        tokens = spec.batch * spec.length if name == "train" else NEW_TOKENS
        rates = [tokens / statistics.median(taken) for taken in times]
        ratios = [own / ours for own, ours in zip(*times, strict=True)]
        found[name] = Pair(*rates, statistics.median(ratios))
    return Row(spec.name, before, found["train"], found.get("generate"))


def line(row: Row) -> str:
    """One row of the table."""

    def columns(pair: Pair | None) -> str:
        if pair is None:
            return ""
        return f"{pair.before:9.1f}{pair.after:9.1f}{pair.ratio:7.2f}x"

    return f"{row.model:<22s}{row.attention_before:<8s}{columns(row.train)}{columns(row.generate)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default="", type=pattern, help="a regular expression on the name of the model"
    )
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    hf.logging.set_verbosity_error()
    print(f"{machine.name_of(CPU)}, torch {torch.__version__}, transformers {hf.__version__}")
    print(f"{'tokens/s':<22s}{'before':<8s}{'training step':>26s}{'generation':>26s}")
    rows = []
    for spec in MODELS:
        if re.search(arguments.only, spec.name, re.IGNORECASE):
            rows.append(measure(spec, arguments.rounds))
            print(line(rows[-1]), flush=True)
    if not arguments.only:
        folder = machine.folder_of(CPU)
        folder.mkdir(parents=True, exist_ok=True)
        document = {
            "machine": machine.name_of(CPU),
            "torch": torch.__version__,
            "transformers": hf.__version__,
            "rows": [asdict(row) for row in rows],
        }
        (folder / "whole_models.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
