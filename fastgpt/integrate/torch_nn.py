"""Which module of torch.nn becomes which of ours, and torch's Transformer layers on them.

The layers of `torch.nn.Transformer*` have inference paths of their own that read the parameters of
their attention and norms without calling them; these classes call them, in training and inference
alike, and fuse each residual addition with the norm that follows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.transformer import _detect_is_causal_mask, _get_seq_len

from fastgpt import nn
from fastgpt.nn import add_norm


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` whose attention and norms are always called."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """(s, n, e) or (n, s, e) to the same; arguments as torch's, masks True = *hidden*."""
        masks = (src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            attended = self._sa_block(self.norm1(src), *masks)
            y, x = add_norm(attended, src, self.norm2)
            return x + self._ff_block(y)
        x, _ = add_norm(self._sa_block(src, *masks), src, self.norm1)
        return add_norm(self._ff_block(x), x, self.norm2)[0]


class TransformerEncoder(torch.nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder` that never packs its input into a nested tensor.

    Where torch would pack, it leaves zeros at the padded positions; so does this.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """(s, n, e) or (n, s, e) to the same; arguments as torch's, masks True = *hidden*."""
        batch_first = self.layers[0].self_attn.batch_first
        is_causal = _detect_is_causal_mask(
            _additive(mask, src), is_causal, _get_seq_len(src, batch_first)
        )
        x = src
        for layer in self.layers:
            x = layer(
                x, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal
            )
        if src_key_padding_mask is not None and self._packs(src, mask, src_key_padding_mask):
            hidden = src_key_padding_mask
            if hidden.dtype != torch.bool:
                hidden = hidden == float("-inf")
            x = x.masked_fill(hidden.unsqueeze(-1), 0.0)
        return x if self.norm is None else self.norm(x)

    def _packs(self, src: Tensor, mask: Tensor | None, padding: Tensor) -> bool:
        """Whether torch's own class would pack this input."""
        if (
            not self.use_nested_tensor
            or not torch.backends.mha.get_fastpath_enabled()
            or self.layers[0].training
            or src.dim() != 3
            or mask is not None
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled()
        ):
            return False
        if torch.is_grad_enabled() and (
            src.requires_grad or any(p.requires_grad for p in self.layers[0].parameters())
        ):
            return False
        additive = _additive(padding, src)
        assert additive is not None
        return not self.mask_check or torch._nested_tensor_from_mask_left_aligned(
            src, additive.logical_not()
        )


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer` with its residual additions fused into the norms."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """(t, n, e) or (n, t, e) to the same; arguments as torch's, masks True = *hidden*."""
        own = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        cross = (memory, memory_mask, memory_key_padding_mask, memory_is_causal)
        if self.norm_first:
            y, x = add_norm(self._sa_block(self.norm1(tgt), *own), tgt, self.norm2)
            y, x = add_norm(self._mha_block(y, *cross), x, self.norm3)
            return x + self._ff_block(y)
        x, _ = add_norm(self._sa_block(tgt, *own), tgt, self.norm1)
        x, _ = add_norm(self._mha_block(x, *cross), x, self.norm2)
        return add_norm(self._ff_block(x), x, self.norm3)[0]


REPLACEMENTS: dict[type[torch.nn.Module], tuple[tuple[str, ...], type[torch.nn.Module]]] = {
    torch.nn.LayerNorm: (("layer_norm",), nn.LayerNorm),
    torch.nn.Softmax: (("softmax",), nn.Softmax),
    torch.nn.CrossEntropyLoss: (("loss",), nn.CrossEntropyLoss),
    torch.nn.MultiheadAttention: (("attention",), nn.MultiheadAttention),
    torch.nn.TransformerEncoderLayer: (("attention", "layer_norm"), TransformerEncoderLayer),
    torch.nn.TransformerEncoder: (("attention", "layer_norm"), TransformerEncoder),
    torch.nn.TransformerDecoderLayer: (("attention", "layer_norm"), TransformerDecoderLayer),
}
"""torch's class -> (the kinds that ask for it, ours): same parameters, another forward."""


def _additive(mask: Tensor | None, src: Tensor) -> Tensor | None:
    """A mask as torch's layers hand it on: float, -inf where it hides."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=src.dtype).masked_fill_(mask, float("-inf"))
