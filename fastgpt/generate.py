"""Generation token by token: the KV cache, sampling, and the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgpt import functional as F
from fastgpt.config import GPTConfig
from fastgpt.nn import visible_keys

if TYPE_CHECKING:
    from fastgpt.model import GPT


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

    Raises:
        ValueError: batch < 1, or capacity is not in [1, n_positions].
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
        capacity = config.n_positions if capacity is None else capacity
        if batch < 1:
            raise ValueError(f"batch: expected an int >= 1, got {batch}")
        if not 1 <= capacity <= config.n_positions:
            raise ValueError(
                f"capacity: expected 1 to n_positions = {config.n_positions}, got {capacity}"
            )
        self.batch, self.capacity = batch, capacity
        self.length = 0
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.start: Tensor | None = None
        self.layers = [
            LayerCache(self, config, config.window_of(i), device, dtype)
            for i in range(config.n_layer)
        ]

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
        elif bool(start.any()):
            self.start = start

    def visible(self, first: int, last: int) -> Tensor | None:
        """(batch, last - first) bool: which of those positions are not padding; None: all."""
        if self.start is None:
            return None
        return torch.arange(first, last, device=self.start.device) >= self.start[:, None]


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
            raise ValueError("cache: it has no gradient; call the model under torch.no_grad()")
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
                cache_start=owner.start,
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


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token id per row from logits (b, v); returns int64 (b,).

    `top_k` keeps the k most likely tokens; `top_p` of those the fewest whose probabilities reach
    p (nucleus sampling: Holtzman et al. 2020, https://arxiv.org/abs/1904.09751).
    """
    scores = logits.float() / temperature
    ids = None
    if top_k is not None and top_k < scores.shape[-1]:
        scores, ids = scores.topk(top_k, dim=-1)
    elif top_p is not None and top_p < 1.0:
        scores, ids = scores.sort(dim=-1, descending=True)
    probabilities = F.softmax(scores, -1)
    if top_p is not None and top_p < 1.0:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return (drawn if ids is None else ids.gather(-1, drawn)).squeeze(-1)


@torch.no_grad()
def generate(
    model: GPT,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    do_sample: bool = True,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | None = None,
    generator: torch.Generator | None = None,
    on_token: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Continue prompts token by token through the KV cache, in eval mode and without gradients.

    Args:
        model: the GPT.
        input_ids: (b, s) int64 or int32 prompts, s >= 1; shorter ones padded on the left.
        max_new_tokens: how many tokens to add at most, >= 0.
        attention_mask: (b, s) bool or integer, nonzero = visible; needed where there is padding.
        do_sample: draw from the distribution; False takes the most likely token.
        temperature, top_k, top_p: shape the distribution; see `sample`.
        eos_token_id: a row that produced it is finished and filled up with it; the loop ends when
            every row is.
        generator: the source of randomness of the draws.
        on_token: called after each step with the new token ids (b,).

    Returns:
        (b, s + n) ids of input_ids' dtype: the prompt and n <= max_new_tokens new tokens.

    Raises:
        ValueError: s + max_new_tokens exceeds n_positions, padding not on the left, or an argument
            out of its range.
        TypeError: an argument of the wrong type.
    """
    config = model.config
    _check_arguments(max_new_tokens, temperature, top_k, top_p, eos_token_id, config.vocab_size)
    if input_ids.dim() != 2 or input_ids.shape[0] == 0 or input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids: expected shape (b, s) with b, s >= 1, got {tuple(input_ids.shape)}"
        )
    b, s = input_ids.shape
    if s + max_new_tokens > config.n_positions:
        raise ValueError(
            f"max_new_tokens: {s} prompt tokens and {max_new_tokens} new ones exceed "
            f"n_positions = {config.n_positions}"
        )
    if attention_mask is not None:
        visible = visible_keys(attention_mask, b, s)
        assert visible is not None
        left_padding(visible)
    if max_new_tokens == 0:
        return input_ids.clone()

    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        cache = model.new_cache(b, s + max_new_tokens)
        finished = torch.zeros(b, dtype=torch.bool, device=input_ids.device)
        tokens = [input_ids]
        hidden = model.hidden_states(input_ids, attention_mask, cache)
        while True:
            logits = model.lm_head(hidden[:, -1])
            if do_sample:
                new = sample(
                    logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
                )
            else:
                new = logits.argmax(dim=-1)
            new = new.to(input_ids.dtype)
            if eos_token_id is not None:
                new = new.masked_fill(finished, eos_token_id)
                finished |= new == eos_token_id
            tokens.append(new[:, None])
            if on_token is not None:
                on_token(new)
            if len(tokens) > max_new_tokens or (eos_token_id is not None and bool(finished.all())):
                return torch.cat(tokens, dim=1)
            hidden = model.hidden_states(new[:, None], None, cache)
    finally:
        for module in training:
            module.training = True


def _check_arguments(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    eos_token_id: int | None,
    vocab_size: int,
) -> None:
    for name, value, least in (
        ("max_new_tokens", max_new_tokens, 0),
        ("top_k", top_k, 1),
        ("eos_token_id", eos_token_id, 0),
    ):
        if value is None and name != "max_new_tokens":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int >= {least}, got {value!r}")
        if value < least:
            raise ValueError(f"{name}: expected an int >= {least}, got {value}")
    if eos_token_id is not None and eos_token_id >= vocab_size:
        raise ValueError(
            f"eos_token_id: expected 0 to {vocab_size - 1} (vocab_size = {vocab_size}), "
            f"got {eos_token_id}"
        )
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a number > 0, got {temperature}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p: expected 0 < top_p <= 1, got {top_p}")
