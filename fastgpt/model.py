"""GPT: the decoder of GPT-1, GPT-2 and GPT-3 on the fused ops."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt import functional as F
from fastgpt.cache import (
    NO_GRADIENT,
    KVCache,
    LayerMemory,
    Memory,
    check_cache,
    check_length,
    from_first_visible,
    visible_keys,
)
from fastgpt.config import GPTConfig, check_config
from fastgpt.generate import generate
from fastgpt.nn import DecoderBlock, LayerNorm, check_hidden
from fastgpt.ops._checks import check_tensor, host_checks

IGNORE_INDEX = -100

RunBlock = Callable[[torch.nn.Module, Tensor, Tensor | None, LayerMemory | None], Tensor]


class GPTOutput(NamedTuple):
    """What `GPT.forward` returns.

    logits: (b, s, vocab_size), or None where they were not asked for.
    loss: the mean cross entropy, a scalar, or None without labels.
    """

    logits: Tensor | None
    loss: Tensor | None


class Decoder(torch.nn.Module):
    """The body of a GPT: embeddings, `n_layer` blocks, final layer norm (pre-norm only).

    Parameters are named as in GPT-2's checkpoints: `wte`, `wpe`, `h.0.attn.c_attn`, ..., `ln_f`.
    They are as torch makes them; whoever puts a head on the body initialises both.

    Sources: Radford et al. 2018 and 2019; Brown et al. 2020, https://arxiv.org/abs/2005.14165
    """

    def __init__(self, config: GPTConfig) -> None:
        check_config(config)
        super().__init__()
        self.config = config
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = torch.nn.Embedding(config.n_positions, config.n_embd)
        self.drop = torch.nn.Dropout(config.dropout)
        self.h = torch.nn.ModuleList(DecoderBlock(config, i) for i in range(config.n_layer))
        self.ln_f: torch.nn.Module = torch.nn.Identity()
        if config.norm == "pre":
            self.ln_f = LayerNorm(config.n_embd, eps=config.layer_norm_eps, bias=config.bias)

    def hidden_states(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Memory | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        run_block: RunBlock | None = None,
    ) -> Tensor:
        """What a head reads, (b, s, n_embd).

        Args:
            input_ids, attention_mask, cache: as `GPT.forward`.
            inputs_embeds: (b, s, n_embd) in place of input_ids: what stands for the tokens before
                their positions are added.
            run_block: called as `run_block(block, x, mask, layer_cache)` in place of the block, to
                run it another way (checkpointed) or to look at what goes through.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds, or as `GPT.forward`.
            TypeError: as `GPT.forward`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "input_ids: expected either input_ids or inputs_embeds, got "
                + ("neither" if input_ids is None else "both")
            )
        if input_ids is not None:
            self._check_input_ids(input_ids)
            tokens = input_ids
        else:
            assert inputs_embeds is not None
            check_hidden(inputs_embeds, self.config.n_embd, name="inputs_embeds")
            tokens = inputs_embeds
        b, s = tokens.shape[:2]
        if cache is None:
            check_length(s, 0, self.config.n_positions)
            attention_mask = visible_keys(attention_mask, b, s)
            first = None if attention_mask is None else attention_mask.int().argmax(dim=1)
            positions = from_first_visible(torch.arange(s, device=tokens.device), first)
        else:
            self._check_cache(cache, inputs_embeds)
            attention_mask, positions = cache.begin(attention_mask, b, s)
        embedded = self.wte(tokens) if inputs_embeds is None else inputs_embeds
        x = self.drop(embedded + self.wpe(positions))
        for i, block in enumerate(self.h):
            layer = None if cache is None else cache.layers[i]
            if run_block is None:
                x = block(x, attention_mask, layer)
            else:
                x = run_block(block, x, attention_mask, layer)
        if cache is not None:
            cache.advance(s)
        return self.ln_f(x)

    def init_module(self, module: torch.nn.Module) -> None:
        """Initialise one module, of this body or of a head on it, as GPT-2 does.

        normal(0, 0.02), the projections that feed the residual stream scaled by
        1 / sqrt(2 * n_layer); biases 0, layer norms 1.
        """
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            residual = (m for name, m in self.named_modules() if name.endswith("c_proj"))
            scale = (2 * self.config.n_layer) ** -0.5 if module in residual else 1.0
            torch.nn.init.normal_(module.weight, 0.0, 0.02 * scale)
            if isinstance(module, torch.nn.Linear) and module.bias is not None:
                torch.nn.init.zeros_(module.bias)
        elif isinstance(module, LayerNorm):
            module.reset_parameters()

    def _check_cache(self, cache: Memory, inputs_embeds: Tensor | None) -> None:
        """Before anything is stored: a layer that rejects the call cannot undo those below it."""
        weight = self.wte.weight
        check_cache(cache, self.config, weight.dtype, weight.device.type)
        if not isinstance(cache, KVCache) or not torch.is_grad_enabled():
            return
        parts = (self.wte, self.wpe, self.h)
        if (inputs_embeds is not None and inputs_embeds.requires_grad) or any(
            parameter.requires_grad for part in parts for parameter in part.parameters()
        ):
            raise ValueError(NO_GRADIENT)

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


class GPT(Decoder):
    """A GPT: the `Decoder`, and the output matrix `lm_head` that turns its state into logits.

    Parameters are named as in GPT-2's checkpoints (`wte`, `wpe`, `h.0.attn.c_attn`, ..., `ln_f`,
    `lm_head`) and initialised as in GPT-2: normal(0, 0.02), the projections that feed the residual
    stream scaled by 1 / sqrt(2 * n_layer), biases 0.

    Sources: Radford et al. 2018 and 2019; Brown et al. 2020, https://arxiv.org/abs/2005.14165
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.lm_head = torch.nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()
        self.reset_parameters()

    def tie_weights(self) -> None:
        """Make the output matrix the token embedding, if the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.wte.weight

    def reset_parameters(self) -> None:
        """Initialise every parameter as GPT-2 does."""
        self.apply(self.init_module)

    def num_parameters(self) -> int:
        """How many numbers are trained; a tied output matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: Memory | None = None,
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
                `linear_cross_entropy`, which never holds all of large (b, s, vocab_size) logits.

        Returns:
            GPTOutput(logits, loss).

        Raises:
            ValueError: a token id or label outside the vocabulary (checked on CPU tensors, and on
                others with FASTGPT_CHECK=1), more than n_positions tokens, a shape that does not
                fit, a cache that is full, made for another config or asked for gradients, or
                return_logits=False without labels.
            TypeError: input_ids or labels are not integers, attention_mask is a float, or cache is
                no cache or of another dtype.
        """
        if labels is None and not return_logits:
            raise ValueError("return_logits: expected True without labels, got False")
        if labels is not None:
            check_tensor("input_ids", input_ids)
            self.check_labels(labels, input_ids.shape)
        hidden = self.hidden_states(input_ids, attention_mask, cache)
        logits = self.lm_head(hidden) if return_logits else None
        if labels is None:
            return GPTOutput(logits, None)
        return GPTOutput(logits, self.next_token_loss(hidden, logits, labels))

    def next_token_loss(
        self, hidden: Tensor, logits: Tensor | None, labels: Tensor, reduction: str = "mean"
    ) -> Tensor:
        """The cross entropy of each position against the next label; -100 is left out.

        Args:
            hidden: (b, s, n_embd), of which the logits are made here where there are none.
            logits: (b, s, vocab_size), or None: `linear_cross_entropy` makes them in parts.
            labels: (b, s) that pass `check_labels`.
            reduction: "mean", "sum" or "none", the latter (b * s,).
        """
        # Shifting the labels instead of the logits leaves the logits where they are.
        targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        targets = targets.reshape(-1).long()
        if logits is None:
            rows = hidden.reshape(-1, hidden.shape[-1])
            return F.linear_cross_entropy(
                rows, self.lm_head.weight, targets, ignore_index=IGNORE_INDEX, reduction=reduction
            )
        rows = logits.reshape(-1, logits.shape[-1])
        return F.cross_entropy(rows, targets, ignore_index=IGNORE_INDEX, reduction=reduction)

    def new_cache(self, batch: int, capacity: int | None = None) -> KVCache:
        """An empty cache for `batch` rows of up to `capacity` (default n_positions) tokens.

        Its dtype is that in which the model attends: the autocast dtype inside autocast.

        Raises:
            ValueError: batch < 1, or capacity is not in [1, n_positions].
            TypeError: batch or capacity is no int.
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

    def check_labels(self, labels: Tensor, shape: torch.Size) -> None:
        """ValueError or TypeError unless labels fit input_ids of `shape` (b, s); see `forward`."""
        check_tensor("labels", labels)
        if labels.shape != shape:
            raise ValueError(
                f"labels: expected the shape of input_ids {tuple(shape)}, got {tuple(labels.shape)}"
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
