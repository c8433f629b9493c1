"""Small models of transformers with random weights, of every family that fastgpt adapts to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

VOCAB, WIDTH, HEADS, POSITIONS, WINDOW = 97, 48, 4, 96, 8
_TOKENS: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}


def _gpt2(**changes: Any) -> Any:
    config = hf.GPT2Config(
        n_layer=2, n_embd=WIDTH, n_head=HEADS, n_positions=POSITIONS, **_TOKENS,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **changes,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config)


def _gpt_neo() -> Any:
    config = hf.GPTNeoConfig(
        num_layers=2, attention_types=[[["global", "local"], 1]], hidden_size=WIDTH,
        num_heads=HEADS, window_size=WINDOW, max_position_embeddings=POSITIONS, **_TOKENS,
        attention_dropout=0.0, embed_dropout=0.0, resid_dropout=0.0,
    )  # fmt: skip
    return hf.GPTNeoForCausalLM(config)


def _gpt_neox() -> Any:
    config = hf.GPTNeoXConfig(
        num_hidden_layers=2, hidden_size=WIDTH, num_attention_heads=HEADS,
        intermediate_size=2 * WIDTH, max_position_embeddings=POSITIONS, **_TOKENS,
        attention_dropout=0.0, hidden_dropout=0.0,
    )  # fmt: skip
    return hf.GPTNeoXForCausalLM(config)


def _gptj() -> Any:
    config = hf.GPTJConfig(
        n_layer=2, n_embd=WIDTH, n_head=HEADS, rotary_dim=8, n_positions=POSITIONS, **_TOKENS,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return hf.GPTJForCausalLM(config)


def _opt(**changes: Any) -> Any:
    config = hf.OPTConfig(
        num_hidden_layers=2, hidden_size=WIDTH, num_attention_heads=HEADS, ffn_dim=2 * WIDTH,
        word_embed_proj_dim=WIDTH, max_position_embeddings=POSITIONS, pad_token_id=1, **_TOKENS,
        dropout=0.0, attention_dropout=0.0, **changes,
    )  # fmt: skip
    return hf.OPTForCausalLM(config)


def _bert(**changes: Any) -> Any:
    config = hf.BertConfig(
        num_hidden_layers=2, hidden_size=WIDTH, num_attention_heads=HEADS,
        intermediate_size=2 * WIDTH, max_position_embeddings=POSITIONS, vocab_size=VOCAB,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **changes,
    )  # fmt: skip
    return (hf.BertLMHeadModel if changes else hf.BertForMaskedLM)(config)


def _rotary(config: type, model: type, **changes: Any) -> Any:
    values = {
        "num_hidden_layers": 2, "hidden_size": WIDTH, "num_attention_heads": HEADS,
        "num_key_value_heads": 2, "intermediate_size": 2 * WIDTH,
        "max_position_embeddings": POSITIONS, **_TOKENS,
    }  # fmt: skip
    return model(config(**values, **changes))


def _qwen2() -> Any:
    """One dense layer and one sliding layer."""
    return _rotary(
        hf.Qwen2Config, hf.Qwen2ForCausalLM, use_sliding_window=True, sliding_window=WINDOW,
        max_window_layers=1,
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], Any]] = {
    "gpt2": _gpt2,
    "gpt2_scaled_by_layer": lambda: _gpt2(scale_attn_by_inverse_layer_idx=True),
    "gpt_neo": _gpt_neo,
    "gpt_neox": _gpt_neox,
    "gptj": _gptj,
    "opt": _opt,
    "opt_post_norm": lambda: _opt(do_layer_norm_before=False),
    "bert": _bert,
    "bert_decoder": lambda: _bert(is_decoder=True),
    "llama": lambda: _rotary(hf.LlamaConfig, hf.LlamaForCausalLM),
    "mistral": lambda: _rotary(hf.MistralConfig, hf.MistralForCausalLM, sliding_window=WINDOW),
    "qwen2": _qwen2,
}
GENERATING = [name for name in FAMILIES if name != "bert"]
SLIDING = ("gpt_neo", "mistral", "qwen2")


def build(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of a family in eval mode with eager attention, and without dropout."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval().to(dtype)
    model.config._attn_implementation = "eager"
    if family.startswith("bert") and int(hf.__version__.split(".")[0]) < 5:
        from transformers.models.bert.modeling_bert import BertSdpaSelfAttention, BertSelfAttention

        for module in model.modules():  # there the class decides
            if isinstance(module, BertSdpaSelfAttention):
                module.__class__ = BertSelfAttention
        model.bert.attn_implementation = "eager"
    return model


def cross_attending_gpt2() -> Any:
    """A decoder that also attends to the states of an encoder."""
    torch.manual_seed(0)
    model = _gpt2(add_cross_attention=True).eval()
    model.config._attn_implementation = "eager"
    return model
