"""Patches of an optional library, applied when its module is imported: before us, after us or never.

Importing such a library only to patch it would cost every user seconds.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

Lay = Callable[[ModuleType], None]


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls the function in ``wanted`` of each module, once, as soon as that has been imported.

    The import raises the function's errors.
    """

    def __init__(self, wanted: dict[str, Lay]) -> None:
        self.wanted = dict(wanted)

    def install(self) -> None:
        """Call the functions of modules already imported, and wait for the others."""
        for name in [name for name in self.wanted if name in sys.modules]:
            self.wanted.pop(name)(sys.modules[name])
        sys.meta_path.insert(0, self)

    def uninstall(self) -> None:
        """Stop waiting."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The other finders' spec with its loader wrapped; None for modules not in ``wanted``."""
        lay = self.wanted.get(fullname)
        if lay is None:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self, fullname)
        return spec


class _Loader(importlib.abc.Loader):
    """A loader that calls the function after loading."""

    def __init__(self, loader: Any, waiting: AfterImport, name: str) -> None:
        self._loader, self._waiting, self._name = loader, waiting, name

    def __getattr__(self, name: str) -> Any:  # get_source and the like
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        lay = self._waiting.wanted.pop(self._name, None)
        if lay is not None:
            lay(module)
