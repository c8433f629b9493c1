"""Act when a module of another package is imported, without importing it ourselves.

`import fastgpt` must stay cheap where transformers is not used, and yet the name "fastgpt" must be
known to transformers whichever of the two is imported first.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Action = Callable[[ModuleType], object]


class _Announcing(Loader):
    """A loader that announces its module once it is complete."""

    def __init__(self, loader: Loader, announce: Action) -> None:
        self.loader, self.announce = loader, announce

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.announce(module)


class _Finder(MetaPathFinder):
    """Finds the awaited modules by the other finders, and gives them an announcing loader."""

    def __init__(self) -> None:
        self.awaited: dict[str, list[Action]] = {}
        self.asking: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.awaited or name in self.asking:
            return None
        self.asking.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.asking.remove(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Announcing(spec.loader, self.announce)
        return spec

    def announce(self, module: ModuleType) -> None:
        for action in self.awaited.pop(module.__name__, ()):
            action(module)


_FINDER = _Finder()


def on_import(name: str, action: Action) -> None:
    """Call `action(module)` now if module `name` is imported already, else right after it is."""
    module = sys.modules.get(name)
    if module is not None:
        action(module)
        return
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    _FINDER.awaited.setdefault(name, []).append(action)
