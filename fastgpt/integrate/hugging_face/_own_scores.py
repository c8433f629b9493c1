"""For attention modules that compute their scores in a method `_attn`: GPT-Neo, and GPT-J until
transformers moved it to AttentionInterface."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
import torch.fx
from torch import Tensor

from fastgpt.integrate.hugging_face.attention import fall_back, read_mask, without_the_least


@torch.fx.wrap
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scale: float,
    window: int | None,
    dropout: float,
    banded: bool,
) -> Tensor:
    """Causal attention of one layer; one node of a `torch.fx` graph.

    Args:
        query: (b, h, sq, d).
        key, value: (b, h, sk, d), those of the cache included.
        attention_mask, window: as `read_mask` takes them.
        scale: factor on the scores.
        dropout: probability of dropping a weight.
        banded: the causal band holds within every mask, as where a model applies it by a `where`.

    Returns:
        (b, h, sq, d), stored as (b, sq, h, d).

    Raises:
        ValueError, TypeError: as `read_mask`.
    """
    sight = read_mask(None, query, key, attention_mask, True, window)
    if banded:
        if sight.mask is not None:
            added = sight.additive(query, key)
            assert added is not None
            sight = dataclasses.replace(sight, mask=None, bias=without_the_least(added, query))
        sight = dataclasses.replace(sight, causal=True, window=window, banded_mean=True)
    return sight.attend(query, key, value, scale, dropout)


class FusedScores(torch.nn.Module):
    """A mixin before the model's class: its `_attn` on the fused kernels, all else as it is.

    Class attributes: `own` is the class that `forward` becomes for calls that need the weights;
    `banded` is as in `attend`.
    """

    own: type
    banded = False
    config: Any
    attn_dropout: Any

    @property
    def scale(self) -> float:
        """Factor on the scores."""
        raise NotImplementedError

    @property
    def window(self) -> int | None:
        """Number of keys that a query sees, its own included; None is dense."""
        return None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own; with output_attentions or a head_mask by the model's own `_attn`."""
        reason = None
        if kwargs.get("output_attentions"):
            reason = "output_attentions=True, and a fused kernel never holds the weights"
        elif kwargs.get("head_mask") is not None:
            reason = "head_mask"
        if reason is None:
            return super().forward(*args, **kwargs)
        fall_back(reason)
        same = copy.copy(self)  # with the same parameters
        same.__class__ = self.own
        return same.forward(*args, **kwargs)

    def _attn(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """(b, h, sq, d), stored as (b, sq, h, d), and no weights."""
        dropout = self.attn_dropout.p if self.training else 0.0
        args = (self.scale, self.window, dropout, self.banded)
        return attend(query, key, value, attention_mask, *args), None


class OwnScores(torch.nn.Module):
    """A mixin before the model's class: its own `_attn` under the masks of `fastgpt_mask`."""

    def _attn(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *head_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        sight = read_mask(self, query, key, attention_mask, None)
        added = sight.additive(query, key)
        out: tuple[Tensor, Tensor] = super()._attn(query, key, value, added, *head_mask)  # type: ignore[misc]
        return out
