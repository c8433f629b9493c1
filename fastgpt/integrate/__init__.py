"""One line for existing models: torch.nn and Hugging Face models run on our kernels."""

from __future__ import annotations

from types import ModuleType

from fastgpt.integrate import auto, sdpa
from fastgpt.integrate._on_import import on_import
from fastgpt.integrate.replace import Entry, Report, replace_layers, restore_layers

__all__ = ["Entry", "Report", "replace_layers", "restore_layers"]

_FAMILIES = ("bert", "gpt2", "gpt_neo", "gpt_neox", "gptj", "opt")


def _register_attention(_: ModuleType) -> None:
    from fastgpt.integrate import models

    models.register()


def _adapt(file: ModuleType) -> None:
    from fastgpt.integrate import models

    models.adapt(file)


on_import("transformers.modeling_utils", _register_attention)
for _family in _FAMILIES:
    on_import(f"transformers.models.{_family}.modeling_{_family}", _adapt)
auto.register_when_imported()
sdpa.register()
