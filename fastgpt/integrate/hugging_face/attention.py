"""The attention function of transformers' AttentionInterface, on `functional.attention`.

Models that follow the interface call it with queries, keys and values (the cache's included) and
the mask that `masks.fastgpt_mask` made. What a fused kernel cannot serve, as returned attention
weights, runs in the model's own eager function for that call: warned of once, and reported by
`fastgpt.explain`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt import functional as F
from fastgpt.backends.reference._band import band, visible
from fastgpt.dispatch import _constant
from fastgpt.integrate.hugging_face._blind import attend_blindly, blind_queries

_collector: Any = None
with contextlib.suppress(ImportError):  # transformers 4 tells the modules instead
    from transformers.utils.output_capturing import _active_collector as _collector

NAME = "fastgpt"
"""The attn_implementation of our attention."""

WEIGHTS = "fastgpt_return_weights"
"""The keyword by which an attention module hands on that its weights are asked for."""

CHOSEN_KEYS = ("indices", "block_indices")
"""Keywords by which sparse attention (DeepSeek-V3.2, MiniMax-M3) tells any implementation but eager
and sdpa, which find it in the mask, the only keys that each query sees."""

_warned: set[str] = set()


@dataclass(frozen=True)
class Sight:
    """What the queries of one call may see.

    Attributes:
        causal, window: as in `functional.attention`, the last query at key n - 1.
        n: number of keys that are written.
        padding: bool (b, n), True = may be seen, or None.
        mask: bool (b|1, h|1, sq, sk), True = may be seen, or None; replaces all of the above.
        bias: float (b|1, h|1, sq|1, sk), added to the scores, or None.
        banded_mean: what a query that sees no key gets in the model's eager attention, whose
            softmax is then uniform: the mean over its band, else that over all keys.
    """

    causal: bool
    window: int | None
    n: int
    padding: Tensor | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None
    banded_mean: bool = False

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float) -> Tensor:
        """(b, h, sq, d) of the fused kernels, stored as (b, sq, h, d).

        A query that sees no key gets what eager attention gives it.
        """
        out = self._fused(q, k, v, scale, dropout)
        blind = self._blind(q)
        if blind is None:
            return out
        r = blind.shape[2]
        q = q[:, :, :r]
        if self.banded_mean:
            k, v = k[:, :, : self.n], v[:, :, : self.n]
            rows = torch.arange(self.n - out.shape[2], self.n, device=q.device)[:r, None]
            band_of_rows = band(rows, torch.arange(self.n, device=q.device), True, self.window)
            filled = attend_blindly(q, k, v, scale, band_of_rows)
        else:
            filled = attend_blindly(q, k, v, scale, None)
        filled = torch.where(blind[..., None], filled, out[:, :, :r])
        # Token by token, as `out` is stored.
        tokens = (filled.transpose(1, 2), out[:, :, r:].transpose(1, 2))
        return torch.cat(tokens, 1).transpose(1, 2)

    def _blind(self, q: Tensor) -> Tensor | None:
        """Which of the first r queries see no key, bool (b, h|1, r); None where all see one.

        Only where each query has a rule of its own: keys that are hidden from all of them, as a row
        of an encoder that is nothing but padding, stay hidden. Kept with the mask, which all layers
        share: on a GPU this waits, once a pass.
        """
        if self.mask is not None:
            mask = _unexpanded(self.mask)
            if mask.shape[2] == 1:
                return None
        elif self.padding is not None and self.causal:
            mask = self.padding
        else:
            return None
        if torch.compiler.is_compiling():
            return self._all_blind(q)
        if mask.is_inference():  # which would not tell that it was changed
            return self._first_blind(q)
        kept = mask.__dict__.setdefault("_fastgpt_blind", {})
        key = (q.shape[2], self.causal, self.window, mask._version)
        if key not in kept:
            kept[key] = self._first_blind(q)
        blind: Tensor | None = kept[key]
        return blind

    def _first_blind(self, q: Tensor) -> Tensor | None:
        """The queries up to the last one that sees no key, bool (b, h|1, r); None if all see."""
        blind = self._all_blind(q)
        found = blind.any(0).any(0).nonzero()
        return blind[..., : int(found[-1]) + 1] if found.numel() else None

    def _all_blind(self, q: Tensor) -> Tensor:
        """Which queries see no key, bool (b, h|1, sq)."""
        b, _, sq, _ = q.shape
        if self.mask is not None:
            blind = ~self.mask.any(-1)
        else:
            assert self.padding is not None
            blind = blind_queries(self.padding, sq, self.window)[:, None]
        return blind.expand(b, -1, sq)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float) -> Tensor:
        if self.mask is not None:
            return F.scaled_dot_product_attention(
                q, k, v, self.mask, dropout, scale=scale, enable_gqa=True
            )
        bias = self.bias
        if self.n != k.shape[2]:
            k, v = k[:, :, : self.n], v[:, :, : self.n]
            bias = None if bias is None else bias[..., : self.n]
        out: Tensor = F.attention(
            q,
            k,
            v,
            causal=self.causal,
            window=self.window,
            scale=scale,
            key_padding_mask=self.padding,
            bias=bias,
            dropout_p=dropout,
        )
        return out

    def additive(self, q: Tensor, k: Tensor) -> Tensor | None:
        """The same as eager attention reads it: (b|1, h|1, sq, sk), 0 or the least of its dtype."""
        sq, sk = q.shape[2], k.shape[2]
        seen = self.mask
        if seen is None:
            rows = torch.arange(self.n - sq, self.n, device=q.device)[:, None]
            columns = torch.arange(sk, device=q.device)
            written = (columns < self.n) if self.n < sk else None
            padding = self.padding
            if padding is not None:
                padding = torch.nn.functional.pad(padding, (0, sk - self.n))[:, None, None, :]
            seen = visible(rows, columns, self.causal, self.window, written, padding)
        if seen is None:
            return self.bias
        seen = seen[(None,) * (4 - seen.dim())]
        least = torch.finfo(q.dtype).min
        hidden = torch.zeros((), dtype=q.dtype, device=q.device)
        added = torch.where(seen, hidden if self.bias is None else self.bias, least)
        return added.expand(-1, -1, sq, -1)


def fastgpt_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    head_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention for a model of transformers.

    Args:
        module: the attention module that calls.
        query: (b, h, sq, d).
        key, value: (b, hk, sk, d), those of the cache included; h is a multiple of hk.
        attention_mask: what `fastgpt_mask` returns, (b, n) of which is causal, or a model's own
            (b|1, h|1, sq|1, sk): bool, True = may be seen, or float, added to the scores.
        dropout: probability of dropping a weight.
        scaling: factor on the scores; None is d ** -0.5.
        sliding_window: number of keys that a query sees, its own included.
        is_causal: without a mask; None is what the module says.
        position_bias: (b|1, h, sq, sk), added to the scores; differentiable.
        softcap, s_aux, head_mask: the model's eager attention serves them.

    Returns:
        (b, sq, h, d), contiguous, and the weights (b, h, sq, sk) where they are asked for.

    Raises:
        ValueError, TypeError: a mask of another shape or dtype.
        NotImplementedError: a call that only eager attention serves, of a model that has none; a
            paged cache (continuous batching); or sparse attention, whose keys the model chooses.
    """
    if cache is not None:
        raise NotImplementedError(
            "cache: fastgpt's attention has no paged cache (continuous batching); "
            "load the model with attn_implementation='sdpa' for it"
        )
    for name in CHOSEN_KEYS:
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"{name}: fastgpt has no sparse attention whose keys the model chooses; "
                "load the model with attn_implementation='sdpa'"
            )
    if query.shape[0] != key.shape[0]:  # one set of queries for all rows (BLIP-2's)
        query = query.expand(key.shape[0], -1, -1, -1)
    scale = _scale(module, query, scaling)
    sight = read_mask(module, query, key, attention_mask, is_causal, sliding_window, position_bias)
    reason = _why_eager(module, query, value, softcap, s_aux, head_mask, kwargs)
    if reason is not None:
        others = {"softcap": softcap, "s_aux": s_aux, "head_mask": head_mask}
        kwargs |= {name: given for name, given in others.items() if given is not None}
        return _eager(module, query, key, value, sight, scale, dropout, reason, kwargs)
    packed = kwargs.get("cu_seq_lens_q") is not None and query.shape[0] == 1
    if packed and dropout == 0.0 and position_bias is None:
        causal, window = _rule(module, query, is_causal, sliding_window)
        return _documents(query, key, value, scale, causal, window, kwargs), None
    out = sight.attend(query, key, value, scale, dropout)
    return out.transpose(1, 2).contiguous(), None  # as it is stored: no copy


def read_mask(
    module: torch.nn.Module | None,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
) -> Sight:
    """What a call may see, from the mask that it got and from what the module says of itself.

    module: None where is_causal is given.

    Raises:
        ValueError: a mask of a shape other than (b, n) with n <= sk, or (b, h, sq, sk).
        TypeError: a mask that is no tensor, or (b, n) and float.
    """
    sk = key.shape[2]
    if attention_mask is None:
        causal, window = _rule(module, query, is_causal, sliding_window)
        return Sight(causal, window, sk, bias=position_bias)
    if not isinstance(attention_mask, Tensor):
        raise TypeError(
            f"attention_mask: expected a tensor or None, got {type(attention_mask).__name__}"
        )
    if attention_mask.dim() == 2:
        if attention_mask.is_floating_point():
            raise TypeError(
                f"attention_mask: expected a (b, n) mask of bool or integers, "
                f"got {attention_mask.dtype}"
            )
        n = attention_mask.shape[1]
        if n > sk:
            raise ValueError(f"attention_mask: expected at most {sk} keys, got {n}")
        padding = None if _hides_nothing(attention_mask) else attention_mask.bool()
        banded = hasattr(module, "masked_bias")  # causal by a where of its own: GPT-2 there
        return Sight(True, _window(sliding_window), n, padding, None, position_bias, banded)
    if attention_mask.dim() != 4:
        raise ValueError(
            "attention_mask: expected (b, n) or (b, h, sq, sk), "
            f"got shape {tuple(attention_mask.shape)}"
        )
    if attention_mask.shape[3] > sk:
        attention_mask = attention_mask[..., :sk]
    if attention_mask.dtype == torch.bool:
        if _hides_nothing(attention_mask):
            return Sight(False, None, sk, bias=position_bias)
        if position_bias is None:
            return Sight(False, None, sk, mask=attention_mask)
        hidden = torch.finfo(position_bias.dtype).min
        bias = torch.where(attention_mask, position_bias, hidden)
        return Sight(False, None, sk, bias=without_the_least(bias, query))
    seen = _as_bool(attention_mask) if position_bias is None else None
    if seen is not None:
        if seen.shape[1] == 1 and torch.equal(seen, seen[:, :, :1].expand_as(seen)):
            return Sight(False, None, sk, padding=seen[:, 0, 0].expand(key.shape[0], sk))
        return Sight(False, None, sk, mask=seen)
    if position_bias is not None:
        attention_mask = attention_mask + position_bias
    return Sight(False, None, sk, bias=without_the_least(attention_mask, query))


def without_the_least(bias: Tensor, query: Tensor) -> Tensor:
    """A bias whose lowest finite values are half the least of its dtype.

    The kernels take exponentials of base 2. The least float times log2(e) is -inf, and a query that
    sees no key would get 0, as of -inf; eager attention makes its softmax uniform. Not where a
    gradient is asked for: it comes from the log-sum-exp, which loses log(n) beside such a number.
    """
    if torch.is_grad_enabled() and query.requires_grad:
        return bias
    half = torch.finfo(bias.dtype).min / 2
    return bias.masked_fill((bias < half) & ~bias.isneginf(), half)


def _rule(
    module: torch.nn.Module | None,
    query: Tensor,
    is_causal: bool | None,
    sliding_window: int | None,
) -> tuple[bool, int | None]:
    """(causal, window) of a call, from its own arguments or what the module is."""
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
        is_causal = is_causal and not getattr(module, "is_cross_attention", False)
    window = _window(sliding_window)
    # Of a single query the causal rule hides nothing, whatever it is called; the window may.
    return bool(is_causal), window if is_causal or query.shape[2] == 1 else None


def _window(sliding_window: int | None) -> int | None:
    return sliding_window if sliding_window is not None and sliding_window > 0 else None


def _hides_nothing(mask: Tensor) -> bool:
    """Whether a bool mask is the one expanded True of `fastgpt_mask`."""
    return all(step == 0 or n == 1 for step, n in zip(mask.stride(), mask.shape, strict=True))


def _documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """(1, sq, h, d) of packed documents, whose offsets a collator gave along with the tokens."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    packed: Tensor = F.varlen_attention(
        q,
        k,
        v,
        kwargs["cu_seq_lens_q"],
        kwargs.get("cu_seq_lens_k", kwargs["cu_seq_lens_q"]),
        kwargs["max_length_q"],
        kwargs.get("max_length_k", kwargs["max_length_q"]),
        causal=causal,
        window=window,
        scale=scale,
    )
    return packed.unsqueeze(0)


def _as_bool(mask: Tensor) -> Tensor | None:
    """A float mask that only shows or hides, as bool; None for any other, or where a look at its
    contents would wait."""
    if mask.requires_grad or not _readable(mask):
        return None
    seen = mask == 0
    return seen if bool((seen | (mask <= torch.finfo(mask.dtype).min)).all()) else None


def _readable(x: Tensor) -> bool:
    """Whether a look at the contents of a tensor waits for no device and breaks no graph."""
    return x.is_cpu and not torch.compiler.is_compiling()


def _unexpanded(x: Tensor) -> Tensor:
    """x with the rows that `expand` made narrowed to one."""
    return x.narrow(2, 0, 1) if x.shape[2] > 1 and x.stride(2) == 0 else x


def _scale(module: torch.nn.Module, query: Tensor, scaling: float | None) -> float:
    if scaling is not None:
        return float(scaling)
    scale: float = query.shape[3] ** -0.5
    # GPT-2 of transformers 4 passes none, and leaves the two flags of its configuration to us.
    if getattr(module, "scale_attn_weights", True) is False:
        scale = 1.0
    if getattr(module, "scale_attn_by_inverse_layer_idx", False):
        scale /= float(module.layer_idx) + 1.0  # type: ignore[arg-type]
    return scale


def _why_eager(
    module: torch.nn.Module,
    query: Tensor,
    value: Tensor,
    softcap: float | None,
    s_aux: Tensor | None,
    head_mask: Tensor | None,
    kwargs: dict[str, Any],
) -> str | None:
    """Why the fused kernels cannot serve a call; None if they can."""
    config = getattr(module, "config", None)
    asked = kwargs.pop(WEIGHTS, False) or kwargs.get("output_attentions")
    if asked or getattr(config, "output_attentions", False) or _weights_collected():
        return "output_attentions=True, and a fused kernel never holds the weights"
    if softcap is not None:
        return f"softcap={softcap}"
    if s_aux is not None:
        return "attention sinks (s_aux)"
    if head_mask is not None:
        return "head_mask"
    for name in _own_keywords(type(module)):
        if kwargs.get(name) is not None:
            return f"{name}, which only the model's own attention knows"
    if value.shape[3] != query.shape[3]:
        return f"values of {value.shape[3]} elements under keys of {query.shape[3]}"
    return None


def _weights_collected() -> bool:
    """Whether transformers 5 collects the weights that attention modules return."""
    collected = None if _collector is None else _collector.get()
    return collected is not None and any("attentions" in key for key in collected)


def fall_back(reason: str) -> None:
    """Report, and warn of once, that a call runs on the model's own attention.

    Raises:
        RuntimeError: a backend is forced, which never falls back.
    """
    dispatch.report_fallback("attention", reason)
    if reason not in _warned and not torch.compiler.is_compiling():
        _warned.add(reason)
        warnings.warn(
            f"fastgpt: this model's own attention runs where a call needs it: {reason}",
            stacklevel=3,
        )


def _eager(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sight: Sight,
    scale: float,
    dropout: float,
    reason: str,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    run = _eager_of(type(module))
    if run is None:
        raise NotImplementedError(
            f"{type(module).__name__}: {reason}, and the model has no eager attention beside it; "
            "load it with attn_implementation='eager'"
        )
    fall_back(reason)
    mask = sight.additive(query, key)
    out: tuple[Tensor, Tensor | None] = run(
        module, query, key, value, mask, scaling=scale, dropout=dropout, **kwargs
    )
    return out


def _eager_of(cls: type) -> Callable[..., Any] | None:
    """The eager attention function in the file of a model's attention class."""
    for base in cls.__mro__:
        run: Callable[..., Any] | None = getattr(
            sys.modules.get(base.__module__), "eager_attention_forward", None
        )
        if run is not None:
            return run
    return None


@_constant
def _own_keywords(cls: type) -> tuple[str, ...]:
    """The keywords of a model's eager attention that `fastgpt_attention` does not have."""
    return _keywords_of(_eager_of(cls))


@functools.cache
def _keywords_of(run: Callable[..., Any] | None) -> tuple[str, ...]:
    if run is None:
        return ()
    ours = {*inspect.signature(fastgpt_attention).parameters, "output_attentions"}
    return tuple(name for name in inspect.signature(run).parameters if name not in ours)
