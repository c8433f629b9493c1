"""Generation token by token: sampling, and the loop through the KV cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgpt import functional as F
from fastgpt.cache import left_padding, visible_keys
from fastgpt.config import check_int, check_number
from fastgpt.ops._checks import check_flag, check_tensor

if TYPE_CHECKING:
    from fastgpt.model import GPT


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
    p (nucleus sampling: Holtzman et al. 2020, https://arxiv.org/abs/1904.09751), at least one.

    Raises:
        ValueError: an argument out of its range.
        TypeError: an argument of the wrong type.
    """
    check_tensor("logits", logits)
    _check_sampling(temperature, top_k, top_p, generator)
    # No score is above 0 then, and none overflows for the least temperature.
    scores = logits.float()
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / min(max(temperature, 1e-30), 1e30)
    ids = None
    if top_k is not None and top_k < scores.shape[-1]:
        scores, ids = scores.topk(top_k, dim=-1)
    elif top_p is not None and top_p < 1.0:
        scores, ids = scores.sort(dim=-1, descending=True)
    probabilities = F.softmax(scores, -1)
    if top_p is not None and top_p < 1.0:
        before = probabilities.cumsum(-1) - probabilities
        least = torch.finfo(before.dtype).tiny  # above `before` of the most likely token, 0
        probabilities = probabilities.masked_fill(before >= max(top_p, least), 0.0)
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
    _check_least("max_new_tokens", max_new_tokens, 0)
    if eos_token_id is not None:
        _check_least("eos_token_id", eos_token_id, 0)
        if eos_token_id >= config.vocab_size:
            raise ValueError(
                f"eos_token_id: expected 0 to {config.vocab_size - 1} "
                f"(vocab_size = {config.vocab_size}), got {eos_token_id}"
            )
    check_flag("do_sample", do_sample)
    _check_sampling(temperature, top_k, top_p, generator)
    if on_token is not None and not callable(on_token):
        raise TypeError(f"on_token: expected None or a function, got {on_token!r}")
    check_tensor("input_ids", input_ids)
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


def _check_sampling(
    temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> None:
    check_number("temperature", temperature)
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a number > 0, got {temperature}")
    if top_k is not None:
        _check_least("top_k", top_k, 1)
    if top_p is not None:
        check_number("top_p", top_p)
        if not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p: expected 0 < top_p <= 1, got {top_p}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected None or a torch.Generator, got {generator!r}")


def _check_least(name: str, value: int, least: int) -> None:
    check_int(name, value, f">= {least}")
    if value < least:
        raise ValueError(f"{name}: expected an int >= {least}, got {value}")
