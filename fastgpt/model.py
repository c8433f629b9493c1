"""GPT: the decoder of GPT-1, GPT-2 and GPT-3 on the fused ops."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt import functional as F
from fastgpt.cache import KVCache, visible_keys
from fastgpt.config import GPTConfig
from fastgpt.generate import generate
from fastgpt.nn import DecoderBlock, LayerNorm
from fastgpt.ops._checks import check_tensor, host_checks

IGNORE_INDEX = -100


class GPTOutput(NamedTuple):
    """What `GPT.forward` returns.

    logits: (b, s, vocab_size), or None where they were not asked for.
    loss: the mean cross entropy, a scalar, or None without labels.
    """

    logits: Tensor | None
    loss: Tensor | None


class GPT(torch.nn.Module):
    """A GPT decoder: embeddings, `n_layer` blocks, final layer norm (pre-norm only), output matrix.

    Parameters are named as in GPT-2's checkpoints (`wte`, `wpe`, `h.0.attn.c_attn`, ..., `ln_f`,
    `lm_head`) and initialised as in GPT-2: normal(0, 0.02), the projections that feed the residual
    stream scaled by 1 / sqrt(2 * n_layer), biases 0.

    Sources: Radford et al. 2018 and 2019; Brown et al. 2020, https://arxiv.org/abs/2005.14165
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = torch.nn.Embedding(config.n_positions, config.n_embd)
        self.drop = torch.nn.Dropout(config.dropout)
        self.h = torch.nn.ModuleList(DecoderBlock(config, i) for i in range(config.n_layer))
        self.ln_f: torch.nn.Module = torch.nn.Identity()
        if config.norm == "pre":
            self.ln_f = LayerNorm(config.n_embd, eps=config.layer_norm_eps, bias=config.bias)
        self.lm_head = torch.nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()
        self.reset_parameters()

    def tie_weights(self) -> None:
        """Make the output matrix the token embedding, if the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.wte.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise every parameter as GPT-2 does."""
        residual_std = 0.02 / (2 * self.config.n_layer) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.normal_(0.0, residual_std if name.endswith("c_proj") else 0.02)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, torch.nn.Embedding):
                module.weight.normal_(0.0, 0.02)
            elif isinstance(module, LayerNorm):
                module.reset_parameters()

    def num_parameters(self) -> int:
        """How many numbers are trained; a tied output matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        return_logits: bool = True,
    ) -> GPTOutput:
        """Next-token logits, and the loss against `labels`.

        Args:
            input_ids: (b, s) int64 or int32, each in [0, vocab_size).
            attention_mask: (b, keys) bool or integer, nonzero = visible; keys is s, plus the
                cached length with a cache. Positions count from the first visible token of a row.
            labels: (b, s) int64, usually input_ids itself: shifted inside, so that position i is
                judged on labels[:, i + 1]; -100 is left out.
            cache: keys and values of the tokens before; extended by this call (inference only).
            return_logits: False, with labels, computes the loss from the hidden states by
                `linear_cross_entropy` and never holds the (b, s, vocab_size) logits.

        Returns:
            GPTOutput(logits, loss).

        Raises:
            ValueError: a token id or label outside the vocabulary (checked on CPU tensors, and on
                others with FASTGPT_CHECK=1), more than n_positions tokens, a shape that does not
                fit, a full cache, or return_logits=False without labels.
            TypeError: input_ids or labels are not integers, or attention_mask is a float.
        """
        if labels is None and not return_logits:
            raise ValueError("return_logits: expected True without labels, got False")
        if labels is not None:
            self._check_labels(labels, input_ids)
        hidden = self.hidden_states(input_ids, attention_mask, cache)
        logits = self.lm_head(hidden) if return_logits else None
        if labels is None:
            return GPTOutput(logits, None)
        # Shifting the labels instead of the logits leaves the logits where they are.
        targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        targets = targets.reshape(-1).long()
        if logits is None:
            rows = hidden.reshape(-1, hidden.shape[-1])
            loss = F.linear_cross_entropy(
                rows, self.lm_head.weight, targets, ignore_index=IGNORE_INDEX
            )
        else:
            rows = logits.reshape(-1, logits.shape[-1])
            loss = F.cross_entropy(rows, targets, ignore_index=IGNORE_INDEX)
        return GPTOutput(logits, loss)

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """What the output matrix reads, (b, s, n_embd); arguments and errors as `forward`."""
        self._check_input_ids(input_ids)
        b, s = input_ids.shape
        past = 0 if cache is None else cache.length
        if past + s > self.config.n_positions:
            raise ValueError(
                f"input_ids: expected at most n_positions = {self.config.n_positions} tokens, "
                f"got {past + s}" + (f" ({past} of them cached)" if past else "")
            )
        positions = torch.arange(s, device=input_ids.device)
        if cache is None:
            attention_mask = visible_keys(attention_mask, b, s)
            first = None if attention_mask is None else attention_mask.int().argmax(dim=1)
        else:
            cache.check(b, s)
            if attention_mask is not None:
                cache.hide_padding(attention_mask, s)
                attention_mask = None
            first = cache.start
            # Counted on the device, so that a captured step moves on when it is replayed.
            positions = positions + cache.lengths[:, None]
        if first is not None:
            positions = (positions - first[:, None]).clamp(min=0)
        x = self.drop(self.wte(input_ids) + self.wpe(positions))
        for i, block in enumerate(self.h):
            x = block(x, attention_mask, None if cache is None else cache.layers[i])
        if cache is not None:
            cache.advance(s)
        return self.ln_f(x)

    def new_cache(self, batch: int, capacity: int | None = None) -> KVCache:
        """An empty cache for `batch` rows of up to `capacity` (default n_positions) tokens.

        Its dtype is that in which the model attends: the autocast dtype inside autocast.

        Raises:
            ValueError: capacity is not in [1, n_positions].
        """
        weight = self.wte.weight
        device = weight.device
        dtype = weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        return KVCache(self.config, batch, capacity, device=device, dtype=dtype)

    def generate(
        self,
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
        """Continue prompts token by token through the KV cache; see `fastgpt.generate.generate`."""
        return generate(
            self,
            input_ids,
            max_new_tokens,
            attention_mask=attention_mask,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_token_id=eos_token_id,
            generator=generator,
            on_token=on_token,
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors`; see `fastgpt.checkpoint.save_pretrained`."""
        from fastgpt.checkpoint import save_pretrained

        save_pretrained(self, Path(folder))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> GPT:
        """Load a checkpoint folder: ours, or Hugging Face's of a GPT-2 or GPT-Neo.

        See `fastgpt.checkpoint.from_pretrained`.
        """
        from fastgpt.checkpoint import from_pretrained

        return from_pretrained(cls, Path(folder), dtype=dtype, device=device)

    def _check_input_ids(self, input_ids: Tensor) -> None:
        check_tensor("input_ids", input_ids)
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(
                f"input_ids: expected shape (b, s) with s >= 1, got {tuple(input_ids.shape)}"
            )
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"input_ids: expected dtype int64 or int32, got {input_ids.dtype}")
        v = self.config.vocab_size
        if host_checks("reference", input_ids):
            bad = (input_ids < 0) | (input_ids >= v)
            _check_ids("input_ids", input_ids, bad, f"0 to {v - 1}", v)

    def _check_labels(self, labels: Tensor, input_ids: Tensor) -> None:
        check_tensor("labels", labels)
        check_tensor("input_ids", input_ids)
        if labels.shape != input_ids.shape:
            raise ValueError(
                f"labels: expected the shape of input_ids {tuple(input_ids.shape)}, "
                f"got {tuple(labels.shape)}"
            )
        if labels.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"labels: expected dtype int64 or int32, got {labels.dtype}")
        v = self.config.vocab_size
        if host_checks("reference", labels):
            bad = ((labels < 0) | (labels >= v)) & (labels != IGNORE_INDEX)
            _check_ids("labels", labels, bad, f"0 to {v - 1} or {IGNORE_INDEX}", v)


def _check_ids(name: str, ids: Tensor, bad: Tensor, expected: str, vocab_size: int) -> None:
    if bool(bad.any()):
        row, column = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"{name}[{row}, {column}] is {int(ids[row, column])}, expected {expected} "
            f"(vocab_size = {vocab_size})"
        )
