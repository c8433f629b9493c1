"""replace_layers on real pretrained weights: as near to eager attention as torch's SDPA is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers as hf

import fastgpt

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from _shared import model_folder

EPS = torch.finfo(torch.float32).eps


def folder_of(name: str) -> Path:
    try:
        return model_folder(name)
    except SystemExit as error:
        pytest.skip(str(error))


def results(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model gives where a token stands, its loss and every gradient."""
    model.zero_grad()
    out = model(**inputs)
    last = out.logits if "logits" in out else out.last_hidden_state
    seen = inputs["attention_mask"].bool()
    loss = out.loss if "labels" in inputs else last[seen].square().mean()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {"output": last[seen], "loss": loss, **gradients}
    return {name: value.detach().clone() for name, value in found.items()}


def hold(model: Any, inputs: dict[str, Tensor]) -> None:
    """Ours is at most twice as far from eager as SDPA is, in the norm of each tensor.

    Without the loss, in which both share torch's rounding: at 49152 classes ours is nearer to
    float64 by an order of magnitude, and so as far from both.
    """
    before = model.config._attn_implementation
    own = results(model, inputs)
    model.set_attn_implementation("sdpa")
    sdpa = results(model, inputs)
    model.set_attn_implementation(before)
    report = fastgpt.replace_layers(model, kinds=("attention", "layer_norm"))
    assert any(entry.kind == "attention" for entry in report.replaced)
    ours = results(model, inputs)
    fastgpt.restore_layers(model)
    again = results(model, inputs)
    if "labels" in inputs:
        fastgpt.replace_layers(model, kinds=("loss",))
        torch.testing.assert_close(results(model, inputs)["loss"], own["loss"])
        fastgpt.restore_layers(model)
    assert ours.keys() == own.keys()
    largest = max(float(x.norm()) for name, x in own.items() if name not in ("output", "loss"))
    for name, want in own.items():
        assert torch.equal(again[name], want), f"{name}: restore_layers did not restore it"
        error, allowed = (float((x[name] - want).norm()) for x in (ours, sdpa))
        allowed = 2 * allowed + 8 * EPS * (float(want.norm()) + largest)
        assert error <= allowed, f"{name}: error {error:.2e} exceeds {allowed:.2e}"


def padded(vocabulary: int, lengths: tuple[int, ...], side: str) -> dict[str, Tensor]:
    s = max(lengths)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, min(vocabulary, 30000), (len(lengths), s), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, s - length if side == "left" else 0 :][:length] = 1
    return {"input_ids": ids, "attention_mask": mask}


def test_bert() -> None:
    """MiniLM: 6 layers of BERT."""
    if hf.__version__.startswith("4."):
        pytest.skip("transformers 4 cannot switch BERT's attention on a live model")
    model = hf.AutoModel.from_pretrained(folder_of("minilm"), attn_implementation="eager")
    hold(model.eval(), padded(model.config.vocab_size, (48, 31, 5), "right"))


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_smollm2(side: str) -> None:
    """SmolLM2-135M-Instruct: 30 layers of Llama, 9 heads over 3."""
    model = hf.AutoModelForCausalLM.from_pretrained(
        folder_of("smollm2"), attn_implementation="eager"
    ).eval()
    inputs = padded(model.config.vocab_size, (40, 22), side)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    hold(model, inputs)


@pytest.mark.slow
def test_smollm2_continues_as_before() -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(
        folder_of("smollm2"), attn_implementation="eager"
    ).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder_of("smollm2"), padding_side="left")
    prompts = ["The capital of France is", "Once upon a time, in a village by the sea,"]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    want = model.generate(**inputs, **options)
    fastgpt.replace_layers(model)
    assert torch.equal(model.generate(**inputs, **options), want)
