"""GPT-J in those versions of transformers in which it is not on AttentionInterface."""

from __future__ import annotations

from transformers.models.gptj.modeling_gptj import GPTJAttention

from fastgpt.integrate.hugging_face._own_scores import FusedScores, OwnScores


class OwnGPTJAttention(OwnScores, GPTJAttention):
    """GPT-J's own attention, for calls that need the weights."""


class FastGPTJAttention(FusedScores, GPTJAttention):
    """GPT-J's attention on the fused kernels; the rotary embedding stays its own."""

    own = OwnGPTJAttention

    @property
    def scale(self) -> float:
        return float(self.head_dim) ** -0.5
