"""replace_layers on models of transformers, held to their own eager attention."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers as hf

import fastgpt
from fastgpt.integrate.hugging_face import attention
from tests.hf_models import (
    FAMILIES,
    GENERATING,
    SLIDING,
    VOCAB,
    WINDOW,
    build,
    cross_attending_gpt2,
)

EPS = torch.finfo(torch.float32).eps
B, S = 3, 5 * WINDOW
NEAR: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5}
"""For tests of whether the same is computed at all; others hold it to the rule."""


def batch(padding: str, b: int = B, s: int = S) -> dict[str, Tensor]:
    """Tokens, their mask and labels of a batch padded on the "left", the "right" or not at all."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCAB, (b, s), generator=generator)
    mask = torch.ones(b, s, dtype=torch.long)
    for row, length in ((0, WINDOW + 5), (1, 3)):
        if padding == "left":
            mask[row, :length] = 0
        elif padding == "right":
            mask[row, -length:] = 0
    inputs = {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100)}
    return inputs if padding == "none" else {**inputs, "attention_mask": mask}


def results(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits where a token stands, the loss and every gradient, all float64."""
    model.zero_grad()
    inputs = {n: x.to(model.dtype) if x.is_floating_point() else x for n, x in inputs.items()}
    out = model(**inputs)
    out.loss.backward()
    seen = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    found = {"logits": out.logits[seen], "loss": out.loss}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"gradient of {name}"] = parameter.grad
    return {name: value.detach().double() for name, value in found.items()}


@contextlib.contextmanager
def float64_throughout() -> Iterator[None]:
    """Models that take their softmax in float32, of masks with the least float64, give NaN."""
    finfo, softmax = torch.finfo, torch.nn.functional.softmax

    def least_of_float32(dtype: torch.dtype) -> torch.finfo:
        return finfo(torch.float32 if dtype == torch.float64 else dtype)

    def as_it_comes(x: Tensor, dim: int, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return softmax(x, dim, dtype=None if x.dtype == torch.float64 else dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "finfo", least_of_float32)
        patch.setattr(torch.nn.functional, "softmax", as_it_comes)
        yield


def hold_to_the_rule(got: Any, own: Any, inputs: dict[str, Tensor]) -> None:
    """`got` is as near to the float64 model as the model's own eager float32 is, twice at most."""
    with float64_throughout():
        ref = results(copy.deepcopy(own).double(), inputs)
    low, found = results(own, inputs), results(got, inputs)
    assert found.keys() == ref.keys()
    # What cancels is of the rounding of its terms: the gradient of a key's bias, of the others';
    # the loss, of the logarithm and the logit that it is the difference of.
    largest = max(float(x.abs().max()) for name, x in ref.items() if name.startswith("gradient"))
    cancelling = {"logits": 0.0, "loss": 8 * EPS * float(ref["loss"])}
    for name, want in ref.items():
        error = float((found[name] - want).abs().max())
        allowed = 2 * float((low[name] - want).abs().max()) + EPS * float(want.abs().max())
        allowed += cancelling.get(name, 8 * EPS * largest)
        assert error <= allowed, f"{name}: error {error:.2e} exceeds {allowed:.2e}"


def backends_of(model: Any, **inputs: Any) -> list[str]:
    """The first line of each decision about attention."""
    lines = str(fastgpt.explain(model, **inputs)).splitlines()
    return [line for line in lines if line.startswith("attention: ")]


def replaced(own: Any, **options: Any) -> Any:
    model = copy.deepcopy(own)
    fastgpt.replace_layers(model, **options)
    return model


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_gradients(family: str, padding: str) -> None:
    own = build(family)
    model = replaced(own)
    hold_to_the_rule(model, own, batch(padding))
    ran = backends_of(model, **batch(padding))
    assert len(ran) == 2
    assert not any("torch" in line.split()[1] for line in ran)


@pytest.mark.parametrize("family", SLIDING)
def test_a_window_stays_a_window(family: str) -> None:
    """Nothing of size (s, s) is made: the band reaches the kernel as one."""
    for padding in ("none", "left"):
        ran = backends_of(replaced(build(family)), **batch(padding))
        assert any(f"window={WINDOW}" in line for line in ran)
        assert not any("mask" in line or "bias" in line for line in ran)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "bert_decoder"])
def test_in_bfloat16(family: str) -> None:
    """As near to float32 as the model's own bfloat16 is."""
    own = build(family)
    inputs = {**batch("right"), "labels": None}
    seen = inputs["attention_mask"].bool()
    with torch.no_grad():
        want = own(**inputs).logits[seen]
        low = copy.deepcopy(own).bfloat16()
        error = (replaced(low)(**inputs).logits[seen].float() - want).square().mean().sqrt()
        allowed = (low(**inputs).logits[seen].float() - want).square().mean().sqrt()
    assert error <= 2 * allowed


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("family", GENERATING)
def test_greedy_generation(family: str, padding: str, cache: str) -> None:
    if family == "bert_decoder" and cache == "static" and hf.__version__.startswith("4."):
        pytest.skip("transformers 4 makes no masks for a BERT with a static cache")
    own = build(family)
    inputs = batch(padding, s=2 * WINDOW + 4)
    del inputs["labels"]
    options = {"max_new_tokens": 2 * WINDOW, "do_sample": False, "pad_token_id": 0}
    options |= {"eos_token_id": None, "attention_mask": torch.ones_like(inputs["input_ids"])}
    want = own.generate(**{**options, **inputs})
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = replaced(own).generate(**{**options, **inputs})
    assert torch.equal(got, want)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gptj", "opt", "llama"])
def test_the_steps_of_a_static_cache_are_alike(family: str) -> None:
    """So that one compiled program serves them all."""
    model = replaced(build(family))
    seen = []

    def see(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs["attention_mask"]
        seen.append((tuple(kwargs["input_ids"].shape), tuple(mask.shape), mask.dtype))

    model.register_forward_pre_hook(see, with_kwargs=True)
    inputs = batch("left", s=10)
    del inputs["labels"]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"cache_implementation": "static", "disable_compile": True}
    model.generate(**inputs, **options)
    prefill, *steps = seen
    assert len(steps) == 3
    assert len(set(steps)) == 1
    assert prefill != steps[0]


def test_beams_and_a_prompt_in_two_parts() -> None:
    own = build("gpt_neo")
    model = replaced(own)
    ids = batch("none", b=2, s=20)["input_ids"]
    mask = torch.ones_like(ids)
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    want = own.generate(ids, attention_mask=mask, eos_token_id=None, **options)
    got = model.generate(ids, attention_mask=mask, eos_token_id=None, **options)
    assert torch.equal(got, want)
    with torch.no_grad():
        first = model(ids[:, :11], use_cache=True)
        second = model(ids[:, 11:], past_key_values=first.past_key_values)
        torch.testing.assert_close(second.logits, own(ids).logits[:, 11:])


def test_cross_attention() -> None:
    own = cross_attending_gpt2()
    states = torch.randn(B, 7, 48)
    visible = torch.ones(B, 7, dtype=torch.long)
    visible[0, 4:] = 0
    for given in ({}, {"encoder_attention_mask": visible}):
        inputs = {**batch("right"), "encoder_hidden_states": states, **given}
        hold_to_the_rule(replaced(own), own, inputs)


def test_what_is_hidden_from_a_whole_row_stays_hidden() -> None:
    """Not even a row of an encoder that is nothing but padding is read."""
    model = replaced(cross_attending_gpt2())
    states = torch.randn(B, 7, 48)
    visible = torch.ones(B, 7, dtype=torch.long)
    visible[0, 4:] = 0
    visible[1] = 0
    inputs = {**batch("right"), "encoder_attention_mask": visible}
    with torch.no_grad():
        want = model(**inputs, encoder_hidden_states=states).logits
        states[visible == 0] = 1e6
        assert torch.equal(model(**inputs, encoder_hidden_states=states).logits, want)


def test_two_lengths_of_bert_attend_to_one_another() -> None:
    """An encoder-decoder of two BERTs, each with a configuration of its own."""
    torch.manual_seed(0)
    pair = hf.EncoderDecoderModel(encoder=build("bert").bert, decoder=_cross_attending_bert())
    own = pair.eval()
    inputs = {**batch("right"), "decoder_input_ids": batch("none", s=9)["input_ids"]}
    inputs["labels"] = inputs["decoder_input_ids"]
    model = replaced(own)
    with torch.no_grad():
        want, got = own(**inputs), model(**inputs)
    torch.testing.assert_close(got.logits, want.logits)
    assert len(backends_of(model, **inputs)) == 6


def _cross_attending_bert() -> Any:
    config = copy.deepcopy(build("bert_decoder").config)
    config.add_cross_attention = True
    config._attn_implementation = "eager"
    return hf.BertLMHeadModel(config)


def test_a_mask_of_the_users_own() -> None:
    """(b, 1, s, s), bool and float: a prefix that sees itself whole, then causal."""
    seen = torch.ones(S, S, dtype=torch.bool).tril()
    seen[:10, :10] = True
    seen = seen.expand(B, 1, S, S)
    added = torch.zeros(B, 1, S, S).masked_fill(~seen, torch.finfo(torch.float32).min)
    own = build("llama")
    model = replaced(own)
    ids = batch("none")["input_ids"]
    with torch.no_grad():
        want = own(ids, attention_mask=added).logits
        torch.testing.assert_close(model(ids, attention_mask=added).logits, want)
        torch.testing.assert_close(model(ids, attention_mask=seen).logits, want)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_packed_documents_do_not_see_one_another(family: str) -> None:
    own = build(family)
    model = replaced(own)
    ids = batch("none", b=1)["input_ids"]
    lengths = (17, S - 17)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        alone = torch.cat([own(part).logits for part in ids.split(lengths, dim=1)], dim=1)
        packed = model(ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(packed, alone)
        offsets = torch.tensor([0, 17, S], dtype=torch.int32)
        told = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
        told |= {"max_length_q": S - 17, "max_length_k": S - 17}
        ran = backends_of(model, input_ids=ids, position_ids=positions, use_cache=False)
        packed = model(ids, position_ids=positions, use_cache=False, **told).logits
    torch.testing.assert_close(packed, alone)
    assert ran


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_are_asked_for_come_from_the_model(family: str) -> None:
    own = build(family)
    model = replaced(own)
    inputs = {**batch("right"), "labels": None}
    attention._warned.clear()
    with torch.no_grad():
        want = own(**inputs, output_attentions=True)
        with pytest.warns(UserWarning, match="output_attentions=True, and a fused kernel"):
            got = model(**inputs, output_attentions=True)
        explained = str(fastgpt.explain(model, **inputs, output_attentions=True))
    assert len(got.attentions) == 2
    for x, y in zip(got.attentions, want.attentions, strict=True):
        torch.testing.assert_close(x, y)
    assert "attention: torch" in explained
    assert "output_attentions=True" in explained
    with fastgpt.backend("cpu"), pytest.raises(RuntimeError, match="output_attentions"):
        model(**inputs, output_attentions=True)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "opt", "llama"])
def test_gradient_checkpointing(family: str) -> None:
    own = build(family)
    model = replaced(own).train()
    model.gradient_checkpointing_enable()
    hold_to_the_rule(model, own, batch("left"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "mistral"])
def test_compiled(family: str) -> None:
    own = build(family)
    model = replaced(own)
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    for padding in ("none", "right", "left"):
        inputs = batch(padding)
        model.zero_grad()
        out = compiled(**inputs, use_cache=False)
        out.loss.backward()
        got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        want = results(own, inputs)
        seen = inputs.get("attention_mask", torch.ones(B, S)).bool()
        torch.testing.assert_close(out.logits[seen].double(), want.pop("logits"), **NEAR)
        torch.testing.assert_close(out.loss.double(), want.pop("loss"), **NEAR)
        for name, gradient in want.items():
            mine = got[name.removeprefix("gradient of ")].double()
            torch.testing.assert_close(mine, gradient, **NEAR)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", ["gpt_neo", "mistral", "opt"])
def test_inference_mode(family: str, padding: str) -> None:
    own = build(family)
    inputs = batch(padding)
    seen = inputs["attention_mask"].bool()
    with torch.inference_mode():
        given = {name: x.clone() for name, x in inputs.items()}
        got, want = replaced(own)(**given), own(**given)
    torch.testing.assert_close(got.logits[seen], want.logits[seen], **NEAR)
    torch.testing.assert_close(got.loss, want.loss, **NEAR)


def test_dropout_is_that_of_training() -> None:
    """Dropped weights: another result on every call, none in eval mode."""
    model = build("gpt2")
    for block in model.transformer.h:
        block.attn.attn_dropout.p = 0.5
    fastgpt.replace_layers(model)
    ids = batch("none")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_else_stays(family: str) -> None:
    own = build(family)
    model = copy.deepcopy(own)
    calls = []
    norm = next(m for m in model.modules() if "Norm" in type(m).__name__)
    norm.register_forward_hook(lambda *_: calls.append(1))
    parameters = dict(model.named_parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        want = own(batch("none")["input_ids"]).logits
    report = fastgpt.replace_layers(model)
    assert all(parameters[n] is p for n, p in model.named_parameters())
    assert model.state_dict().keys() == before.keys()
    assert not model.training
    model(batch("none")["input_ids"])
    assert calls
    assert own.config._attn_implementation == "eager", "another model's configuration was changed"
    assert fastgpt.restore_layers(model) > 0
    assert fastgpt.restore_layers(model) == 0
    assert not any("fastgpt" in type(m).__module__ for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model(batch("none")["input_ids"]).logits, want)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    kinds = {entry.kind for entry in report.replaced}
    assert "attention" in kinds


def test_models_of_one_configuration_are_replaced_one_by_one() -> None:
    first = build("gpt2")
    second = type(first)(first.config).eval()
    assert first.config is second.config
    fastgpt.replace_layers(second)
    assert first.config._attn_implementation == "eager"
    assert second.config._attn_implementation == "fastgpt"
    assert second.transformer.h[0].attn.config is second.config
    second.config.use_cache = False
    fastgpt.restore_layers(second)
    assert second.config._attn_implementation == "eager"
    assert second.config.use_cache is False


def test_copies_and_pickles_of_a_replaced_model() -> None:
    own = build("gpt_neo")
    model = replaced(own)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    ids = batch("none")["input_ids"]
    with torch.no_grad():
        want = model(ids).logits
        for other in (copy.deepcopy(model), loaded):
            assert torch.equal(other(ids).logits, want)
            assert fastgpt.restore_layers(other) > 0
            assert torch.equal(other(ids).logits, own(ids).logits)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "gptj", "llama", "bert"])
def test_from_pretrained_with_the_name(family: str, tmp_path: Any) -> None:
    own = build(family)
    own.save_pretrained(tmp_path)
    model = type(own).from_pretrained(tmp_path, attn_implementation="fastgpt")
    inputs = {**batch("left"), "labels": None}
    seen = inputs["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits[seen], own(**inputs).logits[seen])
    ran = backends_of(model, **inputs)
    assert len(ran) == 2
    assert not any("torch" in line.split()[1] for line in ran)
    report = fastgpt.replace_layers(model, kinds=("attention",))
    assert [entry.why for entry in report] == ["it was already"] * 2


def test_lora_on_top(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    own = build("gpt2")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"], lora_alpha=8)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(copy.deepcopy(own), config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model = copy.deepcopy(wrapped)
    report = fastgpt.replace_layers(model)
    assert [e.module for e in report if e.kind == "attention"] == [
        f"base_model.model.transformer.h.{i}.attn" for i in range(2)
    ]
    hold_to_the_rule(model.eval(), wrapped.eval(), batch("left"))


def test_a_paged_cache_is_refused() -> None:
    q = torch.randn(1, 4, 5, 12)
    with pytest.raises(NotImplementedError, match="paged cache"):
        attention.fastgpt_attention(torch.nn.Module(), q, q, q, None, cache=object())


@pytest.mark.parametrize(
    ("mask", "error", "match"),
    [
        (torch.ones(1, 5), TypeError, "bool or integers"),
        (torch.ones(1, 6, dtype=torch.bool), ValueError, "at most 5 keys, got 6"),
        (torch.ones(1, 5, 5, dtype=torch.bool), ValueError, "got shape"),
        ("causal", TypeError, "expected a tensor or None"),
    ],
)
def test_masks_that_nobody_makes(mask: Any, error: type[Exception], match: str) -> None:
    q = torch.randn(1, 4, 5, 12)
    with pytest.raises(error, match=match):
        attention.fastgpt_attention(torch.nn.Module(), q, q, q, mask)
