"""Patches on an optional library: laid when its module is imported, which may be before us, after us or never.

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
    """Calls a function with a module as soon as that has been imported; once, for each of ``wanted``.

    What the function raises is raised by the import.
    """

    def __init__(self, wanted: dict[str, Lay]) -> None:
        self.wanted = dict(wanted)

    def install(self) -> None:
        """Serve what is imported already, and wait for the rest."""
        for name in [name for name in self.wanted if name in sys.modules]:
            self.wanted.pop(name)(sys.modules[name])
        sys.meta_path.insert(0, self)

    def uninstall(self) -> None:
        """Wait no longer."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec that the other finders find, its loader wrapped; None for modules nobody waits for."""
        lay = self.wanted.get(fullname)
        if lay is None:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self, fullname)
        return spec


class _Loader(importlib.abc.Loader):
    """Another's loader, and what is to be done after it."""

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
