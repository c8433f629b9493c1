"""Checkpoint folders: ours, and Hugging Face's of GPT-2 and GPT-Neo.

A folder holds `config.json` and either `model.safetensors` or shards of it with
`model.safetensors.index.json`. Names and shapes are checked against the model before any tensor
is read, and the model is built only from a complete set.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastgpt.config import GPTConfig
from fastgpt.ops._checks import FLOAT_DTYPES

if TYPE_CHECKING:
    from fastgpt.model import GPT

FLOATS = ("F64", "F32", "F16", "BF16")
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MODEL_TYPE = "fastgpt"
_LISTED = 20


def save_pretrained(model: GPT, folder: Path) -> None:
    """Write `model` to `folder` (made if need be) as `config.json` and `model.safetensors`.

    A tied output matrix is stored once, as `wte.weight`. Each file appears only when complete.

    Raises:
        ValueError: `folder` is a file, or the output matrix is not the tied one of the config.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder: expected a folder, got the file {folder}")
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        head = tensors.pop("lm_head.weight", None)
        if head is not None and not _same(head, tensors.get("wte.weight")):
            raise ValueError(
                "lm_head.weight: expected wte.weight, as config.tie_embeddings is True, "
                "got another matrix; call model.tie_weights(), or build the model with "
                "tie_embeddings=False"
            )
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": MODEL_TYPE, **model.config.to_dict()}
    text = json.dumps(config, indent=2) + "\n"
    replace_file(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    replace_file(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))
    # Shards of an earlier checkpoint of this folder would make it ambiguous.
    (folder / INDEX).unlink(missing_ok=True)


def from_pretrained(
    cls: type[GPT], folder: Path, *, dtype: torch.dtype | None, device: torch.device | str
) -> GPT:
    """A model from a checkpoint folder, in eval mode.

    Ours (`save_pretrained`) and Hugging Face's with model_type `gpt2` or `gpt_neo`, whose tensors
    are renamed, transposed or joined as our layout asks. GPT-Neo does not scale its attention
    scores: its configuration has attention_scale = 1.

    Args:
        folder: the checkpoint.
        dtype: of the parameters; None keeps each as it is stored.
        device: where they go.

    Raises:
        ValueError: `folder` is no checkpoint, its configuration is of another kind of model, or
            tensors are missing, misshapen, no floats or unexpected: one message lists them all.
        TypeError: dtype is no floating dtype.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in FLOAT_DTYPES):
        names = ", ".join(str(one) for one in FLOAT_DTYPES)
        raise TypeError(f"dtype: expected None or one of {names}, got {dtype!r}")
    values = _read_config(folder)
    model_type = values.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in _FORMATS:
        raise ValueError(
            f"{folder / CONFIG}: expected model_type {', '.join(_FORMATS)}, got {model_type!r}"
        )
    convert_config, make_plan = _FORMATS[model_type]
    try:
        config = convert_config(values)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{folder / CONFIG}: {reason}") from error

    with torch.device("meta"):
        model = cls(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_embeddings:
        del shapes["lm_head.weight"]
    stored = _stored_tensors(folder)
    plan = make_plan(shapes, stored, config)
    _check(folder, plan, shapes, stored)

    tensors = {}
    for name, recipe in plan.items():
        tensor = recipe.build(shapes[name], [stored[source].read() for source in recipe.sources])
        tensors[name] = tensor.to(device=device, dtype=dtype or tensor.dtype)
    if config.tie_embeddings:
        tensors["lm_head.weight"] = tensors["wte.weight"]
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    return model.eval()


def _same(one: Tensor, other: Tensor | None) -> bool:
    if other is None or (one.dtype, one.device) != (other.dtype, other.device):
        return False
    return one.data_ptr() == other.data_ptr() or torch.equal(one, other)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """What `write` writes becomes the file `path` when it is complete."""
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ValueError(f"folder: expected a checkpoint folder, got {folder}, which is none")
    present = sorted(path.name for path in folder.iterdir())
    if CONFIG not in present:
        raise ValueError(
            f"{folder} is not a checkpoint: expected {CONFIG} and {WEIGHTS} (or {INDEX}), "
            f"got {', '.join(present[:_LISTED]) or 'an empty folder'}"
        )
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: expected JSON, got: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{folder / CONFIG}: expected a JSON object, got {type(values).__name__}")
    return values


@dataclass(frozen=True)
class _Stored:
    """One tensor in a safetensors file: shape and dtype are known, its data not yet read."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.name)


def _stored_tensors(folder: Path) -> dict[str, _Stored]:
    """Every tensor of the folder by name."""
    stored = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    view = file.get_slice(name)
                    shape = tuple(view.get_shape())
                    stored[name] = _Stored(path, name, shape, view.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: expected a safetensors file, got: {error}") from error
    return stored


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        others = sorted(path.name for path in folder.glob("*.bin"))
        hint = f", only {', '.join(others)}, which can run code when loaded" if others else ""
        raise ValueError(f"{folder} is not a checkpoint: no {WEIGHTS} and no {INDEX}{hint}")
    try:
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder / INDEX}: expected a JSON object with weight_map") from error
    outside = sorted(str(name) for name in names if Path(str(name)).name != name)
    if outside:
        raise ValueError(f"{folder / INDEX}: expected file names, got {', '.join(outside)}")
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise ValueError(f"{folder}: missing shards {', '.join(missing)}")
    return [folder / name for name in sorted(names)]


@dataclass(frozen=True)
class _Recipe:
    """How one of our parameters comes from stored tensors: joined along the rows, none is zeros."""

    sources: tuple[str, ...]
    transpose: bool = False

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.transpose:
            return shape[::-1]
        return (shape[0] // max(len(self.sources), 1), *shape[1:])

    def build(self, shape: tuple[int, ...], tensors: list[Tensor]) -> Tensor:
        if not tensors:
            return torch.zeros(shape)
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return tensor.t().contiguous() if self.transpose else tensor


Plan = dict[str, _Recipe]


def _check(
    folder: Path,
    plan: Plan,
    shapes: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, _Stored],
) -> None:
    """One ValueError that lists every tensor that is missing, misshapen, no float, unexpected."""
    missing, misshapen, not_float, used = [], [], [], set()
    for name, recipe in plan.items():
        expected = recipe.source_shape(shapes[name])
        for source in recipe.sources:
            used.add(source)
            if source not in stored:
                missing.append(source)
            elif stored[source].shape != expected:
                misshapen.append(f"{source} (expected {expected}, got {stored[source].shape})")
            elif stored[source].dtype not in FLOATS:
                not_float.append(f"{source} ({stored[source].dtype})")
    unexpected = [name for name in stored if name not in used]
    problems = [
        f"{kind}: {_listed(names)}"
        for kind, names in (
            ("missing", missing),
            ("misshapen", misshapen),
            ("not float", not_float),
            ("unexpected", unexpected),
        )
        if names
    ]
    if problems:
        raise ValueError(f"{folder}: the tensors do not fit the model; " + "; ".join(problems))


def _listed(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(sorted(names)[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _config(values: dict[str, Any]) -> GPTConfig:
    """Ours, or what `fastgpt.FastGPTConfig` wrote: our fields among those of transformers."""
    if "transformers_version" not in values:
        return GPTConfig.from_dict(values)
    tied = values.get("tie_embeddings", True)
    _require(values, "tie_word_embeddings", tied)
    names = {field.name for field in fields(GPTConfig)}
    return GPTConfig.from_dict({name: values[name] for name in values if name in names})


def _plan(shapes: Iterable[str], stored: dict[str, _Stored], config: GPTConfig) -> Plan:
    """Ours, or with the prefix of the models for transformers, under which everything lies."""
    prefix = "transformer." if "transformer.wte.weight" in stored else ""
    return {name: _Recipe((prefix + name,)) for name in shapes}


def _hugging_face_prefix(stored: dict[str, _Stored], tied: bool) -> str:
    """The prefix of the names; drops from `stored` what is no parameter of the model."""
    prefix = "transformer." if any(name.startswith("transformer.") for name in stored) else ""
    constants = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
    for name in [name for name in stored if name.endswith(constants)]:
        del stored[name]
    if tied:
        stored.pop("lm_head.weight", None)
    return prefix


def _plan_gpt2(shapes: Iterable[str], stored: dict[str, _Stored], config: GPTConfig) -> Plan:
    """GPT-2: our names; its Conv1D layers hold their weights as (in, out)."""
    prefix = _hugging_face_prefix(stored, config.tie_embeddings)
    plan = {}
    for name in shapes:
        conv1d = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        source = name if name == "lm_head.weight" else prefix + name
        plan[name] = _Recipe((source,), transpose=conv1d)
    return plan


def _plan_gpt_neo(shapes: Iterable[str], stored: dict[str, _Stored], config: GPTConfig) -> Plan:
    """GPT-Neo: separate query, key and value matrices without a bias."""
    prefix = _hugging_face_prefix(stored, config.tie_embeddings)
    plan = {}
    for name in shapes:
        source = name if name == "lm_head.weight" else prefix + name
        if name.endswith("attn.c_attn.weight"):
            layer = source.removesuffix("c_attn.weight")
            parts = ("q_proj", "k_proj", "v_proj")
            plan[name] = _Recipe(tuple(f"{layer}attention.{part}.weight" for part in parts))
        elif name.endswith("attn.c_attn.bias"):
            plan[name] = _Recipe(())
        else:
            plan[name] = _Recipe((source.replace("attn.c_proj", "attn.attention.out_proj"),))
    return plan


_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
}


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"activation_function: expected one of {', '.join(_ACTIVATIONS)}, got {name!r}"
        )
    return _ACTIVATIONS[name]


def _require(values: Mapping[str, Any], name: str, expected: Any, default: Any = None) -> None:
    """ValueError if a setting that our model does not have is used."""
    got = values.get(name, default)
    if got is not None and got != expected:
        raise ValueError(f"{name}: only {expected!r} is supported, got {got!r}")


def _dropout(values: Mapping[str, Any], names: tuple[str, ...], default: float) -> Any:
    """The one rate of our model, of the several that the configuration could tell apart."""
    rates = [values.get(name, default) for name in names]
    if any(rate != rates[0] for rate in rates):
        got = ", ".join(f"{name} = {rate!r}" for name, rate in zip(names, rates, strict=True))
        raise ValueError(
            f"{', '.join(names)}: expected one rate for all, as GPTConfig.dropout is, got {got}; "
            "write one rate in their place, which changes nothing outside training"
        )
    return rates[0]


def _config_gpt2(values: dict[str, Any]) -> GPTConfig:
    _require(values, "n_inner", 4 * values["n_embd"])
    _require(values, "scale_attn_by_inverse_layer_idx", False)
    _require(values, "add_cross_attention", False)
    return GPTConfig(
        vocab_size=values["vocab_size"],
        n_positions=values["n_positions"],
        n_layer=values["n_layer"],
        n_embd=values["n_embd"],
        n_head=values["n_head"],
        attention_pattern=("dense",),
        dropout=_dropout(values, ("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1),
        layer_norm_eps=values.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=values.get("tie_word_embeddings", True),
        attention_scale=None if values.get("scale_attn_weights", True) else 1.0,
        activation=_activation(values.get("activation_function", "gelu_new")),
    )


def _config_gpt_neo(values: dict[str, Any]) -> GPTConfig:
    _require(values, "intermediate_size", 4 * values["hidden_size"])
    if "attention_layers" in values:
        layers = values["attention_layers"]
    else:
        layers = [
            kind for kinds, n in values["attention_types"] for _ in range(n) for kind in kinds
        ]
    names = {"global": "dense", "local": "banded"}
    unknown = sorted({str(kind) for kind in layers} - set(names))
    if unknown:
        raise ValueError(f"attention_layers: expected global and local, got {', '.join(unknown)}")
    if len(layers) != values["num_layers"]:
        raise ValueError(
            f"attention_layers: expected num_layers = {values['num_layers']} names, "
            f"got {len(layers)}"
        )
    return GPTConfig(
        vocab_size=values["vocab_size"],
        n_positions=values["max_position_embeddings"],
        n_layer=values["num_layers"],
        n_embd=values["hidden_size"],
        n_head=values["num_heads"],
        window=values.get("window_size", 256),
        attention_pattern=tuple(names[kind] for kind in layers),
        dropout=_dropout(values, ("resid_dropout", "embed_dropout", "attention_dropout"), 0.0),
        layer_norm_eps=values.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=values.get("tie_word_embeddings", True),
        attention_scale=1.0,
        activation=_activation(values.get("activation_function", "gelu_new")),
    )


_FORMATS: dict[str, tuple[Callable[..., GPTConfig], Callable[..., Plan]]] = {
    MODEL_TYPE: (_config, _plan),
    "gpt2": (_config_gpt2, _plan_gpt2),
    "gpt_neo": (_config_gpt_neo, _plan_gpt_neo),
}
