"""GPTConfig: the shape of a decoder, and the thirteen published ones."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

PATTERN_NAMES = ("dense", "banded")


@dataclass(frozen=True)
class GPTConfig:
    """The shape and the hyperparameters of a `GPT`.

    Args:
        vocab_size: number of token ids.
        n_positions: the longest sequence, padding included.
        n_layer, n_embd, n_head: blocks, width, attention heads.
        head_dim: width of a head, 1 to 256. Default n_embd / n_head; given explicitly,
            n_head * head_dim need not equal n_embd.
        window: how many keys a query of a banded layer sees, its own included.
        attention_pattern: "dense" or "banded" per layer, repeated over the depth.
        dropout: probability after the embeddings, in attention, and after each projection.
        bias: whether linear layers and layer norms have a bias.
        tie_embeddings: whether the output matrix is the token embedding.
        norm: "pre" (GPT-2 on: norm before attention and MLP, one more at the end) or "post"
            (GPT-1: norm after each residual addition).
        layer_norm_eps: added to the variance.
        attention_scale: factor on the attention scores; None is 1 / sqrt(head_dim).
        activation: "gelu_tanh" (the GPT family's own approximation) or "gelu" (exact).

    Raises:
        ValueError: a field has an impossible value; the message names it.
        TypeError: a field has the wrong type.
    """

    vocab_size: int
    n_positions: int
    n_layer: int
    n_embd: int
    n_head: int
    head_dim: int | None = None
    window: int = 256
    attention_pattern: tuple[str, ...] = ("dense", "banded")
    dropout: float = 0.0
    bias: bool = True
    tie_embeddings: bool = True
    norm: str = "pre"
    layer_norm_eps: float = 1e-5
    attention_scale: float | None = None
    activation: str = "gelu_tanh"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_layer", "n_embd", "n_head", "window"):
            check_count(name, getattr(self, name))
        if self.head_dim is not None:
            check_count("head_dim", self.head_dim)
        elif self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd: expected a multiple of n_head = {self.n_head} (or give head_dim), "
                f"got {self.n_embd}"
            )
        if self.d_head > 256:
            raise ValueError(f"head_dim: expected at most 256, got {self.d_head}")
        self._check_pattern()
        for name in ("bias", "tie_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {getattr(self, name)!r}")
        check_number("dropout", self.dropout)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected 0 <= dropout < 1, got {self.dropout}")
        check_number("layer_norm_eps", self.layer_norm_eps)
        if not 0.0 < self.layer_norm_eps < math.inf:
            raise ValueError(f"layer_norm_eps: expected a number > 0, got {self.layer_norm_eps}")
        if self.attention_scale is not None:
            check_number("attention_scale", self.attention_scale)
            if not 0.0 < self.attention_scale < math.inf:
                raise ValueError(
                    f"attention_scale: expected None or a number > 0, got {self.attention_scale}"
                )
        _check_choice("norm", self.norm, ("pre", "post"))
        _check_choice("activation", self.activation, ("gelu_tanh", "gelu"))

    def _check_pattern(self) -> None:
        pattern = self.attention_pattern
        if isinstance(pattern, str) or not isinstance(pattern, (tuple, list)):
            raise TypeError(f"attention_pattern: expected a tuple of names, got {pattern!r}")
        if not pattern or any(name not in PATTERN_NAMES for name in pattern):
            raise ValueError(
                f"attention_pattern: expected a non-empty tuple of 'dense' and 'banded', "
                f"got {tuple(pattern)!r}"
            )
        object.__setattr__(self, "attention_pattern", tuple(pattern))

    @property
    def d_head(self) -> int:
        """The width of one head: `head_dim`, or n_embd / n_head where that is None."""
        return self.n_embd // self.n_head if self.head_dim is None else self.head_dim

    @property
    def d_attn(self) -> int:
        """The width of all heads together: n_head * d_head."""
        return self.n_head * self.d_head

    @property
    def d_mlp(self) -> int:
        """The hidden width of the MLP: 4 * n_embd in every published GPT."""
        return 4 * self.n_embd

    def window_of(self, layer: int) -> int | None:
        """How many keys a query of `layer` (0 to n_layer - 1) sees; None: the layer is dense.

        Raises:
            ValueError: there is no such layer.
            TypeError: layer is no int.
        """
        check_int("layer", layer, f"from 0 to {self.n_layer - 1}")
        if not 0 <= layer < self.n_layer:
            raise ValueError(f"layer: expected 0 to {self.n_layer - 1}, got {layer}")
        name = self.attention_pattern[layer % len(self.attention_pattern)]
        return self.window if name == "banded" else None

    @property
    def windows(self) -> tuple[int | None, ...]:
        """`window_of` each layer."""
        return tuple(self.window_of(layer) for layer in range(self.n_layer))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> GPTConfig:
        """The configuration of a published model, with `changes` to single fields.

        GPT-1 from Radford et al. 2018, GPT-2 from Radford et al. 2019 and its released
        checkpoints, GPT-3 from Brown et al. 2020 (https://arxiv.org/abs/2005.14165), table 2.1.
        GPT-3 alternates dense and locally banded layers; the paper does not give the band's
        width, which here is that of GPT-Neo, 256.

        Raises:
            ValueError: there is no such preset; the message lists them.
            TypeError: name is no string.
        """
        if not isinstance(name, str):
            raise TypeError(f"name: expected one of {', '.join(PRESETS)}, got {name!r}")
        if name not in PRESETS:
            raise ValueError(f"name: expected one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **changes})

    def to_dict(self) -> dict[str, Any]:
        """Every field as a plain value that JSON can hold."""
        return {**asdict(self), "attention_pattern": list(self.attention_pattern)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GPTConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: an unknown field, a missing one, or an impossible value.
        """
        names = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - names)
        if unknown:
            raise ValueError(f"GPTConfig has no field {', '.join(unknown)}")
        missing = [name for name in _REQUIRED if name not in values]
        if missing:
            raise ValueError(f"GPTConfig needs the field {', '.join(missing)}")
        return cls(**values)

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> GPTConfig:
        """The inverse of `to_json`.

        Raises:
            ValueError: the text is not a JSON object, or as `from_dict`.
        """
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"text: expected a JSON object, got {type(values).__name__}")
        return cls.from_dict(values)


_REQUIRED = ("vocab_size", "n_positions", "n_layer", "n_embd", "n_head")


def check_config(config: object) -> None:
    """TypeError unless `config` is a `GPTConfig`."""
    if not isinstance(config, GPTConfig):
        raise TypeError(f"config: expected a GPTConfig, got {type(config).__name__}")


def check_int(name: str, value: object, expected: str) -> None:
    """TypeError unless `value` is an int; `expected` says which, as `>= 1`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int {expected}, got {value!r}")


def check_count(name: str, value: int) -> None:
    """TypeError or ValueError unless `value` is an int of at least 1."""
    check_int(name, value, ">= 1")
    if value < 1:
        raise ValueError(f"{name}: expected an int >= 1, got {value}")


def check_number(name: str, value: object) -> None:
    """TypeError unless `value` is a number, and no bool."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _gpt2(n_layer: int, n_embd: int, n_head: int) -> dict[str, Any]:
    return {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_layer": n_layer,
        "n_embd": n_embd,
        "n_head": n_head,
        "attention_pattern": ("dense",),
    }


def _gpt3(n_layer: int, n_embd: int, n_head: int, head_dim: int) -> dict[str, Any]:
    return {
        "vocab_size": 50257,
        "n_positions": 2048,
        "n_layer": n_layer,
        "n_embd": n_embd,
        "n_head": n_head,
        "head_dim": head_dim,
        "attention_pattern": ("dense", "banded"),
    }


PRESETS: dict[str, dict[str, Any]] = {
    "gpt1": {
        "vocab_size": 40478,
        "n_positions": 512,
        "n_layer": 12,
        "n_embd": 768,
        "n_head": 12,
        "attention_pattern": ("dense",),
        "dropout": 0.1,
        "norm": "post",
    },
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "gpt3-small": _gpt3(12, 768, 12, 64),
    "gpt3-medium": _gpt3(24, 1024, 16, 64),
    "gpt3-large": _gpt3(24, 1536, 16, 96),
    "gpt3-xl": _gpt3(24, 2048, 24, 128),
    "gpt3-2.7b": _gpt3(32, 2560, 32, 80),
    "gpt3-6.7b": _gpt3(32, 4096, 32, 128),
    "gpt3-13b": _gpt3(40, 5140, 40, 128),
    "gpt3-175b": _gpt3(96, 12288, 96, 128),
}
"""The fields of each published model."""
