"""GPTConfig: presets against the papers' tables, validation, windows, JSON."""

import dataclasses

import pytest

from fastgpt import GPTConfig
from fastgpt.config import PRESETS

SMALL = {"vocab_size": 11, "n_positions": 8, "n_layer": 3, "n_embd": 12, "n_head": 3}

# n_layer, n_embd, n_head, head_dim, n_positions, vocab_size.
# GPT-1: Radford et al. 2018, section 4.1. GPT-2: Radford et al. 2019, table 2, and the released
# checkpoints. GPT-3: Brown et al. 2020, table 2.1.
PAPERS = {
    "gpt1": (12, 768, 12, 64, 512, 40478),
    "gpt2": (12, 768, 12, 64, 1024, 50257),
    "gpt2-medium": (24, 1024, 16, 64, 1024, 50257),
    "gpt2-large": (36, 1280, 20, 64, 1024, 50257),
    "gpt2-xl": (48, 1600, 25, 64, 1024, 50257),
    "gpt3-small": (12, 768, 12, 64, 2048, 50257),
    "gpt3-medium": (24, 1024, 16, 64, 2048, 50257),
    "gpt3-large": (24, 1536, 16, 96, 2048, 50257),
    "gpt3-xl": (24, 2048, 24, 128, 2048, 50257),
    "gpt3-2.7b": (32, 2560, 32, 80, 2048, 50257),
    "gpt3-6.7b": (32, 4096, 32, 128, 2048, 50257),
    "gpt3-13b": (40, 5140, 40, 128, 2048, 50257),
    "gpt3-175b": (96, 12288, 96, 128, 2048, 50257),
}


def test_there_are_thirteen_presets():
    assert list(PRESETS) == list(PAPERS)


@pytest.mark.parametrize("name", PAPERS)
def test_preset_has_the_papers_shape(name):
    config = GPTConfig.preset(name)
    shape = (config.n_layer, config.n_embd, config.n_head, config.d_head)
    assert (*shape, config.n_positions, config.vocab_size) == PAPERS[name]
    assert config.norm == ("post" if name == "gpt1" else "pre")
    windows = [config.window_of(layer) for layer in range(config.n_layer)]
    if name.startswith("gpt3"):
        assert windows == [None, 256] * (config.n_layer // 2)
    else:
        assert windows == [None] * config.n_layer


def test_preset_takes_changes():
    config = GPTConfig.preset("gpt3-small", window=64, n_layer=2)
    assert (config.window_of(1), config.n_layer, config.n_embd) == (64, 2, 768)


def test_unknown_preset_lists_those_there_are():
    with pytest.raises(ValueError, match=r"gpt3-175b, got 'gpt4'"):
        GPTConfig.preset("gpt4")
    with pytest.raises(TypeError, match=r"name: expected one of gpt1, .*, got \[\]"):
        GPTConfig.preset([])


def test_pattern_repeats_over_the_depth():
    config = GPTConfig(**SMALL, window=2, attention_pattern=("banded", "dense"))
    assert [config.window_of(layer) for layer in range(3)] == [2, None, 2]
    for layer in (-1, 3):
        with pytest.raises(ValueError, match=f"layer: expected 0 to 2, got {layer}"):
            config.window_of(layer)
    for layer in (0.5, "a", True):
        with pytest.raises(TypeError, match=f"layer: expected an int from 0 to 2, got {layer!r}"):
            config.window_of(layer)


def test_head_dim_frees_the_width_from_the_heads():
    config = GPTConfig(**{**SMALL, "n_embd": 13}, head_dim=5)
    assert (config.d_head, config.d_attn, config.d_mlp) == (5, 15, 52)
    assert GPTConfig(**SMALL).d_head == 4


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"vocab_size": 0}, ValueError, "vocab_size: expected an int >= 1, got 0"),
        ({"n_layer": 2.0}, TypeError, "n_layer: expected an int >= 1, got 2.0"),
        ({"n_head": True}, TypeError, "n_head: expected an int >= 1, got True"),
        ({"window": 0}, ValueError, "window: expected an int >= 1, got 0"),
        ({"n_head": 5}, ValueError, "n_embd: expected a multiple of n_head = 5"),
        ({"head_dim": 257}, ValueError, "head_dim: expected at most 256, got 257"),
        ({"n_embd": 1024, "n_head": 2}, ValueError, "head_dim: expected at most 256, got 512"),
        ({"attention_pattern": ()}, ValueError, "attention_pattern"),
        ({"attention_pattern": ("local",)}, ValueError, "attention_pattern"),
        ({"attention_pattern": "dense"}, TypeError, "attention_pattern"),
        ({"dropout": 1.0}, ValueError, "dropout: expected 0 <= dropout < 1, got 1.0"),
        ({"dropout": "0.1"}, TypeError, "dropout: expected a number"),
        ({"bias": 1}, TypeError, "bias: expected a bool, got 1"),
        ({"tie_embeddings": None}, TypeError, "tie_embeddings"),
        ({"norm": "sandwich"}, ValueError, "norm: expected one of pre, post, got 'sandwich'"),
        ({"layer_norm_eps": 0}, ValueError, "layer_norm_eps"),
        ({"layer_norm_eps": float("nan")}, ValueError, "layer_norm_eps"),
        ({"attention_scale": -1.0}, ValueError, "attention_scale"),
        ({"activation": "relu"}, ValueError, "activation: expected one of gelu_tanh, gelu"),
    ],
)
def test_impossible_values_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        GPTConfig(**{**SMALL, **changes})


@pytest.mark.parametrize("name", ["gpt1", "gpt3-13b"])
def test_json_round_trip(name):
    config = GPTConfig.preset(name)
    assert GPTConfig.from_json(config.to_json()) == config
    assert GPTConfig.from_dict(config.to_dict()) == config


def test_from_dict_names_unknown_and_missing_fields():
    with pytest.raises(ValueError, match="no field n_ctx, rope"):
        GPTConfig.from_dict({**SMALL, "rope": True, "n_ctx": 1})
    with pytest.raises(ValueError, match="needs the field n_layer, n_head"):
        GPTConfig.from_dict({"vocab_size": 1, "n_positions": 1, "n_embd": 1})
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        GPTConfig.from_json("[]")


def test_config_is_a_value():
    config = GPTConfig(**SMALL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_layer = 4
    assert hash(config) == hash(GPTConfig(**SMALL))
    assert dataclasses.replace(config, n_layer=4).n_layer == 4
