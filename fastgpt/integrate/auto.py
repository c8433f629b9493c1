"""The Auto classes of transformers get to know the models of `fastgpt.integrate.gpt`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from fastgpt.integrate._on_import import on_import


def register_when_imported() -> None:
    """Make the Auto classes of transformers know "fastgpt" as soon as they are imported."""
    on_import("transformers.models.auto.configuration_auto", _register_config)
    on_import("transformers.models.auto.modeling_auto", _register_models)


def _register_config(auto: ModuleType) -> None:
    with _harmless():
        from fastgpt.integrate.gpt_config import FastGPTConfig

        auto.AutoConfig.register(FastGPTConfig.model_type, FastGPTConfig, exist_ok=True)


def _register_models(auto: ModuleType) -> None:
    with _harmless():
        from fastgpt.integrate import gpt

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
