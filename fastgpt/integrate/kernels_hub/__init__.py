"""Our layers for Hugging Face's `kernels` package (0.17 or later), from this folder, offline.

    from kernels import Mode, kernelize, register_kernel_mapping, replace_kernel_forward_from_hub
    from fastgpt.integrate import kernels_hub

    replace_kernel_forward_from_hub(torch.nn.LayerNorm, "LayerNorm")
    register_kernel_mapping(kernels_hub.mapping())
    kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE)

The folder is a kernel repository as `kernels` wants it on disk: `metadata.json`, and this file with
the classes in `layers`, which kernels executes under a name of its own. So its path, REPOSITORY,
also serves `kernels.get_local_kernel`. transformers gives the names of the GELUs to its own
activations; torch's classes get theirs by `replace_kernel_forward_from_hub`, as above.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from fastgpt.integrate.kernels_hub import layers

REPOSITORY = Path(__file__).resolve().parent
DEVICES = ("cpu", "cuda", "rocm", "xpu")
_OLDEST = (0, 17)


def mapping() -> dict[str, dict[str, Any]]:
    """layer name -> device -> `kernels.LocalLayerRepository`, as `register_kernel_mapping` takes.

    Raises:
        ImportError: `kernels` is not installed.
        RuntimeError: it is older than 0.17; those load no kernels for CPUs.
    """
    from kernels import LocalLayerRepository

    version = importlib.metadata.version("kernels")
    if tuple(map(int, version.split(".")[:2])) < _OLDEST:
        raise RuntimeError(
            f"kernels: expected version {'.'.join(map(str, _OLDEST))} or later, got {version}; "
            "pip install --upgrade kernels, or use the modules of fastgpt.nn"
        )
    repositories = {
        name: LocalLayerRepository(REPOSITORY, layer_name=name) for name in layers.__all__
    }
    return {name: dict.fromkeys(DEVICES, repository) for name, repository in repositories.items()}
