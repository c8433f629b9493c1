"""The same decoder on torch's own layers: what `fastgpt demo` and the benchmarks compare with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgpt.config import GPTConfig
from fastgpt.model import GPT, IGNORE_INDEX, GPTOutput


def band_mask(s: int, window: int, device: torch.device | str) -> Tensor:
    """The causal band as torch takes it: a dense bool mask (s, s), True = visible."""
    i, j = torch.arange(s, device=device)[:, None], torch.arange(s, device=device)
    return (j <= i) & (i - j < window)


class _Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = (config.n_head, config.d_head)
        self.scale = config.attention_scale
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.d_attn, bias=config.bias)
        self.c_proj = nn.Linear(config.d_attn, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.c_attn(x).view(b, s, 3, *self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
        )
        return self.resid_dropout(self.c_proj(out.transpose(1, 2).reshape(b, s, -1)))


class _MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        self.c_fc = nn.Linear(config.n_embd, config.d_mlp, bias=config.bias)
        self.c_proj = nn.Linear(config.d_mlp, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate)))


class _Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.post_norm = config.norm == "post"
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps, bias=config.bias)
        self.attn = _Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps, bias=config.bias)
        self.mlp = _MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.post_norm:
            x = self.ln_1(x + self.attn(x, mask))
            return self.ln_2(x + self.mlp(x))
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class TorchGPT(nn.Module):
    """A `GPT` of torch.nn layers and torch.nn.functional, with the same state_dict keys.

    Dense layers take SDPA's causal path; banded ones need a dense (s, s) mask, built once a call
    and shared by the layers.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(_Block(config) for _ in range(config.n_layer))
        self.ln_f: nn.Module = nn.Identity()
        if config.norm == "pre":
            self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.wte.weight

    @classmethod
    def like(cls, model: GPT) -> TorchGPT:
        """The peer of `model`, on a copy of its parameters."""
        weight = model.wte.weight
        peer = cls(model.config).to(device=weight.device, dtype=weight.dtype)
        peer.load_state_dict(model.state_dict())
        return peer.train(model.training)

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, *, return_logits: bool = True
    ) -> GPTOutput:
        """As `GPT.forward` without padding and cache; the logits are always made."""
        _, s = input_ids.shape
        x = self.drop(self.wte(input_ids) + self.wpe(torch.arange(s, device=input_ids.device)))
        windows = [self.config.window_of(layer) for layer in range(self.config.n_layer)]
        masks = {w: band_mask(s, w, x.device) for w in set(windows) if w is not None}
        for block, window in zip(self.h, windows, strict=True):
            x = block(x, None if window is None else masks[window])
        logits = self.lm_head(self.ln_f(x))
        if labels is None:
            return GPTOutput(logits, None)
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).reshape(-1).long()
        loss = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORE_INDEX)
        return GPTOutput(logits if return_logits else None, loss)
