"""The mask function of transformers' AttentionMaskInterface: masks that stay small.

A causal mask, sliding or not, becomes what the attention of the same name reads:

    bool (b, n)   which of the first n keys may be seen; the others are not written yet (a static
                  cache), and the last query stands at key n - 1

It says that the rule is causal: some models (CLIP's text, BigBird-Pegasus' decoder) mask causally
but call their attention modules bidirectional. Where it hides nothing it is one expanded True.

Everything else (prefix or block patterns, packed documents, bidirectional attention) becomes the
bool (b, 1, q, kv) mask of transformers' own `sdpa_mask`, True = may be seen: always right, and
O(q * kv). The window and the causal rule themselves reach the attention as its own arguments.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from fastgpt.dispatch import _constant

SLICED = ("gemma4_text", "gemma4_unified_text", "lfm2", "pix2struct_text_model")
"""Configurations of models that slice their masks, which must then be (b, 1, q, kv), or that give
them to layers without attention (LFM2 of transformers 4, to its convolutions)."""


def fastgpt_mask(
    batch_size: int,
    *,
    kv_length: int,
    kv_offset: int = 0,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    cache_position: Tensor | None = None,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    **others: Any,
) -> Tensor | None:
    """The mask for `batch_size` rows; the arguments are those of transformers' `sdpa_mask`.

    transformers 4 gives `cache_position (q_length,)`, transformers 5 `q_length` and `q_offset`.

    Returns:
        bool (b, n) or bool (b, 1, q, kv), as the head of this file says; None only if transformers'
        own function returns it.
    """
    positions: dict[str, Any] = {"q_length": q_length, "q_offset": q_offset}
    if cache_position is not None:
        q_length = cache_position.shape[0]
        positions = {"cache_position": cache_position}
    assert q_length is not None
    exact = functools.partial(
        masking_utils.sdpa_mask,
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        **positions,
        **others,
    )
    model_type = getattr(others.get("config"), "model_type", None)
    pattern = None if use_vmap or model_type in SLICED else _pattern(mask_function)
    if pattern is None:
        return exact()
    causal, window = pattern
    if not causal and window is None:
        return _bidirectional(batch_size, q_length, kv_length, kv_offset, attention_mask, others)
    if not causal or (window is not None and not _hands_on_the_window(others.get("config"))):
        return exact()
    if not allow_is_causal_skip and (cache_position is None or q_length == 1):
        # A static cache that is compiled, or a caller who goes on with the mask. But GPT-Neo, which
        # is not compiled, adds its window to it and must know where the queries stand.
        if model_type != "gpt_neo":
            return exact()

    last = _position_of_the_first_query(kv_length, kv_offset, q_length, q_offset, cache_position)
    if last is None:
        return exact()
    n = last + q_length - kv_offset
    padding = _padding(attention_mask, kv_offset, n)
    if padding is not None:
        return padding
    device = others.get("device") if cache_position is None else cache_position.device
    return torch.ones((), dtype=torch.bool, device=device).expand(batch_size, n)


def _pattern(function: Callable[..., Any]) -> tuple[bool, int | None] | None:
    """(causal, window) of a mask function that we know; None for any other."""
    if function is masking_utils.causal_mask_function:
        return True, None
    if function is getattr(masking_utils, "bidirectional_mask_function", None):
        return False, None
    name = getattr(function, "__qualname__", "")
    if getattr(function, "__module__", "") != masking_utils.__name__:
        return None
    if torch.compiler.is_compiling():  # the tracer does not look into closures
        return None
    cells = function.__closure__ or ()
    held = {
        n: cell.cell_contents for n, cell in zip(function.__code__.co_freevars, cells, strict=True)
    }
    if name == "sliding_window_overlay.<locals>.inner_mask":
        return False, held["sliding_window"]
    if name == "packed_sequence_mask_function.<locals>.inner_mask":
        # transformers 4 adds it to every call without a mask: where all is one document, nothing.
        packed = held["packed_sequence_mask"]
        one = not torch.compiler.is_compiling() and not bool(packed[:, -1].any())
        return (False, None) if one else None
    if name == "and_masks.<locals>.and_mask":
        parts = [_pattern(part) for part in held["mask_functions"]]
        if any(part is None for part in parts):
            return None
        known = [part for part in parts if part is not None]
        windows = [window for _, window in known if window is not None]
        return any(causal for causal, _ in known), min(windows) if windows else None
    return None


def _bidirectional(
    batch_size: int,
    q_length: int,
    kv_length: int,
    kv_offset: int,
    attention_mask: Tensor | None,
    others: dict[str, Any],
) -> Tensor:
    """(b, 1, q, kv) that holds (b, kv) elements: the attention sees that they are a padding mask.

    Never None, which attention modules of decoders would read as causal.
    """
    padding = _padding(attention_mask, kv_offset, kv_length)
    if padding is None:
        device = others.get("device") if attention_mask is None else attention_mask.device
        padding = torch.ones(1, 1, dtype=torch.bool, device=device)
    return padding[:, None, None, :].expand(batch_size, 1, q_length, kv_length)


def _padding(attention_mask: Tensor | None, first: int, n: int) -> Tensor | None:
    """The bool mask of the n keys from `first` on; None where nothing is known to be hidden."""
    if attention_mask is None:
        return None
    padding = attention_mask[:, first : first + n].bool()
    if padding.shape[1] < n:
        padding = torch.nn.functional.pad(padding, (0, n - padding.shape[1]))
    # On a GPU this would wait for the device.
    if padding.is_cpu and not torch.compiler.is_compiling() and bool(padding.all()):
        return None
    return padding


def _position_of_the_first_query(
    kv_length: int,
    kv_offset: int,
    q_length: int,
    q_offset: int | Tensor,
    cache_position: Tensor | None,
) -> int | None:
    """Where the first query stands among all tokens; None where only a compiled program knows."""
    if cache_position is not None:
        if kv_length == q_length and kv_offset == 0:
            return 0
        q_offset = cache_position[0]
    if isinstance(q_offset, Tensor):
        return None if torch.compiler.is_compiling() else int(q_offset)
    return q_offset


def _hands_on_the_window(config: Any) -> bool:
    """Whether this model's attention modules pass their window on to the attention function."""
    module = type(config).__module__.replace(".configuration_", ".modeling_")
    return _mentions_window(module)


@_constant
def _mentions_window(module: str) -> bool:
    if module not in sys.modules:
        return False
    try:
        return "sliding_window=" in inspect.getsource(sys.modules[module])
    except (OSError, TypeError):
        return False
