"""The fused ops as functions, under torch's own names where torch has the op.

`torch.fx` records a call of `functional.layer_norm`, say, as one node, and does not look inside.
"""

import torch.fx

from fastgpt.ops.attention import attention
from fastgpt.ops.bias_gelu import bias_gelu
from fastgpt.ops.cross_entropy import cross_entropy
from fastgpt.ops.decode_attention import decode_attention
from fastgpt.ops.layer_norm import add_layer_norm, layer_norm
from fastgpt.ops.linear_cross_entropy import linear_cross_entropy
from fastgpt.ops.masked_softmax import masked_softmax
from fastgpt.ops.scaled_dot_product_attention import scaled_dot_product_attention
from fastgpt.ops.softmax import softmax
from fastgpt.ops.varlen_attention import varlen_attention

__all__ = [
    "add_layer_norm",
    "attention",
    "bias_gelu",
    "cross_entropy",
    "decode_attention",
    "layer_norm",
    "linear_cross_entropy",
    "masked_softmax",
    "scaled_dot_product_attention",
    "softmax",
    "varlen_attention",
]

for _name in __all__:
    torch.fx.wrap(_name)
