"""transformers' models on our attention: what is registered, what is swapped, what is set.

Attention reaches a model in one of two ways. Models on AttentionInterface look up the function of
their configuration's `attn_implementation`. The others look up a class in a table of their own file
when they are built, and are live modules of that class afterwards.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils, modeling_utils

from fastgpt import functional as F
from fastgpt.integrate.attention import NAME, WEIGHTS, fastgpt_attention
from fastgpt.integrate.masks import fastgpt_mask
from fastgpt.integrate.replace import Entry, Step, name_of, remember, swap, wrapped

_MODELS = "transformers.models"

CLASS_TABLES = {
    f"{_MODELS}.gpt_neo.modeling_gpt_neo": (
        "GPT_NEO_ATTENTION_CLASSES",
        "fastgpt.integrate.gpt_neo",
        "FastGPTNeoSelfAttention",
    ),
    f"{_MODELS}.gptj.modeling_gptj": (
        "GPTJ_ATTENTION_CLASSES",
        "fastgpt.integrate.gptj",
        "FastGPTJAttention",
    ),
    f"{_MODELS}.bert.modeling_bert": (
        "BERT_SELF_ATTENTION_CLASSES",
        "fastgpt.integrate.bert",
        "FastBertSelfAttention",
    ),
}
"""A model's file -> its table of attention classes (where the version has it), our class for it."""

KEEP_THE_QUESTION = {
    f"{_MODELS}.gpt2.modeling_gpt2": "GPT2Attention",
    f"{_MODELS}.opt.modeling_opt": "OPTAttention",
    f"{_MODELS}.gpt_neox.modeling_gpt_neox": "GPTNeoXAttention",
}
"""Attention classes that do not tell the attention function that their weights are asked for."""

BUILD_THEIR_MASK = {
    f"{_MODELS}.gpt_neo.modeling_gpt_neo": "GPTNeoModel",
    f"{_MODELS}.gptj.modeling_gptj": "GPTJModel",
    f"{_MODELS}.opt.modeling_opt": "OPTDecoder",
}
"""Classes that, in transformers 4, make their masks without AttentionMaskInterface."""


def register() -> None:
    """Make attn_implementation="fastgpt" known to transformers."""
    modeling_utils.AttentionInterface.register(NAME, fastgpt_attention)
    masking_utils.AttentionMaskInterface.register(NAME, fastgpt_mask)


def adapt(file: ModuleType) -> None:
    """Make it known to the file of a model that has not learnt it from there."""
    name = file.__name__
    if name in CLASS_TABLES:
        table = getattr(file, CLASS_TABLES[name][0], None)
        if table is not None:
            table[NAME] = _our_class(name)
    if name in KEEP_THE_QUESTION:
        _hand_on_the_question(getattr(file, KEEP_THE_QUESTION[name]))
    if name in BUILD_THEIR_MASK:
        _build_small_masks(getattr(file, BUILD_THEIR_MASK[name]))


def _our_class(file: str) -> type[torch.nn.Module]:
    _, room, name = CLASS_TABLES[file]
    cls: type[torch.nn.Module] = getattr(importlib.import_module(room), name)
    return cls


def _hand_on_the_question(cls: Any) -> None:
    forward = cls.forward

    @functools.wraps(forward)
    def handing_on(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("output_attentions") and self.config._attn_implementation == NAME:
            kwargs[WEIGHTS] = True
        return forward(self, *args, **kwargs)

    cls.forward = handing_on


def _build_small_masks(cls: Any) -> None:
    build = getattr(cls, "_update_causal_mask", None)
    if build is None:
        return

    @functools.wraps(build)
    def build_small(
        self: Any,
        attention_mask: Tensor | None,
        input_tensor: Tensor,
        cache_position: Tensor,
        past_key_values: Any,
        output_attentions: bool = False,
    ) -> Any:
        given = (attention_mask, input_tensor, cache_position, past_key_values)
        if self.config._attn_implementation != NAME:
            return build(self, *given, output_attentions)
        return masking_utils.create_causal_mask(
            self.config, input_tensor, attention_mask, cache_position, past_key_values
        )

    cls._update_causal_mask = build_small
    # With a static cache, generate makes the mask ahead of the model: but the (b, 1, q, kv) mask of
    # this function does not say where the queries stand, and a window must know.
    prepare = cls._prepare_4d_causal_attention_mask_with_cache_position

    @functools.wraps(prepare)
    def prepare_small(self: Any, attention_mask: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        small = attention_mask is not None and attention_mask.dim() == 2
        if small and self.config._attn_implementation == NAME:
            return attention_mask
        return prepare(attention_mask, *args, **kwargs)

    cls._prepare_4d_causal_attention_mask_with_cache_position = prepare_small


def steps(model: torch.nn.Module, kinds: Sequence[str]) -> Iterable[Step]:
    """What `replace_layers` does to the models of transformers inside of `model`."""
    names = {id(module): name for name, module in model.named_modules()}
    theirs = [m for m in model.modules() if isinstance(m, modeling_utils.PreTrainedModel)]
    if "attention" in kinds:
        seen: set[int] = set()
        for each in theirs:
            if id(each.config) not in seen:
                seen.add(id(each.config))
                yield from _attention_steps(model, each, names)
    if "loss" in kinds:
        for each in theirs:
            yield from _loss_steps(each, names[id(each)])


def _attention_steps(root: torch.nn.Module, model: Any, names: dict[int, str]) -> Iterable[Step]:
    """Those of the attention modules that read `model.config`."""
    before = str(model.config._attn_implementation)
    modules = [
        m
        for m in model.modules()
        if m.__dict__.get("config") is model.config and "is_causal" in m.__dict__
    ]
    swapped = [m for m in _of_class_tables(model) if _configuration_of(m, model) is model.config]
    to_set = functools.partial(_set_implementation, root, model)
    name = names[id(model)]
    if swapped:
        file = _file_of(swapped[0])
        ours = _our_class(file)
        for i, module in enumerate(swapped):
            was, why = name_of(type(module)), wrapped(module)
            entry = Entry(names[id(module)], "attention", was, None if why else name_of(ours), why)
            if isinstance(module, ours):
                yield Step(Entry(entry.module, "attention", was, was, "it was already"))
            elif why:
                yield Step(entry)
            else:
                yield Step(entry, _both(to_set if i == 0 else None, swap(module, ours)))
    elif before == NAME:
        for module in modules:
            was = f"{type(module).__name__} ({NAME})"
            yield Step(Entry(names[id(module)], "attention", was, was, "it was already"))
    elif modules and model._can_set_attn_implementation():
        for i, module in enumerate(modules):
            cls = type(module).__name__
            entry = Entry(names[id(module)], "attention", f"{cls} ({before})", f"{cls} ({NAME})")
            yield Step(entry, to_set if i == 0 else None)
    elif _attends(model):
        why = "its attention is neither on transformers' AttentionInterface nor known to fastgpt"
        yield Step(Entry(name, "attention", f"{type(model).__name__} ({before})", None, why))


def _of_class_tables(model: torch.nn.Module) -> list[Any]:
    """The attention modules of `model` whose class a table of their file decides."""
    bases = tuple(
        base
        for file, (table, _, _) in CLASS_TABLES.items()
        if file in sys.modules and (classes := getattr(sys.modules[file], table, None)) is not None
        for base in (classes["eager"],)
    )
    return [m for m in model.modules() if isinstance(m, bases)]


def _configuration_of(module: torch.nn.Module, model: Any) -> Any:
    """That of the module, or where it keeps none of the innermost model around it."""
    found = module.__dict__.get("config")
    if found is not None:
        return found
    around = [
        m
        for m in model.modules()
        if isinstance(m, modeling_utils.PreTrainedModel) and any(x is module for x in m.modules())
    ]
    return around[-1].config  # in the order of modules(), an outer one comes first


def _file_of(module: torch.nn.Module) -> str:
    return next(base.__module__ for base in type(module).__mro__ if base.__module__ in CLASS_TABLES)


def _attends(model: torch.nn.Module) -> bool:
    return any("Attention" in type(m).__name__ for m in model.modules())


def _both(first: Callable[[], object] | None, second: Callable[[], object]) -> Callable[[], object]:
    def act() -> None:
        if first is not None:
            first()
        second()

    return act


def _set_implementation(root: torch.nn.Module, model: Any) -> None:
    """Set the implementation in a configuration that no other model reads."""
    _own_configuration(root, model)
    remember(model, "config._attn_implementation_internal", NAME)
    # BERT of transformers 4 keeps the name by which it chooses its masks.
    for module in model.modules():
        if "attn_implementation" in module.__dict__ and module.config is model.config:
            remember(module, "attn_implementation", NAME)


_OWNED = "_fastgpt_owned"


def _own_configuration(root: torch.nn.Module, model: Any) -> None:
    """Give all of `root` that reads the configuration of `model` a copy of it and of its parts."""
    tops = [
        m
        for m in root.modules()
        if isinstance(m, modeling_utils.PreTrainedModel) and _contains(m.config, model.config)
    ]
    whole = tops[0].config
    if whole.__dict__.get(_OWNED):
        return
    mine = copy.deepcopy(whole)
    new = {id(old): fresh for old, fresh in zip(_parts(whole), _parts(mine), strict=True)}
    mine.__dict__[_OWNED] = True
    for module in root.modules():
        fresh = new.get(id(module.__dict__.get("config")))
        if fresh is not None:
            module.config = fresh


def _parts(config: Any) -> list[Any]:
    """A configuration and all configurations inside of it, in a fixed order."""
    parts = [config]
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None:
            parts += _parts(part)
    return parts


def _contains(config: Any, part: Any) -> bool:
    return any(each is part for each in _parts(config))


def _loss_steps(model: Any, name: str) -> Iterable[Step]:
    """The loss of a language model; that of a handful of classes has nothing to gain."""
    ours = name_of_function(causal_lm_loss)
    if model.__dict__.get("_loss_function") is causal_lm_loss:
        yield Step(Entry(name, "loss", ours, ours, "it was already"))
    elif _computes_lm_loss(model):
        entry = Entry(name, "loss", "ForCausalLMLoss", ours)
        yield Step(entry, lambda: remember(model, "_loss_function", causal_lm_loss))


def _computes_lm_loss(model: Any) -> bool:
    return (
        getattr(model, "loss_type", None) in (None, "ForCausalLM")
        and "_loss_function" not in model.__dict__
        and model.get_output_embeddings() is not None
        and "loss_function" in _source_of(type(model).forward)
    )


def name_of_function(function: Callable[..., Any]) -> str:
    """A function as the report names it."""
    return f"{function.__module__}.{function.__name__}"


@functools.cache
def _source_of(function: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss on `functional.cross_entropy`.

    Args:
        logits: (b, s, vocab_size), float.
        labels: (b, s) int64: position i is judged on labels[:, i + 1].
        num_items_in_batch: the divisor of the sum, over all micro-batches; None is the mean.
        ignore_index: the label that is left out.
        shift_labels: (b, s), labels that are shifted already.

    Returns:
        A float32 scalar.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    rows = logits.float().view(-1, vocab_size)
    targets = shift_labels.reshape(-1).to(rows.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(rows, targets, ignore_index=ignore_index, reduction=reduction)
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch
