"""fastgpt: hand-written fused kernels for GPT-3-style decoders, as drop-in PyTorch functions and
modules.

    from fastgpt import functional as F     # attention, layer_norm, cross_entropy, ...
    from fastgpt import nn                  # the same as modules
    model = fastgpt.GPT(fastgpt.GPTConfig.preset("gpt3-small"))
    print(fastgpt.replace_layers(a_model_of_torch_or_transformers))
    print(fastgpt.explain(F.attention, q, k, v, window=256))
"""

from fastgpt import functional, integrate, nn
from fastgpt.config import GPTConfig
from fastgpt.dispatch import backend, explain
from fastgpt.integrate import replace_layers, restore_layers
from fastgpt.model import GPT

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "GPTConfig",
    "backend",
    "explain",
    "functional",
    "integrate",
    "nn",
    "replace_layers",
    "restore_layers",
]
