"""fastgpt: hand-written fused kernels for GPT-3-style decoders, as drop-in PyTorch functions and
modules.

    from fastgpt import functional as F     # attention, layer_norm, cross_entropy, ...
    from fastgpt import nn                  # the same as modules
    model = fastgpt.GPT(fastgpt.GPTConfig.preset("gpt3-small"))
    print(fastgpt.replace_layers(a_model_of_torch_or_transformers))
    print(fastgpt.explain(F.attention, q, k, v, window=256))
"""

from typing import Any

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

_OF_TRANSFORMERS = (
    "FastGPTConfig",
    "FastGPTForCausalLM",
    "FastGPTForSequenceClassification",
    "FastGPTModel",
)


def __getattr__(name: str) -> Any:
    """The models for transformers, which is imported only when one of them is asked for."""
    if name not in _OF_TRANSFORMERS:
        raise AttributeError(f"module 'fastgpt' has no attribute {name!r}")
    try:
        from fastgpt.integrate.hugging_face import gpt
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "transformers":
            raise
        raise ImportError(
            f"fastgpt.{name} needs transformers: pip install 'transformers>=4.57'"
        ) from error
    return getattr(gpt, name)
