"""GPT-Neo: its scores are not scaled, and every other layer sees a window of its newest keys.

The window is kept at any length, which transformers' flash attention path of GPT-Neo does not.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

from fastgpt.integrate.hugging_face._own_scores import FusedScores, OwnScores
from fastgpt.integrate.hugging_face.attention import Sight, without_the_least


class OwnGPTNeoSelfAttention(OwnScores, GPTNeoSelfAttention):
    """GPT-Neo's own attention, for calls that need the weights."""


class FastGPTNeoSelfAttention(FusedScores, GPTNeoSelfAttention):
    """GPT-Neo's attention on the fused kernels, banded in its local layers."""

    own = OwnGPTNeoSelfAttention

    @property
    def scale(self) -> float:
        return 1.0

    @property
    def window(self) -> int | None:
        local = self.config.attention_layers[self.layer_id] == "local"
        return int(self.config.window_size) if local else None

    def sight(self, query: Tensor, key: Tensor, attention_mask: Tensor | None) -> Sight:
        """As any model's, and within the causal band whatever the mask says."""
        sight = super().sight(query, key, attention_mask)
        if sight.mask is not None:
            added = sight.additive(query, key)
            assert added is not None
            sight = dataclasses.replace(sight, mask=None, bias=without_the_least(added, query))
        return dataclasses.replace(sight, causal=True, window=self.window, banded_mean=True)
