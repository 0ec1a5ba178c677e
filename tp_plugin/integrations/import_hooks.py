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


class _Waiting(importlib.abc.MetaPathFinder):
    """A finder that is told when the imports it waits for begin and end.

    A module has its own loader again when its import begins, so nothing of ours remains in it.
    """

    def waits_for(self, name: str) -> bool:
        """Return True for a module whose import it is told of."""
        raise NotImplementedError

    def begin(self) -> None:
        """Take note of an import that begins."""

    def end(self, name: str, module: ModuleType, failed: bool) -> None:
        """Take note of an import that ends; it raises the errors of this."""
        raise NotImplementedError

    def install(self) -> None:
        """Wait from now on."""
        sys.meta_path.insert(0, self)

    def uninstall(self) -> None:
        """Stop waiting."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the other finders' spec with its loader wrapped; None for modules it does not wait for."""
        if not self.waits_for(fullname):
            return None
        # the finders before this one have found nothing, or have asked it
        later = sys.meta_path[sys.meta_path.index(self) + 1 :] if self in sys.meta_path else sys.meta_path
        finders = (other for other in later if hasattr(other, "find_spec"))
        spec = next((found for other in finders if (found := other.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self, fullname)
        return spec


class _Loader(importlib.abc.Loader):
    """A loader that says when an import begins and ends."""

    def __init__(self, loader: Any, waiting: _Waiting, name: str) -> None:
        self._loader, self._waiting, self._name = loader, waiting, name

    def __getattr__(self, name: str) -> Any:  # get_source and the like
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._waiting.begin()
        try:
            self._loader.exec_module(module)
        except BaseException:
            self._waiting.end(self._name, module, failed=True)
            raise
        self._waiting.end(self._name, module, failed=False)


class AfterImport(_Waiting):
    """Calls the function in ``wanted`` of each module, once, as soon as that has been imported."""

    def __init__(self, wanted: dict[str, Lay]) -> None:
        self.wanted = dict(wanted)

    def install(self) -> None:
        """Call the functions of modules already imported, and wait for the others."""
        for name in [name for name in self.wanted if name in sys.modules]:
            self.wanted.pop(name)(sys.modules[name])
        super().install()

    def waits_for(self, name: str) -> bool:
        """Return True for a module whose function was not called yet."""
        return name in self.wanted

    def end(self, name: str, module: ModuleType, failed: bool) -> None:
        """Call the function of a module that was imported."""
        lay = None if failed else self.wanted.pop(name, None)
        if lay is not None:
            lay(module)


class BetweenImports(_Waiting):
    """Calls a function once: one of ``modules`` has been imported and no import of ``packages`` is under way.

    A library whose import is half done lacks names that a patch needs.
    """

    def __init__(self, modules: Collection[str], packages: Collection[str], call: Callable[[], None]) -> None:
        self._modules, self._packages, self._call = frozenset(modules), frozenset(packages), call
        self._depth, self._imported, self._lock = 0, False, threading.Lock()

    def waits_for(self, name: str) -> bool:
        """Return True for a module of ``packages``."""
        return name.partition(".")[0] in self._packages

    def begin(self) -> None:
        """Count an import that begins."""
        with self._lock:
            self._depth += 1

    def end(self, name: str, module: ModuleType, failed: bool) -> None:
        """Count an import that has ended, and call the function if it was the outermost."""
        with self._lock:
            self._depth -= 1
            self._imported |= name in self._modules and not failed
            due = self._imported and not self._depth and not failed and self in sys.meta_path
            if due:
                self.uninstall()
        if due:
            self._call()


def waiting() -> list[BetweenImports]:
    """Return the hooks that have not called their function yet."""
    return [finder for finder in sys.meta_path if isinstance(finder, BetweenImports)]
