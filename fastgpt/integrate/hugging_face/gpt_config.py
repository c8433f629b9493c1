"""FastGPTConfig: `fastgpt.GPTConfig` as a configuration of transformers."""

from __future__ import annotations

import dataclasses
from typing import Any

import transformers
from transformers.configuration_utils import PretrainedConfig

from fastgpt.checkpoint import MODEL_TYPE
from fastgpt.config import GPTConfig

_SHAPE = tuple(field.name for field in dataclasses.fields(GPTConfig))
_OLDEST = (4, 57)  # the caches of older ones are others
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < _OLDEST:
    raise ImportError(
        "fastgpt: its models for transformers need transformers >= 4.57, "
        f"got {transformers.__version__}; pip install --upgrade transformers"
    )


class FastGPTConfig(PretrainedConfig):
    """The configuration of the FastGPT models; the defaults are those of "gpt3-small".

    The fields of `fastgpt.GPTConfig` have its names and its checks, and also the standard names of
    transformers: hidden_size is n_embd, num_attention_heads n_head, num_hidden_layers n_layer,
    max_position_embeddings n_positions, tie_word_embeddings tie_embeddings.

    Args:
        vocab_size, n_positions, n_layer, n_embd, n_head, head_dim, window, attention_pattern,
        dropout, bias, tie_embeddings, norm, layer_norm_eps, attention_scale, activation: as
            `fastgpt.GPTConfig`.
        use_cache: whether a model returns the keys and values that it computed (never in training).
        fused_loss: in training, compute the loss from the hidden states, without ever holding the
            (b, s, vocab_size) logits, which are then not returned.
        bos_token_id, eos_token_id, pad_token_id: ids of the tokenizer's special tokens.
        **kwargs: what every configuration of transformers takes: num_labels, problem_type, ...

    Raises:
        ValueError, TypeError: as `fastgpt.GPTConfig`, or tie_embeddings and tie_word_embeddings
            contradict each other.
    """

    model_type = MODEL_TYPE
    attribute_map = {  # noqa: RUF012 - the base class declares it so
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "max_position_embeddings": "n_positions",
        "tie_word_embeddings": "tie_embeddings",
    }
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 50257,
        n_positions: int = 2048,
        n_layer: int = 12,
        n_embd: int = 768,
        n_head: int = 12,
        head_dim: int | None = None,
        window: int = 256,
        attention_pattern: tuple[str, ...] | list[str] = ("dense", "banded"),
        dropout: float = 0.0,
        bias: bool = True,
        tie_embeddings: bool | None = None,
        norm: str = "pre",
        layer_norm_eps: float = 1e-5,
        attention_scale: float | None = None,
        activation: str = "gelu_tanh",
        use_cache: bool = True,
        fused_loss: bool = False,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        tie_word_embeddings: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if tie_embeddings is None:
            tie_embeddings = True if tie_word_embeddings is None else tie_word_embeddings
        elif tie_word_embeddings not in (None, tie_embeddings):
            raise ValueError(
                "tie_word_embeddings: it is another name of tie_embeddings, which is "
                f"{tie_embeddings}, got {tie_word_embeddings}; give one of them"
            )
        self.vocab_size = vocab_size
        self.n_positions = n_positions
        self.n_layer = n_layer
        self.n_embd = n_embd
        self.n_head = n_head
        self.head_dim = head_dim
        self.window = window
        self.attention_pattern = attention_pattern
        self.dropout = dropout
        self.bias = bias
        self.norm = norm
        self.layer_norm_eps = layer_norm_eps
        self.attention_scale = attention_scale
        self.activation = activation
        self.use_cache = use_cache
        self.fused_loss = fused_loss
        # The base class sets the standard name, and so, by attribute_map, ours.
        kwargs |= {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        kwargs |= {"pad_token_id": pad_token_id, "tie_word_embeddings": tie_embeddings}
        super().__init__(**kwargs)
        # Serialized as a list: one form, whichever was given and however it came here.
        self.attention_pattern = list(self.to_gpt_config().attention_pattern)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> FastGPTConfig:
        """The configuration of a published model, see `fastgpt.GPTConfig.preset`.

        Raises:
            ValueError: there is no such preset; the message lists them.
        """
        return cls(**{**GPTConfig.preset(name).to_dict(), **changes})

    @classmethod
    def from_gpt_config(cls, config: GPTConfig, **kwargs: Any) -> FastGPTConfig:
        """The same shape for transformers; kwargs are its other settings."""
        return cls(**config.to_dict(), **kwargs)

    def to_gpt_config(self) -> GPTConfig:
        """The shape as `fastgpt.GPT` takes it.

        Raises:
            ValueError, TypeError: as `fastgpt.GPTConfig`.
        """
        return GPTConfig(**{name: getattr(self, name) for name in _SHAPE})

    @property
    def layer_types(self) -> list[str]:
        """What the caches of transformers keep of each layer: all of it, or its window."""
        config = self.to_gpt_config()
        return [
            "full_attention" if config.window_of(i) is None else "sliding_attention"
            for i in range(config.n_layer)
        ]

    @property
    def sliding_window(self) -> int | None:
        """The window of the banded layers, None where all are dense."""
        return self.window if "sliding_attention" in self.layer_types else None
