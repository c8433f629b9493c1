"""BERT in transformers 4, where it is not on AttentionInterface."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import EncoderDecoderCache
from transformers.models.bert.modeling_bert import BertSelfAttention

from fastgpt.integrate.hugging_face.attention import fall_back, read_mask


class FastBertSelfAttention(BertSelfAttention):
    """BERT's self- and cross-attention on the fused kernels.

    Relative position embeddings, returned weights and a head_mask run BERT's own attention.
    """

    is_causal = False  # the mask of a decoder says so itself

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        past_key_values: Any = None,
        output_attentions: bool | None = False,
        cache_position: Tensor | None = None,
        **deprecated: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(b, s, c) to ((b, s, c), None), or with the weights where they are asked for."""
        reason = None
        if output_attentions:
            reason = "output_attentions=True, and a fused kernel never holds the weights"
        elif head_mask is not None:
            reason = "head_mask"
        elif self.position_embedding_type != "absolute":
            reason = f"position_embedding_type={self.position_embedding_type!r}"
        if reason is not None:
            fall_back(reason)
            given = (head_mask, encoder_hidden_states, past_key_values, output_attentions)
            own: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, attention_mask, *given, cache_position, **deprecated
            )
            return own
        if past_key_values is None:
            past_key_values = deprecated.get("past_key_value")
        q = self._split(self.query(hidden_states))
        k, v = self._keys_and_values(
            hidden_states, encoder_hidden_states, past_key_values, cache_position
        )
        sight = read_mask(self, q, k, attention_mask, None)
        dropout = self.dropout.p if self.training else 0.0
        out = sight.attend(q, k, v, self.attention_head_size**-0.5, dropout)
        return out.transpose(1, 2).flatten(2), None

    def _split(self, x: Tensor) -> Tensor:
        """(b, s, h * d) to (b, h, s, d)."""
        heads = (self.num_attention_heads, self.attention_head_size)
        return x.unflatten(-1, heads).transpose(1, 2)

    def _keys_and_values(
        self, own: Tensor, encoder: Tensor | None, cache: Any, cache_position: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Those of the encoder's states, kept after the first step, or all up to `own`."""
        layer = self.layer_idx
        twofold = isinstance(cache, EncoderDecoderCache)
        if encoder is None:
            k, v = self._split(self.key(own)), self._split(self.value(own))
            if cache is None:
                return k, v
            kept = cache.self_attention_cache if twofold else cache
            updated: tuple[Tensor, Tensor] = kept.update(
                k, v, layer, {"cache_position": cache_position}
            )
            return updated
        if twofold and cache.is_updated.get(layer):
            stored = cache.cross_attention_cache.layers[layer]
            return stored.keys, stored.values
        k, v = self._split(self.key(encoder)), self._split(self.value(encoder))
        if cache is not None:
            kept = cache.cross_attention_cache if twofold else cache
            k, v = kept.update(k, v, layer, {"cache_position": None})
            if twofold:
                cache.is_updated[layer] = True
        return k, v
