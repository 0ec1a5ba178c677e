"""TRL, under our slot: its fused language-model head over a sharded vocabulary, and trainers that were not shown right
refused. TRL is optional and slow to import, so its modules are patched when somebody imports them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.contract import Patches, out_of_range
from tp_plugin.integrations.late import AfterImport, Lay
from tp_plugin.integrations.trl import head, trainers

_PATCHES = Patches()
_PARTS = (head, trainers)
_WAITING: AfterImport | None = None


def install() -> None:
    """Patch TRL now or as soon as it is imported; calling it again does nothing.

    Raises TensorParallelError, or lets the import raise it, if a name has moved or the version is none we know.
    """
    global _WAITING
    if _WAITING is None:
        _WAITING = AfterImport({part.MODULE: _laying(part) for part in _PARTS})
        _WAITING.install()


def uninstall() -> None:
    """Take the patches off again and wait for no further import."""
    global _WAITING
    if _WAITING is not None:
        _WAITING.uninstall()
        _WAITING = None
    _PATCHES.undo()


def check_contracts() -> None:
    """Every name of TRL this package touches, checked; imports TRL. Raises TensorParallelError naming what moved."""
    import importlib

    for part in _PARTS:
        part.check_contracts(importlib.import_module(part.MODULE))


def _laying(part: Any) -> Lay:
    def lay(module: ModuleType) -> None:
        if error := out_of_range("trl", extra="trl"):
            raise TensorParallelError(error)
        part.check_contracts(module)
        part.install(_PATCHES, module)

    return lay


__all__ = ["check_contracts", "install", "uninstall"]
