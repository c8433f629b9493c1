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
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils, modeling_utils

from fastgpt import functional as F
from fastgpt import nn
from fastgpt.integrate.hugging_face.attention import CHOSEN_KEYS, NAME, WEIGHTS, fastgpt_attention
from fastgpt.integrate.hugging_face.masks import fastgpt_mask
from fastgpt.integrate.replace import Entry, Step, name_of, remember, swap, wrapped

_MODELS = "transformers.models"

CLASS_TABLES = {
    f"{_MODELS}.gpt_neo.modeling_gpt_neo": (
        "GPT_NEO_ATTENTION_CLASSES",
        "fastgpt.integrate.hugging_face.gpt_neo",
        "FastGPTNeoSelfAttention",
    ),
    f"{_MODELS}.gptj.modeling_gptj": (
        "GPTJ_ATTENTION_CLASSES",
        "fastgpt.integrate.hugging_face.gptj",
        "FastGPTJAttention",
    ),
    f"{_MODELS}.bert.modeling_bert": (
        "BERT_SELF_ATTENTION_CLASSES",
        "fastgpt.integrate.hugging_face.bert",
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
        cls = getattr(file, BUILD_THEIR_MASK[name])
        _build_small_masks(cls)
        if name == f"{_MODELS}.gpt_neo.modeling_gpt_neo":
            _keep_the_padding(cls)


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


def _keep_the_padding(cls: Any) -> None:
    """With a static cache, generate of transformers 4 makes the mask ahead of the model: but the
    (b, 1, q, kv) mask of this function does not say where the queries stand, as a window must know.
    """
    prepare = getattr(cls, "_prepare_4d_causal_attention_mask_with_cache_position", None)
    if prepare is None:
        return

    @functools.wraps(prepare)
    def prepare_small(self: Any, attention_mask: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        small = attention_mask is not None and attention_mask.dim() == 2
        if small and self.config._attn_implementation == NAME:
            return attention_mask
        return prepare(attention_mask, *args, **kwargs)

    cls._prepare_4d_causal_attention_mask_with_cache_position = prepare_small


def steps(model: torch.nn.Module, kinds: Sequence[str]) -> Iterable[Step]:
    """What `replace_layers` does to the models of transformers inside of `model`."""
    for part in _parts_of_models(model):
        if "attention" in kinds:
            yield from _attention_steps(model, part)
        if "loss" in kinds:
            yield from _loss_steps(part.model, part.name)
    if "attention" in kinds:
        yield from _without_a_model(model)


@dataclass(frozen=True)
class Part:
    """A PreTrainedModel and what is in it, but not in another one inside of it: name -> module."""

    name: str
    model: Any
    modules: dict[str, torch.nn.Module]


def _parts_of_models(root: torch.nn.Module) -> list[Part]:
    parts: dict[str, Part] = {}
    around: dict[str, Part] = {}
    for name, module in root.named_modules():
        if isinstance(module, modeling_utils.PreTrainedModel):
            parts[name] = around[name] = Part(name, module, {})
        elif name and (part := around.get(name.rpartition(".")[0])) is not None:
            around[name] = part
            part.modules[name] = module
    return list(parts.values())


def _without_a_model(root: torch.nn.Module) -> Iterable[Step]:
    """Attention modules that were taken out of the model whose masks they read."""
    inside = {id(m) for part in _parts_of_models(root) for m in part.modules.values()}
    for name, module in root.named_modules():
        cls = type(module)
        reads = "config" in module.__dict__ and "is_causal" in module.__dict__
        of_a_model = isinstance(module, _tabled_classes()) or (
            reads and cls.__module__.startswith(f"{_MODELS}.")
        )
        if of_a_model and id(module) not in inside:
            why = "the model that makes its masks is not here: replace its layers instead"
            yield Step(Entry(name, "attention", name_of(cls), None, why))


def _attention_steps(root: torch.nn.Module, part: Part) -> Iterable[Step]:
    model = part.model
    before = str(model.config._attn_implementation)
    tabled = {name: m for name, m in part.modules.items() if isinstance(m, _tabled_classes())}
    reading = {
        name: m
        for name, m in part.modules.items()
        if "config" in m.__dict__ and "is_causal" in m.__dict__ and name not in tabled
    }
    act: Callable[[], object] | None = functools.partial(_set_implementation, root, part)
    # All or none of them: our masks are not those that the model's own classes read.
    why = next(filter(None, map(_why_not, tabled.values())), "")
    for name, module in tabled.items():
        ours = _our_class(_file_of(module))
        was = name_of(type(module))
        if isinstance(module, ours):
            yield Step(Entry(name, "attention", was, was, "it was already"))
        elif why:
            yield Step(Entry(name, "attention", was, None, why))
        else:
            yield Step(Entry(name, "attention", was, name_of(ours)), _both(act, swap(module, ours)))
            act = None
    unserved = _why_unserved(model, reading.values())
    for name, module in reading.items():
        cls = type(module).__name__
        was, now = f"{cls} ({before})", f"{cls} ({NAME})"
        if before == NAME:
            yield Step(Entry(name, "attention", was, was, "it was already"))
        elif not unserved:
            yield Step(Entry(name, "attention", was, now), act)
            act = None
    attends = any(
        "Attention" in type(m).__name__ and not isinstance(m, nn.CausalSelfAttention)
        for m in part.modules.values()
    )
    if attends and not tabled and unserved and before != NAME:
        was = f"{type(model).__name__} ({before})"
        yield Step(Entry(part.name, "attention", was, None, unserved))


def _why_unserved(model: Any, reading: Iterable[torch.nn.Module]) -> str:
    """Why a model that reads its implementation's name must keep the one it has; "" if not."""
    classes = {type(module) for module in reading}
    if not classes or not model._can_set_attn_implementation():
        return "its attention is neither on transformers' AttentionInterface nor known to fastgpt"
    if not model._supports_sdpa:  # what it leaves to the function is then its eager function's
        return "it says that it needs its own attention (_supports_sdpa is False)"
    if any(f" {name}=" in _source_of(cls.forward) for cls in classes for name in CHOSEN_KEYS):
        return "sparse attention, whose keys it chooses"
    return ""


def _why_not(module: torch.nn.Module) -> str:
    """Why a module of a class of a table cannot be given ours; "" if it can."""
    table = getattr(sys.modules[_file_of(module)], CLASS_TABLES[_file_of(module)][0])
    if type(module) not in table.values():
        return f"{name_of(type(module))} may have a forward of its own"
    return wrapped(module)


def _tabled_classes() -> tuple[type, ...]:
    """The attention classes that a table of their file chooses from, of the files in use."""
    return tuple(
        classes["eager"]
        for file, (table, _, _) in CLASS_TABLES.items()
        if (classes := getattr(sys.modules.get(file), table, None)) is not None
    )


def _file_of(module: torch.nn.Module) -> str:
    return next(base.__module__ for base in type(module).__mro__ if base.__module__ in CLASS_TABLES)


def _both(first: Callable[[], object] | None, second: Callable[[], object]) -> Callable[[], object]:
    def act() -> None:
        if first is not None:
            first()
        second()

    return act


def _set_implementation(root: torch.nn.Module, part: Part) -> None:
    """Set the implementation in every configuration that this part reads, and no other model."""
    for module in (part.model, *part.modules.values()):
        config = module.__dict__.get("config")
        if getattr(config, "_attn_implementation_internal", NAME) != NAME:
            _own_configuration(root, config)
            remember(module, "config._attn_implementation_internal", NAME)
        # BERT of transformers 4 keeps the name by which it chooses its masks.
        if "attn_implementation" in module.__dict__:
            remember(module, "attn_implementation", NAME)


_OWNED = "_fastgpt_config"
"""The attribute of a model that holds the configuration that `_own_configuration` made for it."""


def _own_configuration(root: torch.nn.Module, config: Any) -> None:
    """Give all of `root` that reads `config` a copy of it, and of the configuration around it."""
    tops = [m.config for m in root.modules() if isinstance(m, modeling_utils.PreTrainedModel)]
    whole = next((top for top in tops if any(each is config for each in _all_of(top))), config)
    if any(module.__dict__.get(_OWNED) is whole for module in root.modules()):
        return
    mine = copy.deepcopy(whole)
    new = {id(old): fresh for old, fresh in zip(_all_of(whole), _all_of(mine), strict=True)}
    for module in root.modules():
        fresh = new.get(id(module.__dict__.get("config")))
        if fresh is not None:
            module.config = fresh
            if fresh is mine:
                module.__dict__[_OWNED] = mine


def _all_of(config: Any) -> list[Any]:
    """A configuration and all configurations inside of it, in a fixed order."""
    found = [config]
    for name in getattr(config, "sub_configs", {}):
        inside = getattr(config, name, None)
        if inside is not None:
            found += _all_of(inside)
    return found


def _loss_steps(model: Any, name: str) -> Iterable[Step]:
    """The loss of a language model; that of a handful of classes has nothing to gain."""
    ours = "fastgpt.functional.cross_entropy"
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
