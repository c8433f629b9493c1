"""`torch.ops.fastgpt`: every schema is defined here, once; backends only implement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "fastgpt"
_library = torch.library.Library(NAMESPACE, "DEF")


def define(
    name: str, schema: str, fake: Callable[..., Any], tags: tuple[torch.Tag, ...] = ()
) -> torch._ops.OpOverload:
    """Define `fastgpt::<name>` with `schema` (arguments and returns) and its shape function.

    Returns the overload `torch.ops.fastgpt.<name>.default`. It has no kernel until the compiled
    library registers one; the fake alone lets torch.compile and torch.export trace it.
    """
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=_library)

    def no_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise NotImplementedError(
            f"{qualified}: torch.vmap has no rule for this fused kernel; pass the mapped axis as a "
            'batch axis, or use fastgpt.backend("reference")'
        )

    torch.library.register_vmap(qualified, no_vmap, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
