"""`fastgpt.GPT` as models of transformers: its generate, Trainer, pipelines, Auto classes, PEFT.

The decoder is `fastgpt.model.GPT`, held as `transformer`; here are its configuration, its caches
and its heads in the terms of transformers.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from fastgpt.integrate.hugging_face.gpt_cache import CacheView
from fastgpt.integrate.hugging_face.gpt_config import FastGPTConfig
from fastgpt.model import GPT, IGNORE_INDEX, Decoder
from fastgpt.ops._checks import host_checks

logger = logging.get_logger(__name__)

# The name of the cache in outputs: "cache" in the newer transformers, which deprecate the other.
_FIELDS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
CACHE = "cache" if "cache" in _FIELDS else "past_key_values"
# What a folder may hold that only another model has a place for.
_HEADS = [r"lm_head\.weight", r"score\.weight"]


@dataclasses.dataclass
class _Body:
    """What the body gives to a head: hidden is (b, s, n_embd)."""

    hidden: Tensor
    cache: Cache | None
    hidden_states: tuple[Tensor, ...] | None


class FastGPTPreTrainedModel(PreTrainedModel):
    """What the FastGPT models share: the body, and what transformers asks of a model."""

    config_class = FastGPTConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderBlock"]  # noqa: RUF012 - lists, as the base class joins them
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    body_class: type[Decoder] = Decoder

    def __init__(self, config: FastGPTConfig) -> None:
        super().__init__(config)
        self.transformer = self.body_class(config.to_gpt_config())
        self.gradient_checkpointing = False

    def get_input_embeddings(self) -> torch.nn.Module:
        """The token embedding."""
        return self.transformer.wte

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        """Put another token embedding in, whose size is the vocabulary's from then on."""
        vocab_size = value.get_parameter("weight").shape[0]
        config = dataclasses.replace(self.transformer.config, vocab_size=vocab_size)
        self.transformer.add_module("wte", value)
        self.transformer.config = config

    def _init_weights(self, module: torch.nn.Module) -> None:
        self.transformer.init_module(module)

    def _body(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        *,
        position_ids: Tensor | None,
        cache: Cache | None,
        past_key_values: Cache | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        output_hidden_states: bool | None,
        output_attentions: bool | None,
        token_type_ids: Tensor | None,
    ) -> _Body:
        """Run the body; the arguments are those of every `forward` here."""
        self._refuse(output_attentions, token_type_ids)
        if cache is not None and past_key_values not in (None, cache):
            raise ValueError("past_key_values: it is another name of cache, got both; give one")
        cache = past_key_values if cache is None else cache
        checkpointed = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if checkpointed and cache is not None:
            raise ValueError(
                "past_key_values: not possible with gradient checkpointing, whose second forward "
                "would extend it again; call model.gradient_checkpointing_disable()"
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        elif use_cache and checkpointed:
            logger.warning_once("use_cache=True: no cache is kept under gradient checkpointing")
            use_cache = False
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        seen: list[Tensor] = []

        def run_block(block: torch.nn.Module, x: Tensor, *arguments: Any) -> Tensor:
            if output_hidden_states:
                seen.append(x)
            if checkpointed:
                return self._gradient_checkpointing_func(block.__call__, x, *arguments)
            return block(x, *arguments)

        tokens = input_ids if inputs_embeds is None else inputs_embeds
        view = CacheView(
            cache,
            self.transformer.config,
            device=tokens.device if isinstance(tokens, Tensor) else self.device,
            position_ids=position_ids,
            dropout_p=self.transformer.config.dropout if self.training else 0.0,
            make_cache=(lambda: DynamicCache(config=self.config)) if use_cache else None,
        )
        hidden = self.transformer.hidden_states(
            input_ids, attention_mask, view, inputs_embeds=inputs_embeds, run_block=run_block
        )
        hidden_states = (*seen, hidden) if output_hidden_states else None
        return _Body(hidden, view.cache if use_cache else None, hidden_states)

    def _output(self, kind: type, body: _Body, return_dict: bool | None, **fields: Any) -> Any:
        """An output of `kind`, or what of it is there as a tuple."""
        output = kind(**fields, **{CACHE: body.cache}, hidden_states=body.hidden_states)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _refuse(self, output_attentions: bool | None, token_type_ids: Tensor | None) -> None:
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError(
                "output_attentions: expected False, a fused kernel never holds the attention "
                "weights; got True"
            )
        if token_type_ids is not None and host_checks("reference", token_type_ids):
            if bool(token_type_ids.any()):
                raise ValueError(
                    "token_type_ids: expected zeros, a GPT has no kinds of tokens, "
                    f"got {int(token_type_ids.max())}"
                )


class FastGPTModel(FastGPTPreTrainedModel):
    """The body alone: hidden states without a head."""

    _keys_to_ignore_on_load_unexpected = _HEADS

    def __init__(self, config: FastGPTConfig) -> None:
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        token_type_ids: Tensor | None = None,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """last_hidden_state (b, s, n_embd); the rest is as in `FastGPTForCausalLM.forward`."""
        body = self._body(
            input_ids,
            attention_mask,
            position_ids=position_ids,
            cache=cache,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            token_type_ids=token_type_ids,
        )
        return self._output(
            BaseModelOutputWithPast, body, return_dict, last_hidden_state=body.hidden
        )


class FastGPTForCausalLM(FastGPTPreTrainedModel, GenerationMixin):
    """`fastgpt.GPT` with the interface of every causal language model of transformers."""

    body_class = GPT
    _tied_weights_keys = {  # noqa: RUF012 - the base class declares it so
        "transformer.lm_head.weight": "transformer.wte.weight"
    }
    accepts_loss_kwargs = True  # the Trainer's num_items_in_batch
    transformer: GPT

    def __init__(self, config: FastGPTConfig) -> None:
        super().__init__(config)
        self.post_init()

    @property
    def lm_head(self) -> torch.nn.Module:
        """The output matrix, which is the GPT's."""
        return self.transformer.lm_head

    def get_output_embeddings(self) -> torch.nn.Module:
        """The output matrix."""
        return self.transformer.lm_head

    def set_output_embeddings(self, new_embeddings: torch.nn.Linear) -> None:
        """Put another output matrix in."""
        self.transformer.lm_head = new_embeddings

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # generate reads its signature
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # The cache gets its older name, the one that PEFT's prompts and prefixes look for.
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if "cache" in inputs:
            inputs["past_key_values"] = inputs.pop("cache")
        return inputs

    @staticmethod
    def create_masks_for_generate(
        *_: Any, attention_mask: Tensor | None = None, **__: Any
    ) -> Tensor | None:
        """The mask as it is: the kernels need none of (s, keys), whatever the cache is."""
        return attention_mask

    def _valid_auto_compile_criteria(self, model_kwargs: Any, generation_config: Any) -> bool:
        # The length of a static cache is read by the host, so that a graph would break at it.
        if generation_config.compile_config is not None:
            logger.warning_once("compile_config: FastGPTForCausalLM.generate does not compile")
        return False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        token_type_ids: Tensor | None = None,
        cache_position: Tensor | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Next-token logits, and the loss against `labels`.

        Args:
            input_ids: (b, s) integers, each in [0, vocab_size).
            attention_mask: (b, past + s), 1 = visible and 0 = hidden, any pattern; past is the
                length of the cache.
            position_ids: (b, s) or (1, s). Default: the visible tokens of a row are counted. Where
                they start again within a row, and nothing is masked or cached, documents are packed
                and see only themselves (known in eager mode only: a graph cannot look).
            cache, past_key_values: two names of the keys and values of the tokens before, a Cache
                of transformers; extended by this call.
            inputs_embeds: (b, s, n_embd) in place of input_ids.
            labels: (b, s), usually input_ids itself: shifted inside; -100 is left out.
            use_cache: return the cache, a new one where none came. Default: the configuration's,
                and never in training.
            logits_to_keep: only the logits of the last so many positions, or of those of an index
                tensor; 0 keeps all.
            output_hidden_states: return what each block read, and what the head reads.
            output_attentions: False; a fused kernel never holds the weights.
            return_dict: False returns a tuple.
            num_items_in_batch: what the summed loss is divided by, where a batch comes in parts;
                default: the labels of this call that count.
            token_type_ids: zeros, which tokenizers may add.
            cache_position: as transformers 4 passes it. A cache knows its length itself.

        Returns:
            CausalLMOutputWithPast. Its loss is float32; logits (b, s, vocab_size) are None in
            training with `config.fused_loss`.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds, an id, label or position out
                of its range (checked on CPU tensors, and on others with FASTGPT_CHECK=1), more than
                n_positions tokens, a shape that does not fit, a cache under gradient checkpointing,
                logits_to_keep with labels, output_attentions, or token_type_ids other than zeros.
            TypeError: ids, labels or positions that are no integers, or a cache of another kind.
        """
        body = self._body(
            input_ids,
            attention_mask,
            position_ids=position_ids,
            cache=cache,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            token_type_ids=token_type_ids,
        )
        hidden, loss = body.hidden, None
        logits: Tensor | None = None
        if labels is None:
            kept = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            )
            logits = self.lm_head(hidden[:, kept])
        else:
            if isinstance(logits_to_keep, Tensor) or logits_to_keep:
                raise ValueError(
                    f"logits_to_keep: expected 0 with labels, whose loss takes every position, "
                    f"got {logits_to_keep}"
                )
            self.transformer.check_labels(labels, hidden.shape[:2])
            # Another layer than ours may be there, as LoRA's, of which the matrix is a part only.
            fused = self.config.fused_loss and type(self.lm_head) is torch.nn.Linear
            if not (fused and self.training):
                logits = self.lm_head(hidden)
            loss = self._loss(hidden, logits, labels.to(hidden.device), num_items_in_batch)
        return self._output(CausalLMOutputWithPast, body, return_dict, loss=loss, logits=logits)

    def _loss(
        self,
        hidden: Tensor,
        logits: Tensor | None,
        labels: Tensor,
        num_items_in_batch: int | Tensor | None,
    ) -> Tensor:
        """The summed loss over what counts, in float32 whatever the logits are."""
        losses = self.transformer.next_token_loss(hidden, logits, labels, reduction="none")
        count = num_items_in_batch
        if count is None:
            count = (labels[:, 1:] != IGNORE_INDEX).sum()
        elif isinstance(count, Tensor):
            count = count.to(losses.device)
        return losses.float().sum() / count


class FastGPTForSequenceClassification(FastGPTPreTrainedModel):
    """The body, and a linear classifier on the last visible token of each row, as GPT-1's.

    Source: Radford et al. 2018, section 3.2
    """

    accepts_loss_kwargs = False
    _keys_to_ignore_on_load_unexpected = _HEADS

    def __init__(self, config: FastGPTConfig) -> None:
        super().__init__(config)
        assert config.num_labels is not None  # the base class always sets it
        self.num_labels = config.num_labels
        self.score = torch.nn.Linear(config.n_embd, self.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        token_type_ids: Tensor | None = None,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Scores of the classes, (b, num_labels), and the loss against `labels`.

        Args:
            attention_mask: as `FastGPTForCausalLM.forward`. Without it, `config.pad_token_id` at
                either end of a row of input_ids is padding.
            labels: (b) integers, or floats where `config.problem_type` is "regression" (b) or
                (b, num_labels), or "multi_label_classification" (b, num_labels). A problem_type of
                None is found from num_labels and the dtype, as all models of transformers do.
            others: as `FastGPTForCausalLM.forward`.

        Returns:
            SequenceClassifierOutputWithPast.

        Raises:
            ValueError: several rows with neither attention_mask nor pad_token_id, a row without a
                visible token, or as `FastGPTForCausalLM.forward`.
            TypeError: as `FastGPTForCausalLM.forward`.
        """
        if attention_mask is None and input_ids is not None:
            attention_mask = self._padding(input_ids)
        body = self._body(
            input_ids,
            attention_mask,
            position_ids=position_ids,
            cache=cache,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            token_type_ids=token_type_ids,
        )
        b, s, _ = body.hidden.shape
        if attention_mask is not None:
            last = _last_visible(attention_mask[:, -s:].to(body.hidden.device))
        elif b == 1:
            last = torch.full((1,), s - 1, device=body.hidden.device)
        else:
            raise ValueError(
                f"attention_mask: needed to find the last token of each of {b} rows; give it, or "
                "input_ids and config.pad_token_id"
            )
        logits = self.score(body.hidden[torch.arange(b, device=last.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                labels=labels, logits=logits, pooled_logits=logits, config=self.config
            )
        return self._output(
            SequenceClassifierOutputWithPast, body, return_dict, loss=loss, logits=logits
        )

    def _padding(self, input_ids: Tensor) -> Tensor | None:
        """The mask (b, s) that hides pad tokens before the first and after the last other token."""
        pad = self.config.pad_token_id
        if pad is None or input_ids.dim() != 2:
            return None
        token = input_ids != pad
        after_first = token.cumsum(1) > 0
        before_last = token.flip(1).cumsum(1).flip(1) > 0
        return after_first & before_last


def _last_visible(attention_mask: Tensor) -> Tensor:
    """The last visible position of each row of a mask (b, s), int64 (b)."""
    visible = attention_mask.bool()
    if host_checks("reference", visible) and not bool(visible.any(1).all()):
        row = int((~visible.any(1)).nonzero()[0])
        raise ValueError(
            f"attention_mask: expected a visible token in every row, got none in row {row}"
        )
    return visible.shape[1] - 1 - visible.flip(1).int().argmax(1)
