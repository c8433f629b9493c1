"""transformers' models on our attention, and our decoder as a model of transformers.

Only the files of this folder import transformers, and they are imported after it.
"""

from __future__ import annotations

from types import ModuleType

from fastgpt.integrate._on_import import on_import

_FAMILIES = ("bert", "gpt2", "gpt_neo", "gpt_neox", "gptj", "opt")


def register_when_imported() -> None:
    """Make "fastgpt" known to each part of transformers as soon as that is imported."""
    on_import("transformers.modeling_utils", _register_attention)
    for family in _FAMILIES:
        on_import(f"transformers.models.{family}.modeling_{family}", _adapt)
    on_import("transformers.models.auto.configuration_auto", _register_config)
    on_import("transformers.models.auto.modeling_auto", _register_models)


def _register_attention(_: ModuleType) -> None:
    from fastgpt.integrate.hugging_face import models

    models.register()


def _adapt(file: ModuleType) -> None:
    from fastgpt.integrate.hugging_face import models

    models.adapt(file)


def _register_config(file: ModuleType) -> None:
    from fastgpt.integrate.hugging_face import auto

    auto.register_config(file)


def _register_models(file: ModuleType) -> None:
    from fastgpt.integrate.hugging_face import auto

    auto.register_models(file)
