"""What the attention of other models of transformers asks for, and which models keep their own."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers as hf

import fastgpt
from fastgpt.integrate.hugging_face import masks
from fastgpt.integrate.hugging_face.attention import fastgpt_attention
from tests.hf_models import HEADS, POSITIONS, VOCAB, WIDTH, build

B, H, S, D = 2, 3, 7, 8
LEAST = torch.finfo(torch.float32).min


def eager_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float = D**-0.5,
    dropout: float = 0.0,
    sinks: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """As models write it, with a sink: one more score of every query, that of no key."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2), weights


class Attention(torch.nn.Module):
    """An attention module of the file of that function."""

    is_causal = False


def qkv(sk: int = S) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, H, S, D, generator=generator)
    k, v = torch.randn(2, B, H, sk, D, generator=generator)
    return q, k, v


def clip_text(positions: int = POSITIONS) -> Any:
    torch.manual_seed(0)
    config = hf.CLIPTextConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
        num_attention_heads=HEADS, max_position_embeddings=positions, eos_token_id=2,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return hf.CLIPTextModel(config).eval()


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_a_causal_mask_in_modules_that_call_themselves_bidirectional(padding: str) -> None:
    own = clip_text()
    model = copy.deepcopy(own)
    assert fastgpt.replace_layers(model, kinds=("attention",)).replaced
    ids = torch.randint(3, VOCAB, (B, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[0, : 4 if padding == "left" else None][-4:] = 0
    with torch.no_grad():
        want = own(ids, attention_mask=mask).last_hidden_state
        got = model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()])


def test_a_keyword_of_the_models_own_attention_runs_that() -> None:
    q, k, v = qkv()
    sinks = torch.randn(1, H, 1, 1)
    with pytest.warns(UserWarning, match="sinks, which only the model's own attention knows"):
        got, _ = fastgpt_attention(Attention(), q, k, v, None, sinks=sinks)
    want, _ = eager_attention_forward(Attention(), q, k, v, None, sinks=sinks)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["indices", "block_indices"])
def test_keys_that_the_model_chooses_are_refused(name: str) -> None:
    chosen = {name: torch.zeros(B, S, 1, dtype=torch.int32)}
    with pytest.raises(NotImplementedError, match=f"{name}: .*sparse attention"):
        fastgpt_attention(Attention(), *qkv(), None, **chosen)


def test_a_query_that_a_bias_lets_see_no_key_averages_all() -> None:
    q, k, v = qkv()
    bias = torch.randn(B, H, S, S, generator=torch.Generator().manual_seed(2))
    bias[:, :, 2] = LEAST
    bias[:, :, 3, 4:] = float("-inf")
    got, _ = fastgpt_attention(Attention(), q, k, v, bias)
    want, _ = eager_attention_forward(Attention(), q, k, v, bias)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got[:, 2], v.mean(2))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_keys_that_are_hidden_from_a_whole_row_never_leak(dtype: torch.dtype) -> None:
    """A row of an encoder without tokens, say."""
    q, k, v = qkv()
    k[0], v[0] = float("nan"), float("nan")
    mask = torch.ones(B, 1, 1, S, dtype=torch.bool)
    mask[0] = False
    if dtype != torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, LEAST)
    for given in (mask, mask.expand(B, 1, S, S)):
        got, _ = fastgpt_attention(Attention(), q, k, v, given)
        assert torch.equal(got[0], torch.zeros(S, H, D))
        want, _ = eager_attention_forward(Attention(), q[1:], k[1:], v[1:], None)
        torch.testing.assert_close(got[1:], want)


def test_a_mask_that_changed_is_read_again() -> None:
    q, k, v = qkv()
    mask = torch.ones(S, S, dtype=torch.bool).tril().expand(B, 1, S, S).clone()
    for hidden in (0, 3):
        mask[:, :, :hidden] = False
        got, _ = fastgpt_attention(Attention(), q, k, v, mask)
        torch.testing.assert_close(got[:, :hidden], v.mean(2)[:, None].expand_as(got[:, :hidden]))


def test_a_position_bias_over_a_cache_that_is_not_full() -> None:
    q, k, v = qkv(sk=S + 4)
    k[:, :, S:], v[:, :, S:] = float("nan"), float("nan")
    bias = torch.randn(1, H, S, S + 4, generator=torch.Generator().manual_seed(3))
    written = torch.ones(B, S, dtype=torch.bool)
    got, _ = fastgpt_attention(Attention(), q, k, v, written, position_bias=bias)
    causal = bias[..., :S].masked_fill(~torch.ones(S, S, dtype=torch.bool).tril(), LEAST)
    want, _ = eager_attention_forward(Attention(), q, k[:, :, :S], v[:, :, :S], causal)
    torch.testing.assert_close(got, want)


def test_one_set_of_queries_for_all_rows() -> None:
    q, k, v = qkv()
    got, _ = fastgpt_attention(Attention(), q[:1], k, v, None)
    want, _ = eager_attention_forward(Attention(), q[:1], k, v, None)
    torch.testing.assert_close(got, want)


def test_masks_that_a_model_slices_have_all_dimensions() -> None:
    of_gemma = SimpleNamespace(model_type="gemma4_text")
    given: dict[str, Any] = {"kv_length": S}
    if hf.__version__.startswith("4."):
        given["cache_position"] = torch.arange(S)
    else:
        given |= {"q_length": S, "device": "cpu"}
    mask = masks.fastgpt_mask(B, config=of_gemma, **given)
    assert mask is not None
    assert torch.equal(mask.expand(B, 1, S, S), torch.ones(B, 1, S, S, dtype=torch.bool).tril())
    small = masks.fastgpt_mask(B, config=SimpleNamespace(model_type="llama"), **given)
    assert small is not None
    assert small.shape == (B, S)


def test_a_model_that_needs_its_own_attention_keeps_it() -> None:
    """GPT-OSS, whose every query has a sink, says that it does not run on torch's SDPA."""
    config = hf.GptOssConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=2, head_dim=12, num_local_experts=2,
        num_experts_per_tok=1, pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    model = hf.GptOssForCausalLM(config)
    report = fastgpt.replace_layers(model, kinds=("attention",))
    assert not report.replaced
    assert any("_supports_sdpa is False" in entry.why for entry in report.left)
    assert model.config._attn_implementation == "eager"


def test_all_or_none_of_a_models_modules_are_swapped() -> None:
    from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

    class Louder(GPTNeoSelfAttention):
        """A subclass of a user's, whose override must not get lost."""

    own = build("gpt_neo")
    next(m for m in own.modules() if isinstance(m, GPTNeoSelfAttention)).__class__ = Louder
    model = copy.deepcopy(own)
    report = fastgpt.replace_layers(model, kinds=("attention",))
    assert [entry.why for entry in report.left] == ["Louder may have a forward of its own"] * 2
    ids = torch.randint(VOCAB, (B, 30))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, own(ids).logits)


def test_the_configuration_that_is_saved_is_the_models(tmp_path: Any) -> None:
    model = build("gpt2")
    fastgpt.replace_layers(model)
    model.save_pretrained(tmp_path)
    assert "fastgpt" not in (tmp_path / "config.json").read_text()
    config = hf.AutoConfig.from_pretrained(tmp_path)
    first, second = hf.GPT2LMHeadModel(config), hf.GPT2LMHeadModel(config)
    before = second.config._attn_implementation
    fastgpt.replace_layers(first)
    assert second.config._attn_implementation == before


def test_a_transformers_that_is_too_old_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    own = build("gpt2")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.46.3")
    with pytest.warns(UserWarning, match=r"transformers 4\.46\.3 stays their own"):
        report = fastgpt.replace_layers(own)
    assert {entry.kind for entry in report} == {"layer_norm"}
    assert own.config._attn_implementation == "eager"


def test_a_convolution_that_gets_the_mask_of_attention() -> None:
    config = hf.Lfm2Config(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=2, layer_types=["full_attention", "conv"],
        pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    own = hf.Lfm2ForCausalLM(config).eval()
    model = copy.deepcopy(own)
    assert fastgpt.replace_layers(model, kinds=("attention",)).replaced
    ids = torch.randint(3, VOCAB, (B, S))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), own.generate(ids, **options))


def test_attention_taken_out_of_its_model_is_reported() -> None:
    for part in (build("gpt_neo").transformer.h[1].attn, build("gpt2").transformer.h):
        report = fastgpt.replace_layers(part, kinds=("attention",))
        assert report.left
        assert not report.replaced
        assert {entry.why for entry in report} == {
            "the model that makes its masks is not here: replace its layers instead"
        }
