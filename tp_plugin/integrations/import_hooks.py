"""Functions called when modules of other libraries have been imported.

- Patches of an optional library are applied when its module is imported: before us, after us or never. Importing such
  a library only to patch it would cost every user seconds.
- A process that tp_plugin was asked into by a variable registers when its program has imported what it trains with.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Callable, Collection, Sequence
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
        spec = _found_by_others(self, fullname, path, target)
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


class BetweenImports(importlib.abc.MetaPathFinder):
    """Calls a function once: one of ``modules`` has been imported and no import of ``packages`` is under way.

    A library whose import is half done lacks names that a patch needs. Each module has its own loader again when its
    import begins, so nothing of ours remains in it.
    """

    def __init__(self, modules: Collection[str], packages: Collection[str], call: Callable[[], None]) -> None:
        self._modules, self._packages, self._call = frozenset(modules), frozenset(packages), call
        self._depth, self._imported, self._lock = 0, False, threading.Lock()

    def install(self) -> None:
        """Wait from now on; modules that are imported already do not count."""
        sys.meta_path.insert(0, self)

    def uninstall(self) -> None:
        """Stop waiting."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The other finders' spec with its loader wrapped; None for modules outside ``packages``."""
        if fullname.partition(".")[0] not in self._packages:
            return None
        spec = _found_by_others(self, fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _CountingLoader(spec.loader, self)
        return spec

    def begin(self) -> None:
        """Count an import that begins."""
        with self._lock:
            self._depth += 1

    def end(self, name: str, failed: bool) -> None:
        """Count an import that has ended, and call the function if it was the outermost."""
        with self._lock:
            self._depth -= 1
            self._imported |= name in self._modules and not failed
            due = self._imported and not self._depth and not failed and self in sys.meta_path
            if due:
                self.uninstall()
        if due:
            self._call()


class _CountingLoader(importlib.abc.Loader):
    """A loader that says when an import begins and ends."""

    def __init__(self, loader: Any, waiting: BetweenImports) -> None:
        self._loader, self._waiting = loader, waiting

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._waiting.begin()
        failed = True
        try:
            self._loader.exec_module(module)
            failed = False
        finally:
            self._waiting.end(module.__name__, failed)


def _found_by_others(
    finder: Any, fullname: str, path: Sequence[str] | None, target: ModuleType | None
) -> importlib.machinery.ModuleSpec | None:
    """Return what the finders after ``finder`` find; those before it have found nothing, or have asked it."""
    later = sys.meta_path[sys.meta_path.index(finder) + 1 :] if finder in sys.meta_path else sys.meta_path
    finders = (other for other in later if hasattr(other, "find_spec"))
    return next((found for other in finders if (found := other.find_spec(fullname, path, target))), None)
