"""GPT-Neo: its scores are not scaled, and every other layer sees a window of its newest keys.

The window is kept at any length, which transformers' flash attention path of GPT-Neo does not.
"""

from __future__ import annotations

from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

from fastgpt.integrate.hugging_face._own_scores import FusedScores, OwnScores


class OwnGPTNeoSelfAttention(OwnScores, GPTNeoSelfAttention):
    """GPT-Neo's own attention, for calls that need the weights."""


class FastGPTNeoSelfAttention(FusedScores, GPTNeoSelfAttention):
    """GPT-Neo's attention on the fused kernels, banded in its local layers."""

    own = OwnGPTNeoSelfAttention
    banded = True

    @property
    def scale(self) -> float:
        return 1.0

    @property
    def window(self) -> int | None:
        local = self.config.attention_layers[self.layer_id] == "local"
        return int(self.config.window_size) if local else None
