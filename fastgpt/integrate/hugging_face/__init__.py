"""transformers' models on our attention, and our decoder as a model of transformers.

Only the files of this folder import transformers, and they are imported after it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from types import ModuleType

from fastgpt.integrate._on_import import on_import

OLDEST = (4, 57)
"""The first version of transformers that we are tested on."""

_FAMILIES = ("bert", "gpt2", "gpt_neo", "gpt_neox", "gptj", "opt")


def register_when_imported() -> None:
    """Make "fastgpt" known to each part of transformers as soon as that is imported."""
    _once_imported("transformers.modeling_utils", _register_attention)
    for family in _FAMILIES:
        _once_imported(f"transformers.models.{family}.modeling_{family}", _adapt)
    _once_imported("transformers.models.auto.configuration_auto", _register_config)
    _once_imported("transformers.models.auto.modeling_auto", _register_models)


def _once_imported(name: str, register: Callable[[ModuleType], None]) -> None:
    on_import(name, lambda file: register(file) if served() else None)


def served() -> bool:
    """Whether the transformers that is imported is new enough; warns if not, and breaks nothing."""
    version = str(sys.modules["transformers"].__version__)
    if tuple(int(part) for part in version.split(".")[:2]) >= OLDEST:
        return True
    oldest = ".".join(map(str, OLDEST))
    warnings.warn(
        f"fastgpt: the attention of models of transformers {version} stays their own; "
        f"fastgpt knows transformers from {oldest} on",
        stacklevel=2,
    )
    return False


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
