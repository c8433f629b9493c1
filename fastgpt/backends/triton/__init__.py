"""Triton kernels for any GPU that Triton reaches; without a GPU they run under its interpreter.

Each `<op>_fwd` and `<op>_bwd` has the signature of the raw op of that name and launches kernels by
`_launch.launch` alone. This file imports no triton, so that the table can be asked without it.
"""

from __future__ import annotations

import importlib.metadata
import os

OLDEST = (3, 4)


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 makes Triton run its kernels in Python, on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def missing() -> str | None:
    """Why no Triton kernel can run here; None if one can."""
    needed = ".".join(map(str, OLDEST))
    remedy = f"pip install 'triton>={needed}'"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return f"Triton is not installed ({remedy})"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"needs Triton {needed} or later, found {version} ({remedy})"
    return None
