"""Accelerate, under our slot: samples counted once, full state dicts, DeepSpeed on CPU, refusals before training.

Every patch asks :func:`tp_plugin.integrations.accelerate.degree.tp_size` first and is the original where it is 1, but
``randomness``, which asks whether the shape has changed.
"""

from tp_plugin.integrations.accelerate import collect, counting, cpu, dispatch, export, mesh, randomness, refuse
from tp_plugin.integrations.contract import Patches

_PATCHES = Patches()
_PARTS = (collect, counting, cpu, dispatch, export, mesh, randomness, refuse)


def install() -> None:
    """Lay our patches on accelerate; calling it again does nothing. Raises TensorParallelError if a name has moved."""
    if _PATCHES:
        return
    check_contracts()
    for part in _PARTS:
        part.install(_PATCHES)


def uninstall() -> None:
    """Take them off again."""
    _PATCHES.undo()


def check_contracts() -> None:
    """Every name of accelerate this package touches, checked. Raises TensorParallelError naming what moved."""
    for part in _PARTS:
        part.check_contracts()


__all__ = ["check_contracts", "install", "uninstall"]
