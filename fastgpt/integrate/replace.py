"""replace_layers and restore_layers: the modules of a live model on our kernels, and back.

A module is replaced by giving it a class with another forward, so its parameters, buffers, hooks,
state_dict, dtype, device and mode are what they were. What was before is kept in the module itself,
and travels with copies of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastgpt import nn
from fastgpt.integrate import torch_nn

KINDS = ("attention", "layer_norm", "softmax", "loss")
_WAS = "_fastgpt_was"
_ABSENT = "nothing"


@dataclass(frozen=True)
class Entry:
    """What became of one module.

    Attributes:
        module: its name in the model; "" is the model itself.
        kind: attention, layer_norm, softmax or loss.
        was: what ran before.
        now: what runs now, None if it was left as it was.
        why: why it was left, or what to know; "" where there is nothing to say.
    """

    module: str
    kind: str
    was: str
    now: str | None
    why: str = ""


@dataclass(frozen=True)
class Report:
    """What `replace_layers` did: prints as a table."""

    entries: tuple[Entry, ...]

    @property
    def replaced(self) -> tuple[Entry, ...]:
        """What runs on our kernels now."""
        return tuple(entry for entry in self.entries if entry.now is not None)

    @property
    def left(self) -> tuple[Entry, ...]:
        """What was left as it was, and why."""
        return tuple(entry for entry in self.entries if entry.now is None)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __str__(self) -> str:
        if not self.entries:
            return "nothing in this model is of a kind that fastgpt replaces"
        rows = [("module", "was", "is now, or why not")]
        for e in self.entries:
            now = e.now if e.now is not None else f"left: {e.why}"
            if e.now is not None and e.why:
                now += f" ({e.why})"
            rows.append((e.module or "(the model)", e.was, now))
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]
        lines.insert(1, "-" * max(len(line) for line in lines))
        lines.append(f"{len(self.replaced)} replaced, {len(self.left)} left")
        return "\n".join(lines)


@dataclass(frozen=True)
class Step:
    """One entry of the report and what makes it true."""

    entry: Entry
    act: Callable[[], object] | None = None


def replace_layers(
    model: torch.nn.Module, kinds: Iterable[str] = KINDS, strict: bool = False
) -> Report:
    """Run the layers of a model on fastgpt's kernels, in place.

    Understands torch.nn (LayerNorm, Softmax, CrossEntropyLoss, MultiheadAttention and the
    Transformer layers) and Hugging Face transformers (every model whose attention goes through
    AttentionInterface, GPT-Neo, GPT-J and BERT), by themselves or inside of other modules and
    wrappers (PEFT, DDP). Parameters, buffers, state_dict, hooks, tied weights, dtype, device and
    training mode stay. A Hugging Face model gets a configuration object of its own, so that other
    models built from the same one are not changed.

    Calls that our kernels do not serve (returned attention weights, say) run on what was there
    before, with one warning; `fastgpt.explain(model, ...)` lists them.

    Args:
        model: any torch.nn.Module.
        kinds: what to replace, of "attention", "layer_norm", "softmax", "loss".
        strict: raise, and change nothing, if anything of these kinds cannot be replaced.

    Returns:
        A report that prints as a table: module, was, is now or why not.

    Raises:
        TypeError: model is no module, or kinds is a string or nothing to iterate over.
        ValueError: an unknown kind, or strict and something would be left.
    """
    kinds = _check(model, kinds)
    steps = [*_torch_steps(model, kinds), *_hugging_face_steps(model, kinds)]
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    steps.sort(key=lambda step: order[step.entry.module])
    report = Report(tuple(step.entry for step in steps))
    if strict and report.left:
        raise ValueError(f"strict: not everything of kinds={kinds} is served:\n{report}")
    for step in steps:
        if step.act is not None:
            step.act()
    return report


def restore_layers(model: torch.nn.Module) -> int:
    """Undo `replace_layers`: every module runs what it ran before, bit for bit.

    A Hugging Face model keeps the configuration object that it was given, with what was changed in
    it since.

    Returns:
        How many modules were given back.

    Raises:
        TypeError: model is no module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    count = 0
    for module in model.modules():
        was = module.__dict__.pop(_WAS, None)
        if was is None:
            continue
        count += 1
        for attribute, value in was.items():
            if attribute == "__class__":
                module.__class__ = _as_it_was(type(module), *value)
            elif attribute.startswith("config."):
                setattr(module.config, attribute.removeprefix("config."), value)
            elif value == _ABSENT:
                delattr(module, attribute)
            else:
                setattr(module, attribute, value)
    return count


def remember(module: torch.nn.Module, attribute: str, value: Any) -> None:
    """Set an attribute of a module, or of its configuration ("config.x"), for restore_layers."""
    owner: Any = module
    name = attribute
    if attribute.startswith("config."):
        owner, name = module.config, attribute.removeprefix("config.")
    was = module.__dict__.setdefault(_WAS, {})
    if name == "__class__":
        was.setdefault(attribute, (type(module), value))
    else:
        was.setdefault(attribute, getattr(owner, name, _ABSENT))
    setattr(owner, name, value)


def _as_it_was(cls: type, was: type, ours: type) -> type:
    """What a module's class was: or a class like its own, where something has since subclassed ours
    for it alone, as torch's parametrizations and fully_shard do."""
    if cls is ours:
        return was
    bases = tuple(was if base is ours else base for base in cls.__bases__)
    own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__.replace(ours.__name__, was.__name__), bases, own)


def swap(module: torch.nn.Module, cls: type[torch.nn.Module]) -> Callable[[], object]:
    """The act of giving a module another class."""
    return lambda: remember(module, "__class__", cls)


def name_of(cls: type) -> str:
    """A class as the report names it: torch.nn.LayerNorm, fastgpt.nn.LayerNorm, GPT2Attention."""
    room = "torch.nn" if cls.__module__.startswith("torch.nn.") else cls.__module__
    return f"{room}.{cls.__name__}" if room in ("torch.nn", "fastgpt.nn") else cls.__name__


def wrapped(module: torch.nn.Module) -> str:
    """Why a module's class cannot decide what it runs; "" if it can."""
    if "forward" in module.__dict__:
        return "its forward is wrapped (by accelerate's hooks, say): replace before wrapping"
    return ""


def _check(model: torch.nn.Module, kinds: Iterable[str]) -> tuple[str, ...]:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(kinds, str):
        raise TypeError(f"kinds: expected a tuple of names, got {kinds!r}; write ({kinds!r},)")
    if not isinstance(kinds, Iterable):
        raise TypeError(f"kinds: expected a tuple of names, got {kinds!r}")
    kinds = tuple(kinds)
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"kinds: expected some of {', '.join(KINDS)}, got {kind!r}")
    return kinds


def _torch_steps(model: torch.nn.Module, kinds: Sequence[str]) -> Iterable[Step]:
    ours = {cls: asked for asked, cls in torch_nn.REPLACEMENTS.values()}
    ours[nn.CausalSelfAttention] = ("attention",)
    for name, module in model.named_modules():
        cls = type(module)
        if cls in torch_nn.REPLACEMENTS:
            asked, new = torch_nn.REPLACEMENTS[cls]
            if not set(asked) & set(kinds):
                continue
            why = wrapped(module) or _left_by_its_state(module)
            if why:
                yield Step(Entry(name, asked[0], name_of(cls), None, why))
            else:
                yield Step(Entry(name, asked[0], name_of(cls), name_of(new)), swap(module, new))
        elif cls in ours:
            asked = ours[cls]
            if set(asked) & set(kinds):
                yield Step(Entry(name, asked[0], name_of(cls), name_of(cls), "it was already"))
        else:
            yield from _near_misses(name, module, kinds)


def _left_by_its_state(module: torch.nn.Module) -> str:
    if isinstance(module, torch.nn.Softmax) and module.dim is None:
        return "dim=None, torch's deprecated choice of a dimension"
    return ""


def _near_misses(name: str, module: torch.nn.Module, kinds: Sequence[str]) -> Iterable[Step]:
    """Modules that a reader would expect to be replaced."""
    cls = type(module)
    if "layer_norm" in kinds and cls.__name__.endswith("RMSNorm"):
        yield Step(Entry(name, "layer_norm", name_of(cls), None, "fastgpt has no RMSNorm"))
        return
    for base, (asked, new) in torch_nn.REPLACEMENTS.items():
        if isinstance(module, base) and not isinstance(module, new) and set(asked) & set(kinds):
            why = f"a subclass of {name_of(base)}, which may have a forward of its own"
            yield Step(Entry(name, asked[0], name_of(cls), None, why))
            return


def _hugging_face_steps(model: torch.nn.Module, kinds: Sequence[str]) -> Iterable[Step]:
    """Those of transformers' models, which there can only be where it is imported."""
    from fastgpt.integrate import hugging_face

    if "transformers.modeling_utils" not in sys.modules or not hugging_face.served():
        return ()
    from fastgpt.integrate.hugging_face import models

    return models.steps(model, kinds)
