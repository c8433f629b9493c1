"""The Auto classes of transformers get to know our models, the moment they are imported."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


def register_config(auto: ModuleType) -> None:
    """AutoConfig reads the folders of our models."""
    with _harmless():
        from fastgpt.integrate.hugging_face.gpt_config import FastGPTConfig

        auto.AutoConfig.register(FastGPTConfig.model_type, FastGPTConfig, exist_ok=True)


def register_models(auto: ModuleType) -> None:
    """The Auto classes make our models of such a configuration."""
    with _harmless():
        from fastgpt.integrate.hugging_face import gpt

        for names, auto_class, model in (
            (auto.MODEL_MAPPING_NAMES, auto.AutoModel, gpt.FastGPTModel),
            (
                auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
                auto.AutoModelForCausalLM,
                gpt.FastGPTForCausalLM,
            ),
            (
                auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
                auto.AutoModelForSequenceClassification,
                gpt.FastGPTForSequenceClassification,
            ),
        ):
            auto_class.register(gpt.FastGPTConfig, model, exist_ok=True)
            # The Trainer's label smoothing and lm-eval look a model up by its name alone.
            names[gpt.FastGPTConfig.model_type] = model.__name__


@contextmanager
def _harmless() -> Iterator[None]:
    """A warning in place of an exception: the import under way is transformers' own."""
    try:
        yield
    except Exception as error:
        warnings.warn(
            f"fastgpt: transformers does not get to know its models: {error}", stacklevel=2
        )
