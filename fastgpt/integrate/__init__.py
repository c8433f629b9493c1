"""One line for existing models: torch.nn and Hugging Face models run on our kernels."""

from fastgpt.integrate import sdpa

sdpa.register()
