"""The KV cache of a decoder, and the masks that say which of its keys are padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastgpt import functional as F
from fastgpt.config import GPTConfig, check_config, check_count, check_int
from fastgpt.ops._checks import check_tensor

NO_GRADIENT = "cache: it has no gradient; call the model under torch.no_grad()"


class LayerMemory(Protocol):
    """What one attention layer asks of a cache."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Keep the keys and values of t new tokens, and attend with their queries: (b, h, t, d)."""
        ...


class Memory(Protocol):
    """What a decoder asks of a cache: `KVCache` here, those of transformers in `integrate`."""

    @property
    def layers(self) -> Sequence[LayerMemory]:
        """One per block."""
        ...

    def begin(self, attention_mask: Tensor | None, b: int, s: int) -> tuple[Tensor | None, Tensor]:
        """The mask for the layers, and the positions (s) or (b, s), of `s` tokens for `b` rows."""
        ...

    def advance(self, t: int) -> None:
        """Count `t` tokens that every layer has taken in."""
        ...


class KVCache:
    """The keys and values of the tokens that a model has seen, preallocated per layer.

    A dense layer keeps `capacity` tokens; a banded one keeps only its window, as a ring in which
    position p lies in slot p mod window. All rows are equally long: shorter prompts are padded on
    the left, and `start` says where each row begins. A step of one token makes no host wait.

    Args:
        config: the model's.
        batch: number of rows.
        capacity: the most tokens a row will hold, padding included; default n_positions.
        device, dtype: of the keys and values.

    Attributes:
        layers: one `LayerCache` per layer.
        lengths: (batch,) int32 on the device, tokens seen; `length` is the same on the host.
        start: (batch,) int32 on the device, position of each row's first visible token, or None
            where nothing is padded.
        incoming_start: the same during a call, whose padding `start` takes over once every layer
            has the new tokens: a call that is rejected leaves it as it was.

    Raises:
        ValueError: batch < 1, or capacity is not in [1, n_positions].
        TypeError: config is no GPTConfig, or batch or capacity no int.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch: int,
        capacity: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_config(config)
        check_count("batch", batch)
        capacity = config.n_positions if capacity is None else capacity
        check_int("capacity", capacity, f"from 1 to n_positions = {config.n_positions}")
        if not 1 <= capacity <= config.n_positions:
            raise ValueError(
                f"capacity: expected 1 to n_positions = {config.n_positions}, got {capacity}"
            )
        self.config, self.batch, self.capacity = config, batch, capacity
        self.length = 0
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.start: Tensor | None = None
        self.incoming_start: Tensor | None = None
        self.layers = [
            LayerCache(self, config, config.window_of(i), device, dtype)
            for i in range(config.n_layer)
        ]

    def begin(self, attention_mask: Tensor | None, b: int, s: int) -> tuple[None, Tensor]:
        """Where `s` more tokens of `b` rows stand: (s) or (b, s) positions, and no mask.

        Padding goes to `incoming_start`. Positions are counted on the device, so that a captured
        step moves on when it is replayed.

        Raises:
            ValueError: more than n_positions tokens, or as `check` and `hide_padding`.
        """
        check_length(s, self.length, self.config.n_positions)
        self.check(b, s)
        self.incoming_start = self.start
        if attention_mask is not None:
            self.hide_padding(attention_mask, s)
        positions = torch.arange(s, device=self.lengths.device) + self.lengths[:, None]
        return None, from_first_visible(positions, self.incoming_start)

    def check(self, batch: int, t: int) -> None:
        """ValueError unless `t` more tokens for `batch` rows fit."""
        if batch != self.batch:
            raise ValueError(f"cache: expected one for {batch} rows, got one for {self.batch}")
        if self.length + t > self.capacity:
            raise ValueError(
                f"cache: full, it holds {self.length} of at most {self.capacity} tokens "
                f"and {t} more came"
            )

    def advance(self, t: int) -> None:
        """Count `t` tokens whose keys and values every layer has just stored."""
        self.length += t
        self.lengths += t
        self.start = self.incoming_start

    def hide_padding(self, attention_mask: Tensor, t: int) -> None:
        """Take each row's first visible position from a mask over the cached and `t` new tokens.

        The mask is read by the host: give it with the prompt, and leave it out of later steps.

        Args:
            attention_mask: (batch, length + t) bool or integer, nonzero = visible. Padding must be
                on the left, and where tokens are cached it must be what it was for them.

        Raises:
            ValueError: another shape, padding that is not on the left, or a row without any token.
        """
        visible = visible_keys(attention_mask, self.batch, self.length + t)
        assert visible is not None
        start = left_padding(visible)
        if self.length:
            before = torch.zeros_like(self.lengths) if self.start is None else self.start
            if not torch.equal(start, before):
                raise ValueError(
                    "attention_mask: expected the left padding of the cached tokens "
                    f"{before.tolist()}, got {start.tolist()}"
                )
        else:
            self.incoming_start = start if bool(start.any()) else None

    def visible(self, first: int, last: int) -> Tensor | None:
        """(batch, last - first) bool: which of those positions are not padding; None: all."""
        start = self.incoming_start
        if start is None:
            return None
        return torch.arange(first, last, device=start.device) >= start[:, None]


class LayerCache:
    """One layer's share of a `KVCache`: `k` and `v`, (b, h, slots, d)."""

    def __init__(
        self,
        owner: KVCache,
        config: GPTConfig,
        window: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.owner, self.window = owner, window
        self.ring = window is not None and window < owner.capacity
        slots = window if window is not None and self.ring else owner.capacity
        shape = (owner.batch, config.n_head, slots, config.d_head)
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Store the keys and values of t new tokens and attend with their queries.

        Args:
            q, k, v: (b, h, t, d).
            scale: on the scores; None is 1 / sqrt(d).
            attention_mask: as `KVCache.hide_padding`.

        Returns:
            (b, h, t, d). The owner's lengths are as before: its caller advances them, once for all
            layers.

        Raises:
            ValueError: the cache is full, of another batch size, or gradients are asked for.
        """
        owner = self.owner
        t = q.shape[2]
        if q.requires_grad and torch.is_grad_enabled():
            raise ValueError(NO_GRADIENT)
        owner.check(q.shape[0], t)
        if attention_mask is not None:
            owner.hide_padding(attention_mask, t)
        q, k, v = (x.to(self.k.dtype) for x in (q, k, v))
        if t == 1:
            return F.decode_attention(
                q,
                self.k,
                self.v,
                owner.lengths,
                k_new=k,
                v_new=v,
                window=self.window,
                scale=scale,
                cache_start=owner.incoming_start,
                ring=self.ring,
            )
        first, last = self._oldest(), owner.length + t
        if owner.length and self.ring:
            slots = torch.arange(first, owner.length, device=k.device) % self.k.shape[2]
            keys = torch.cat((self.k[:, :, slots], k), dim=2)
            values = torch.cat((self.v[:, :, slots], v), dim=2)
            self._store(k, v)
        else:
            self._store(k, v)
            # A first prompt reads its own keys, as it would without a cache.
            keys, values = (k, v) if first == owner.length else (self.k, self.v)
            keys, values = keys[:, :, : last - first], values[:, :, : last - first]
        return F.attention(
            q,
            keys,
            values,
            window=self.window,
            scale=scale,
            key_padding_mask=owner.visible(first, last),
        )

    def _oldest(self) -> int:
        """The oldest position that a token after the cached ones can see."""
        if self.window is None or not self.ring:
            return 0
        return max(0, self.owner.length - self.window + 1)

    def _store(self, k: Tensor, v: Tensor) -> None:
        """Write keys and values (b, h, t, d) behind the cached ones; a ring keeps the newest."""
        slots, t, length = self.k.shape[2], k.shape[2], self.owner.length
        if not self.ring:
            self.k[:, :, length : length + t] = k
            self.v[:, :, length : length + t] = v
            return
        kept = min(t, slots)
        places = torch.arange(length + t - kept, length + t, device=k.device) % slots
        self.k[:, :, places] = k[:, :, t - kept :]
        self.v[:, :, places] = v[:, :, t - kept :]


def check_cache(cache: Memory, config: GPTConfig, dtype: torch.dtype, device_type: str) -> None:
    """ValueError or TypeError unless a model of this config, dtype and device can use the cache.

    Inside autocast its layers take queries of any dtype, and so a `KVCache` of any.
    """
    if not isinstance(cache, KVCache):
        if not all(hasattr(cache, name) for name in ("layers", "begin", "advance")):
            raise TypeError(
                f"cache: expected a KVCache, as new_cache makes them, got {type(cache).__name__}"
            )
        return
    if cache.config is not config:
        for name in ("n_layer", "n_head", "d_head", "n_positions", "windows"):
            expected, got = getattr(config, name), getattr(cache.config, name)
            if expected != got:
                raise ValueError(f"cache: expected one for {name} = {expected}, got one for {got}")
    got_dtype = cache.layers[0].k.dtype
    if got_dtype != dtype and not torch.is_autocast_enabled(device_type):
        raise TypeError(f"cache: expected dtype {dtype} as the model, got {got_dtype}")


def visible_keys(attention_mask: Tensor | None, b: int, keys: int) -> Tensor | None:
    """attention_mask as the bool (b, keys) that the ops take, None if there is none.

    Raises:
        ValueError: another shape.
        TypeError: no tensor, or a float mask, whose meaning (additive or not) would be a guess.
    """
    if attention_mask is None:
        return None
    check_tensor("attention_mask", attention_mask)
    if attention_mask.is_floating_point() or attention_mask.is_complex():
        raise TypeError(
            "attention_mask: expected dtype bool or an integer (1 = visible), "
            f"got {attention_mask.dtype}"
        )
    if attention_mask.dim() != 2 or tuple(attention_mask.shape) != (b, keys):
        raise ValueError(
            f"attention_mask: expected shape (b, keys) = {(b, keys)}, "
            f"got {tuple(attention_mask.shape)}"
        )
    return attention_mask.bool()


def check_length(new: int, past: int, n_positions: int) -> None:
    """ValueError unless `new` tokens after `past` cached ones have a position each."""
    if past + new > n_positions:
        raise ValueError(
            f"input_ids: expected at most n_positions = {n_positions} tokens, "
            f"got {past + new}" + (f" ({past} of them cached)" if past else "")
        )


def from_first_visible(positions: Tensor, first: Tensor | None) -> Tensor:
    """positions (s) or (b, s), counted from each row's `first` (b,); 0 before it."""
    return positions if first is None else (positions - first[:, None]).clamp(min=0)


def left_padding(visible: Tensor) -> Tensor:
    """The first visible position of each row of a bool (b, s) mask, int32 (b,).

    Raises:
        ValueError: a hidden token behind a visible one, or a row that is hidden altogether.
    """
    holes = visible[:, :-1] & ~visible[:, 1:]
    if bool(holes.any()):
        row, column = (int(i) for i in holes.nonzero()[0])
        raise ValueError(
            "attention_mask: expected padding on the left only, "
            f"got a hidden token behind a visible one at [{row}, {column + 1}]"
        )
    hidden = ~visible[:, -1]
    if bool(hidden.any()):
        raise ValueError(
            f"attention_mask: expected a visible token in every row, got none in row "
            f"{int(hidden.nonzero()[0])}"
        )
    return visible.int().argmax(dim=1).int()
