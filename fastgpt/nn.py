"""The ops as modules: drop-ins for torch.nn, and the parts of a GPT decoder.

`LayerNorm`, `Softmax`, `CrossEntropyLoss` and `MultiheadAttention` are torch's own classes with
another forward: constructor, attributes, state_dict and repr are torch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as torch_functional
from torch import Tensor
from torch.nn.modules import module as torch_module

from fastgpt import dispatch
from fastgpt import functional as F
from fastgpt.cache import LayerMemory, visible_keys
from fastgpt.config import GPTConfig
from fastgpt.ops._checks import check_float, check_shape, check_tensor

__all__ = [
    "MLP",
    "CausalSelfAttention",
    "CrossEntropyLoss",
    "DecoderBlock",
    "LayerNorm",
    "MultiheadAttention",
    "Softmax",
]


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` on `functional.layer_norm`: (..., *normalized_shape) to the same.

    Source: Ba, Kiros, Hinton 2016, https://arxiv.org/abs/1607.06450
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class Softmax(torch.nn.Softmax):
    """`torch.nn.Softmax` on `functional.softmax`; the deprecated `dim=None` goes to torch."""

    def forward(self, input: Tensor) -> Tensor:
        if self.dim is None:
            dispatch.report_fallback("softmax", "dim is None, torch's deprecated choice of one")
            # Not super(): integrate/kernels_hub binds this forward to instances of torch's class.
            return torch.nn.Softmax.forward(self, input)
        return F.softmax(input, self.dim)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` on `functional.cross_entropy`: (n, v) and int64 (n) to ()."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` on the fused attention, with the same masks and arguments.

    A fused kernel never holds the attention weights, so `need_weights=True` (torch's default)
    runs torch's own forward, as do `add_bias_kv`, `add_zero_attn` and nested tensors; `explain`
    reports it. A query that every mask hides gives 0 here and NaN in torch.

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of `query` over `key` and `value`.

        Args:
            query: (l, n, e), (n, l, e) when batch_first, or (l, e).
            key, value: (s, n, kdim / vdim) in the same order as query.
            key_padding_mask: (n, s), unbatched (s): bool, True = *ignored*, or float, added.
            need_weights: also return the weights, through torch's own slower path.
            attn_mask: (l, s) or (n * h, l, s): bool, True = *hidden*, or float, added.
            average_attn_weights: the weights' mean over the heads instead of each.
            is_causal: attn_mask is the causal mask (alone: apply it, first key to first query).

        Returns:
            (output, weights): output like query; weights None unless asked for, else (n, l, s), or
            (n, h, l, s) when not averaged.

        Raises:
            ValueError: query has neither 2 nor 3 dimensions, or a shape does not fit.
            TypeError: an input is no float tensor, or a mask neither bool nor float.
        """
        self._check(query, key, value, key_padding_mask, attn_mask)
        reason = self._why_torch(query, key, value, need_weights)
        if reason is not None:
            dispatch.report_fallback("multihead_attention", reason)
            return super().forward(
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
        batch_dim = None if query.dim() == 2 else 0 if self.batch_first else 1
        q, k, v = self._heads(query, key, value, batch_dim)
        if key_padding_mask is not None and batch_dim is None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        out = self._attend(q, k, v, key_padding_mask, attn_mask, is_causal)
        out = out.transpose(1, 2).flatten(2)  # (n, l, h * d), no copy
        out = torch_functional.linear(out, self.out_proj.weight, self.out_proj.bias)
        if batch_dim is None:
            return out.squeeze(0), None
        return (out if self.batch_first else out.transpose(0, 1).contiguous()), None

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
    ) -> None:
        """ValueError or TypeError as `forward`; the shapes of nested tensors are torch's matter."""
        inputs = (("query", query), ("key", key), ("value", value))
        for name, tensor in inputs:
            check_tensor(name, tensor)
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is None:
                continue
            check_tensor(name, mask)
            if mask.dtype != torch.bool and not mask.is_floating_point():
                raise TypeError(f"{name}: expected dtype bool or a float, got {mask.dtype}")
        if any(tensor.is_nested for _, tensor in inputs):
            return
        rank = query.dim()
        if rank not in (2, 3):
            raise ValueError(f"query: expected 2 or 3 dimensions, got shape {tuple(query.shape)}")
        for name, tensor in inputs:
            check_float(name, tensor)
            if tensor.dim() != rank:
                raise ValueError(
                    f"{name}: expected {rank} dimensions as query, got shape {tuple(tensor.shape)}"
                )
        at = 1 if rank == 3 and self.batch_first else 0
        sq, sk = query.shape[at], key.shape[at]
        batch = () if rank == 2 else (query.shape[1 - at],)
        lead = "" if rank == 2 else "n, "
        for name, tensor, length, width, axes in (
            ("query", query, sq, self.embed_dim, "l"),
            ("key", key, sk, self.kdim, "s"),
            ("value", value, sk, self.vdim, "s"),
        ):
            if at == 1:
                check_shape(name, tensor, (*batch, length, width), f"(n, {axes}, e)")
            else:
                check_shape(name, tensor, (length, *batch, width), f"({axes}, {lead}e)")
        if key_padding_mask is not None:
            check_shape("key_padding_mask", key_padding_mask, (*batch, sk), f"({lead}s)")
        if attn_mask is not None and attn_mask.dim() == 3:
            heads = self.num_heads * (query.shape[1 - at] if rank == 3 else 1)
            check_shape("attn_mask", attn_mask, (heads, sq, sk), "(n * h, l, s)")
        elif attn_mask is not None:
            check_shape("attn_mask", attn_mask, (sq, sk), "(l, s)")

    def _why_torch(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool
    ) -> str | None:
        if need_weights:
            return "need_weights=True, and a fused kernel never holds the weights"
        if self.bias_k is not None or self.bias_v is not None:
            return "add_bias_kv=True"
        if self.add_zero_attn:
            return "add_zero_attn=True"
        if query.is_nested or key.is_nested or value.is_nested:
            return "nested tensors"
        return None

    def _heads(
        self, query: Tensor, key: Tensor, value: Tensor, batch_dim: int | None
    ) -> tuple[Tensor, ...]:
        """Project and split: each (n, h, l or s, d), views of the projections' outputs."""
        shape = (self.num_heads, self.head_dim)
        bias = self.in_proj_bias
        if self._qkv_same_embed_dim and query is key and key is value:
            packed = torch_functional.linear(query, self.in_proj_weight, bias)
            projected = packed.unflatten(-1, (3, *shape)).unbind(-3)
        else:
            if self._qkv_same_embed_dim:
                weights = self.in_proj_weight.chunk(3)
            else:
                weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            projected = tuple(
                torch_functional.linear(x, w, b).unflatten(-1, shape)
                for x, w, b in zip((query, key, value), weights, biases, strict=True)
            )
        if batch_dim is None:
            return tuple(x.transpose(0, 1).unsqueeze(0) for x in projected)
        if batch_dim == 0:
            return tuple(x.transpose(1, 2) for x in projected)
        return tuple(x.permute(1, 2, 0, 3) for x in projected)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        n, h, sq, _ = q.shape
        sk = k.shape[2]
        dropout_p = self.dropout if self.training else 0.0
        causal = is_causal and sq == sk
        if causal:
            attn_mask = None
        elif is_causal and attn_mask is None:
            attn_mask = torch.ones(sq, sk, dtype=torch.bool, device=q.device).triu(1)
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.reshape(n, h, sq, sk)

        visible = bias = None
        if key_padding_mask is not None:
            if key_padding_mask.dtype == torch.bool:
                visible = ~key_padding_mask
            else:
                bias = key_padding_mask[:, None, None, :]
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            if bias is None:
                seen = ~attn_mask if visible is None else ~attn_mask & visible[:, None, None, :]
                return F.scaled_dot_product_attention(q, k, v, seen, dropout_p)
            attn_mask = torch.zeros_like(attn_mask, dtype=bias.dtype).masked_fill(
                attn_mask, float("-inf")
            )
        if attn_mask is not None:
            bias = attn_mask if bias is None else attn_mask + bias
        return F.attention(
            q,
            k,
            v,
            causal=causal,
            key_padding_mask=visible,
            bias=bias,
            dropout_p=dropout_p,
        )


class CausalSelfAttention(torch.nn.Module):
    """Causal multi-head self-attention of one GPT layer, dense or banded as the config says.

    Parameters: `c_attn` (n_embd to 3 * n_head * head_dim: queries, keys, values) and `c_proj`
    back to n_embd. No tensor is copied between the two projections and the fused kernel.

    Source: Brown et al. 2020, https://arxiv.org/abs/2005.14165; the band: Child et al. 2019,
    https://arxiv.org/abs/1904.10509
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.n_embd, self.n_head, self.head_dim = config.n_embd, config.n_head, config.d_head
        self.window = config.window_of(layer)
        self.scale = config.attention_scale
        self.dropout = config.dropout
        self.c_attn = torch.nn.Linear(config.n_embd, 3 * config.d_attn, bias=config.bias)
        self.c_proj = torch.nn.Linear(config.d_attn, config.n_embd, bias=config.bias)
        self.resid_dropout = torch.nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, cache: LayerMemory | None = None
    ) -> Tensor:
        """(b, s, n_embd) to (b, s, n_embd).

        Args:
            x: (b, s, n_embd), float.
            attention_mask: (b, keys) bool or integer, nonzero = visible; with a cache, keys counts
                the cached ones too, and only left padding is possible.
            cache: the layer's keys and values, extended by this call; the caller advances it
                afterwards (`KVCache.advance`). Inference only.

        Raises:
            ValueError: a shape does not fit, or the cache is full.
            TypeError: x is no float tensor, or attention_mask is one.
        """
        check_hidden(x, self.n_embd)
        b, s, _ = x.shape
        qkv = self.c_attn(x).view(b, s, 3, self.n_head, self.head_dim)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # each (b, h, s, d), a view
        if cache is None:
            out = F.attention(
                q,
                k,
                v,
                window=self.window,
                scale=self.scale,
                key_padding_mask=visible_keys(attention_mask, b, s),
                dropout_p=self.dropout if self.training else 0.0,
            )
        else:
            out = cache.attend(q, k, v, scale=self.scale, attention_mask=attention_mask)
        out = out.transpose(1, 2).reshape(b, s, self.n_head * self.head_dim)
        return self.resid_dropout(self.c_proj(out))

    def extra_repr(self) -> str:
        return f"n_head={self.n_head}, head_dim={self.head_dim}, window={self.window}"


class MLP(torch.nn.Module):
    """The feed-forward half of a block: n_embd to 4 * n_embd, gelu, and back.

    Parameters: `c_fc` and `c_proj`. The bias of `c_fc` is added inside the fused gelu.

    Source: Radford et al. 2019; gelu: Hendrycks, Gimpel 2016, https://arxiv.org/abs/1606.08415
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_embd = config.n_embd
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        self.c_fc = torch.nn.Linear(config.n_embd, config.d_mlp, bias=config.bias)
        self.c_proj = torch.nn.Linear(config.d_mlp, config.n_embd, bias=config.bias)
        self.dropout = torch.nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, cache: LayerMemory | None = None
    ) -> Tensor:
        """(b, s, n_embd) to (b, s, n_embd), each position by itself.

        `attention_mask` and `cache` are accepted as by every layer and change nothing.

        Raises:
            ValueError: x is not (b, s, n_embd).
            TypeError: x is no float tensor.
        """
        check_hidden(x, self.n_embd)
        if type(self.c_fc) is torch.nn.Linear and not _is_watched(self.c_fc):
            hidden = torch_functional.linear(x, self.c_fc.weight)
            hidden = F.bias_gelu(hidden, self.c_fc.bias, self.approximate)
        else:  # wrapped by somebody else, as LoRA does, or watched
            hidden = F.bias_gelu(self.c_fc(x), None, self.approximate)
        return self.dropout(self.c_proj(hidden))


class DecoderBlock(torch.nn.Module):
    """One decoder layer: attention and MLP, each with its residual addition and layer norm.

    norm="pre" (GPT-2, GPT-3): x + attn(ln_1(x)), then x + mlp(ln_2(x)).
    norm="post" (GPT-1): ln_1(x + attn(x)), then ln_2(x + mlp(x)).
    Each residual addition that a layer norm follows inside the block is fused with it.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.post_norm = config.norm == "post"
        self.ln_1 = LayerNorm(config.n_embd, eps=config.layer_norm_eps, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, eps=config.layer_norm_eps, bias=config.bias)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, cache: LayerMemory | None = None
    ) -> Tensor:
        """(b, s, n_embd) to (b, s, n_embd); arguments and errors as `CausalSelfAttention`."""
        if self.post_norm:
            attended = self.attn(x, attention_mask, cache)
            x, _ = add_norm(attended, x, self.ln_1)
            y, _ = add_norm(self.mlp(x), x, self.ln_2)
            return y
        check_hidden(x, self.attn.n_embd)
        attended = self.attn(self.ln_1(x), attention_mask, cache)
        y, x = add_norm(attended, x, self.ln_2)
        return x + self.mlp(y)


def add_norm(x: Tensor, residual: Tensor, norm: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual), in one pass where nobody watches or wraps the norm."""
    if type(norm) is not LayerNorm or _is_watched(norm):
        s = x + residual
        return norm(s), s
    return F.add_layer_norm(x, residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _is_watched(module: torch.nn.Module) -> bool:
    """Whether calling the module does more than its forward: hooks, its own or those of every
    module, or a forward of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
        or "forward" in module.__dict__
    )


def check_hidden(x: Tensor, n_embd: int, *, name: str = "x") -> None:
    """ValueError or TypeError unless x is (b, s, n_embd), float."""
    check_float(name, x)
    if x.dim() != 3 or x.shape[2] != n_embd:
        raise ValueError(f"{name}: expected shape (b, s, {n_embd}), got {tuple(x.shape)}")
