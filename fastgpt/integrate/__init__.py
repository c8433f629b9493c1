"""One line for existing models: torch.nn and Hugging Face models run on our kernels."""

from __future__ import annotations

from fastgpt.integrate import hugging_face, kernels_hub, sdpa
from fastgpt.integrate.replace import Entry, Report, replace_layers, restore_layers

__all__ = ["Entry", "Report", "kernels_hub", "replace_layers", "restore_layers"]

hugging_face.register_when_imported()
sdpa.register()
