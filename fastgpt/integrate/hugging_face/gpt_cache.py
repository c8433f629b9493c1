"""The caches of transformers, as a `fastgpt.model.Decoder` uses a cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from fastgpt import functional as F
from fastgpt.cache import check_length, visible_keys
from fastgpt.config import GPTConfig
from fastgpt.ops._checks import check_tensor, host_checks


class CacheView:
    """A `fastgpt.cache.Memory` over a cache of transformers, or over none.

    Unlike `KVCache` it takes any mask, gradients flow through the keys and values (as prefix tuning
    needs), and positions may be given. Where nothing is cached or masked, position_ids that start
    again within a row mark packed documents: no token sees another document, and no cache is made.

    Args:
        cache: holds the keys and values of the tokens before, and takes in those of this call.
        config: the decoder's.
        position_ids: (b, s) or (1, s) integers; default: visible tokens are counted, as `generate`
            of transformers counts them.
        dropout_p: probability of dropping an attention weight.
        make_cache: called for a cache where none came.
        device: of the tokens.

    Raises:
        TypeError: cache is of another kind.
    """

    def __init__(
        self,
        cache: Cache | None,
        config: GPTConfig,
        *,
        device: torch.device,
        position_ids: Tensor | None = None,
        dropout_p: float = 0.0,
        make_cache: Callable[[], Cache] | None = None,
    ) -> None:
        if cache is not None and not isinstance(cache, Cache):
            raise TypeError(
                "past_key_values: expected a Cache of transformers, as "
                f"DynamicCache(config=model.config), got {type(cache).__name__}"
            )
        self.cache, self.config, self.device, self.make_cache = cache, config, device, make_cache
        self.position_ids, self.dropout_p = position_ids, dropout_p
        self.past = 0 if cache is None else int(cache.get_seq_length())
        self.slots: Tensor | None = None  # (s): where a static cache puts the new tokens
        self.documents: tuple[Tensor, int] | None = None  # offsets (n + 1), longest document
        self.layers = [LayerView(self, i) for i in range(config.n_layer)]

    def begin(self, attention_mask: Tensor | None, b: int, s: int) -> tuple[Tensor | None, Tensor]:
        """The mask as bool (b, past + s) or None, and positions (s), (1, s) or (b, s).

        Raises:
            ValueError: more than n_positions tokens, a shape that does not fit, a mask that holds
                other numbers than 0 and 1, positions that do not exist, or packed documents with
                a cache, or with dropout, which the packed kernel does not have.
            TypeError: attention_mask is no tensor, or position_ids are no integers.
        """
        visible = visible_keys(_as_bool(attention_mask), b, self.past + s)
        self.slots = torch.arange(self.past, self.past + s, device=self.device)
        positions = self._positions(visible, b, s)
        if self.cache is None and self.documents is None and self.make_cache is not None:
            self.cache = self.make_cache()
        return visible, positions

    def _positions(self, visible: Tensor | None, b: int, s: int) -> Tensor:
        if self.position_ids is None:
            check_length(s, self.past, self.config.n_positions)
            assert self.slots is not None
            if visible is None:
                return self.slots
            return (visible.cumsum(1) - 1).clamp(min=0)[:, self.past :]
        self._check_position_ids(self.position_ids, b, s)
        # Whether documents are packed is seen on the host: unknown in a graph, nothing to see in
        # a row of one token.
        if visible is None and self.past == 0 and s > 1 and not torch.compiler.is_compiling():
            self._find_documents(self.position_ids.expand(b, s))
        return self.position_ids

    def advance(self, t: int) -> None:
        """Nothing: `Cache.update` has counted the tokens."""

    def _check_position_ids(self, position_ids: Tensor, b: int, s: int) -> None:
        check_tensor("position_ids", position_ids)
        if tuple(position_ids.shape) not in ((b, s), (1, s)):
            raise ValueError(
                f"position_ids: expected shape (b, s) = {(b, s)} or {(1, s)}, "
                f"got {tuple(position_ids.shape)}"
            )
        if position_ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f"position_ids: expected dtype int64 or int32, got {position_ids.dtype}"
            )
        n = self.config.n_positions
        # So many tokens need a look even on a GPU: padding may not count, or documents be packed.
        if self.past + s > n or host_checks("reference", position_ids):
            low, high = (int(x) for x in position_ids.aminmax())
            if low < 0 or high >= n:
                raise ValueError(
                    f"position_ids: expected 0 to {n - 1} (n_positions = {n}), "
                    f"got {low if low < 0 else high}"
                )

    def _find_documents(self, position_ids: Tensor) -> None:
        b, s = position_ids.shape
        begins = position_ids.diff(dim=1) != 1
        if not bool(begins.any()):
            return
        if self.dropout_p > 0.0 or self.cache is not None:
            got = "a cache" if self.dropout_p == 0.0 else f"dropout = {self.dropout_p}"
            raise ValueError(
                "position_ids: packed documents (positions that start again within a row) have "
                f"neither dropout nor a cache, got {got}; give each document a row of its own"
            )
        edges = torch.ones(b * s + 1, dtype=torch.bool, device=begins.device)
        edges[:-1].view(b, s)[:, 1:] = begins
        offsets = edges.nonzero().flatten().int()
        self.documents = offsets, int(offsets.diff().max())


class LayerView:
    """One layer's share of a `CacheView`: a `fastgpt.cache.LayerMemory`."""

    def __init__(self, owner: CacheView, layer: int) -> None:
        self.owner, self.layer, self.window = owner, layer, owner.config.window_of(layer)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Hand the keys and values of the new tokens to the cache, and attend with their queries.

        Args:
            q, k, v: (b, h, t, d).
            scale: on the scores; None is 1 / sqrt(d).
            attention_mask: (b, past + t) bool, as `CacheView.begin` gives it.

        Returns:
            (b, h, t, d).
        """
        owner = self.owner
        if owner.documents is not None:
            return self._attend_packed(q, k, v, scale)
        if owner.cache is not None:
            assert owner.slots is not None
            # transformers 4 reads the slots of a static cache, 5 counts them itself.
            arguments = {"cache_position": owner.slots.to(k.device)}
            total = owner.past + k.shape[2]
            k, v = owner.cache.update(k, v, self.layer, arguments)
            # A static cache gives its whole buffer, empty behind the newest token; a sliding one
            # no more than the window can see. Either way the last key is now the newest token's.
            k, v = k[:, :, :total], v[:, :, :total]
        if attention_mask is not None:
            attention_mask = attention_mask[:, attention_mask.shape[1] - k.shape[2] :]
        return F.attention(
            q,
            k,
            v,
            window=self.window,
            scale=scale,
            key_padding_mask=attention_mask,
            dropout_p=owner.dropout_p,
        )

    def _attend_packed(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        assert self.owner.documents is not None
        offsets, longest = self.owner.documents
        b, _, s, _ = q.shape
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # each (b * s, h, d)
        out = F.varlen_attention(
            q, k, v, offsets, offsets, longest, longest, window=self.window, scale=scale
        )
        return out.view(b, s, *out.shape[1:]).transpose(1, 2)


def _as_bool(attention_mask: Tensor | None) -> Tensor | None:
    """A mask of 0 and 1 in a float dtype, as PEFT makes them of a prompt's, as bool."""
    if not isinstance(attention_mask, Tensor) or not attention_mask.is_floating_point():
        return attention_mask
    if host_checks("reference", attention_mask):
        other = (attention_mask != 0) & (attention_mask != 1)
        if bool(other.any()):
            raise ValueError(
                "attention_mask: expected 1 (visible) and 0 (hidden), "
                f"got {float(attention_mask[other][0])}"
            )
    return attention_mask.bool()
